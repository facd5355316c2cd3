"""QuantParams and QuantizedWeight: the vocabulary of everything above the operators.

A quantizer has unsigned b-bit codes, a scale and a zero point: value(q) = (q - zero_point) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4cuda import ops
from ptq4cuda.ops.checks import FLOATING, describe

_FRACTIONS = 58  # of the range of data that are tried, a sixtieth apart


@dataclass(frozen=True, eq=False)
class QuantParams:
    """The quantizer of a tensor, or one for each of its channels.

    Attributes:
        bits: uint8 [C] or [1], 0 to 8.
        scale: float32 [C] or [1], > 0.
        zero_point: int32 [C] or [1].
        axis: the channel axis of the tensor, counted from the front or the back.

    Raises:
        TypeError, ValueError: a field has the wrong dtype, shape, device or value.
    """

    bits: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int = 1

    def __post_init__(self) -> None:
        fields = {"bits": torch.uint8, "scale": torch.float32, "zero_point": torch.int32}
        channels = max(p.numel() for p in map(self.__getattribute__, fields) if isinstance(p, Tensor))
        for name, dtype in fields.items():
            ops.check_vector(name, getattr(self, name), dtype, channels, self.scale, or_one=True)
        ops.check_bits(self.bits)
        ops.check_scale(self.scale)
        ops.check_zero_point(self.zero_point)

    @classmethod
    def from_range(
        cls, low: Tensor, high: Tensor, bits: Tensor, axis: int = 1, constant: Tensor | None = None
    ) -> QuantParams:
        """Spread the codes over [low, high], widened to contain zero, which gets a code of its own.

        Args:
            low: [C] or [1], finite.
            high: [C] or [1], finite, >= low.
            bits: uint8 [C] or [1], 0 to 8.
            axis: the channel axis.
            constant: [C] or [1], the value of channels with 0 bits. Default: zero.

        Raises:
            ValueError: a limit is not finite, or low is above high.
        """
        bad = ~((low <= high) & torch.isfinite(low) & torch.isfinite(high))
        if bool(bad.any()):
            low, high, bad = torch.broadcast_tensors(low, high, bad)
            i = int(bad.nonzero()[0])
            raise ValueError(f"low and high must be finite, low not above high, got low {low[i]}, high {high[i]}")
        low, high = low.double().clamp_max(0.0), high.double().clamp_min(0.0)
        qmax = torch.exp2(bits.double()) - 1.0
        constant = torch.zeros_like(low) if constant is None else constant.double()
        low, high, bits, constant = torch.broadcast_tensors(low, high, bits, constant)
        step = ((high - low) / qmax).clamp_min(torch.finfo(torch.float32).tiny)
        zero_point = torch.minimum(torch.round(-low / step), qmax)

        # Channels of one value need no particular scale. They get one like the others have: where scales are folded
        # into weights, a wide one would take the range of the weights for itself.
        live = (bits > 0) & (high > low)
        usual = step[live].median() if bool(live.any()) else constant.new_ones(())
        step = torch.where(live, step, usual)
        # Zero bits leave the code 0, whose value is -zero_point * scale: a whole number of steps of about that size.
        empty = (bits == 0) & (constant != 0)
        steps = (constant.abs() / usual).round().clamp(1, 255)
        step = torch.where(empty, constant.abs() / steps, step).clamp_min(torch.finfo(torch.float32).tiny)
        zero_point = torch.where(bits == 0, -constant.sign() * steps, zero_point)
        return cls(bits.to(torch.uint8), step.float(), zero_point.to(torch.int32), axis)

    @classmethod
    def from_data(cls, data: Tensor, bits: int = 4, axis: int | None = 1) -> QuantParams:
        """Spread the codes over the range in which rounding and clipping the data makes the least squared error.

        Ranges that are tried are that of the data and fractions of it, down to a twentieth. What quantize() finds for
        a layer of a network, whose activations and readers it knows, may be better.

        Args:
            data: floating values of any shape.
            bits: 1 to 8.
            axis: of the channels, each of which gets a range of its own; None for one range.

        Raises:
            TypeError, ValueError: data has no values, NaN, Inf or another dtype; bits or axis are out of range.
        """
        if not isinstance(data, Tensor) or data.dtype not in FLOATING:
            raise TypeError(f"data must be a float32, float16 or bfloat16 tensor, got {describe(data)}")
        if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
            raise ValueError(f"bits must be an int from 1 to 8, got {bits!r}")
        if axis is not None and not -data.dim() <= axis < data.dim():
            raise ValueError(f"data of shape {list(data.shape)} has no axis {axis}")
        if not data.numel() or not bool(torch.isfinite(data).all()):
            raise ValueError("data contains NaN or Inf" if data.numel() else "data has no values")
        rows = (data.detach().reshape(1, -1) if axis is None else data.detach().movedim(axis, 0).flatten(1)).float()
        low, high = rows.amin(1), rows.amax(1)
        of_bits = torch.full_like(low, bits, dtype=torch.uint8)
        best_low, best_high, least = low, high, torch.full_like(low, torch.inf, dtype=torch.float64)
        for fraction in torch.linspace(1.0, 0.05, _FRACTIONS).tolist():
            tried = cls.from_range(low * fraction, high * fraction, of_bits, 0)
            error = (tried.fake_quantize(rows) - rows).square().sum(1, dtype=torch.float64)
            better = error < least
            least = torch.where(better, error, least)
            best_low = torch.where(better, low * fraction, best_low)
            best_high = torch.where(better, high * fraction, best_high)
        return cls.from_range(best_low, best_high, of_bits, 1 if axis is None else axis)

    def repeated(self, times: int) -> QuantParams:
        """Return the quantizer of each channel several times, one after the other; once, with the same tensors."""
        if times == 1:
            return self
        bits, scale, zero_point = (
            p if p.numel() == 1 else p.repeat_interleave(times) for p in (self.bits, self.scale, self.zero_point)
        )
        return QuantParams(bits, scale, zero_point, self.axis)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return value(code(x)) with x's shape, dtype and strides."""
        return ops.fake_quantize(x, self.scale, self.zero_point, self.bits, self.axis)

    def quantize(self, x: Tensor) -> Tensor:
        """Return code(x), uint8 with x's shape and strides."""
        return ops.quantize(x, self.scale, self.zero_point, self.bits, self.axis)

    def to(self, device: torch.device) -> QuantParams:
        """Return the same quantizer on a device."""
        return QuantParams(self.bits.to(device), self.scale.to(device), self.zero_point.to(device), self.axis)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Weights as integer codes: row o has the values scale[o] * (codes[o] + offset[o]).

    The form holds every correction that is linear in a row (design: executable form), so that an integer kernel
    needs the codes alone and applies scale and offset to its sums.

    Attributes:
        codes: uint8 [O, ...], below 2^bits[o].
        bits: uint8 [O].
        scale: float32 [O].
        offset: float32 [O].
    """

    codes: Tensor
    bits: Tensor
    scale: Tensor
    offset: Tensor

    def values(self) -> Tensor:
        """Return the weights, float32, codes' shape."""
        shape = (-1,) + (1,) * (self.codes.dim() - 1)
        return (self.codes.float() + self.offset.view(shape)) * self.scale.view(shape)
