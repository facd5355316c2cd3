"""Compiles CUDA sources as host C++ against the execution model in model/, and the CPU kernels for sanitizers.

Results are kept in a cache folder under the hash of everything that goes into them.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
CSRC = HERE.parent.parent / "csrc"
KERNELS = tuple(sorted((CSRC / "cuda").glob("*.cu")))
CPU_KERNELS = tuple(sorted((CSRC / "cpu").glob("*.cpp")))

SANITIZE = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g1")
_UNDEFINED = "undefined,float-cast-overflow"
SANITIZE_UNDEFINED = (f"-fsanitize={_UNDEFINED}", f"-fno-sanitize-recover={_UNDEFINED}", "-fno-sanitize=vptr")
_FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # vectors are read and written through arrays of their elements, as nvcc allows
    "-fvisibility=hidden",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",  # #pragma unroll
    "-DPTQ4CUDA_ON_CPU",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{MODEL}",
    f"-I{CSRC}",
    *(f"-isystem{path}" for path in cpp_extension.include_paths()),
)


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def library(cache: Path, *flags: str) -> Path:
    """Return the kernels of csrc/cuda as a library that registers them in the namespace ptq4cuda_on_cpu."""
    return _build(cache, "kernels.so", KERNELS, flags, _link())


def cpu_library(cache: Path, *flags: str) -> Path:
    """Return the kernels of csrc/cpu as a library; loaded, they take the place of the installed ones.

    They are not optimized: with sanitizers it takes far longer to compile them than to run them.
    """
    return _build(cache, "cpu.so", CPU_KERNELS, (*flags, "-O0", "-UPTQ4CUDA_ON_CPU", "-Wno-error"), _link())


def _link() -> list[str]:
    paths = cpp_extension.library_paths()
    return [
        "-shared",
        *(f"-L{path}" for path in paths),
        *(f"-Wl,-rpath,{path}" for path in paths),
        "-ltorch_cpu",
        "-ldl",
    ]


def program(cache: Path, source: Path, *flags: str) -> Path:
    """Return an executable of one CUDA source that has a main()."""
    return _build(cache, source.stem, (source,), flags, ["-ldl"])


def _build(cache: Path, name: str, sources: tuple[Path, ...], flags: tuple[str, ...], link: list[str]) -> Path:
    sources = (*sources, MODEL / "model.cpp")
    version = subprocess.run([*compiler(), "--version"], text=True, capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((version, torch.__version__, _FLAGS, flags, link)).encode())
    headers = [path for folder in (CSRC, MODEL) for path in folder.rglob("*.*h")]
    for path in sorted({*sources, *headers}):
        digest.update(path.read_bytes())
    folder = cache / digest.hexdigest()[:16]
    result = folder / name
    if result.exists():
        return result

    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.name}.{os.getpid()}.o" for source in sources]

    def compile_source(source: Path, to: Path) -> None:
        _run([*compiler(), *_FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(to)])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_source, sources, objects))
    unfinished = result.with_suffix(f".{os.getpid()}")
    _run([*compiler(), *flags, *map(str, objects), *link, "-o", str(unfinished)])
    unfinished.rename(result)  # in one step: another process may build the same
    for path in objects:
        path.unlink()
    return result


def _run(command: list[str]) -> None:
    run = subprocess.run(command, text=True, capture_output=True)
    assert run.returncode == 0, f"{shlex.join(command)}\n{run.stderr}"
