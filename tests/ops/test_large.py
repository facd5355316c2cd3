"""Tensors of more than 2^31 elements, where there is memory for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ptq4cuda.ops
from ops.backends import CUDA
from ptq4cuda import _native
from ptq4cuda.ops import panels
from ptq4cuda.quantizer import QuantParams

pytestmark = pytest.mark.xdist_group("large")  # one at a time

GIB = 1 << 30
LENGTH = GIB + 9  # of each of two channels
LAYOUTS = ("contiguous", "channels_last")


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0


@pytest.fixture(scope="module", params=["cpu", CUDA])
def memory(request: pytest.FixtureRequest) -> Tensor:
    device = request.param
    needed = 16 if device == "cpu" else 12
    if free_bytes(device) < needed * GIB or (device == "cpu" and not _native.cpu_loaded):
        pytest.skip(f"needs kernels for {device} and {needed} GiB free")
    return torch.zeros(2 * LENGTH, dtype=torch.bfloat16, device=device)


@pytest.fixture(params=LAYOUTS)
def x(request: pytest.FixtureRequest, memory: Tensor) -> Tensor:
    """[1, 2, LENGTH], zero but for the last values."""
    x = memory.view(1, 2, LENGTH) if request.param == "contiguous" else memory.view(1, LENGTH, 2).transpose(1, 2)
    memory.view(2, LENGTH)[:, -8:] = memory[-16:] = 0.0  # of the other layout
    x[0, :, -3:] = torch.tensor([[1.0, 2.0, -4.0], [3.0, 0.0, -1.0]])
    return x


def test_quantize(x: Tensor) -> None:
    codes = ptq4cuda.ops.quantize(x, 1.0, 2, 4)
    assert codes[0, :, -4:].tolist() == [[2, 3, 4, 0], [2, 5, 2, 1]]
    assert int(codes.sub_(2).count_nonzero()) == 5  # a sum would make int64 of all codes first


def test_quantize_pack(x: Tensor) -> None:
    packed = ptq4cuda.ops.quantize_pack(x, 1.0, 2)
    assert packed[0, -4:].flatten().tolist() == [0x22, 0x53, 0x24, 0x10]
    assert int(packed.sub_(0x22).count_nonzero()) == 3


def test_channel_statistics(x: Tensor) -> None:
    found = ptq4cuda.ops.channel_statistics(x)
    for row, values in zip(found.tolist(), x[0, :, -3:].tolist(), strict=True):
        count, low, high, mean, m2, absdev, positive = row
        assert (count, low, high) == (LENGTH, min(values), max(values))
        assert mean == pytest.approx(sum(values) / LENGTH, rel=1e-12)
        assert m2 == pytest.approx(sum(v * v for v in values), rel=1e-6)
        rest = abs(mean) * (LENGTH - 3)
        assert absdev == pytest.approx((sum(abs(v - mean) for v in values) + rest) / LENGTH, rel=1e-6)
        assert positive == sum(v > 0 for v in values) / LENGTH


def test_channel_histogram(x: Tensor) -> None:
    counts = ptq4cuda.ops.channel_histogram(x, -4.5, 3.5, 8)
    assert counts.tolist() == [
        [1, 0, 0, 0, LENGTH - 3, 1, 1, 0],
        [0, 0, 0, 1, LENGTH - 2, 0, 0, 1],
    ]


def test_unpack_dequantize(x: Tensor) -> None:
    packed = torch.full((1, LENGTH, 1), 0x22, dtype=torch.uint8, device=x.device)
    packed[0, -3:, 0] = torch.tensor([0x53, 0x24, 0x10], dtype=torch.uint8)
    expected = x[0, :, -3:].clone()
    expected[0, -1], expected[1, -1] = -2.0, -1.0
    x.fill_(7.0)
    ptq4cuda.ops.unpack_dequantize(packed, 1.0, 2, 2, out=x)
    assert torch.equal(x[0, :, -3:], expected)
    assert int(x.count_nonzero()) == 5


def test_unpack_codes(memory: Tensor) -> None:
    """Two rows, of 3 and of 2 bits."""
    bits = torch.tensor([3, 2], dtype=torch.uint8, device=memory.device)
    offsets, total = ptq4cuda.ops.row_offsets(bits, LENGTH)
    packed = torch.zeros(total, dtype=torch.uint8, device=memory.device)
    first, second = (int(end) - 1 for end in (offsets[1], total))
    assert 3 * LENGTH % 8 == 3  # bits of the last code of the first row
    assert 2 * LENGTH % 8 == 2
    packed[first], packed[second] = 5, 2
    codes = ptq4cuda.ops.unpack_codes(packed, bits, LENGTH, offsets)
    assert codes[:, -3:].tolist() == [[0, 0, 5], [0, 0, 2]]
    assert int(codes.count_nonzero()) == 2


@pytest.mark.parametrize("groups", [1, 16])
def test_conv2d_integer(memory: Tensor, groups: int) -> None:
    """More than 2^31 codes in and out; what does not see the last codes is the zero point."""
    channels, images, width = 16, 3, (1 << 27) // 3 + 9
    assert images * width * channels > 1 << 31
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-99, 99, (16, 1, 3, channels // groups), dtype=torch.int8, generator=generator)
    one, zero = torch.full((16,), 0.01), torch.zeros(16)
    quantizer = QuantParams(torch.full((1,), 8, dtype=torch.uint8), one, torch.full((1,), 99).int())

    def convolution(x: Tensor) -> Tensor:
        tensors = (x, panels.weight_panels(weight, groups), one * 1e-3, zero)
        outputs = [quantizer.to(x.device)]
        (y,) = ptq4cuda.ops.conv2d_integer(
            *(t.to(x.device) for t in tensors), (1, 3), (1, 1), (0, 1), (1, 1), groups, outputs=outputs
        )
        return y

    codes = memory.view(torch.uint8)[: images * width * channels]
    x = codes.view(images, 1, width, channels).movedim(-1, 1)
    last = torch.randint(0, 256, (16, 1, 4), dtype=torch.uint8, generator=generator)
    try:
        x[-1, :, :, -4:] = last
        y = convolution(x)
    finally:
        codes.zero_()
    expected = convolution(torch.nn.functional.pad(last, (3, 0))[None])[0, :, :, -5:]
    assert torch.equal(y[-1, :, :, -5:].cpu(), expected)
    assert int((expected != 99).sum()) > 40
    assert int(y.sub_(99).count_nonzero()) == int((expected != 99).sum())


def test_max_pool_codes(memory: Tensor) -> None:
    channels, images, width = 16, 3, (1 << 27) // 3 + 9
    codes = memory.view(torch.uint8)[: images * width * channels]
    x = codes.view(images, 1, width, channels).movedim(-1, 1)
    last = torch.randint(1, 256, (16, 1, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        x[-1, :, :, -4:] = last
        y = ptq4cuda.ops.max_pool_codes(x, (1, 3), (1, 1), (0, 1))
    finally:
        codes.zero_()
    expected = ptq4cuda.ops.max_pool_codes(torch.nn.functional.pad(last, (3, 0))[None], (1, 3), (1, 1), (0, 1))
    assert torch.equal(y[-1, :, :, -7:].cpu(), expected[0])
    assert int(y.count_nonzero()) == 5 * channels
