"""Bad arguments raise before anything runs, and the message tells the value."""

# ruff: noqa: E501  # a table reads best with a case a line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.backends import NATIVE, Backend
from ptq4cuda import ops

X = torch.randn(2, 5, 3, 4)
SCALE, ZERO = torch.ones(5), torch.zeros(5, dtype=torch.int32)
BITS = torch.full((5,), 4, dtype=torch.uint8)
PACKED = torch.zeros(2, 3, 4, 3, dtype=torch.uint8)
CODES = torch.zeros(3, 9, dtype=torch.uint8)
WIDTH = torch.tensor([2, 5, 8], dtype=torch.uint8)


def scale_with(value: float) -> Tensor:
    scale = SCALE.clone()
    scale[3] = value
    return scale


BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("x dtype", lambda: ops.quantize(X.double(), SCALE, ZERO, BITS), TypeError, "x must be .* torch.float64 .2, 5, 3, 4"),
    ("x kind", lambda: ops.quantize([1.0], SCALE, ZERO, BITS), TypeError, "x must be .*, got list"),  # type: ignore[arg-type]
    ("axis", lambda: ops.quantize(X, SCALE, ZERO, BITS, 4), ValueError, r"axis 4 is out of range .*\[2, 5, 3, 4\]"),
    ("axis -5", lambda: ops.channel_statistics(X, -5), ValueError, r"axis -5 is out of range"),
    ("axis kind", lambda: ops.channel_statistics(X, 1.0), TypeError, "axis must be an int, got float"),  # type: ignore[arg-type]
    ("axis of 0-d", lambda: ops.channel_statistics(torch.tensor(1.0), 1), ValueError, "axis 1 is out of range"),
    ("scale length", lambda: ops.fake_quantize(X, SCALE[:4], ZERO, BITS), ValueError, r"scale .*\[5\] or \[1\], got \[4\]"),
    ("scale shape", lambda: ops.fake_quantize(X, SCALE[None], ZERO, BITS), ValueError, r"scale .* got \[1, 5\]"),
    ("scale dtype", lambda: ops.fake_quantize(X, SCALE.double(), ZERO, BITS), TypeError, "scale must be torch.float32, got torch.float64"),
    ("scale zero", lambda: ops.fake_quantize(X, scale_with(0.0), ZERO, BITS), ValueError, r"scale\[3\] is 0"),
    ("scale negative", lambda: ops.fake_quantize(X, scale_with(-2.0), ZERO, BITS), ValueError, r"scale\[3\] is -2"),
    ("scale NaN", lambda: ops.fake_quantize(X, scale_with(float("nan")), ZERO, BITS), ValueError, r"scale\[3\] is nan"),
    ("scale Inf", lambda: ops.fake_quantize(X, scale_with(float("inf")), ZERO, BITS), ValueError, r"scale\[3\] is inf"),
    ("scale denormal", lambda: ops.fake_quantize(X, scale_with(1e-40), ZERO, BITS), ValueError, r"scale\[3\] is .*e-41"),
    ("scale number", lambda: ops.fake_quantize(X, 0.0, 0, 4), ValueError, "scale must be positive and finite, got 0.0"),
    ("scale number", lambda: ops.fake_quantize(X, float("nan"), 0, 4), ValueError, "scale must be .* got nan"),
    ("zero point dtype", lambda: ops.quantize(X, SCALE, ZERO.long(), BITS), TypeError, "zero_point must be torch.int32, got torch.int64"),
    ("zero point length", lambda: ops.quantize(X, SCALE, ZERO[:2], BITS), ValueError, r"zero_point .* got \[2\]"),
    ("zero point size", lambda: ops.quantize(X, SCALE, ZERO + (1 << 23), BITS), ValueError, "zero_point must be .*4194304, got 8388608"),
    ("bits dtype", lambda: ops.quantize(X, SCALE, ZERO, BITS.int()), TypeError, "bits must be torch.uint8, got torch.int32"),
    ("bits range", lambda: ops.quantize(X, SCALE, ZERO, BITS + 5), ValueError, "bits must be 0 to 8, got 9"),
    ("bits number", lambda: ops.quantize(X, SCALE, ZERO, 9), ValueError, "bits must be 0 to 8, got 9"),
    ("bits negative", lambda: ops.quantize(X, SCALE, ZERO, -1), ValueError, "bits must be 0 to 8, got -1"),
    ("bits kind", lambda: ops.quantize(X, SCALE, ZERO, 4.0), TypeError, "bits must be a tensor, got float"),  # type: ignore[arg-type]
    ("device", lambda: ops.quantize(X, SCALE.to("meta"), ZERO, BITS), ValueError, "scale is on meta, .* on cpu"),
    ("out dtype", lambda: ops.quantize(X, SCALE, ZERO, BITS, out=torch.empty_like(X)), ValueError, r"out must be torch.uint8 \[2, 5, 3, 4\] .* got torch.float32"),
    ("out shape", lambda: ops.fake_quantize(X, SCALE, ZERO, BITS, out=X[:1]), ValueError, r"out must be .* \[2, 5, 3, 4\] .*\[1, 5, 3, 4\]"),
    ("pack dims", lambda: ops.quantize_pack(X[0, 0, 0], 1.0, 0, 0), ValueError, r"x must have the shape \[N, C, .*\], got \[4\]"),
    ("pack axis", lambda: ops.quantize_pack(X, 1.0, 0, 2), ValueError, "axis must be 0 or 1, got 2"),
    ("pack out", lambda: ops.quantize_pack(X, SCALE, ZERO, out=PACKED[:1]), ValueError, r"out must be .*\[2, 3, 4, 3\] on cpu, got torch.uint8 \[1, 3, 4, 3\]"),
    ("unpack dtype", lambda: ops.unpack_dequantize(PACKED.int(), SCALE, ZERO, 5), TypeError, "packed must be .* got torch.int32"),
    ("unpack channels", lambda: ops.unpack_dequantize(PACKED, 1.0, 0, 7), ValueError, r"channels is 7, .*\[2, 3, 4, 3\]"),
    ("unpack to", lambda: ops.unpack_dequantize(PACKED, SCALE, ZERO, 5, dtype=torch.int8), TypeError, "dtype must be .* got torch.int8"),
    ("unpack axis", lambda: ops.unpack_dequantize(PACKED, SCALE, ZERO, 5, 3), ValueError, "axis must be 0 or 1, got 3"),
    ("unpack out", lambda: ops.unpack_dequantize(PACKED, SCALE, ZERO, 5, out=X[:, :4]), ValueError, r"out must be .*\[2, 5, 3, 4\], got .*\[2, 4, 3, 4\]"),
    ("unpack strides", lambda: ops.unpack_dequantize(PACKED, SCALE, ZERO, 5, out=X.clone().transpose(2, 3).contiguous().transpose(2, 3)), ValueError, "strides are"),
    ("centre dtype", lambda: ops.channel_statistics(X, 1, SCALE), TypeError, "centre must be torch.float64, got torch.float32"),
    ("centre shape", lambda: ops.channel_statistics(X, 1, SCALE.double()[:1]), ValueError, r"centre .*\[5\], got \[1\]"),
    ("bins zero", lambda: ops.channel_histogram(X, -SCALE, SCALE, 0), ValueError, "bins must be 1 to 4096, got 0"),
    ("bins many", lambda: ops.channel_histogram(X, -SCALE, SCALE, 4097), ValueError, "bins must be 1 to 4096, got 4097"),
    ("bins kind", lambda: ops.channel_histogram(X, -SCALE, SCALE, 2.0), TypeError, "bins must be an int, got float"),  # type: ignore[arg-type]
    ("low dtype", lambda: ops.channel_histogram(X, -SCALE.double(), SCALE, 8), TypeError, "low must be torch.float32, got torch.float64"),
    ("low kind", lambda: ops.channel_histogram(X, [0.0], SCALE, 8), TypeError, "low must be a tensor, got list"),  # type: ignore[arg-type]
    ("high length", lambda: ops.channel_histogram(X, -SCALE, SCALE[:4], 8), ValueError, r"high .*\[5\] or \[1\], got \[4\]"),
    ("high device", lambda: ops.channel_histogram(X, -SCALE, SCALE.to("meta"), 8), ValueError, "high is on meta, .* on cpu"),
    ("low above high", lambda: ops.channel_histogram(X, scale_with(1.5), SCALE, 8), ValueError, r"low\[3\] is 1.5, high\[3\] is 1"),
    ("low above one", lambda: ops.channel_histogram(X, scale_with(1.5), 1.0, 8), ValueError, r"low\[3\] is 1.5, high\[3\] is 1"),
    ("low NaN", lambda: ops.channel_histogram(X, float("nan"), 1.0, 8), ValueError, r"low\[0\] is nan, high\[0\] is 1"),
    ("high NaN", lambda: ops.channel_histogram(X, 0.0, scale_with(float("nan")), 8), ValueError, r"high\[3\] is nan"),
    ("histogram axis", lambda: ops.channel_histogram(X, 0.0, 1.0, 8, 4), ValueError, "axis 4 is out of range"),
    ("histogram x", lambda: ops.channel_histogram(X.long(), 0.0, 1.0, 8), TypeError, "x must be .* torch.int64"),
    ("codes dtype", lambda: ops.pack_codes(CODES.int(), WIDTH), TypeError, r"codes must be .* got torch.int32 \[3, 9\]"),
    ("codes too wide", lambda: ops.pack_codes(CODES + 7, WIDTH), ValueError, "codes has 7 in row 0, which has 2 bits"),
    ("codes bits", lambda: ops.pack_codes(CODES, WIDTH + 1), ValueError, "bits must be 0 to 8, got 9"),
    ("codes rows", lambda: ops.pack_codes(CODES, WIDTH[:2]), ValueError, r"bits must have the shape \[3\], got \[2\]"),
    ("codes out", lambda: ops.pack_codes(CODES, WIDTH, out=CODES[0]), ValueError, r"out must be contiguous uint8 \[18\] on cpu, got torch.uint8 \[9\]"),
    ("bytes out", lambda: ops.unpack_codes(torch.zeros(18, dtype=torch.uint8), WIDTH, 9, out=CODES[:, ::2]), ValueError, r"out must be contiguous uint8 \[3, 9\]"),
    ("bytes kind", lambda: ops.unpack_codes(CODES, WIDTH, 9), TypeError, r"packed must be .* got torch.uint8 \[3, 9\]"),
    ("bytes length", lambda: ops.unpack_codes(CODES[0], WIDTH, 9), ValueError, "packed has 9 bytes; 3 rows of 9 codes take 18"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# What a direct call of torch.ops could still do: the native code checks what its memory accesses depend on.
DIRECT: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("fake_quantize", (X.double(), SCALE, ZERO, BITS, 1), {}),
    ("fake_quantize", (X, SCALE[:3], ZERO, BITS, 1), {}),
    ("fake_quantize", (X, SCALE, ZERO.long(), BITS, 1), {}),
    ("fake_quantize", (X, SCALE, ZERO, BITS[:2], 1), {}),
    ("quantize", (X, SCALE, ZERO, BITS, 4), {}),
    ("quantize", (X, SCALE, ZERO, BITS, -5), {}),
    ("quantize", (X, SCALE, ZERO, BITS, 1), {"out": torch.empty(2, 5, 3, 3, dtype=torch.uint8)}),
    ("quantize", (X, SCALE, ZERO, BITS, 1), {"out": torch.empty(2, 5, 3, 4)}),
    ("fake_quantize", (X, SCALE, ZERO, BITS, 1), {"out": torch.empty(2, 4, 3, 5).transpose(1, 3)}),
    ("quantize_pack", (X[0, 0, 0], SCALE[:1], ZERO[:1], 0), {}),
    ("quantize_pack", (X, SCALE, ZERO, 2), {}),
    ("quantize_pack", (X, SCALE, ZERO, 1), {"out": PACKED[:, :, :, :2]}),
    ("unpack_dequantize", (PACKED, SCALE, ZERO, 1, 7, torch.float32), {}),
    ("unpack_dequantize", (PACKED, SCALE, ZERO, 1, 5, torch.int32), {}),
    ("unpack_dequantize", (PACKED, SCALE[:4], ZERO, 1, 5, torch.float32), {}),
    ("unpack_dequantize", (PACKED, SCALE, ZERO, 1), {"out": torch.empty(2, 5, 3, 5)}),
    ("channel_statistics", (X, 1, SCALE), {}),
    ("channel_statistics", (X, 1, SCALE.double()[:4]), {}),
    ("channel_histogram", (X.double(), -SCALE, SCALE, 8, 1), {}),
    ("channel_histogram", (X, -SCALE[:4], SCALE, 8, 1), {}),
    ("channel_histogram", (X, -SCALE, SCALE[None], 8, 1), {}),
    ("channel_histogram", (X, -SCALE, SCALE.double(), 8, 1), {}),
    ("channel_histogram", (X, -SCALE, SCALE, 0, 1), {}),
    ("channel_histogram", (X, -SCALE, SCALE, 4097, 1), {}),
    ("channel_histogram", (X, -SCALE, SCALE, 8, 4), {}),
    ("pack_codes", (CODES[0], WIDTH, torch.zeros(3, dtype=torch.int64), 18), {}),
    ("pack_codes", (CODES, WIDTH[:2], torch.zeros(3, dtype=torch.int64), 18), {}),
    ("pack_codes", (CODES, WIDTH, torch.zeros(2, dtype=torch.int64), 18), {}),
    ("pack_codes", (CODES, WIDTH, torch.zeros(3, dtype=torch.int64), -1), {}),
    ("unpack_codes", (CODES, WIDTH, torch.zeros(3, dtype=torch.int64), 9), {}),
    ("unpack_codes", (CODES[0], WIDTH, torch.zeros(3, dtype=torch.int64), -1), {}),
    ("pack_codes", (CODES, WIDTH, torch.zeros(3, dtype=torch.int64)), {"out": CODES}),
    ("pack_codes", (CODES, WIDTH, torch.zeros(3, dtype=torch.int64)), {"out": CODES[:, 0]}),
    ("unpack_codes", (CODES[0], WIDTH, torch.zeros(3, dtype=torch.int64)), {"out": CODES[:2]}),
    ("unpack_codes", (CODES[0], WIDTH, torch.zeros(3, dtype=torch.int64)), {"out": CODES[:, ::2]}),
    ("unpack_codes", (CODES[0], WIDTH, torch.zeros(3, dtype=torch.int64)), {"out": CODES.int()}),
]


@pytest.mark.parametrize("which", NATIVE)
@pytest.mark.parametrize(("op", "arguments", "named"), DIRECT, ids=[str(i) for i in range(len(DIRECT))])
def test_direct_calls_are_checked(
    request: pytest.FixtureRequest, which: str, op: str, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    backend: Backend = request.getfixturevalue(which)
    with pytest.raises(RuntimeError, match=op):
        getattr(backend, op)(*arguments, **named)
