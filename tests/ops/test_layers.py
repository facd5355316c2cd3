"""run_layers: steps that it joins or computes in a way of its own give what their operators give one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptq4cuda import _native
from ptq4cuda.ops import panels
from ptq4cuda.ops.layers import Code

pytestmark = pytest.mark.skipif(not _native.cpu_loaded, reason="there is no native library")
OP = torch.ops.ptq4cuda

# Kernel, stride, padding, dilation of a convolution: those of a pooling, and whether it goes to the end.
STEMS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "7 and 3": ((7, 2, 3, 1), (3, 2, 1, 1, False)),
    "3 and 2": ((3, 1, 1, 1), (2, 2, 0, 1, False)),
    "1 and 3, to the end": ((1, 1, 0, 1), (3, 2, 0, 1, True)),
    "5 and all rows": ((5, 1, 0, 1), (3, 1, 1, 1, False)),
    "rows that nobody reads": ((3, 1, 2, 2), (2, 3, 0, 1, True)),
    "far apart": ((3, 2, 1, 1), (3, 1, 1, 3, False)),
}


def quantizers(count: int, channels: int, g: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    def whole(most: int) -> Tensor:
        return torch.randint(0, most, (channels,), generator=g)

    return [
        (torch.rand(channels, generator=g) + 0.05, whole(9).to(torch.int32), (whole(6) + 3).to(torch.uint8))
        for _ in range(count)
    ]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", STEMS)
def test_poolings_of_what_was_just_made(name: str, threads: int) -> None:
    (k, s, p, d), (*pair, to_the_end) = STEMS[name]
    names = ("kernel_size", "stride", "padding", "dilation")
    window: dict[str, Any] = {at: (n, n) for at, n in zip(names, pair, strict=True)} | {"ceil_mode": to_the_end}
    g, before = torch.Generator().manual_seed(len(name)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number, (channels, outputs, *size) in enumerate(
            ((3, 20, 57, 33), (3, 64, 30, 31), (16, 33, 23, 40), (64, 48, 40, 37))
        ):
            x = torch.randint(0, 256, (3, channels, *size), dtype=torch.uint8, generator=g)
            x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.randint(-8, 8, (outputs, k, k, channels), dtype=torch.int8, generator=g)
            for how in ("one", "two", "two, the second first", "one of two", "one, returned", "two, one returned"):
                codes = quantizers(1 + how.startswith(("two", "one of")), outputs, g)
                args = (
                    panels.weight_panels(weight, 1),
                    torch.randint(-99, 99, (k * k, outputs), dtype=torch.int32, generator=g) if number else None,
                    torch.rand(outputs, generator=g) * 1e-3,
                    torch.randn(outputs, generator=g),
                    *([n, n] for n in (k, s, p, d)),
                    *(1, 0, None, 0.1, 900.0, None, None, None),
                    *(list(each) for each in zip(*codes, strict=True)),
                    *([torch.empty(0, dtype=torch.int32)] * len(codes), [0] * len(codes), None),
                )
                made = OP.conv2d_integer(x, *args)
                largest = torch.full((1, channels, k, k), 255, dtype=torch.uint8)
                code = Code([False])
                values = code.convolve(
                    *(0, args[0], OP.prepare_layer(largest, *args), outputs, *args[4:9], None),
                    residual=None,
                    values=False,
                    second=len(codes) > 1,
                )
                chosen = {"one of two": [1], "two, the second first": [1, 0]}.get(how, range(len(codes)))
                results = [code.max_pool(values[i], **window) for i in chosen]
                wanted = [OP.max_pool_codes(made[i], **window) for i in chosen]
                if how.endswith("returned"):
                    results, wanted = [*results, values[0]], [*wanted, made[0]]
                numbers = code.returning(results)
                for _ in range(2):
                    found = OP.run_layers([x], code.constants, numbers, torch.float32)
                    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)), (how, size)
                if how in ("one", "two") and threads == 1 and number < 3:  # there is no place for what is between
                    assert OP.memory_of_layers([x], code.constants, numbers, torch.float32) < made[0].numel()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 3, 33, 31), (2, 3, 128, 129), (2, 4, 9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_of_planes(size: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    ((scale, _, bits),) = quantizers(1, size[1], g)
    x = torch.randn(size, generator=g) * 4
    x = torch.where(torch.rand(size, generator=g) < 0.3, (x / 0.125).round() * 0.0625, x)  # with ties
    unusual = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e9, -1e9, 3e9, -3e9, -0.0, 1e-40])
    x.view(-1)[: 11 * (x.numel() // 22)] = unusual.repeat(x.numel() // 22)
    x = x.view(-1)[torch.randperm(x.numel(), generator=g)].view(size).to(dtype)
    for zero_point, step in ((4, 0.125), (-(1 << 22), 1e-6), (1 << 22, 1e-6), (200, None)):
        zeros = torch.full((size[1],), zero_point, dtype=torch.int32)
        scales = scale if step is None else torch.full_like(scale, step)
        code = Code([False])
        numbers = code.returning([code.quantize(0, scales, zeros, bits)])
        (y,) = OP.run_layers([x], code.constants, numbers, torch.float32)
        assert torch.equal(y, OP.quantize(x, scales, zeros, bits, 1))
