"""What the arguments of the operators must be.

Written once for the functions of ptq4cuda.ops, the reference and the fake kernels: a function for each operator takes
what the operator takes, and raises TypeError or ValueError. csrc/entry.h and csrc/conv.h say the same for the native
kernels, sentence by sentence.

Sizes may be symbolic, and a check holds no more of them than the operator needs. Values of parameters are looked at
where that costs nothing: in ordinary tensors on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ptq4cuda.compat import expect_true, storage_id
from ptq4cuda.ops import panels

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
# The number of a dtype is its place here: that of ScalarType in PyTorch.
DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32),
    torch.bfloat16,
)
MAX_BINS = 4096
MAX_ZERO_POINT = 1 << 22  # codes and zero points are held in float32, exactly
_LIMIT = 1 << 30  # of what the kernels of convolutions count in 32 bits
_WINDOW_BYTES = 1 << 31  # of the rows of an image that a row of outputs reads
_OUTPUTS = 1 << 60


# --- of all operators -----------------------------------------------------------------------------------------


def describe(x: object) -> str:
    """Return dtype and shape of a tensor, or what it is instead."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def readable(p: Tensor) -> bool:
    """True if looking at values costs no synchronisation and breaks no graph."""
    return p.device.type == "cpu" and not torch.compiler.is_compiling() and type(p) in (Tensor, torch.nn.Parameter)


def _holds(condition: bool | torch.SymBool) -> bool:
    """Tell whether a condition on sizes holds. Where only the data will tell sizes, torch holds them to it then."""
    if isinstance(condition, torch.SymBool) and not torch.compiler.is_dynamo_compiling():
        return expect_true(condition)
    return bool(condition)


def _is_shape(t: Tensor, shape: Sequence[int]) -> bool:
    return t.dim() == len(shape) and all(_holds(a == b) for a, b in zip(t.shape, shape, strict=True))


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product = product * size
    return product


def check_input(x: Tensor) -> None:
    """Raise TypeError unless x is a tensor of a dtype that is quantized."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise TypeError(f"x must be a float32, float16 or bfloat16 tensor, got {describe(x)}")


def floating_dtype(dtype: int | torch.dtype) -> torch.dtype:
    """Return a dtype of values in floating point, given itself or its number, or raise TypeError."""
    if type(dtype) is int and 0 <= dtype < len(DTYPES):
        dtype = DTYPES[dtype]
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    assert isinstance(dtype, torch.dtype)
    return dtype


def number_of(dtype: torch.dtype) -> int:
    """Return the number of a dtype, for an operator."""
    return DTYPES.index(dtype)


def _check_axis(x: Tensor, axis: int) -> int:
    """Return the number of channels."""
    if not isinstance(axis, int):
        raise TypeError(f"axis must be an int, got {type(axis).__name__}")
    dims = max(x.dim(), 1)
    if not -dims <= axis < dims:
        raise ValueError(f"axis {axis} is out of range for x of shape {list(x.shape)}")
    return x.shape[axis] if x.dim() else 1


def check_vector(name: str, p: Tensor, dtype: torch.dtype, length: int, x: Tensor, or_one: bool = False) -> None:
    """Raise unless p is a vector of this length, or, for parameters of channels, of length 1, on x's device."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(p).__name__}")
    if p.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {p.dtype}")
    if p.dim() != 1 or not ((or_one and p.shape[0] == 1) or _holds(p.shape[0] == length)):
        expected = f"[{length}] or [1]" if or_one and length != 1 else f"[{length}]"
        raise ValueError(f"{name} must have the shape {expected}, got {list(p.shape)}")
    _check_device(name, p, x)


def _check_device(name: str, p: Tensor, x: Tensor) -> None:
    if p.device != x.device:
        raise ValueError(f"{name} is on {p.device}, the tensor it belongs to on {x.device}")


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
            f"scale must be positive and finite (at least {smallest:g}), scale[{index}] is {float(scale[index]):g}"
        )


def check_zero_point(zero_point: Tensor) -> None:
    """Raise ValueError unless float32 holds every zero point and its differences to codes exactly."""
    if not _within(zero_point, -MAX_ZERO_POINT, MAX_ZERO_POINT):
        value = int(zero_point[(zero_point < -MAX_ZERO_POINT) | (zero_point > MAX_ZERO_POINT)][0])
        raise ValueError(f"zero_point must be from -{MAX_ZERO_POINT} to {MAX_ZERO_POINT}, got {value}")


def _check_quantizer(x: Tensor, channels: int, scale: Tensor, zero_point: Tensor, bits: Tensor | None) -> None:
    check_vector("scale", scale, torch.float32, channels, x, or_one=True)
    check_vector("zero_point", zero_point, torch.int32, channels, x, or_one=True)
    if bits is not None:
        check_vector("bits", bits, torch.uint8, channels, x, or_one=True)
    if readable(scale):
        check_scale(scale)
        check_zero_point(zero_point)
        if bits is not None:
            check_bits(bits)


# --- out= -----------------------------------------------------------------------------------------------------


def _check_out(out: Tensor, dtype: torch.dtype, shape: Sequence[int], x: Tensor, like: Tensor | None = None) -> None:
    """Raise unless out is what the operator would return: contiguous, or with the strides of `like`."""
    _check_is_tensor(out)
    if out.dtype != dtype or not _is_shape(out, shape) or out.device != x.device:
        raise ValueError(f"out must be {dtype} {list(shape)} on {x.device}, got {describe(out)} on {out.device}")
    strides = torch.empty(shape, device="meta").stride() if like is None else like.stride()
    if out.numel() and not all(n == 1 or a == b for n, a, b in zip(shape, out.stride(), strides, strict=True)):
        raise ValueError(f"out must have the strides {list(strides)}, it has {list(out.stride())}")


def _check_is_tensor(out: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")


def _memory(t: Tensor) -> tuple[int, int | torch.SymInt, int | torch.SymInt]:
    """Return a tensor's storage, and the bytes in it from its first element to behind its last one."""
    begin = t.storage_offset()
    end = begin + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return storage_id(t), begin * t.element_size(), end * t.element_size()


def _check_apart(out: Tensor, in_place: bool = False, **inputs: Tensor | None) -> None:
    """Raise if out has memory of an input. Where an operator works in place, out may be the (first) input itself."""
    if torch.compiler.is_dynamo_compiling() or not out.numel():  # the fake kernel comes after Dynamo
        return
    storage, begin, end = _memory(out)
    for name, t in inputs.items():
        if t is not None and t.numel():
            other, first, last = _memory(t)
            same = in_place and (begin, end, out.stride(), out.dtype) == (first, last, t.stride(), t.dtype)
            if storage == other and begin < last and first < end and not same:
                without = " without being the same tensor" if in_place else ""
                raise ValueError(f"out overlaps {name} in memory{without}")
        in_place = False


# --- the operators --------------------------------------------------------------------------------------------


def channel_statistics(x: Tensor, axis: int, centre: Tensor | None = None) -> None:
    """Check the arguments of the operator."""
    check_input(x)
    channels = _check_axis(x, axis)
    if centre is not None:
        check_vector("centre", centre, torch.float64, channels, x)


def channel_histogram(x: Tensor, low: Tensor, high: Tensor, bins: int, axis: int) -> None:
    """Check the arguments of the operator, for which limits in any order are defined."""
    check_input(x)
    channels = _check_axis(x, axis)
    if not isinstance(bins, int):
        raise TypeError(f"bins must be an int, got {type(bins).__name__}")
    if not 1 <= bins <= MAX_BINS:
        raise ValueError(f"bins must be 1 to {MAX_BINS}, got {bins}")
    check_vector("low", low, torch.float32, channels, x, or_one=True)
    check_vector("high", high, torch.float32, channels, x, or_one=True)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int) -> None:
    """Check the arguments of the operator."""
    check_input(x)
    _check_quantizer(x, _check_axis(x, axis), scale, zero_point, bits)


quantize = fake_quantize


def fake_quantize_out(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int, *, out: Tensor) -> None:
    """Check the arguments of the operator with out=."""
    fake_quantize(x, scale, zero_point, bits, axis)
    _check_out(out, x.dtype, x.shape, x, like=torch.empty_like(x, device="meta"))
    _check_apart(out, in_place=True, x=x, scale=scale, zero_point=zero_point, bits=bits)


def quantize_out(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int, *, out: Tensor) -> None:
    """Check the arguments of the operator with out=."""
    quantize(x, scale, zero_point, bits, axis)
    _check_out(out, torch.uint8, x.shape, x, like=torch.empty_like(x, device="meta"))
    _check_apart(out, in_place=True, x=x, scale=scale, zero_point=zero_point, bits=bits)


def pack_axis(dims: int, axis: int) -> int:
    """Return 0 or 1 for an axis counted from the front or the back."""
    if not isinstance(axis, int):
        raise TypeError(f"axis must be an int, got {type(axis).__name__}")
    normalized = axis + dims if axis < 0 else axis
    if normalized not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis}")
    return normalized


def quantize_pack(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> None:
    """Check the arguments of the operator."""
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x must have the shape [N, C, *spatial], got {list(x.shape)}")
    _check_quantizer(x, x.shape[pack_axis(x.dim(), axis)], scale, zero_point, None)


def quantize_pack_out(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, *, out: Tensor) -> None:
    """Check the arguments of the operator with out=."""
    quantize_pack(x, scale, zero_point, axis)
    _check_out(out, torch.uint8, (x.shape[0], *x.shape[2:], (x.shape[1] + 1) // 2), x)
    _check_apart(out, x=x, scale=scale, zero_point=zero_point)


def _check_packed(packed: Tensor) -> None:
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() < 2:
        raise TypeError(f"packed must be a uint8 tensor [N, *spatial, ceil(C / 2)], got {describe(packed)}")


def unpack_dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor, axis: int, channels: int, dtype: int | torch.dtype
) -> None:
    """Check the arguments of the operator."""
    _check_packed(packed)
    if not isinstance(channels, (int, torch.SymInt)):
        raise TypeError(f"channels must be an int, got {type(channels).__name__}")
    if not (_holds(channels >= 0) and _holds((channels + 1) // 2 == packed.shape[-1])):
        raise ValueError(f"channels is {channels}, which does not fit the packed shape {list(packed.shape)}")
    floating_dtype(dtype)
    axis = pack_axis(packed.dim(), axis)
    _check_quantizer(packed, packed.shape[0] if axis == 0 else channels, scale, zero_point, None)


def unpack_dequantize_out(packed: Tensor, scale: Tensor, zero_point: Tensor, axis: int, *, out: Tensor) -> None:
    """Check the arguments of the operator with out=."""
    _check_packed(packed)
    _check_is_tensor(out)
    fits = out.dtype in FLOATING and out.dim() == packed.dim() and out.device == packed.device
    if not (fits and _is_shape(packed, (out.shape[0], *out.shape[2:], (out.shape[1] + 1) // 2))):
        raise ValueError(
            f"out must be floating point, with the channels of the packed shape {list(packed.shape)} on "
            f"{packed.device}, got {describe(out)} on {out.device}"
        )
    if out.numel() and not (out.is_contiguous() or out.movedim(1, -1).is_contiguous()):
        raise ValueError(f"out must be contiguous or channels_last, its strides are {list(out.stride())}")
    axis = pack_axis(packed.dim(), axis)
    _check_quantizer(packed, packed.shape[0] if axis == 0 else out.shape[1], scale, zero_point, None)
    _check_apart(out, packed=packed, scale=scale, zero_point=zero_point)


def pack_codes(codes: Tensor, bits: Tensor, offsets: Tensor, packed_bytes: int) -> None:
    """Check the arguments of the operator."""
    _check_codes(codes, bits, offsets)
    if not _holds(packed_bytes >= 0):
        raise ValueError(f"packed_bytes must not be negative, got {packed_bytes}")
    _check_rows(bits, offsets, codes.shape[1], packed_bytes, written=True)


def pack_codes_out(codes: Tensor, bits: Tensor, offsets: Tensor, *, out: Tensor) -> None:
    """Check the arguments of the operator with out=."""
    _check_codes(codes, bits, offsets)
    _check_is_tensor(out)
    _check_out(out, torch.uint8, (out.numel(),), codes)
    _check_rows(bits, offsets, codes.shape[1], out.numel(), written=True)
    _check_apart(out, codes=codes, bits=bits, offsets=offsets)


def _check_codes(codes: Tensor, bits: Tensor, offsets: Tensor) -> None:
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or codes.dim() != 2:
        raise TypeError(f"codes must be a uint8 tensor [rows, length], got {describe(codes)}")
    check_vector("bits", bits, torch.uint8, codes.shape[0], codes)
    check_vector("offsets", offsets, torch.int64, codes.shape[0], codes)


def unpack_codes(packed: Tensor, bits: Tensor, offsets: Tensor, length: int) -> None:
    """Check the arguments of the operator."""
    _check_bytes(packed, bits, offsets)
    if not _holds(length >= 0):
        raise ValueError(f"length must not be negative, got {length}")
    _check_rows(bits, offsets, length, packed.shape[0], written=False)


def unpack_codes_out(packed: Tensor, bits: Tensor, offsets: Tensor, *, out: Tensor) -> None:
    """Check the arguments of the operator with out=."""
    _check_bytes(packed, bits, offsets)
    _check_is_tensor(out)
    length = out.shape[1] if out.dim() == 2 else 0
    _check_out(out, torch.uint8, (bits.shape[0], length), packed)
    _check_rows(bits, offsets, length, packed.shape[0], written=False)
    _check_apart(out, packed=packed, bits=bits, offsets=offsets)


def _check_bytes(packed: Tensor, bits: Tensor, offsets: Tensor) -> None:
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise TypeError(f"packed must be a uint8 tensor [bytes], got {describe(packed)}")
    rows = bits.numel() if isinstance(bits, Tensor) else 0
    check_vector("bits", bits, torch.uint8, rows, packed)
    check_vector("offsets", offsets, torch.int64, rows, packed)


def _check_rows(bits: Tensor, offsets: Tensor, length: int, packed_bytes: int, written: bool) -> None:
    """Raise unless rows lie inside of the packed bytes and, if they are written, apart from each other."""
    if not readable(bits):
        return
    check_bits(bits)
    places = []
    for row, (width, offset) in enumerate(zip(bits.tolist(), offsets.tolist(), strict=True)):
        size = (length * width + 7) // 8
        if not 0 <= offset <= packed_bytes - size:
            raise ValueError(
                f"row {row} of {length} codes of {width} bits at byte {offset} does not fit into {packed_bytes} bytes"
            )
        if size:
            places.append((offset, offset + size))
    places.sort(key=lambda place: place[0])
    for (_, end), (begin, _) in itertools.pairwise(places):
        if written and begin < end:
            raise ValueError(f"rows overlap at byte {begin}")


def _check_pair(name: str, pair: tuple[int, int], least: int) -> None:
    if not (isinstance(pair, (tuple, list)) and all(isinstance(n, (Integral, torch.SymInt)) for n in pair)):
        raise TypeError(f"{name} must be two ints, got {pair!r}")
    if len(pair) != 2 or not (least <= min(pair) and max(pair) < _LIMIT):
        raise ValueError(f"{name} must be two numbers from {least} to {_LIMIT - 1}, got {list(pair)}")


def _check_tensor(name: str, t: Tensor, dtype: torch.dtype, shape: Sequence[int], x: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype != dtype or not _is_shape(t, shape):
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {describe(t)}")
    _check_device(name, t, x)


def output_size(
    size: Sequence[Any], kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool = False
) -> list[Any]:
    """Return how often a window finds a place along each of some dimensions, as convolutions and pooling count."""
    sizes = []
    for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True):
        places = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
        # A window must begin before the padding on its right.
        sizes.append(places - 1 if ceil_mode and (places - 1) * s >= n + p else places)
    return sizes


def max_pool_codes(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> None:
    """Check the arguments of the operator."""
    if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.dim() != 4:
        raise TypeError(f"x must be a uint8 tensor [N, C, H, W], got {describe(x)}")
    _check_pair("kernel_size", kernel_size, 1)
    _check_pair("stride", stride, 1)
    _check_pair("padding", padding, 0)
    _check_pair("dilation", dilation, 1)
    padded = [x.shape[2 + i] + 2 * padding[i] for i in (0, 1)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    small = all(_holds(n < _LIMIT) for n in x.shape[1:])
    if small and not all(_holds(p >= r) for p, r in zip(padded, reach, strict=True)):
        raise ValueError(f"the window {list(kernel_size)} is larger than the padded input {list(x.shape)}")

    def size() -> list[Any]:  # of what is small enough
        return output_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)

    if not (
        small
        and _holds(padded[0] * padded[1] < _LIMIT)
        and _holds(2 * padded[1] * x.shape[1] < _WINDOW_BYTES)
        and _holds(_product((*x.shape[:2], *size())) < _OUTPUTS)
    ):
        raise ValueError(
            f"x {list(x.shape)} with the padding {list(padding)} or the window {list(kernel_size)} with the stride "
            f"{list(stride)} is too large"
        )


def conv2d_integer(
    x: Tensor,
    weight: Tensor,
    zero_sums: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    low_bytes: int,
    span: int | None,
    negative_slope: float,
    upper: float | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero_point: Tensor | None,
    out_scale: Sequence[Tensor] | None,
    out_zero_point: Sequence[Tensor] | None,
    out_bits: Sequence[Tensor] | None,
    out_starts: Sequence[Tensor] | None,
    out_bytes: Sequence[int] | None,
    dtype: int | torch.dtype | None,
) -> None:
    """Check the arguments of the operator."""
    if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.dim() != 4:
        raise TypeError(f"x must be a uint8 tensor [N, C, H, W], got {describe(x)}")
    _check_pair("kernel_size", kernel_size, 1)
    _check_pair("stride", stride, 1)
    _check_pair("padding", padding, 0)
    _check_pair("dilation", dilation, 1)
    span = panels.NIBBLES if span is None else span
    for name, number in (("groups", groups), ("low_bytes", low_bytes), ("span", span)):
        if not isinstance(number, int):
            raise TypeError(f"{name} must be an int, got {type(number).__name__}")
    outputs = scale.numel() if isinstance(scale, Tensor) else 0
    channels, rows, columns = x.shape[1], x.shape[2], x.shape[3]
    if low_bytes and (not 0 < low_bytes <= channels or low_bytes % 4 or channels % 4 or groups != 1):
        raise ValueError(f"x {list(x.shape)} with {low_bytes} low bytes and {groups} groups holds no packed codes")
    if groups < 1 or channels < 1 or channels % groups or outputs % groups:
        raise ValueError(f"{channels} input and {outputs} output channels do not make {groups} groups")

    padded = (rows + 2 * padding[0], columns + 2 * padding[1])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    small = all(_holds(n < _LIMIT) for n in (channels, rows, columns, outputs))
    if small and not all(_holds(p >= r) for p, r in zip(padded, reach, strict=True)):
        raise ValueError(f"the kernel {list(kernel_size)} is larger than the padded input {list(x.shape)}")
    size = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    codes = 2 * channels if low_bytes else channels
    words = -(-(codes // groups) // panels.CHANNELS)
    if not (
        small
        and _holds(padded[0] * padded[1] < _LIMIT)
        and _holds(reach[0] * padded[1] * codes < _WINDOW_BYTES)
        and kernel_size[0] * kernel_size[1] * words < _LIMIT
        and _holds(_product((x.shape[0], *size, outputs)) < _OUTPUTS)
    ):
        raise ValueError(
            f"x {list(x.shape)} with the padding {list(padding)}, the kernel {list(kernel_size)} with the dilation "
            f"{list(dilation)} or {outputs} outputs are too large"
        )
    check_vector("scale", scale, torch.float32, outputs, x)
    check_vector("bias", bias, torch.float32, outputs, x)

    shape = panels.shape_of_panels(outputs, kernel_size, codes // groups, groups)
    _check_tensor("weight", weight, torch.int8, shape, x)
    if zero_sums is not None:
        _check_tensor("zero_sums", zero_sums, torch.int32, (kernel_size[0] * kernel_size[1], outputs), x)
    if span == 0 or abs(span) > _LIMIT:
        raise ValueError(f"span must be 1 to {_LIMIT} or, of nibbles, negative, got {span}")
    if not math.isfinite(negative_slope):
        raise ValueError(f"negative_slope must be finite, got {negative_slope:g}")
    if upper is not None and math.isnan(upper):
        raise ValueError("upper must be a number, got nan")
    if residual is not None:
        _check_tensor("residual", residual, torch.uint8, (x.shape[0], outputs, *size), x)
        if residual_scale is None or residual_zero_point is None:
            raise ValueError("residual needs residual_scale and residual_zero_point")
        _check_quantizer(x, outputs, residual_scale, residual_zero_point, None)
    lists = tuple(given or () for given in (out_scale, out_zero_point, out_bits, out_starts, out_bytes))
    lengths = [len(given) for given in lists]
    if len(set(lengths)) > 1:
        *first, last = lengths
        raise ValueError(
            "out_scale, out_zero_point, out_bits, out_starts and out_bytes must have an item for each output of "
            f"codes, got {', '.join(map(str, first))} and {last}"
        )
    count = lengths[0] + (dtype is not None)
    if not 0 < count <= 2:
        raise ValueError(f"there are one or two outputs, got {count}")
    if dtype is not None:
        floating_dtype(dtype)
    whole_octets = panels.whole_octets(outputs, codes // groups, groups)
    for i, (scales, zero_points, bits, starts, packed) in enumerate(zip(*lists, strict=True)):
        _check_quantizer(x, outputs, scales, zero_points, bits)
        check_vector("bits", bits, torch.uint8, outputs, x, or_one=True)
        if not isinstance(starts, Tensor):
            raise TypeError(f"out_starts[{i}] must be a tensor, got {type(starts).__name__}")
        if not starts.numel():
            continue
        octets = -(-outputs // panels.OCTET)
        check_vector(f"out_starts[{i}]", starts, torch.int32, octets + 1, x)
        if not 4 * octets <= packed < _LIMIT or packed % 4 or not whole_octets:
            raise ValueError(f"{outputs} outputs in {groups} groups are not packed in {packed} bytes")
        if readable(starts) and not _are_starts(starts, bits.expand(outputs), octets, packed):
            raise ValueError(f"out_starts[{i}] are not those of out_bits[{i}] in {packed} bytes")


def _are_starts(starts: Tensor, bits: Tensor, octets: int, size: int) -> bool:
    """Tell whether each octet has the bytes that its high nibbles need."""
    high = torch.nn.functional.pad(bits > 4, (0, octets * panels.OCTET - len(bits))).view(octets, panels.OCTET)
    ends = 4 * octets + ((high.sum(1) + 1) // 2).cumsum(0)
    begins = [4 * octets, *ends.tolist()]
    return begins[-1] <= size and starts.tolist() == [*begins[:-1], size]
