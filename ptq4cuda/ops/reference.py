"""Every operator once more in plain PyTorch: the specification that the CPU and CUDA kernels are tested against.

It runs on any device and also serves where no kernel is built. Signatures are those of the operators; arguments
have been checked by ops.checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq4cuda.ops import checks, nibbles
from ptq4cuda.ops.panels import weight_of_panels

# Columns of channel_statistics.
STATISTICS = ("count", "min", "max", "mean", "m2", "absdev", "positive")


def _along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """View a vector of length C or 1 so that it broadcasts along `axis` of x."""
    if x.dim() == 0 or parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.view(shape)


def _qmax(bits: Tensor) -> Tensor:
    return (torch.ones_like(bits, dtype=torch.int32) << bits.to(torch.int32)).float() - 1.0


def _unclamped_codes(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return rint(x / scale) + zero_point as float32."""
    return torch.round(x.float() * _along(1.0 / scale, x, axis)) + _along(zero_point, x, axis).float()


def _float_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int) -> Tensor:
    """Return clamp(rint(x / scale) + zero_point, 0, 2^bits - 1) as float32, NaN for NaN."""
    codes = _unclamped_codes(x, scale, zero_point, axis)
    return torch.minimum(codes.clamp_min(0.0), _along(_qmax(bits), x, axis))


def inside_clip_range(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int) -> Tensor:
    """Return where x is rounded but not clipped, bool, x's shape: where the straight-through gradient is one."""
    codes = _unclamped_codes(x, scale, zero_point, axis)
    return (codes >= 0) & (codes <= _along(_qmax(bits), x, axis))


def _zero_codes(zero_point: Tensor, bits: Tensor) -> Tensor:
    """Return the codes whose values are nearest to zero, float32 [C] or [1]."""
    return torch.minimum(zero_point.float().clamp_min(0.0), _qmax(bits))


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int) -> Tensor:
    """Quantize and dequantize; NaN stays NaN."""
    codes = _float_codes(x, scale, zero_point, bits, axis)
    values = (codes - _along(zero_point, x, axis).float()) * _along(scale, x, axis)
    return torch.empty_like(x).copy_(values)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int) -> Tensor:
    """Return uint8 codes; NaN becomes the zero point."""
    codes = _float_codes(x, scale, zero_point, bits, axis)
    codes = torch.where(codes.isnan(), _along(_zero_codes(zero_point, bits), x, axis), codes)
    return torch.empty_like(x, dtype=torch.uint8).copy_(codes)


def quantize_pack(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """[N, C, *spatial] to packed 4-bit codes, uint8 [N, *spatial, ceil(C / 2)]."""
    four = torch.full_like(zero_point, 4, dtype=torch.uint8)
    axis = axis % x.dim()
    codes = quantize(x, scale, zero_point, four, axis)
    if x.shape[1] % 2:
        pad = _zero_codes(zero_point, four).to(torch.uint8)
        # The pad code of the last channel, or of each sample where the quantizers lie along dimension 0.
        pad = _along(pad if axis == 0 else pad[-1:], x, 0).expand_as(codes[:, :1])
        codes = torch.cat([codes, pad], dim=1)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).movedim(1, -1).contiguous()


def unpack_dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor, axis: int, channels: int, dtype: int | torch.dtype
) -> Tensor:
    """Packed 4-bit codes, uint8 [N, *spatial, ceil(C / 2)], to values [N, C, *spatial], channels innermost."""
    out = packed.new_empty((*packed.shape[:-1], channels), dtype=checks.floating_dtype(dtype)).movedim(-1, 1)
    if not out.numel():  # sizes that are not zero may have no double
        return out
    codes = torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten(-2)[..., :channels].movedim(-1, 1)
    axis = axis % codes.dim()
    values = (codes.float() - _along(zero_point, codes, axis).float()) * _along(scale, codes, axis)
    return out.copy_(values)


def _rows(x: Tensor, axis: int) -> Tensor:
    """Return the values of each channel as a row."""
    if not x.numel():  # sizes that are not zero may have no product
        return x.new_empty((x.shape[axis], 0))
    return x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.reshape(-1, 1)


def channel_statistics(x: Tensor, axis: int, centre: Tensor | None = None) -> Tensor:
    """Return float64 [C, 7]: count, min, max, mean, m2, absdev, positive of each channel."""
    rows = _rows(x, axis).double()
    channels, count = rows.shape
    out = rows.new_zeros((channels, len(STATISTICS)))
    if count == 0:
        out[:, 1], out[:, 2] = torch.inf, -torch.inf
        return out
    mean = rows.mean(1)
    about = mean if centre is None else centre
    columns = [
        torch.full_like(mean, count),
        rows.amin(1),
        rows.amax(1),
        mean,
        (rows - mean[:, None]).square().sum(1),
        (rows - about[:, None]).abs().mean(1),
        (rows > 0).double().mean(1),
    ]
    return torch.stack(columns, dim=1, out=out)


def channel_histogram(x: Tensor, low: Tensor, high: Tensor, bins: int, axis: int) -> Tensor:
    """Return how many values of each channel are in each of `bins` bins from low to high, int64 [C, bins]."""
    rows = _rows(x, axis).float()
    span = high - low
    factor = torch.full_like(span, bins) / span  # not bins / span, which is rounded twice
    factor = torch.where((span > 0) & factor.isfinite(), factor, 0.0)
    place = (rows - low[:, None]) * factor[:, None]
    place = place.nan_to_num(0.0).floor().clamp(0, bins - 1)
    counts = torch.zeros((rows.shape[0], bins), dtype=torch.int64, device=x.device)
    return counts.scatter_add_(1, place.to(torch.int64), (~rows.isnan()).to(torch.int64))


def pack_codes(codes: Tensor, bits: Tensor, offsets: Tensor, packed_bytes: int) -> Tensor:
    """Pack row r of uint8 codes [rows, length] with bits[r] bits a code, lowest bit first, at byte offsets[r]."""
    packed = codes.new_zeros(packed_bytes)
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    for row, width, offset in zip(codes, bits.tolist(), offsets.tolist(), strict=True):
        stream = (row[:, None] >> place[:width]) & 1
        stream = torch.nn.functional.pad(stream.flatten(), (0, -stream.numel() % 8)).view(-1, 8)
        packed[offset : offset + len(stream)] = (stream << place).sum(1).to(torch.uint8)
    return packed


def unpack_codes(packed: Tensor, bits: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Return the uint8 codes [rows, length] that pack_codes packed."""
    codes = packed.new_zeros((bits.numel(), length))
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    for row, width, offset in zip(codes, bits.tolist(), offsets.tolist(), strict=True):
        stream = packed[offset : offset + (length * width + 7) // 8]
        stream = ((stream[:, None] >> place) & 1).flatten()[: length * width].view(length, width)
        row.copy_((stream << place[:width]).sum(1))
    return codes


def max_pool_codes(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    """Take the largest code of each window: rows first, then columns, as maxima of shifted views."""
    sizes = checks.output_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    if not x.numel():
        return x.new_zeros((x.shape[0], *sizes, x.shape[1])).movedim(-1, 1)
    for dim, size, k, s, p, d in zip((2, 3), sizes, kernel_size, stride, padding, dilation, strict=True):
        last = s * (size - 1) + d * (k - 1) + 1  # places that windows see, the padding included
        around = (p, max(0, last - p - x.shape[dim]))
        x = torch.nn.functional.pad(x, (0, 0, *around) if dim == 2 else around)  # zero is the least code
        views = [x.narrow(dim, d * i, s * (size - 1) + 1) for i in range(k)]
        views = [v[:, :, ::s] if dim == 2 else v[:, :, :, ::s] for v in views]
        x = views[0]
        for view in views[1:]:
            x = torch.maximum(x, view)
    y = x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return y.copy_(x)


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
) -> list[Tensor]:
    """Convolve codes with integer weights; values, or the codes of the next layer, channels innermost in memory."""
    size = checks.output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    shape = (x.shape[0], scale.numel(), *size)
    inside = torch.ones_like(x[:1, :1], dtype=torch.float64)
    if low_bytes:  # every nibble is a channel
        weight = nibbles.weight_of_panels(weight, scale.numel(), kernel_size, low_bytes)
        x = nibbles.split(x)
        x[:, 2 * low_bytes :] *= 16
    else:
        weight = weight_of_panels(weight, scale.numel(), kernel_size, x.shape[1] // groups, groups)
    if not x.numel() or not scale.numel():  # there is nothing to sum, which torch.conv2d refuses
        sums = torch.zeros(shape, dtype=torch.float64, device=x.device)
    else:  # float64 adds integers exactly up to 2^53
        sums = torch.conv2d(x.double(), weight.movedim(-1, 1).double(), None, stride, padding, dilation, groups)
        if zero_sums is not None:  # the share of the zero points, of those taps that are inside of the image
            kernel = zero_sums.t().reshape(-1, 1, *kernel_size).double()
            sums = sums - torch.conv2d(inside, kernel, None, stride, padding, dilation)
    sums = sums.to(torch.int64).to(torch.int32)  # those that do not fit wrap around
    y = sums.float() * _along(scale, x, 1) + _along(bias, x, 1)
    if residual is not None:
        assert residual_scale is not None and residual_zero_point is not None
        y = y + (residual.float() - _along(residual_zero_point, x, 1).float()) * _along(residual_scale, x, 1)
    low = torch.zeros_like(y) if negative_slope == 0 else negative_slope * y  # zeros of a ReLU are positive
    y = torch.where(y > 0, y, low).clamp_max(math.inf if upper is None else upper)

    outputs = [] if dtype is None else [y.to(checks.floating_dtype(dtype))]
    coded = (out_scale, out_zero_point, out_bits, out_starts, out_bytes)
    for scale, zero_point, bits, starts, n in zip(*(given or () for given in coded), strict=True):
        codes = quantize(y, scale, zero_point, bits, 1)
        outputs.append(nibbles.pack(codes, bits.expand(y.shape[1]), starts, n) if starts.numel() else codes)
    return [out.movedim(1, -1).contiguous().movedim(-1, 1) for out in outputs]
