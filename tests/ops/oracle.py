"""What the operators must return, once more, value by value, in numpy and Python integers; and awkward tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptq4cuda.ops.nibbles import Nibbles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Shapes for what is measured of each channel.
OF_CHANNELS = [
    (1, 3, 8, 8),
    (2, 5, 7, 6),
    (3, 8, 1, 1),
    (1, 1, 9, 33),
    (2, 300, 3, 3),
    (4, 33),
    (2, 16, 5),
    (5,),
    (1,),
    (),
    (2, 3, 4, 5, 6),
    (70, 3, 5, 7),
    (3, 2, 40, 40),
    (2, 1, 101, 103),  # one channel, an odd number of values
    (40, 24, 6, 6),
    (9, 56, 7, 5),  # channels_last: blocks side by side, of vectors of channels
]
Array = npt.NDArray[Any]

# Values that a quantizer must survive, also half-way between two codes.
AWKWARD = (float("nan"), float("inf"), float("-inf"), 60000.0, -60000.0, 1e30, 1e-30, -0.0, 0.5, 1.5, 2.5, -0.5)


def outputs(
    *quantizers: Sequence[Tensor], layouts: Sequence[Nibbles | None] = (), values: torch.dtype | None = None
) -> dict[str, Any]:
    """Return what conv2d_integer is asked to return: values, and codes of quantizers, packed with a layout."""
    whole = torch.empty(0, dtype=torch.int32)
    packed = [
        (layout.starts, layout.bytes) if layout else (whole, 0) for layout in layouts or (None,) * len(quantizers)
    ]
    scales, zero_points, bits = ([quantizer[i] for quantizer in quantizers] for i in range(3))
    return {
        "out_scale": scales,
        "out_zero_point": zero_points,
        "out_bits": bits,
        "out_starts": [starts for starts, _ in packed],
        "out_bytes": [size for _, size in packed],
        "dtype": values,
    }


def typed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ops.conv2d_integer that are these of the operator."""
    given = dict(arguments)
    fields = [given.pop(f"out_{name}") for name in ("scale", "zero_point", "bits", "starts", "bytes")]
    values = [] if given["dtype"] is None else [None]
    quantizers = [SimpleNamespace(scale=s, zero_point=z, bits=b) for s, z, b, _, _ in zip(*fields, strict=True)]
    packed = [
        Nibbles(b, 0, size, starts) if starts is None or starts.numel() else None
        for _, _, b, starts, size in zip(*fields, strict=True)
    ]
    given["dtype"] = given["dtype"] or torch.float32
    return given | {"outputs": values + quantizers, "layouts": values + packed}


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Return random values, some awkward ones among them, in a memory layout."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 3
    places = torch.randperm(x.numel(), generator=generator)[: min(len(AWKWARD), x.numel() // 3)]
    x.view(-1)[places] = torch.tensor(AWKWARD)[: len(places)]
    return arrange(x.to(dtype), layout)


def arrange(x: Tensor, layout: str) -> Tensor:
    """Copy x into a memory layout."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":  # dense, in an order of dimensions that no memory format has
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "strided":  # with gaps
        return torch.stack([x, x], dim=-1)[..., 0]
    if layout == "misaligned":  # contiguous, from the second value of a storage on
        storage = torch.empty(x.numel() + 1, dtype=x.dtype)
        storage[1:] = x.flatten()
        return storage[1:].view(x.shape)
    raise ValueError(layout)


def layouts(shape: tuple[int, ...]) -> Iterator[str]:
    """Give the names of the layouts that differ for a shape."""
    yield "contiguous"
    yield "misaligned"
    if len(shape) >= 2:
        yield from ("channels_last", "permuted", "strided")


def quantizer(channels: int, seed: int = 0, bits: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return random scales, zero points and bits (0 to 8) of each channel."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=generator) + 0.05
    zero_point = torch.randint(-3, 18, (channels,), dtype=torch.int32, generator=generator)
    width = torch.randint(0, 9, (channels,), dtype=torch.uint8, generator=generator)
    return scale, zero_point, width if bits is None else torch.full_like(width, bits)


def _along(parameter: Tensor, ndim: int, axis: int) -> Array:
    shape = [1] * ndim
    if ndim and parameter.numel() > 1:
        shape[axis] = -1
    return parameter.numpy().reshape(shape)


def float_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int) -> Array:
    """Return float32 codes, NaN for NaN."""
    inverse = np.float32(1) / _along(scale, x.dim(), axis)
    top = (2.0 ** _along(bits, x.dim(), axis).astype(np.float32) - 1).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        code = np.rint(x.float().numpy() * inverse) + _along(zero_point, x.dim(), axis).astype(np.float32)
        return np.clip(code, np.float32(0), top)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int) -> Tensor:
    code = float_codes(x, scale, zero_point, bits, axis)
    top = 2 ** _along(bits, x.dim(), axis).astype(np.int64) - 1
    zero = np.clip(_along(zero_point, x.dim(), axis), 0, top)
    return torch.from_numpy(np.asarray(np.where(np.isnan(code), zero, code))).to(torch.uint8)


def dequantize(codes: Array, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    zero = _along(zero_point, codes.ndim, axis).astype(np.float32)
    with np.errstate(over="ignore"):
        values = (codes.astype(np.float32) - zero) * _along(scale, codes.ndim, axis)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, axis: int) -> Tensor:
    return dequantize(float_codes(x, scale, zero_point, bits, axis), scale, zero_point, axis, x.dtype)


def pack(codes: Tensor, pad: Tensor) -> Tensor:
    """Pack 4-bit codes [N, C, *spatial]; sample n of an odd C ends with the code pad[n]."""
    rows = np.moveaxis(codes.numpy(), 1, -1).astype(np.int64)
    if rows.shape[-1] % 2:
        last = np.broadcast_to(pad.numpy().reshape(-1, *[1] * (rows.ndim - 1)), (*rows.shape[:-1], 1))
        rows = np.concatenate([rows, last], axis=-1)
    return torch.from_numpy(rows[..., 0::2] + 16 * rows[..., 1::2]).to(torch.uint8).contiguous()


def pack_rows(codes: Tensor, bits: Tensor) -> bytes:
    """Pack rows of codes with Python's integers."""
    packed = b""
    for row, width in zip(codes.tolist(), bits.tolist(), strict=True):
        number = sum(code << (i * width) for i, code in enumerate(row))
        packed += number.to_bytes((len(row) * width + 7) // 8, "little")
    return packed


def statistics(x: Tensor, axis: int, centre: Tensor | None = None) -> Tensor:
    """Return count, min, max, mean, m2, absdev, positive of each channel of a finite tensor, in longdouble."""
    values = x.float().numpy().astype(np.longdouble)
    rows = np.moveaxis(values.reshape(values.shape or (1,)), axis, 0)
    rows = rows.reshape(rows.shape[0], -1)
    mean = rows.mean(1)
    about = mean if centre is None else centre.numpy().astype(np.longdouble)
    columns = [
        np.full(len(rows), rows.shape[1]),
        rows.min(1),
        rows.max(1),
        mean,
        ((rows - mean[:, None]) ** 2).sum(1),
        np.abs(rows - about[:, None]).mean(1),
        (rows > 0).mean(1),
    ]
    return torch.from_numpy(np.stack([c.astype(np.float64) for c in columns], axis=1))


def histogram(x: Tensor, low: Tensor, high: Tensor, bins: int, axis: int) -> Tensor:
    """Return int64 [C, bins], one channel after the other."""
    values = x.float().numpy()
    rows = np.moveaxis(values.reshape(values.shape or (1,)), axis, 0)
    counts = np.zeros((len(rows), bins), np.int64)
    for c, row in enumerate(rows):
        below, above = (limit.numpy()[c if len(limit) > 1 else 0] for limit in (low, high))
        with np.errstate(all="ignore"):
            factor = np.float32(bins) / (above - below) if above > below else np.float32(0)
            assert factor.dtype == np.float32
            numbers = row[~np.isnan(row)]
            place = np.floor((numbers - below) * (factor if np.isfinite(factor) else np.float32(0)))
        place[np.isnan(place)] = 0  # Inf times 0
        np.add.at(counts[c], np.clip(place, 0, bins - 1).astype(np.int64), 1)
    return torch.from_numpy(counts)


def same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and values; NaN equals NaN, and 0 is not -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


def guarded(
    shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...], offset: int
) -> tuple[Tensor, Tensor]:
    """Return a tensor inside a larger storage that is filled with 0x5a, and that storage as bytes.

    offset is the place of the tensor's first value, in values.
    """
    length = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
    raw = torch.full(((length + 2 * offset + 64) * dtype.itemsize,), 0x5A, dtype=torch.uint8)
    return raw.view(dtype).as_strided(shape, stride, offset), raw


def surroundings(x: Tensor, raw: Tensor) -> Tensor:
    """Return the bytes of a guarded, dense tensor's storage that do not belong to it."""
    begin = x.storage_offset() * x.dtype.itemsize
    return torch.cat([raw[:begin], raw[begin + x.numel() * x.dtype.itemsize :]])
