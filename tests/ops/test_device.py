"""What shows on a device of many multiprocessors: streams, outputs of every size, results that differ between runs.

Convolutions of the same sizes also run in the execution model, on a few multiprocessors and once.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ops import oracle
from ops.backends import CUDA_SOURCES, Backend
from ops.test_conv import Case, channels_last, packed_arguments
from ops.test_torch import OPERATORS, overload, samples
from ptq4cuda.ops.nibbles import Nibbles

REPEATS = 200
MULTIPROCESSORS = 2  # of the model


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_the_current_stream_waits_for_what_comes_before(name: str) -> None:
    """Arguments are written on a side stream, after a long wait: a kernel of another stream would read what was."""
    arguments = samples("channels_last", torch.float32, (4, 6, 32, 32))[name]
    named = arguments[-1] if isinstance(arguments[-1], dict) else {}
    arguments = arguments[: len(arguments) - bool(named)]
    op = overload("ptq4cuda", name)

    def call(*there: Any) -> list[Tensor]:
        out = {key: torch.zeros_like(value, device="cuda") for key, value in named.items()}
        result = op(*there, **out)
        return list(out.values()) or tree_leaves(result)

    there = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    late = [torch.zeros_like(a) if isinstance(a, Tensor) else a for a in there]
    expected = call(*there)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, there, strict=True):
            if isinstance(target, Tensor):
                target.copy_(source)
        found = call(*late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# By how codes are fetched: 16 bytes, words or bytes at a time; of one pixel or of many; with packed codes or without.
PATHS = {
    "vectors": Case(64, 24, kernel=(3, 3), padding=(1, 1)),
    "words": Case(60, 24, kernel=(3, 3), padding=(1, 1)),
    "bytes": Case(3, 70, kernel=(7, 7), padding=(3, 3), bits=8),
    "1x1": Case(512, 64),
    "groups": Case(128, 48, kernel=(3, 3), padding=(1, 1), groups=2),
    "packed vectors": Case(128, 24, kernel=(3, 3), padding=(1, 1)),
    "packed words": Case(72, 24, kernel=(3, 3), padding=(1, 1)),
    "depthwise vectors": Case(32, 32, kernel=(3, 3), padding=(1, 1), groups=32),
    "depthwise bytes": Case(9, 9, kernel=(3, 3), padding=(1, 1), groups=9),
}


@pytest.mark.parametrize("pixels", [8, 40, 70, 140, 270])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("which", CUDA_SOURCES)
def test_every_size_and_path_gives_the_same_every_time(
    request: pytest.FixtureRequest, cpu: Backend, which: str, path: str, pixels: int
) -> None:
    """Output pixels of a multiprocessor decide on tiles and on shares of the sums: few are shared out, many not."""
    backend: Backend = request.getfixturevalue(which)
    if which == "cuda":
        count = torch.cuda.get_device_properties("cuda").multi_processor_count
    else:
        execution_model: ctypes.CDLL = request.getfixturevalue("execution_model")
        count = MULTIPROCESSORS
        execution_model.cuda_on_cpu_use_device(count - 1)
    case = PATHS[path]
    rows = max(1, round((count * pixels) ** 0.5) // 2)
    case = Case(**{**vars(case), "size": (rows, -(-count * pixels // rows)), "batch": 1})
    if path.startswith("packed"):
        x, _, a = packed_arguments(case, "some")
    else:
        x, weight, zeros = case.make()
        a = case.arguments(weight, zeros)
    g = torch.Generator().manual_seed(3)
    scale, zero_point, bits = oracle.quantizer(case.outputs, 5)
    residual = torch.randint(0, 256, (1, case.outputs, *case.size), dtype=torch.uint8, generator=g)
    a |= {"scale": torch.rand(case.outputs, generator=g) * 0.01, "bias": torch.randn(case.outputs, generator=g)}
    a |= {"negative_slope": 0.0, "residual": channels_last(residual)}
    a |= {"residual_scale": scale, "residual_zero_point": zero_point}
    packed = Nibbles.of(bits) if case.groups == 1 else None
    a |= oracle.outputs((scale, zero_point, bits), (scale * 2, zero_point, bits), layouts=(packed, None))
    x = channels_last(x)
    expected = cpu.conv2d_integer(x, *a.values())
    found = backend.conv2d_integer(x, *a.values())
    assert all(map(oracle.same, found, expected))
    assert len(found) == 2
    if which != "cuda":
        return
    there = tree_map_only(Tensor, Tensor.cuda, (x, *a.values()))
    first = torch.ops.ptq4cuda.conv2d_integer(*there)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        again = torch.ops.ptq4cuda.conv2d_integer(*there)
        for a_, b in zip(again, first, strict=True):
            different += (a_ != b).any()
    assert int(different) == 0
