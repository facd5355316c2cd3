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
