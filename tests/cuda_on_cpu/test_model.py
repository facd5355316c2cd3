"""The execution model of CUDA itself: right kernels compute, wrong ones are caught, also by the sanitizer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ptq4cuda
from cuda_on_cpu import build

PLANTED = build.HERE / "planted.cu"


def run(program: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *cases], text=True, capture_output=True, timeout=60)


@pytest.fixture(scope="session")
def planted(model_cache: Path) -> Path:
    return build.program(model_cache, PLANTED)


@pytest.fixture(scope="session")
def sanitized(model_cache: Path) -> Path:
    return build.program(model_cache, PLANTED, *build.SANITIZE)


def test_shuffles_ballots_barriers_and_shared_memory(planted: Path) -> None:
    values = [i * i % 97 for i in range(192)]
    sums = [sum(values[b : b + 64]) for b in range(0, 192, 64)]
    odd = [sum(values[w + lane] % 2 << lane for lane in range(32)) for w in range(0, 192, 32)]
    found = run(planted, "sum")
    assert found.returncode == 0
    assert [[int(v) for v in line.split()] for line in found.stdout.splitlines()] == [sums, odd]


def test_parts_of_a_warp_and_dynamic_shared_memory(planted: Path) -> None:
    value = []
    for thread in range(64):
        lane, base = thread % 32, thread - thread % 32
        if lane < 16:
            value.append(base + (lane ^ 15))
        else:
            value.append((thread if lane == 16 else thread - 1) + 16)
    shared = [value[thread - thread % 32 + 3] + 1 for thread in range(64)]
    expected = [shared[63 - thread] + value[thread] for thread in range(64)]
    assert [float(v) for v in run(planted, "halves").stdout.split()] == expected


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("returned", r"waits at planted.cu:\d+, thread 5 has returned"),
        ("two_barriers", r"waits at planted.cu:(\d+), thread \d+ waits at planted.cu:(?!\1)\d+"),
        ("lane_missing", r"waits at planted.cu:\d+, thread 9 has returned"),
        ("lane_outside_the_mask", r"reads lane 12, outside the mask at planted.cu:\d+"),
        ("not_in_the_mask", r"thread 0 of block 0 is not in the mask of the warp function at planted.cu:\d+"),
        ("half_a_warp", r"waits at planted.cu:\d+, thread 48 does not exist"),
        ("misaligned_copy", "an asynchronous copy of 16 bytes that are not aligned"),
    ],
)
def test_what_a_device_would_hang_at_is_an_error(planted: Path, case: str, message: str) -> None:
    found = run(planted, case, "sum")
    assert found.returncode == 1
    error, *after = found.stdout.splitlines()
    assert re.search(message, error), error
    assert after == run(planted, "sum").stdout.splitlines()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("too_many_threads", "CUDA error: invalid configuration argument"),
        ("no_threads", "CUDA error: invalid configuration argument"),
        ("flat_block_of_65", "CUDA error: invalid configuration argument"),
        ("no_blocks", "CUDA error: invalid configuration argument"),
        ("shared_without_asking", "CUDA error: invalid argument"),
        ("shared_48_kib", ""),
        ("shared_after_asking", ""),
        ("too_much_shared", "CUDA error: invalid argument"),
        ("static_and_8_kib", ""),
        ("static_and_more_than_8_kib", "CUDA error: invalid argument"),
        ("static_after_asking", ""),
        ("static_and_too_much", "CUDA error: invalid argument"),
    ],
)
def test_launches_that_a_device_refuses(planted: Path, case: str, message: str) -> None:
    found = run(planted, case, "sum")
    assert found.returncode == bool(message)
    assert found.stdout == (f"{message}\n" if message else "") + run(planted, "sum").stdout


def test_the_last_error_is_told_once(planted: Path) -> None:
    invalid = "invalid configuration argument"
    assert run(planted, "error_is_forgotten").stdout == f"{invalid}, {invalid}, no error\n"


def test_asynchronous_copies(planted: Path) -> None:
    expected = []
    for _block in range(2):
        for thread in range(64):
            source = (thread + 32) % 64
            total = 0 if source == 7 else sum(chunk * 64 + source for chunk in range(5))
            expected += [total * factor for factor in (1, 2, 3, 4)]
    assert [int(v) for v in run(planted, "copies").stdout.split()] == expected


@pytest.mark.parametrize(
    "missing", ["wait", "end_of_group", "barrier_after_wait", "barrier_before_copy"], ids=lambda name: name
)
def test_a_copy_is_there_after_its_wait_and_a_barrier(planted: Path, missing: str) -> None:
    found, right = (run(planted, case).stdout.split() for case in (f"missing_{missing}", "copies"))
    assert len(found) == len(right)
    assert found != right


def test_a_missing_barrier_changes_results(planted: Path) -> None:
    values = [int(v) for v in run(planted, "missing_barrier").stdout.split()]
    right = [100 * block + 63 - thread for block in range(2) for thread in range(64)]
    # Half of each block's threads find the other half done: which half depends on the order of the threads.
    wrong = [i for i, (value, expected) in enumerate(zip(values, right, strict=True)) if value != expected]
    assert wrong == [*range(32), *range(64 + 32, 64 + 64)]


@pytest.mark.parametrize("case", ["sum", "halves", "copies", "inside_shared", "inside_global"])
def test_the_sanitizer_accepts_right_kernels(sanitized: Path, planted: Path, case: str) -> None:
    found = run(sanitized, case)
    assert found.returncode == 0, found.stderr
    assert found.stdout == run(planted, case).stdout


@pytest.mark.parametrize(
    ("case", "message", "access"),
    [
        ("beyond_shared", "global-buffer-overflow", "WRITE of size 4"),  # statics of the host
        ("beyond_dynamic_shared", "heap-buffer-overflow", "READ of size 4"),
        ("beyond_global", "heap-buffer-overflow", "WRITE of size 4"),
    ],
)
def test_the_sanitizer_sees_accesses_out_of_bounds(sanitized: Path, case: str, message: str, access: str) -> None:
    found = run(sanitized, case)
    assert found.returncode != 0
    assert message in found.stderr
    assert access in found.stderr
    assert f"{case}_kernel" in found.stderr


@pytest.mark.parametrize("kernels", ["cuda sources", "cpu kernels"])
def test_the_kernels_stay_in_bounds(model_cache: Path, kernels: str) -> None:
    """Every operator on tensors of odd sizes and addresses, and with any arguments, watched by sanitizers."""
    if kernels == "cpu kernels":
        library = build.cpu_library(model_cache, *build.SANITIZE, *build.SANITIZE_UNDEFINED)
    else:
        library = build.library(model_cache, *build.SANITIZE)
    runtimes = [
        subprocess.run([*build.compiler(), f"-print-file-name={name}"], text=True, capture_output=True, check=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    found = subprocess.run(
        [sys.executable, "-m", "cuda_on_cpu.sanitized_ops", str(library)],
        cwd=model_cache,  # not the source folder, which may hold no library
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(runtime.stdout.strip() for runtime in runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "PYTHONPATH": f"{build.HERE.parent}:{Path(ptq4cuda.__file__).parent.parent}",
        },
        text=True,
        capture_output=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.endswith("operator calls, all as the reference\n"), found.stdout
