"""max_pool_codes against torch's pooling of floats, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ops import oracle
from ops.backends import NATIVE, Backend
from ptq4cuda import ops
from ptq4cuda.ops import reference

# Windows as torch allows them: kernel, stride, padding, dilation, ceil_mode.
WINDOWS: dict[str, tuple[Any, ...]] = {
    "2": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "3, step 2": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "3, step 1": ((3, 3), (1, 1), (1, 1), (1, 1), False),
    "2, to the end": ((2, 2), (2, 2), (0, 0), (1, 1), True),
    "3, to the end": ((3, 3), (2, 2), (0, 0), (1, 1), True),
    "padded to the end": ((3, 2), (2, 3), (1, 1), (1, 1), True),
    "one beyond the padding": ((2, 2), (3, 3), (1, 1), (1, 1), True),  # torch leaves out what begins in the padding
    "dilated": ((3, 2), (1, 3), (1, 0), (2, 4), False),
    "dilated to the end": ((2, 3), (2, 2), (1, 1), (3, 2), True),
    "a row": ((1, 5), (1, 2), (0, 2), (1, 1), False),
    "steps over": ((1, 1), (3, 2), (0, 0), (1, 1), False),
    "whole": ((13, 11), (1, 1), (0, 0), (1, 1), False),
}


def codes(*shape: int, seed: int = 0) -> Tensor:
    """Random codes, mostly small ones, so that the largest is often the padding's 0 or a neighbour's."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.7, x % 3, x)


def expected(x: Tensor, window: tuple[Any, ...]) -> Tensor:
    return F.max_pool2d(x.float(), *window).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4, 12, 16, 48, 65])
@pytest.mark.parametrize("name", WINDOWS)
def test_pools_as_torch_does(backend: Backend, name: str, channels: int) -> None:
    for layout in ("channels_last", "contiguous", "strided"):
        x = oracle.arrange(codes(2, channels, 13, 11), layout)
        y = backend.max_pool_codes(x, *WINDOWS[name])
        assert oracle.same(y, expected(x, WINDOWS[name]))
        assert y.movedim(1, -1).is_contiguous()


def test_the_larger_of_all_pairs_of_codes(backend: Backend) -> None:
    """The kernels compare bytes of a word at once: no byte may disturb its neighbour."""
    pairs = torch.tensor(list(itertools.product(range(256), range(256))), dtype=torch.uint8)
    first, second = pairs.t().reshape(2, 1, 1, -1)
    for shift in (0, 1):  # against each other's neighbours
        x = torch.cat([first, second.roll(shift, -1)], dim=1)  # [1, 2, 65536]
        x = x.reshape(1, 2, 4096, 16).permute(0, 3, 2, 1)  # 16 channels of 4096 rows of two
        found = backend.max_pool_codes(x, (1, 2), (1, 2), (0, 0), (1, 1), False)
        assert torch.equal(found[..., 0], x.amax(-1))


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_any_alignment(backend: Backend, offset: int) -> None:
    x = codes(2, 16, 5, 6)
    inside, raw = oracle.guarded(tuple(x.shape), torch.uint8, oracle.arrange(x, "channels_last").stride(), offset)
    inside.copy_(x)
    raw[:offset] = 255
    y = backend.max_pool_codes(inside, *WINDOWS["3, step 2"])
    assert oracle.same(y, expected(x, WINDOWS["3, step 2"]))


def test_windows_of_padding_alone_are_zero(backend: Backend) -> None:
    x = torch.full((1, 5, 2, 2), 7, dtype=torch.uint8)
    y = backend.max_pool_codes(x, (2, 2), (1, 1), (4, 5), (1, 1), False)
    padded = F.pad(x.float(), (5, 5, 4, 4))
    assert oracle.same(y, F.max_pool2d(padded, 2, 1).to(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 0, 5, 5)])
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    y = backend.max_pool_codes(torch.empty(shape, dtype=torch.uint8), *WINDOWS["3, step 2"])
    assert (y.shape, y.dtype) == (torch.Size([shape[0], shape[1], 3, 3]), torch.uint8)


def test_long_rows_and_many_of_them(backend: Backend) -> None:
    """More threads than a block has, and more rows than a thread of the CPU takes."""
    for shape in ((1, 64, 3, 300), (5, 3, 700, 3), (2, 1024, 3, 3)):
        x = oracle.arrange(codes(*shape), "channels_last")
        assert oracle.same(backend.max_pool_codes(x, *WINDOWS["3, step 1"]), expected(x, WINDOWS["3, step 1"]))


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ((2,), ((2, 2), (2, 2), (0, 0), (1, 1), False)),
        (((3, 2),), ((3, 2), (3, 2), (0, 0), (1, 1), False)),
        (([3], [2], [1]), ((3, 3), (2, 2), (1, 1), (1, 1), False)),
        (([3, 2], (1, 2), 1, 2, True), ((3, 2), (1, 2), (1, 1), (2, 2), True)),
    ],
)
def test_the_typed_function_takes_what_torch_takes(given: tuple[Any, ...], window: tuple[Any, ...]) -> None:
    x = codes(2, 4, 9, 8)
    assert oracle.same(ops.max_pool_codes(x, *given), reference.max_pool_codes(x, *window))


X = torch.zeros(1, 4, 5, 5, dtype=torch.uint8)
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (X.float(), {}, "x must be a uint8 tensor"),
    (X[0], {}, "x must be a uint8 tensor"),
    (X, {"kernel_size": (0, 2)}, "kernel_size must be two numbers from 1 to 1073741823, got"),
    (X, {"kernel_size": (2, 2, 2)}, "kernel_size must be two numbers"),
    (X, {"stride": (1, 0)}, "stride must be two numbers from 1 to 1073741823, got"),
    (X, {"padding": (-1, 0)}, "padding must be two numbers from 0 to 1073741823, got"),
    (X, {"dilation": (1, 0)}, "dilation must be two numbers from 1 to 1073741823, got"),
    (X, {"kernel_size": (6, 1)}, "is larger than the padded input"),
    (X, {"dilation": (5, 1)}, "is larger than the padded input"),
]


@pytest.mark.parametrize(("x", "wrong", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(x: Tensor, wrong: dict[str, Any], message: str) -> None:
    arguments = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)} | wrong
    with pytest.raises((TypeError, ValueError), match=message):
        ops.max_pool_codes(x, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", NATIVE)
def test_direct_calls_are_checked(request: pytest.FixtureRequest, which: str) -> None:
    backend: Backend = request.getfixturevalue(which)
    for x, wrong, _ in BAD:
        arguments = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)} | wrong
        with pytest.raises(RuntimeError, match="max_pool_codes"):
            backend.max_pool_codes(x, *arguments.values(), False)
