"""The operators of ptq4cuda as typed functions.

Each is a torch custom op (namespace ptq4cuda) with a CPU and a CUDA kernel and a pure-PyTorch reference, which
agree code for code. A quantizer is unsigned b-bit codes with a scale and a zero point:

    code(x)  = clamp(rint(x / scale) + zero_point, 0, 2^bits - 1)
    value(q) = (q - zero_point) * scale

Quantizer arguments are vectors of length C, the size of x along `axis`, or 1, or plain numbers: scale float32 > 0,
zero_point int32, bits uint8 from 0 to 8. They live on x's device. The functions here check every argument and raise
TypeError or ValueError; values of parameters that live on a GPU are not read back to be checked (QuantParams does
that once, when it is made).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq4cuda.ops import panels
from ptq4cuda.ops import registration as _registration

__all__ = [
    "channel_histogram",
    "channel_statistics",
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

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
MAX_BINS = 4096
MAX_ZERO_POINT = 1 << 22  # codes and zero points are held in float32, exactly
_ops = getattr(torch.ops, _registration.NAMESPACE)


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
    channels = _check_input(x, axis)
    if centre is not None:
        check_vector("centre", centre, torch.float64, (channels,), x)
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
    channels = _check_input(x, axis)
    if not isinstance(bins, int):
        raise TypeError(f"bins must be an int, got {type(bins).__name__}")
    if not 1 <= bins <= MAX_BINS:
        raise ValueError(f"bins must be 1 to {MAX_BINS}, got {bins}")
    if isinstance(low, (int, float)):
        low = torch.full((1,), low, dtype=torch.float32, device=x.device)
    if isinstance(high, (int, float)):
        high = torch.full((1,), high, dtype=torch.float32, device=x.device)
    check_vector("low", low, torch.float32, (channels, 1), x)
    check_vector("high", high, torch.float32, (channels, 1), x)
    if _readable(low) and _readable(high):
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
    `out`, if given, has x's shape, dtype and strides and is returned.
    """
    parameters = _quantizer(x, scale, zero_point, bits, axis)
    if out is None:
        return _ops.fake_quantize(x, *parameters, axis)  # type: ignore[no-any-return]
    _check_out(out, x, x.dtype)
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
    parameters = _quantizer(x, scale, zero_point, bits, axis)
    if out is None:
        return _ops.quantize(x, *parameters, axis)  # type: ignore[no-any-return]
    _check_out(out, x, torch.uint8)
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
    axis = _check_pack_axis(x, axis)
    scale, zero_point, _ = _quantizer(x, scale, zero_point, 4, axis)
    if out is None:
        return _ops.quantize_pack(x, scale, zero_point, axis)  # type: ignore[no-any-return]
    _check_contiguous_out(out, (x.shape[0], *x.shape[2:], (x.shape[1] + 1) // 2), x)
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
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() < 2:
        raise TypeError(f"packed must be a uint8 tensor [N, *spatial, ceil(C / 2)], got {_describe(packed)}")
    if channels < 0 or (channels + 1) // 2 != packed.shape[-1]:
        raise ValueError(f"channels is {channels}, which does not fit the packed shape {list(packed.shape)}")
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis}")
    count = packed.shape[0] if axis == 0 else channels
    scale, zero_point, _ = _parameters(packed, count, scale, zero_point, 4)
    if out is None:
        return _ops.unpack_dequantize(packed, scale, zero_point, axis, channels, dtype)  # type: ignore[no-any-return]
    expected = (packed.shape[0], channels, *packed.shape[1:-1])
    if out.dtype not in FLOATING or tuple(out.shape) != expected:
        raise ValueError(f"out must be floating point {list(expected)}, got {out.dtype} {list(out.shape)}")
    if not out.is_contiguous() and not out.movedim(1, -1).is_contiguous():
        raise ValueError(f"out must be contiguous or channels_last, its strides are {list(out.stride())}")
    _ops.unpack_dequantize.out(packed, scale, zero_point, axis, out=out)
    return out


def row_offsets(bits: Tensor, length: int) -> tuple[Tensor, int]:
    """Return where each row of `length` codes begins when packed with its bits, and the bytes of all rows.

    Args:
        bits: uint8 [rows].
        length: codes in a row.

    Returns:
        int64 [rows] byte offsets on bits' device, and the total. Every row begins at a whole byte.
    """
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
        raise TypeError(f"codes must be a uint8 tensor [rows, length], got {_describe(codes)}")
    check_vector("bits", bits, torch.uint8, (codes.shape[0],), codes)
    if _readable(bits):
        check_bits(bits)
    if codes.numel():
        wide = (codes.amax(1).to(torch.int32) >> bits.to(torch.int32)).nonzero().flatten().tolist()
        if wide:
            row = wide[0]
            raise ValueError(f"codes has {int(codes[row].amax())} in row {row}, which has {int(bits[row])} bits")
    offsets, total = row_offsets(bits, codes.shape[1])
    if out is None:
        return _ops.pack_codes(codes, bits, offsets, total)  # type: ignore[no-any-return]
    _check_contiguous_out(out, (total,), codes)
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
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise TypeError(f"packed must be a uint8 tensor [bytes], got {_describe(packed)}")
    if offsets is None:
        check_vector("bits", bits, torch.uint8, (bits.numel(),), packed)
        if _readable(bits):
            check_bits(bits)
        offsets, total = row_offsets(bits, length)
        if total != packed.numel():
            raise ValueError(f"packed has {packed.numel()} bytes; {len(bits)} rows of {length} codes take {total}")
    if out is None:
        return _ops.unpack_codes(packed, bits, offsets, length)  # type: ignore[no-any-return]
    _check_contiguous_out(out, (bits.shape[0], length), packed)
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
    if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.dim() != 4:
        raise TypeError(f"x must be a uint8 tensor [N, C, H, W], got {_describe(x)}")
    kernel = _pair("kernel_size", kernel_size, 1)
    step = kernel if stride is None else _pair("stride", stride, 1)
    pad, spread = _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    if any(n + 2 * p < d * (k - 1) + 1 for n, k, p, d in zip(x.shape[2:], kernel, pad, spread, strict=True)):
        raise ValueError(f"the window {kernel} is larger than the padded input {list(x.shape)}")
    return _ops.max_pool_codes(x, kernel, step, pad, spread, ceil_mode)  # type: ignore[no-any-return]


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of a number or of one or two."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} must be two numbers from {least} on, got {value}")
    return pair


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
    span: int = panels.NIBBLES,
    negative_slope: float = 1.0,
    upper: float = math.inf,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: Tensor | None = None,
    out_starts: Tensor | None = None,
    out_bytes: int = 0,
    also_scale: Tensor | None = None,
    also_zero_point: Tensor | None = None,
    also_bits: Tensor | None = None,
    also_starts: Tensor | None = None,
    also_bytes: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Convolve unsigned codes with signed 8-bit weights, and finish the integer sums in the same pass.

        y_o = activation(scale_o * Σ weight * (code - zero_point) + bias_o + residual_o)

    The sums are exact. They are rounded to float32 (which changes them beyond 2^24), multiplied by the scale, added
    to the bias, added to the residual, each step rounded; every device returns the same bits. (Scales and bias are
    finite; what codes NaN would get differs.) IntegerConv2d prepares the arguments.

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
        span: what panels.span_of_sums returns for weight and x; the default holds for all.
        negative_slope: of the activation min(y if y > 0 else negative_slope * y, upper); 1 for none, 0 for a ReLU.
        upper: of the activation.
        residual: uint8 [N, O, H', W'] codes.
        residual_scale: float32 [O] or [1], with a residual.
        residual_zero_point: int32 [O] or [1], with a residual.
        out_scale: float32 [O] or [1]: the output is quantized with this scale, exactly as `quantize` would.
        out_zero_point: int32 [O] or [1], with out_scale.
        out_bits: uint8 [O] or [1], with out_scale.
        out_starts: the codes are packed: starts and, as out_bytes, the bytes of the ops.nibbles.Nibbles of out_bits.
            The outputs of a group are whole octets then, or there is one group.
        out_bytes: with out_starts.
        also_scale: float32 [O] or [1]: there is a second output, codes of the same values with this scale.
        also_zero_point: int32 [O] or [1], with also_scale.
        also_bits: uint8 [O] or [1], with also_scale.
        also_starts: as out_starts.
        also_bytes: with also_starts.
        dtype: of the output, without out_scale: float32, float16 or bfloat16.

    Returns:
        The output [N, O, H', W'], channels_last: values, or uint8 codes where out_scale is given. Where also_scale
        is given, a second one follows, uint8 codes of the same shape. Packed codes are [N, bytes, H', W'].

    There is no out=: the outputs are one or two, of forms that follow from all these arguments, and memory that a
    layer returns is what the allocator of torch hands to the next but one.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.dim() != 4:
        raise TypeError(f"x must be a uint8 tensor [N, C, H, W], got {_describe(x)}")
    for name, pair, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two numbers from {least} on, got {pair}")
    outputs = scale.shape[0] if isinstance(scale, Tensor) and scale.dim() == 1 else 0
    check_vector("scale", scale, torch.float32, (outputs,), x)
    check_vector("bias", bias, torch.float32, (outputs,), x)
    if low_bytes and (not 0 < low_bytes <= x.shape[1] or low_bytes % 4 or x.shape[1] % 4 or groups != 1):
        raise ValueError(f"x {list(x.shape)} with {low_bytes} low bytes and {groups} groups holds no packed codes")
    if groups < 1 or x.shape[1] % groups or outputs % groups or not x.shape[1]:
        raise ValueError(f"{x.shape[1]} input and {outputs} output channels do not make {groups} groups")
    size = [x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1 for d in (0, 1)]
    if min(size) < 0:
        raise ValueError(f"the kernel {kernel_size} is larger than the padded input {list(x.shape)}")
    channels = 2 * x.shape[1] if low_bytes else x.shape[1] // groups
    shape = panels.shape_of_panels(outputs, kernel_size, channels, groups)
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8 or tuple(weight.shape) != shape:
        raise ValueError(f"weight must be int8 {list(shape)}, got {_describe(weight)}")
    taps = kernel_size[0] * kernel_size[1]
    if zero_sums is not None and (zero_sums.dtype != torch.int32 or tuple(zero_sums.shape) != (taps, outputs)):
        raise ValueError(f"zero_sums must be int32 {[taps, outputs]}, got {_describe(zero_sums)}")
    if span == 0:
        raise ValueError("span must not be 0")
    if residual is not None:
        expected = (x.shape[0], outputs, *(size[d] // stride[d] + 1 for d in (0, 1)))
        if residual.dtype != torch.uint8 or tuple(residual.shape) != expected:
            raise ValueError(f"residual must be uint8 {list(expected)}, got {_describe(residual)}")
        if residual_scale is None or residual_zero_point is None:
            raise ValueError("residual needs residual_scale and residual_zero_point")
        _parameters(x, outputs, residual_scale, residual_zero_point, 8)
    whole_octets = panels.whole_octets(outputs, x.shape[1] // groups, groups)
    for name, scales, zero_points, bits, starts, packed in (
        ("out", out_scale, out_zero_point, out_bits, out_starts, out_bytes),
        ("also", also_scale, also_zero_point, also_bits, also_starts, also_bytes),
    ):
        if scales is None:
            continue
        if zero_points is None or bits is None:
            raise ValueError(f"{name}_scale needs {name}_zero_point and {name}_bits")
        _parameters(x, outputs, scales, zero_points, bits)
        if starts is not None:
            octets = -(-outputs // panels.OCTET)
            check_vector(f"{name}_starts", starts, torch.int32, (octets + 1,), x)
            if packed < 4 * octets or packed % 4 or not whole_octets:
                raise ValueError(f"{outputs} outputs in {groups} groups are not packed in {packed} bytes")
    if out_scale is None and dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return _ops.conv2d_integer(  # type: ignore[no-any-return]
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
        upper,
        residual,
        residual_scale,
        residual_zero_point,
        out_scale,
        out_zero_point,
        out_bits,
        out_starts,
        out_bytes,
        also_scale,
        also_zero_point,
        also_bits,
        also_starts,
        also_bytes,
        dtype,
    )


# --- argument checks ------------------------------------------------------------------------------------------


def _describe(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _check_input(x: Tensor, axis: int) -> int:
    """Return the number of channels."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise TypeError(f"x must be a float32, float16 or bfloat16 tensor, got {_describe(x)}")
    if not isinstance(axis, int):
        raise TypeError(f"axis must be an int, got {type(axis).__name__}")
    dims = max(x.dim(), 1)
    if not -dims <= axis < dims:
        raise ValueError(f"axis {axis} is out of range for x of shape {list(x.shape)}")
    return x.shape[axis] if x.dim() else 1


def _check_pack_axis(x: Tensor, axis: int) -> int:
    _check_input(x, axis)
    if x.dim() < 2:
        raise ValueError(f"x must have the shape [N, C, *spatial], got {list(x.shape)}")
    if axis % x.dim() not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis}")
    return axis % x.dim()


def check_vector(name: str, p: Tensor, dtype: torch.dtype, lengths: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(p).__name__}")
    if p.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {p.dtype}")
    if p.dim() != 1 or all(p.shape[0] != n for n in lengths):  # not `in`: torch.compile has symbolic sizes
        expected = " or ".join(f"[{n}]" for n in dict.fromkeys(lengths))
        raise ValueError(f"{name} must have the shape {expected}, got {list(p.shape)}")
    if p.device != x.device:
        raise ValueError(f"{name} is on {p.device}, the tensor it belongs to on {x.device}")


def _readable(p: Tensor) -> bool:
    """True if looking at values costs no synchronisation and breaks no graph."""
    return p.device.type == "cpu" and not torch.compiler.is_compiling() and type(p) is Tensor


def _within(p: Tensor, low: float, high: float) -> bool:
    """True if all values are from low to high, and so none is NaN. One operator, since every call of ours asks."""
    if not p.numel():
        return True
    smallest, largest = p.aminmax()
    return bool(low <= smallest.item() and largest.item() <= high)


def check_bits(bits: Tensor) -> None:
    """Raise ValueError unless all bits are 0 to 8."""
    if not _within(bits, 0, 8):
        raise ValueError(f"bits must be 0 to 8, got {int(bits.max())}")


def check_scale(scale: Tensor) -> None:
    """Raise ValueError unless every scale is a positive, finite number whose inverse is finite, too."""
    smallest = torch.finfo(torch.float32).tiny
    if not _within(scale, smallest, torch.finfo(torch.float32).max):
        index = int((~((scale >= smallest) & (scale < torch.inf))).nonzero()[0])
        raise ValueError(
            f"scale must be positive and finite (at least {smallest:.3g}), scale[{index}] is {scale[index]}"
        )


def check_zero_point(zero_point: Tensor) -> None:
    """Raise ValueError unless float32 holds every zero point and its differences to codes exactly."""
    if not _within(zero_point, -MAX_ZERO_POINT, MAX_ZERO_POINT):
        value = int(zero_point[(zero_point < -MAX_ZERO_POINT) | (zero_point > MAX_ZERO_POINT)][0])
        raise ValueError(f"zero_point must be from -{MAX_ZERO_POINT} to {MAX_ZERO_POINT}, got {value}")


def _check_limits(low: Tensor, high: Tensor) -> None:
    """Raise ValueError unless low <= high everywhere, and so none is NaN."""
    low, high = torch.broadcast_tensors(low, high)
    bad = ~(low <= high)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"low must not be above high, nor NaN: low[{i}] is {low[i]}, high[{i}] is {high[i]}")


def _quantizer(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, bits: Tensor | int, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _parameters(x, _check_input(x, axis), scale, zero_point, bits)


def _parameters(
    x: Tensor, channels: int, scale: Tensor | float, zero_point: Tensor | int, bits: Tensor | int
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the parameters of a quantizer and make vectors of plain numbers."""
    if isinstance(scale, (int, float)):
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        scale = torch.full((1,), scale, dtype=torch.float32, device=x.device)
    if isinstance(zero_point, int):
        zero_point = torch.full((1,), zero_point, dtype=torch.int32, device=x.device)
    if isinstance(bits, int):
        if not 0 <= bits <= 8:
            raise ValueError(f"bits must be 0 to 8, got {bits}")
        bits = torch.full((1,), bits, dtype=torch.uint8, device=x.device)
    check_vector("scale", scale, torch.float32, (channels, 1), x)
    check_vector("zero_point", zero_point, torch.int32, (channels, 1), x)
    check_vector("bits", bits, torch.uint8, (channels, 1), x)
    if _readable(scale):
        check_scale(scale)
        check_zero_point(zero_point)
        check_bits(bits)
    return scale, zero_point, bits


def _check_contiguous_out(out: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if out.dtype != torch.uint8 or tuple(out.shape) != shape or not out.is_contiguous() or out.device != x.device:
        raise ValueError(
            f"out must be contiguous uint8 {list(shape)} on {x.device}, got {_describe(out)} on {out.device}, "
            f"its strides are {list(out.stride())}"
        )


def _check_out(out: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if out.dtype != dtype or out.shape != x.shape or out.device != x.device:
        raise ValueError(f"out must be {dtype} {list(x.shape)} on {x.device}, got {_describe(out)} on {out.device}")
