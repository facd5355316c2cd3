"""Packed codes: how an activation whose channels have few bits lies in memory between two convolutions.

The channels of a tensor have 0 to 8 bits each, mostly about four. A pixel has the low nibbles of all channels, two a
byte, and then the high nibbles of only those channels that have more than four bits:

    low    a word (4 bytes) for each octet of channels: the nibbles of channels 8k to 8k + 7, the lowest first
    high   for each octet, the nibbles of its channels of more than four bits, in their order: 0 to 4 bytes

What is missing to fill a byte, a word or the whole section is zero. Nobody needs a table of channels: a thread that
has the codes of an octet writes whole bytes, and what reads the nibbles takes each for a channel of its own, with
codes up to 15 and the weights of the channel that it belongs to. A sum over the high nibbles counts 16-fold.

A packed tensor is uint8 [N, bytes, H, W], channels_last: a pixel's bytes lie where the codes of its channels would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4cuda.ops import panels
from ptq4cuda.ops.panels import OCTET

_LOW_BITS = 4
_WORD = 4  # bytes
_VECTOR = 16  # bytes that the kernels fetch at once


@dataclass(frozen=True, eq=False)
class Nibbles:
    """Where the nibbles of a tensor's codes lie in a pixel.

    Attributes:
        bits: uint8 [C], of each channel.
        low_bytes: of the low nibbles.
        bytes: of a pixel.
        starts: int32 [ceil(C / 8) + 1], the first byte of each octet's high nibbles; the last is `bytes`.
    """

    bits: Tensor
    low_bytes: int
    bytes: int
    starts: Tensor

    @classmethod
    def of(cls, bits: Tensor) -> Nibbles:
        """Lay out codes of uint8 [C] bits, 0 to 8.

        Pixels are whole words. Wide ones, of many whole vectors, are filled up to whole vectors.
        """
        octets = -(-len(bits) // OCTET)
        high = torch.nn.functional.pad(bits > _LOW_BITS, (0, octets * OCTET - len(bits)))
        sizes = (high.view(octets, OCTET).sum(1) + 1) // 2
        low_bytes = octets * _WORD
        unit = _VECTOR if low_bytes % _VECTOR == 0 and low_bytes > _VECTOR else _WORD
        ends = low_bytes + sizes.cumsum(0)
        size = -(-int(ends[-1]) // unit) * unit
        starts = torch.cat([ends[:1] - sizes[:1], ends])
        starts[-1] = size
        return cls(bits, low_bytes, size, starts.to(torch.int32))

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes [N, C, H, W] packed."""
        return pack(codes, self.bits, self.starts, self.bytes)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the codes, uint8 [N, C, H, W]."""
        nibbles = split(packed)
        codes = nibbles[:, : len(self.bits)].clone()
        high = _high(self.bits)
        codes[:, high] |= nibbles[:, _places(self.bits, self.starts)] << 4
        return codes

    def weight_panels(self, weight: Tensor) -> Tensor:
        """Arrange int8 weights [O, R, S, C] for packed codes: panels of both sections, those of the high one first.

        A word of codes has eight nibbles, which become two words of four: those of even numbers, then the odd ones.
        """
        columns = weight.new_zeros((*weight.shape[:3], 2 * self.bytes))
        columns[..., : weight.shape[3]] = weight
        columns[..., _places(self.bits, self.starts)] = weight[..., _high(self.bits)]
        low, high = columns[..., : 2 * self.low_bytes], columns[..., 2 * self.low_bytes :]
        sections = [s.unflatten(-1, (-1, OCTET // 2, 2)).transpose(-1, -2).flatten(-3) for s in (high, low)]
        return torch.cat([panels.weight_panels(s, 1) for s in sections if s.shape[-1]], dim=1)


def _high(bits: Tensor) -> Tensor:
    """Return the channels of more than four bits, int64."""
    return (bits > _LOW_BITS).nonzero().flatten()


def _places(bits: Tensor, starts: Tensor) -> Tensor:
    """Return which nibble of a pixel is the high one of each channel of _high(bits), int64."""
    high = bits > _LOW_BITS
    octet = torch.arange(len(bits), device=bits.device) // OCTET
    before = torch.nn.functional.pad(high.cumsum(0), (1, 0))  # how many of the channels before are high
    return (2 * starts[octet] + before[:-1] - before[octet * OCTET])[high]


def pack(codes: Tensor, bits: Tensor, starts: Tensor, size: int) -> Tensor:
    """Return codes [N, C, H, W] of uint8 [C] bits packed, with `starts` and `bytes` of their Nibbles."""
    n, channels, height, width = codes.shape
    nibbles = codes.new_zeros((n, 2 * size, height, width))
    nibbles[:, :channels] = codes & 0x0F
    nibbles[:, _places(bits, starts)] = codes[:, _high(bits)] >> 4
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return packed.contiguous(memory_format=torch.channels_last)


def split(packed: Tensor) -> Tensor:
    """Return the nibbles of packed codes as channels, uint8 [N, 2 * bytes, H, W]."""
    return torch.stack([packed & 0x0F, packed >> 4], dim=2).flatten(1, 2)


def weight_of_panels(weight: Tensor, outputs: int, kernel: tuple[int, int], low_bytes: int) -> Tensor:
    """Return the weights of all nibbles, int8 [O, R, S, 2 * bytes], that Nibbles.weight_panels arranged."""
    taps, low_words = kernel[0] * kernel[1], 2 * low_bytes // panels.CHANNELS
    sections = []
    for part in reversed(weight.split([weight.shape[1] - taps * low_words, taps * low_words], dim=1)):
        if part.shape[1]:
            columns = panels.weight_of_panels(part, outputs, kernel, part.shape[1] // taps * panels.CHANNELS, 1)
            sections.append(columns.unflatten(-1, (-1, 2, OCTET // 2)).transpose(-1, -2).flatten(-3))
    return torch.cat(sections, dim=-1)
