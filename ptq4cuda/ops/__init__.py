"""The operators of ptq4cuda as typed functions.

Each is a torch custom op (namespace ptq4cuda) with a CPU and a CUDA kernel and a pure-PyTorch reference, which
agree code for code. A quantizer is unsigned b-bit codes with a scale and a zero point:

    code(x)  = clamp(rint(x / scale) + zero_point, 0, 2^bits - 1)
    value(q) = (q - zero_point) * scale

Quantizer arguments are vectors of length C, the size of x along `axis`, or 1, or plain numbers: scale float32 > 0,
zero_point int32, bits uint8 from 0 to 8. They live on x's device.

Every argument is checked, see ops.checks: by the functions here, which raise TypeError or ValueError, and by the
operators behind them, which raise RuntimeError with the same sentence. Values of parameters that live on a GPU are
not read back to be checked (QuantParams does that once, when it is made). `out` must not overlap an input in memory;
that of fake_quantize may be x itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ptq4cuda.ops import checks
from ptq4cuda.ops import registration as _registration
from ptq4cuda.ops.checks import FLOATING, check_bits, check_scale, check_vector, check_zero_point
from ptq4cuda.ops.nibbles import Nibbles
from ptq4cuda.ops.schemas import argument

__all__ = [
    "FLOATING",
    "channel_histogram",
    "channel_statistics",
    "check_bits",
    "check_scale",
    "check_vector",
    "check_zero_point",
    "conv2d_integer",
    "fake_quantize",
    "max_pool_codes",
    "pack_codes",
    "quantize",
    "quantize_pack",
    "row_offsets",
    "unpack_codes",
    "unpack_dequantize",
]

_ops = getattr(torch.ops, _registration.NAMESPACE)


class Quantizer(Protocol):
    """A quantizer of channels: ptq4cuda.QuantParams is one."""

    @property
    def bits(self) -> Tensor:
        """uint8 [C] or [1], 0 to 8."""

    @property
    def scale(self) -> Tensor:
        """float32 [C] or [1], > 0."""

    @property
    def zero_point(self) -> Tensor:
        """int32 [C] or [1]."""


def channel_statistics(x: Tensor, axis: int = 1, centre: Tensor | None = None) -> Tensor:
    """Return statistics of each channel in one deterministic reduction.

    Args:
        x: float32, float16 or bfloat16, any shape.
        axis: the channel axis; C is its size.
        centre: float64 [C]; the mean absolute deviation is taken about it. Default: about the channel's mean.

    Returns:
        float64 [C, 7]: count, min, max, mean, m2 (sum of squared deviations from the mean), absdev (mean absolute
        deviation), positive (fraction of values > 0). An empty channel has count 0, min inf, max -inf. NaN or Inf
        in a channel leave its mean, m2 and absdev not finite.
    """
    checks.channel_statistics(x, axis, centre)
    return _ops.channel_statistics(x, axis, centre)  # type: ignore[no-any-return]


def channel_histogram(x: Tensor, low: Tensor | float, high: Tensor | float, bins: int, axis: int = 1) -> Tensor:
    """Count the values of each channel in bins of equal width from low to high.

    Values below low are in the first bin, values above high in the last, as ±Inf is; NaN is in none. Where high is
    low, or their distance has no finite inverse, all values are in the first bin. The bin is the floor of
    (x - low) * (bins / (high - low)) in float32, the same on every device.

    Args:
        x: float32, float16 or bfloat16, any shape.
        low: float32 [C] or [1], or a number; not above high.
        high: as low.
        bins: 1 to 4096.
        axis: the channel axis; C is its size.

    Returns:
        int64 [C, bins].
    """
    checks.check_input(x)
    low, high = (_limit(name, value, x) for name, value in (("low", low), ("high", high)))
    checks.channel_histogram(x, low, high, bins, axis)
    if checks.readable(low) and checks.readable(high):
        _check_limits(low, high)
    return _ops.channel_histogram(x, low, high, bins, axis)  # type: ignore[no-any-return]


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    bits: Tensor | int,
    axis: int = 1,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize: value(code(x)), with x's shape, dtype and strides.

    NaN stays NaN, ±Inf saturates. Differentiable in x: the straight-through gradient, 1 where x is not clipped.
    `out`, if given, has x's shape, dtype and strides and is returned; no gradient is recorded then.
    """
    checks.check_input(x)
    parameters = (*_vectors(x, scale, zero_point), _bits_vector(x, bits))
    if out is None:
        checks.fake_quantize(x, *parameters, axis)
        return _ops.fake_quantize(x, *parameters, axis)  # type: ignore[no-any-return]
    checks.fake_quantize_out(x, *parameters, axis, out=out)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("out= records no gradient, which x requires: leave out away, or use torch.no_grad()")
    _ops.fake_quantize.out(x, *parameters, axis, out=out)
    return out


def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    bits: Tensor | int,
    axis: int = 1,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return code(x) as uint8 with x's shape and strides. NaN gets the zero point's code, ±Inf saturates."""
    checks.check_input(x)
    parameters = (*_vectors(x, scale, zero_point), _bits_vector(x, bits))
    if out is None:
        checks.quantize(x, *parameters, axis)
        return _ops.quantize(x, *parameters, axis)  # type: ignore[no-any-return]
    checks.quantize_out(x, *parameters, axis, out=out)
    _ops.quantize.out(x, *parameters, axis, out=out)
    return out


def quantize_pack(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, axis: int = 1, *, out: Tensor | None = None
) -> Tensor:
    """Quantize to 4 bits and pack two channels a byte, low nibble first.

    Args:
        x: [N, C, *spatial], float32, float16 or bfloat16; contiguous and channels_last are read without a copy.
        scale: of each channel (or a number).
        zero_point: of each channel (or a number).
        axis: 1 for quantizers along C (activations), 0 along N (weights [O, C, R, S]).
        out: receives the result, if given.

    Returns:
        uint8 [N, *spatial, ceil(C / 2)]. An odd C is padded with the zero point of the last channel.
    """
    checks.check_input(x)
    scale, zero_point = _vectors(x, scale, zero_point)
    if out is None:
        checks.quantize_pack(x, scale, zero_point, axis)
        return _ops.quantize_pack(x, scale, zero_point, axis)  # type: ignore[no-any-return]
    checks.quantize_pack_out(x, scale, zero_point, axis, out=out)
    _ops.quantize_pack.out(x, scale, zero_point, axis, out=out)
    return out


def unpack_dequantize(
    packed: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    channels: int,
    axis: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return the values of packed 4-bit codes.

    Args:
        packed: uint8 [N, *spatial, ceil(C / 2)] as quantize_pack makes it.
        scale: as given to quantize_pack.
        zero_point: as given to quantize_pack.
        channels: C.
        axis: 1 or 0, as given to quantize_pack.
        dtype: of the result: float32, float16 or bfloat16.
        out: [N, C, *spatial], contiguous or channels_last; receives the result, if given, in its own dtype.

    Returns:
        [N, C, *spatial], channels innermost in memory (channels_last).
    """
    if isinstance(packed, Tensor):  # anything else is refused
        scale, zero_point = _vectors(packed, scale, zero_point)
    checks.unpack_dequantize(packed, scale, zero_point, axis, channels, dtype)
    if out is None:
        return _ops.unpack_dequantize(packed, scale, zero_point, axis, channels, checks.number_of(dtype))  # type: ignore[no-any-return]
    checks.unpack_dequantize_out(packed, scale, zero_point, axis, out=out)
    if out.shape[1] != channels:
        raise ValueError(f"out must have {channels} channels, its shape is {list(out.shape)}")
    _ops.unpack_dequantize.out(packed, scale, zero_point, axis, out=out)
    return out


def row_offsets(bits: Tensor, length: int) -> tuple[Tensor, int]:
    """Return where each row of `length` codes begins when packed with its bits, and the bytes of all rows.

    Args:
        bits: uint8 [rows].
        length: codes in a row.

    Returns:
        int64 [rows] byte offsets on bits' device, and the total. Every row begins at a whole byte.

    Raises:
        TypeError, ValueError: bits are no vector of uint8, or the rows are longer than memory can be.
    """
    check_vector("bits", bits, torch.uint8, bits.numel() if isinstance(bits, Tensor) else 0, bits)
    if not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length must be an int, got {type(length).__name__}")
    if length < 0 or length * max(len(bits), 1) >= 1 << 60:
        raise ValueError(f"length must not be negative nor beyond all memory, got {length}")
    sizes = (bits.to(torch.int64) * length + 7) // 8
    ends = sizes.cumsum(0)
    return ends - sizes, int(ends[-1]) if len(ends) else 0


def pack_codes(codes: Tensor, bits: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Pack rows of codes, each with its own bit-width, lowest bit first, every row from a whole byte on.

    Args:
        codes: uint8 [rows, length]; codes of row r are below 2^bits[r].
        bits: uint8 [rows], 0 to 8.
        out: receives the result, if given.

    Returns:
        uint8 [bytes]; row_offsets(bits, length) tells where the rows begin.
    """
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or codes.dim() != 2:
        raise TypeError(f"codes must be a uint8 tensor [rows, length], got {checks.describe(codes)}")
    check_vector("bits", bits, torch.uint8, codes.shape[0], codes)
    if checks.readable(bits):
        check_bits(bits)
    if codes.numel():
        wide = (codes.amax(1).to(torch.int32) >> bits.to(torch.int32)).nonzero().flatten().tolist()
        if wide:
            row = wide[0]
            raise ValueError(f"codes has {int(codes[row].amax())} in row {row}, which has {int(bits[row])} bits")
    offsets, total = row_offsets(bits, codes.shape[1])
    if out is None:
        return _ops.pack_codes(codes, bits, offsets, total)  # type: ignore[no-any-return]
    checks.pack_codes_out(codes, bits, offsets, out=out)
    if out.shape[0] != total:
        raise ValueError(f"out must have {total} bytes, it has {out.shape[0]}")
    _ops.pack_codes.out(codes, bits, offsets, out=out)
    return out


def unpack_codes(
    packed: Tensor, bits: Tensor, length: int, offsets: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return the uint8 codes [rows, length] that pack_codes packed.

    Args:
        packed: uint8 [bytes].
        bits: uint8 [rows], 0 to 8.
        length: codes in a row.
        offsets: row_offsets(bits, length)[0], for callers that keep it.
        out: uint8 [rows, length]; receives the result, if given.
    """
    if offsets is None:
        offsets, total = row_offsets(bits, length)
        if isinstance(packed, Tensor) and packed.dim() == 1 and total != len(packed):
            raise ValueError(f"packed has {len(packed)} bytes; {len(bits)} rows of {length} codes take {total}")
    if out is None:
        checks.unpack_codes(packed, bits, offsets, length)
        return _ops.unpack_codes(packed, bits, offsets, length)  # type: ignore[no-any-return]
    checks.unpack_codes_out(packed, bits, offsets, out=out)
    if out.shape[1] != length:
        raise ValueError(f"out must have rows of {length} codes, its shape is {list(out.shape)}")
    _ops.unpack_codes.out(packed, bits, offsets, out=out)
    return out


def max_pool_codes(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Return the largest code of each window: codes rise with values, so that this pools the values.

    Args:
        x: uint8 [N, C, H, W] codes; channels_last is read without a copy. It is padded with 0, the least code.
        kernel_size: of the window, a number or those of rows and columns.
        stride: likewise. Default: kernel_size.
        padding: likewise, on both sides.
        dilation: likewise.
        ceil_mode: let a window that begins inside of the input end outside, as in torch.nn.MaxPool2d.

    Returns:
        uint8 [N, C, H', W'], channels_last.
    """
    kernel = _pair(kernel_size)
    arguments = (kernel, kernel if stride is None else _pair(stride), _pair(padding), _pair(dilation), ceil_mode)
    checks.max_pool_codes(x, *arguments)
    return _ops.max_pool_codes(x, *arguments)  # type: ignore[no-any-return]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return the numbers of rows and columns of a number or of one or two."""
    if isinstance(value, (tuple, list)):
        return tuple(value) * 2 if len(value) == 1 else tuple(value)
    return (value, value)  # type: ignore[return-value]  # checked later, like the rest


def conv2d_integer(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    *,
    low_bytes: int = 0,
    zero_sums: Tensor | None = None,
    span: int | None = None,
    negative_slope: float = 1.0,
    upper: float = math.inf,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    outputs: Sequence[Quantizer | None] = (None,),
    layouts: Sequence[Nibbles | None] = (),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Convolve unsigned codes with signed 8-bit weights, and finish the integer sums in the same pass.

        y_o = activation(scale_o * Σ weight * (code - zero_point) + bias_o + residual_o)

    The sums are exact. They are rounded to float32 (which changes them beyond 2^24), multiplied by the scale, added
    to the bias, added to the residual, each step rounded; every device returns the same bits. Sums have 32 bits, and
    those of layers that do not fit wrap around; IntegerConv2d refuses such layers, and prepares the arguments.

    Args:
        x: uint8 [N, C, H, W] codes; channels_last is read without a copy. Zero padding pads with the value zero.
        weight: int8, as panels.weight_panels arranges [O, R, S, C / groups].
        scale: float32 [O].
        bias: float32 [O].
        kernel_size: R, S.
        stride: of rows and columns.
        padding: of rows and columns, on both sides.
        dilation: of rows and columns.
        groups: as in torch.nn.Conv2d.
        low_bytes: of packed codes, see ops.nibbles: x is uint8 [N, bytes, H, W], and weight is arranged by their
            Nibbles. There are no groups then.
        zero_sums: int32 [R * S, O]: Σ weight * zero_point over the channels of x, of each tap. Default: x has no
            zero points.
        span: what panels.span_of_sums returns for weight and x, which CPUs ask for. Default: what holds for all.
        negative_slope: of the activation min(y if y > 0 else negative_slope * y, upper); 1 for none, 0 for a ReLU,
            whose zeros are positive.
        upper: of the activation.
        residual: uint8 [N, O, H', W'] codes.
        residual_scale: float32 [O] or [1], with a residual.
        residual_zero_point: int32 [O] or [1], with a residual.
        outputs: one or two quantizers of the codes that are returned, exactly as `quantize` would, with scale, zero
            point and bits [O] or [1]; the first may be None, for values.
        layouts: of each output whose codes are packed the ops.nibbles.Nibbles of its bits, None for the others. The
            outputs of a group are whole octets then, or there is one group. Default: none is packed.
        dtype: of the values: float32, float16 or bfloat16.

    Returns:
        The outputs [N, O, H', W'], channels_last: values, or uint8 codes. Packed codes are [N, bytes, H', W'].

    There is no out=: the outputs are one or two, of forms that follow from all these arguments, and memory that a
    layer returns is what the allocator of torch hands to the next but one.
    """
    if not outputs or None in outputs[1:]:
        raise ValueError("there are one or two outputs, of which the first alone may be values")
    coded = [output for output in outputs if output is not None]
    laid_out = list(layouts or (None,) * len(outputs))
    if len(laid_out) != len(outputs):
        raise ValueError(f"layouts must have an item for each output, got {len(laid_out)} for {len(outputs)}")
    packed = laid_out[len(outputs) - len(coded) :]
    whole = torch.empty(0, dtype=torch.int32, device=x.device if isinstance(x, Tensor) else None)
    arguments = (
        x,
        weight,
        zero_sums,
        scale,
        bias,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        low_bytes,
        span,
        negative_slope,
        argument(upper),
        residual,
        residual_scale,
        residual_zero_point,
        argument([output.scale for output in coded]),
        argument([output.zero_point for output in coded]),
        argument([output.bits for output in coded]),
        argument([whole if layout is None else layout.starts for layout in packed]),
        argument([0 if layout is None else layout.bytes for layout in packed]),
        checks.number_of(dtype) if outputs[0] is None else None,
    )
    checks.conv2d_integer(*arguments)
    for name, values in (("scale", scale), ("bias", bias)):
        if checks.readable(values) and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} contains NaN or Inf")
    return _ops.conv2d_integer(*arguments)  # type: ignore[no-any-return]


# --- plain numbers as parameters ------------------------------------------------------------------------------


def _vectors(x: Tensor, scale: Tensor | float, zero_point: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point as vectors."""
    if isinstance(scale, (int, float)):
        if not 0 < scale <= torch.finfo(torch.float32).max:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        scale = torch.full((1,), scale, dtype=torch.float32, device=x.device)
    if isinstance(zero_point, int):
        if abs(zero_point) > checks.MAX_ZERO_POINT:  # it need not fit into int32
            limit = checks.MAX_ZERO_POINT
            raise ValueError(f"zero_point must be from -{limit} to {limit}, got {zero_point}")
        zero_point = torch.full((1,), zero_point, dtype=torch.int32, device=x.device)
    return scale, zero_point


def _bits_vector(x: Tensor, bits: Tensor | int) -> Tensor:
    if isinstance(bits, int):
        if not 0 <= bits <= 8:
            raise ValueError(f"bits must be 0 to 8, got {bits}")
        bits = torch.full((1,), bits, dtype=torch.uint8, device=x.device)
    return bits


def _limit(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    if not isinstance(value, (int, float)):
        return value
    if torch.finfo(torch.float32).max < abs(value) < math.inf:
        raise ValueError(f"{name} must fit into float32, got {value}")
    return torch.full((1,), value, dtype=torch.float32, device=x.device)


def _check_limits(low: Tensor, high: Tensor) -> None:
    """Raise ValueError unless low <= high everywhere, and so none is NaN."""
    low, high = torch.broadcast_tensors(low, high)
    bad = ~(low <= high)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"low must not be above high, nor NaN: low[{i}] is {low[i]}, high[{i}] is {high[i]}")
