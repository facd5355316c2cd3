"""Packed codes against a packing nibble by nibble in Python, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4cuda.ops import panels
from ptq4cuda.ops.nibbles import Nibbles, split, weight_of_panels


def bits_of(channels: int, which: str) -> Tensor:
    """Return the bits of channels, of which none, some or all have more than four."""
    low, high = {"none": (0, 5), "some": (0, 9), "all": (5, 9)}[which]
    g = torch.Generator().manual_seed(channels)
    return torch.randint(low, high, (channels,), dtype=torch.uint8, generator=g)


def codes_of(bits: Tensor, size: tuple[int, int] = (3, 5), batch: int = 2) -> Tensor:
    """Return random codes of these bits, [N, C, H, W]."""
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (batch, len(bits), *size), dtype=torch.uint8, generator=g)
    return codes & ((1 << bits.int()) - 1).to(torch.uint8).view(-1, 1, 1)


def packed_pixel(codes: list[int], bits: list[int], size: int) -> list[int]:
    """Pack the codes of a pixel as the module's docstring says."""

    def as_bytes(nibbles: list[int]) -> list[int]:
        nibbles = nibbles + [0] * (len(nibbles) % 2)
        return [a | b << 4 for a, b in zip(nibbles[0::2], nibbles[1::2], strict=True)]

    octets = range(0, len(codes), 8)
    result = []
    for k in octets:
        low = as_bytes([code & 15 for code in codes[k : k + 8]])
        result += low + [0] * (4 - len(low))
    for k in octets:
        result += as_bytes([c >> 4 for c, b in zip(codes[k : k + 8], bits[k : k + 8], strict=True) if b > 4])
    return result + [0] * (size - len(result))


@pytest.mark.parametrize("which", ["none", "some", "all"])
@pytest.mark.parametrize("channels", [1, 7, 8, 13, 32, 64, 96, 200])
def test_pack_and_unpack(channels: int, which: str) -> None:
    bits = bits_of(channels, which)
    codes, layout = codes_of(bits), Nibbles.of(bits)
    packed = layout.pack(codes)
    assert packed.shape == (2, layout.bytes, 3, 5)
    assert packed.is_contiguous(memory_format=torch.channels_last)
    for n, y, x in ((0, 0, 0), (1, 2, 4), (1, 1, 3)):
        expected = packed_pixel(codes[n, :, y, x].tolist(), bits.tolist(), layout.bytes)
        assert packed[n, :, y, x].tolist() == expected
    assert torch.equal(layout.unpack(packed), codes)


def test_sizes() -> None:
    def sizes(bits: list[int]) -> tuple[int, int, list[int]]:
        layout = Nibbles.of(torch.tensor(bits, dtype=torch.uint8))
        return layout.low_bytes, layout.bytes, layout.starts.tolist()

    assert sizes([4] * 16) == (8, 8, [8, 8, 8])
    assert sizes([4] * 15 + [5]) == (8, 12, [8, 8, 12])
    assert sizes([5, 4, 8] + [1] * 8 + [6]) == (8, 12, [8, 9, 12])
    assert sizes([8] * 9) == (8, 16, [8, 12, 16])
    # From 64 channels on, where the low nibbles fill vectors of 16 bytes, the others do.
    assert sizes([5] + [4] * 31)[:2] == (16, 20)
    assert sizes([5] + [4] * 63)[:2] == (32, 48)
    assert sizes([5] + [4] * 71)[:2] == (36, 40)


@pytest.mark.parametrize("which", ["none", "some", "all"])
@pytest.mark.parametrize("channels", [5, 16, 70])
def test_weights_of_nibbles(channels: int, which: str) -> None:
    """The sum over nibbles, the high ones 16-fold, is the sum over codes; the low ones are in the channels' order."""
    layout = Nibbles.of(bits_of(channels, which))
    codes = codes_of(layout.bits)
    g = torch.Generator().manual_seed(2)
    weight = torch.randint(-128, 128, (20, 3, 2, channels), dtype=torch.int8, generator=g)
    there = layout.weight_panels(weight)
    assert tuple(there.shape) == panels.shape_of_panels(20, (3, 2), 2 * layout.bytes, 1)
    back = weight_of_panels(there, 20, (3, 2), layout.low_bytes)
    assert torch.equal(back[..., :channels], weight)
    nibbles = split(layout.pack(codes)).long()
    nibbles[:, 2 * layout.low_bytes :] *= 16
    expected = torch.einsum("nchw,orsc->norshw", codes.long(), weight.long())
    assert torch.equal(torch.einsum("nchw,orsc->norshw", nibbles, back.long()), expected)
