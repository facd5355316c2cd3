"""Bad arguments raise before anything runs, and the message tells the value."""

# ruff: noqa: E501  # a table reads best with a case a line

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only

from ops import oracle
from ops.backends import NATIVE, Backend
from ptq4cuda import ops
from ptq4cuda.ops import checks, panels

X = torch.randn(2, 5, 3, 4)
SCALE, ZERO = torch.ones(5), torch.zeros(5, dtype=torch.int32)
BITS = torch.full((5,), 4, dtype=torch.uint8)
PACKED = torch.zeros(2, 3, 4, 3, dtype=torch.uint8)
CODES = torch.zeros(3, 9, dtype=torch.uint8)
WIDTH = torch.tensor([2, 5, 8], dtype=torch.uint8)


ROWS = torch.tensor([0, 3, 9])


def gaps(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


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
    ("scale huge", lambda: ops.fake_quantize(X, 10**400, 0, 4), ValueError, "scale must be positive and finite, got 10000"),
    ("zero point huge", lambda: ops.quantize(X, 1.0, 10**400, 4), ValueError, "zero_point must be from -4194304 to 4194304"),
    ("out kind", lambda: ops.fake_quantize(X, SCALE, ZERO, BITS, out=[1.0]), TypeError, "out must be a tensor, got list"),  # type: ignore[arg-type]
    ("out gradient", lambda: ops.fake_quantize(torch.nn.Parameter(X), SCALE, ZERO, BITS, out=torch.empty_like(X)), ValueError, "out= records no gradient, which x requires"),
    ("quantize out", lambda: ops.quantize(X, SCALE, ZERO, BITS, out="x"), TypeError, "out must be a tensor, got str"),  # type: ignore[arg-type]
    ("pack out kind", lambda: ops.quantize_pack(X, SCALE, ZERO, out=3), TypeError, "out must be a tensor, got int"),  # type: ignore[arg-type]
    ("unpack out kind", lambda: ops.unpack_dequantize(PACKED, SCALE, ZERO, 5, out=3), TypeError, "out must be a tensor, got int"),  # type: ignore[arg-type]
    ("codes out kind", lambda: ops.pack_codes(CODES, WIDTH, out=3), TypeError, "out must be a tensor, got int"),  # type: ignore[arg-type]
    ("unpack channels kind", lambda: ops.unpack_dequantize(PACKED, 1.0, 0, 5.0), TypeError, "channels must be an int, got float"),  # type: ignore[arg-type]
    ("pack axis kind", lambda: ops.quantize_pack(X, 1.0, 0, 1.0), TypeError, "axis must be an int, got float"),  # type: ignore[arg-type]
    ("pack axis far", lambda: ops.quantize_pack(X, 1.0, 0, 4), ValueError, "axis must be 0 or 1, got 4"),
    ("low huge", lambda: ops.channel_histogram(X, -1e300, 1.0, 8), ValueError, "low must fit into float32, got -1e[+]300"),
    ("conv bias", lambda: convolve(bias=torch.full((5,), torch.nan)), ValueError, "bias contains NaN or Inf"),
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
    ("pack out gaps", lambda: ops.quantize_pack(X, SCALE, ZERO, out=gaps(PACKED)), ValueError, r"out must have the strides \[36, 12, 3, 1\], it has \[72, 24, 6, 2\]"),
    ("unpack dtype", lambda: ops.unpack_dequantize(PACKED.int(), SCALE, ZERO, 5), TypeError, "packed must be .* got torch.int32"),
    ("unpack channels", lambda: ops.unpack_dequantize(PACKED, 1.0, 0, 7), ValueError, r"channels is 7, .*\[2, 3, 4, 3\]"),
    ("unpack to", lambda: ops.unpack_dequantize(PACKED, SCALE, ZERO, 5, dtype=torch.int8), TypeError, "dtype must be .* got torch.int8"),
    ("unpack axis", lambda: ops.unpack_dequantize(PACKED, SCALE, ZERO, 5, 3), ValueError, "axis must be 0 or 1, got 3"),
    ("unpack out", lambda: ops.unpack_dequantize(PACKED, SCALE[:1], ZERO[:1], 5, out=torch.empty(2, 6, 3, 4)), ValueError, r"out must have 5 channels, its shape is \[2, 6, 3, 4\]"),
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
    ("codes out", lambda: ops.pack_codes(CODES, WIDTH, out=torch.empty(20, dtype=torch.uint8)), ValueError, "out must have 18 bytes, it has 20"),
    ("bytes out", lambda: ops.unpack_codes(torch.zeros(18, dtype=torch.uint8), WIDTH, 9, out=torch.empty(3, 8, dtype=torch.uint8)), ValueError, "out must have rows of 9 codes"),
    ("bytes kind", lambda: ops.unpack_codes(CODES, WIDTH, 9), TypeError, r"packed must be .* got torch.uint8 \[3, 9\]"),
    ("bytes bits", lambda: ops.unpack_codes(CODES[0], [2, 5, 8], 9), TypeError, "bits must be a tensor, got list"),  # type: ignore[arg-type]
    ("bytes many", lambda: ops.unpack_codes(CODES[0], WIDTH, 1 << 62), ValueError, "length must not be negative nor beyond all memory"),
    ("bytes fewer", lambda: ops.unpack_codes(CODES[0], WIDTH, -1), ValueError, "length must not be negative"),
    ("bytes number", lambda: ops.unpack_codes(CODES[0], WIDTH, 9.0), TypeError, "length must be an int, got float"),  # type: ignore[arg-type]
    ("bytes length", lambda: ops.unpack_codes(CODES[0], WIDTH, 9), ValueError, "packed has 9 bytes; 3 rows of 9 codes take 18"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- direct calls of the operators: the same sentence from every implementation --------------------------------------


STARTS = [torch.tensor([4, 4], dtype=torch.int32), torch.tensor([4, 8], dtype=torch.int32)]


def conv_arguments(**changes: Any) -> tuple[Any, ...]:
    """A 3x3 convolution from 6 to 5 channels, with everything that it can have."""
    arguments = {
        "x": torch.randint(0, 16, (2, 6, 5, 4), dtype=torch.uint8),
        "weight": panels.weight_panels(torch.ones(5, 3, 3, 6, dtype=torch.int8), 1),
        "zero_sums": torch.ones(9, 5, dtype=torch.int32),
        "scale": SCALE,
        "bias": SCALE,
        "kernel_size": (3, 3),
        "stride": (2, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "low_bytes": 0,
        "span": -8,
        "negative_slope": 0.0,
        "upper": 6.0,
        "residual": torch.zeros(2, 5, 3, 4, dtype=torch.uint8),
        "residual_scale": SCALE,
        "residual_zero_point": ZERO,
        "out_scale": [SCALE, SCALE],
        "out_zero_point": [ZERO, ZERO],
        "out_bits": [BITS, BITS + 2],
        "out_starts": STARTS,
        "out_bytes": [4, 8],
        "dtype": None,
    }
    return tuple({**arguments, **changes}.values())


def convolve(**changes: Any) -> Any:
    return ops.conv2d_integer(**oracle.typed(dict(zip(NAMES, conv_arguments(**changes), strict=True))))


NAMES = tuple(inspect.signature(checks.conv2d_integer).parameters)


Direct = tuple[str, tuple[Any, ...], dict[str, Any], str]


def conv(message: str, **changes: Any) -> Direct:
    return "conv2d_integer", conv_arguments(**changes), {}, message


BYTES = torch.zeros(18, dtype=torch.uint8)
DIRECT: list[Direct] = [
    ("fake_quantize", (X.double(), SCALE, ZERO, BITS, 1), {}, "x must be a float32, float16 or bfloat16 tensor, got torch.float64 [2, 5, 3, 4]"),
    ("fake_quantize", (X, SCALE[:3], ZERO, BITS, 1), {}, "scale must have the shape [5] or [1], got [3]"),
    ("fake_quantize", (X[:, :1], SCALE[:3], ZERO, BITS, 1), {}, "scale must have the shape [1], got [3]"),
    ("fake_quantize", (X, SCALE.bool(), ZERO, BITS, 1), {}, "scale must be torch.float32, got torch.bool"),
    ("fake_quantize", (X, SCALE, ZERO.long(), BITS, 1), {}, "zero_point must be torch.int32, got torch.int64"),
    ("fake_quantize", (X, SCALE, ZERO, BITS[:2], 1), {}, "bits must have the shape [5] or [1], got [2]"),
    ("quantize", (X, SCALE, ZERO, BITS, 4), {}, "axis 4 is out of range for x of shape [2, 5, 3, 4]"),
    ("quantize", (X, SCALE, ZERO, BITS, -(2**63)), {}, "axis -9223372036854775808 is out of range for x of shape [2, 5, 3, 4]"),
    ("quantize", (X, SCALE, ZERO, BITS, 1), {"out": torch.empty(2, 5, 3, 3, dtype=torch.uint8)}, "out must be torch.uint8 [2, 5, 3, 4] on "),
    ("quantize", (X, SCALE, ZERO, BITS, 1), {"out": torch.empty(2, 5, 3, 4)}, "out must be torch.uint8 [2, 5, 3, 4] on "),
    ("fake_quantize", (X, SCALE, ZERO, BITS, 1), {"out": torch.empty(2, 4, 3, 5).transpose(1, 3)}, "out must have the strides [60, 12, 4, 1], it has [60, 1, 5, 15]"),
    ("fake_quantize", (X, SCALE, ZERO, BITS, 1), {"out": torch.empty(1, 5, 3, 4).expand(2, 5, 3, 4)}, "out must have the strides [60, 12, 4, 1], it has [0, 12, 4, 1]"),
    ("quantize_pack", (X[0, 0, 0], SCALE[:1], ZERO[:1], 0), {}, "x must have the shape [N, C, *spatial], got [4]"),
    ("quantize_pack", (X, SCALE, ZERO, 2), {}, "axis must be 0 or 1, got 2"),
    ("quantize_pack", (X, SCALE, ZERO, 1), {"out": PACKED[:, :, :, :2]}, "out must be torch.uint8 [2, 3, 4, 3] on "),
    ("unpack_dequantize", (PACKED, SCALE, ZERO, 1, 7, torch.float32), {}, "channels is 7, which does not fit the packed shape [2, 3, 4, 3]"),
    ("unpack_dequantize", (PACKED, SCALE, ZERO, 1, -5, torch.float32), {}, "channels is -5, which does not fit the packed shape [2, 3, 4, 3]"),
    ("unpack_dequantize", (PACKED, SCALE, ZERO, 1, 2**63 - 1, torch.float32), {}, "channels is 9223372036854775807, which does not fit the packed shape [2, 3, 4, 3]"),
    ("unpack_dequantize", (PACKED, SCALE, ZERO, 1, 5, torch.int32), {}, "dtype must be float32, float16 or bfloat16, got torch.int32"),
    ("unpack_dequantize", (PACKED, SCALE[:4], ZERO, 1, 5, torch.float32), {}, "scale must have the shape [5] or [1], got [4]"),
    ("unpack_dequantize", (PACKED, SCALE, ZERO, 1), {"out": torch.empty(2, 5, 3, 5)}, "out must be floating point, with the channels of the packed shape [2, 3, 4, 3] on "),
    ("unpack_dequantize", (PACKED[0, 0, 0], SCALE, ZERO, 0, 5, torch.float32), {}, "packed must be a uint8 tensor [N, *spatial, ceil(C / 2)], got torch.uint8 [3]"),
    ("channel_statistics", (X, 1, SCALE), {}, "centre must be torch.float64, got torch.float32"),
    ("channel_statistics", (X, 1, SCALE.double()[:4]), {}, "centre must have the shape [5], got [4]"),
    ("channel_histogram", (X.double(), -SCALE, SCALE, 8, 1), {}, "x must be a float32, float16 or bfloat16 tensor, got torch.float64 [2, 5, 3, 4]"),
    ("channel_histogram", (X, -SCALE[:4], SCALE, 8, 1), {}, "low must have the shape [5] or [1], got [4]"),
    ("channel_histogram", (X, -SCALE, SCALE[None], 8, 1), {}, "high must have the shape [5] or [1], got [1, 5]"),
    ("channel_histogram", (X, -SCALE, SCALE.double(), 8, 1), {}, "high must be torch.float32, got torch.float64"),
    ("channel_histogram", (X, -SCALE, SCALE, 0, 1), {}, "bins must be 1 to 4096, got 0"),
    ("channel_histogram", (X, -SCALE, SCALE, 4097, 1), {}, "bins must be 1 to 4096, got 4097"),
    ("channel_histogram", (X, -SCALE, SCALE, 8, 4), {}, "axis 4 is out of range for x of shape [2, 5, 3, 4]"),
    ("pack_codes", (CODES[0], WIDTH, ROWS, 18), {}, "codes must be a uint8 tensor [rows, length], got torch.uint8 [9]"),
    ("pack_codes", (CODES, WIDTH[:2], ROWS, 18), {}, "bits must have the shape [3], got [2]"),
    ("pack_codes", (CODES, WIDTH, ROWS[:2], 18), {}, "offsets must have the shape [3], got [2]"),
    ("pack_codes", (CODES, WIDTH, ROWS, -1), {}, "packed_bytes must not be negative, got -1"),
    ("unpack_codes", (CODES, WIDTH, ROWS, 9), {}, "packed must be a uint8 tensor [bytes], got torch.uint8 [3, 9]"),
    ("unpack_codes", (BYTES, WIDTH[None], ROWS, 9), {}, "bits must have the shape [3], got [1, 3]"),
    ("unpack_codes", (BYTES, WIDTH, ROWS, -1), {}, "length must not be negative, got -1"),
    ("pack_codes", (CODES, WIDTH, ROWS), {"out": CODES.clone()}, "out must be torch.uint8 [27] on "),
    ("pack_codes", (CODES, WIDTH, ROWS), {"out": torch.empty(18, 2, dtype=torch.uint8)[:, 0]}, "out must have the strides [1], it has [2]"),
    ("unpack_codes", (BYTES, WIDTH, ROWS), {"out": CODES[:2].clone()}, "out must be torch.uint8 [3, 9] on "),
    ("unpack_codes", (BYTES, WIDTH, ROWS), {"out": gaps(CODES)}, "out must have the strides [9, 1], it has [18, 2]"),
    ("unpack_codes", (BYTES, WIDTH, ROWS), {"out": CODES.int()}, "out must be torch.uint8 [3, 9] on "),
    conv("x must be a uint8 tensor [N, C, H, W], got torch.float32 [2, 5, 3, 4]", x=X),
    conv("kernel_size must be two numbers from 1 to 1073741823, got [0, 3]", kernel_size=(0, 3)),
    conv("stride must be two numbers from 1 to 1073741823, got [4611686018427387904, 1]", stride=(2**62, 1)),
    conv("stride must be two numbers from 1 to 1073741823, got [1, -9223372036854775808]", stride=(1, -(2**63))),
    conv("padding must be two numbers from 0 to 1073741823, got [1, -1]", padding=(1, -1)),
    conv("dilation must be two numbers from 1 to 1073741823, got [1, 1073741824]", dilation=(1, 2**30)),
    conv("scale must have the shape [5], got [1, 5]", scale=SCALE[None]),
    conv("bias must have the shape [5], got [1]", bias=SCALE[:1]),
    conv("6 input and 5 output channels do not make 2 groups", groups=2),
    conv("6 input and 5 output channels do not make 0 groups", groups=0),
    conv("6 input and 5 output channels do not make -1 groups", groups=-1),
    conv("x [2, 6, 5, 4] with 4 low bytes and 1 groups holds no packed codes", low_bytes=4),
    conv("x [2, 6, 5, 4] with -4 low bytes and 1 groups holds no packed codes", low_bytes=-4),
    conv("the kernel [8, 3] is larger than the padded input [2, 6, 5, 4]", kernel_size=(8, 3)),
    conv("the kernel [3, 3] is larger than the padded input [2, 6, 5, 4]", dilation=(2**29, 1)),
    conv("x [2, 6, 5, 4] with the padding [32768, 32768], the kernel [3, 3] with the dilation [1, 1] or 5 outputs are too large", padding=(2**15, 2**15)),
    conv("the padding [268435456, 0], the kernel [3, 3] with the dilation [268435456, 1] or 5 outputs are too large", padding=(2**28, 0), dilation=(2**28, 1)),
    conv("weight must be torch.int8 [1, 18, 16, 4], got torch.int8 [1, 17, 16, 4]", weight=torch.ones(1, 17, 16, 4, dtype=torch.int8)),
    conv("weight must be torch.int8 [1, 18, 16, 4], got torch.uint8 [1, 18, 16, 4]", weight=torch.ones(1, 18, 16, 4, dtype=torch.uint8)),
    conv("zero_sums must be torch.int32 [9, 5], got torch.int32 [5, 9]", zero_sums=torch.ones(5, 9, dtype=torch.int32)),
    conv("span must be 1 to 1073741824 or, of nibbles, negative, got 0", span=0),
    conv("span must be 1 to 1073741824 or, of nibbles, negative, got -9223372036854775808", span=-(2**63)),
    conv("negative_slope must be finite, got inf", negative_slope=float("inf")),
    conv("negative_slope must be finite, got nan", negative_slope=float("nan")),
    conv("upper must be a number, got nan", upper=float("nan")),
    conv("residual must be torch.uint8 [2, 5, 3, 4], got torch.uint8 [2, 3, 4, 3]", residual=PACKED),
    conv("residual needs residual_scale and residual_zero_point", residual_scale=None),
    conv("scale must have the shape [5] or [1], got [2]", residual_scale=SCALE[:2]),
    conv("must have an item for each output of codes, got 2, 2, 1, 2 and 2", out_bits=[BITS]),
    conv("must have an item for each output of codes, got 2, 2, 2, 2 and 0", out_bytes=[]),
    conv("there are one or two outputs, got 3", dtype=torch.float32),
    conv("there are one or two outputs, got 0", **{name: [] for name in ("out_scale", "out_zero_point", "out_bits", "out_starts", "out_bytes")}),
    conv("bits must be torch.uint8, got torch.int32", out_bits=[ZERO, BITS]),
    conv("out_starts[0] must have the shape [2], got [3]", out_starts=[torch.zeros(3, dtype=torch.int32), STARTS[1]]),
    conv("out_starts[1] must be torch.int32, got torch.int64", out_starts=[STARTS[0], torch.zeros(2, dtype=torch.int64)]),
    conv("5 outputs in 1 groups are not packed in 6 bytes", out_bytes=[6, 8]),
    conv("5 outputs in 1 groups are not packed in -4 bytes", out_bytes=[4, -4]),
    conv("5 outputs in 1 groups are not packed in 4611686018427387904 bytes", out_bytes=[4, 2**62]),
    conv("dtype must be float32, float16 or bfloat16, got torch.float64", **oracle.outputs(values=torch.float64)),
]  # fmt: skip
NAN, INF = float("nan"), float("inf")
VALUES: list[Direct] = [
    ("fake_quantize", (X, scale_with(NAN), ZERO, BITS, 1), {}, "scale must be positive and finite (at least 1.17549e-38), scale[3] is nan"),
    ("fake_quantize", (X, scale_with(-INF), ZERO, BITS, 1), {}, "scale must be positive and finite (at least 1.17549e-38), scale[3] is -inf"),
    ("quantize", (X, scale_with(0.0), ZERO, BITS, 1), {}, "scale must be positive and finite (at least 1.17549e-38), scale[3] is 0"),
    ("quantize_pack", (X, scale_with(1e-40), ZERO, 1), {}, "scale must be positive and finite (at least 1.17549e-38), scale[3] is 9.99995e-41"),
    ("unpack_dequantize", (PACKED, scale_with(-1.5), ZERO, 1, 5, torch.float32), {}, "scale[3] is -1.5"),
    ("quantize", (X, SCALE, ZERO - 4194305, BITS, 1), {}, "zero_point must be from -4194304 to 4194304, got -4194305"),
    ("quantize", (X, SCALE, ZERO, BITS + 200, 1), {}, "bits must be 0 to 8, got 204"),
    ("pack_codes", (CODES, WIDTH + 1, ROWS, 18), {}, "bits must be 0 to 8, got 9"),
    ("pack_codes", (CODES, WIDTH, ROWS, 17), {}, "row 2 of 9 codes of 8 bits at byte 9 does not fit into 17 bytes"),
    ("pack_codes", (CODES, WIDTH, ROWS - 1, 18), {}, "row 0 of 9 codes of 2 bits at byte -1 does not fit into 18 bytes"),
    ("pack_codes", (CODES, WIDTH, ROWS + (2**63 - 10), 18), {}, "row 0 of 9 codes of 2 bits at byte 9223372036854775798 does not fit into 18 bytes"),
    ("pack_codes", (CODES, WIDTH, ROWS // 3, 18), {}, "rows overlap at byte 1"),
    ("pack_codes", (CODES, WIDTH, ROWS * 0), {"out": BYTES.clone()}, "rows overlap at byte 0"),
    ("unpack_codes", (BYTES, WIDTH, ROWS, 10), {}, "row 2 of 10 codes of 8 bits at byte 9 does not fit into 18 bytes"),
    ("unpack_codes", (BYTES, WIDTH, ROWS, 2**62), {}, "row 0 of 4611686018427387904 codes of 2 bits at byte 0 does not fit into 18 bytes"),
    conv("bits must be 0 to 8, got 9", out_bits=[BITS + 5, BITS]),
    conv("zero_point must be from -4194304 to 4194304, got 5000000", residual_zero_point=ZERO + 5000000),
    conv("out_starts[0] are not those of out_bits[0] in 4 bytes", out_starts=[torch.tensor([0, 4], dtype=torch.int32), STARTS[1]]),
    conv("out_starts[0] are not those of out_bits[0] in 4 bytes", out_bits=[BITS + 1, BITS + 2]),
    conv("out_starts[1] are not those of out_bits[1] in 8 bytes", out_starts=[STARTS[0]] * 2),
]  # fmt: skip


def refusal(call: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
        call(*arguments, **named)
    return str(error.value)


@pytest.mark.parametrize("which", NATIVE)
@pytest.mark.parametrize(("op", "arguments", "named", "message"), DIRECT)
def test_direct_calls_are_checked(
    request: pytest.FixtureRequest,
    reference: Backend,
    which: str,
    op: str,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    message: str,
) -> None:
    said = refusal(getattr(reference, op), arguments, named)
    assert message in said
    assert "\n" not in said
    native: Backend = request.getfixturevalue(which)
    words = message if which == "cuda" else said  # which names the device
    assert re.search(f"{op}: .*{re.escape(words)}", refusal(getattr(native, op), arguments, named))


@pytest.mark.parametrize("which", ["reference", "cpu"])
@pytest.mark.parametrize(("op", "arguments", "named", "message"), VALUES)
def test_values_that_can_be_read_are_checked(
    request: pytest.FixtureRequest,
    which: str,
    op: str,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    message: str,
) -> None:
    backend: Backend = request.getfixturevalue(which)
    assert message in refusal(getattr(backend, op), arguments, named)


def on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [on_meta(item) for item in value]
    return value.to("meta") if isinstance(value, Tensor) and value.layout == torch.strided else value


@pytest.mark.parametrize(("op", "arguments", "named", "message"), DIRECT)
def test_fake_kernels_refuse_in_the_same_words(
    op: str, arguments: tuple[Any, ...], named: dict[str, Any], message: str
) -> None:
    out = named.get("out")
    there = {"out": torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")} if named else {}
    call = getattr(torch.ops.ptq4cuda, op)
    assert message in refusal(call.out if named else call, tuple(map(on_meta, arguments)), there)


@pytest.mark.parametrize(
    ("op", "arguments", "message"), [(op, a, message) for op, a, named, message in DIRECT if not named]
)
def test_compiled_calls_refuse_in_the_same_words(op: str, arguments: tuple[Any, ...], message: str) -> None:
    """As torch.compile sees them: fake tensors, whose sizes may be symbolic."""
    call = getattr(torch.ops.ptq4cuda, op)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = tree_map_only(Tensor, lambda a: mode.from_tensor(a, static_shapes=False), arguments)
        said = refusal(call, tuple(fake), {})
    sizes = re.compile(r"\[[^]]*]|\bs\d+|-?\d+")  # they are formulas there
    assert sizes.sub("n", message) in sizes.sub("n", said)


def test_no_size_is_specialized_by_a_check() -> None:
    torch.compiler.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    def layer(x: Tensor, residual: Tensor) -> list[Tensor]:
        result: list[Tensor] = torch.ops.ptq4cuda.conv2d_integer(*conv_arguments(x=x, residual=residual, span=8))
        return result

    compiled = torch.compile(layer, fullgraph=True, backend=counting)
    for batch, height, width in ((3, 11, 8), (2, 9, 7), (7, 14, 10)):
        x = torch.randint(0, 16, (batch, 6, height, width), dtype=torch.uint8)
        residual = torch.zeros(batch, 5, (height - 1) // 2 + 1, width, dtype=torch.uint8)
        for tensor, dim in itertools.product((x, residual), (0, 2, 3)):
            torch._dynamo.mark_dynamic(tensor, dim)
        assert all(map(torch.equal, compiled(x, residual), layer(x, residual)))
    assert len(graphs) == 1


# --- out= and memory ------------------------------------------------------------------------------------------------


def test_out_must_not_overlap_an_input(reference: Backend, cpu: Backend, cuda_on_cpu: Backend) -> None:
    memory = torch.randn(400)
    x, shifted, behind = (memory[at : at + 120].view(2, 5, 3, 4) for at in (0, 5, 120))
    scale, zero_point = memory[:5].abs() + 1, torch.zeros(5, dtype=torch.int32)
    inside = memory[130:135].abs_().add_(1)  # the scale, in the memory of `behind`
    nibbles = memory.view(torch.uint8)
    packed, codes = nibbles[:72].view(2, 3, 4, 3), nibbles[:120].view(2, 5, 3, 4)
    row, rows = nibbles[:18], nibbles[10:37].view(3, 9).bitwise_and_(3)
    apart = torch.empty_like(memory).view(torch.uint8)
    table = torch.zeros(18, dtype=torch.uint8)
    width = table[:3].copy_(WIDTH)
    cases: list[tuple[str, tuple[Any, ...], Tensor, str]] = [
        ("fake_quantize", (x, scale, zero_point, BITS, 1), shifted, "x in memory without being the same tensor"),
        ("fake_quantize", (x, scale, zero_point, BITS, 1), x.view(5, 2, 3, 4).transpose(0, 1), "strides"),
        ("fake_quantize", (x, inside, zero_point, BITS, 1), behind, "scale in memory"),
        ("quantize", (x, scale, zero_point, BITS, 1), codes, "x in memory without being the same tensor"),
        ("quantize_pack", (x, scale, zero_point, 1), packed, "x in memory"),
        ("unpack_dequantize", (packed, scale, zero_point, 1), x, "packed in memory"),
        ("pack_codes", (rows, WIDTH, ROWS), row, "codes in memory"),
        ("pack_codes", (CODES, width, ROWS), table, "bits in memory"),
        ("unpack_codes", (row, WIDTH, ROWS), rows, "packed in memory"),
    ]
    before = memory.clone()
    for op, arguments, out, message in cases:
        said = refusal(getattr(reference, op), arguments, {"out": out})
        assert message in said, (op, message)
        for native in (cpu, cuda_on_cpu):
            assert f"{op}: {said}" in refusal(getattr(native, op), arguments, {"out": out})
        assert said in refusal(getattr(ops, op), (*arguments[:2], *public(op, arguments)), {"out": out})
        assert torch.equal(memory, before)
        fits = apart[: out.numel() * out.element_size()].view(out.dtype).view(out.shape)
        getattr(cpu, op)(*arguments, out=fits)  # all else is right


def public(op: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the function of ptq4cuda.ops takes after the first two arguments."""
    if op == "unpack_dequantize":
        return arguments[2], 5, arguments[3]
    if op == "unpack_codes":
        return 9, arguments[2]
    return () if op == "pack_codes" else arguments[2:]


def test_meta_tensors_that_overlap() -> None:
    memory = torch.empty(400, device="meta")
    scale, zero_point, bits = (t.to("meta") for t in (SCALE, ZERO, BITS))
    x, shifted, other = (memory[at : at + 120].view(2, 5, 3, 4) for at in (0, 5, 200))
    for out in (x, other, torch.empty_like(x)):
        torch.ops.ptq4cuda.fake_quantize.out(x, scale, zero_point, bits, 1, out=out)
    with pytest.raises(ValueError, match="out overlaps x in memory without being the same tensor"):
        torch.ops.ptq4cuda.fake_quantize.out(x, scale, zero_point, bits, 1, out=shifted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "misaligned"])
def test_fake_quantize_works_in_place(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    x = oracle.make((3, 5, 6, 7), dtype, layout)
    expected = backend.fake_quantize(x, SCALE, ZERO, BITS, 1)
    assert backend.fake_quantize(x, SCALE, ZERO, BITS, 1, out=x) is x
    assert oracle.same(x, expected)


def test_a_tensor_with_gaps_is_no_out(reference: Backend, cpu: Backend, cuda_on_cpu: Backend) -> None:
    """The result is dense, so x with gaps cannot be filled in place."""
    x = gaps(X)
    for backend in (reference, cpu, cuda_on_cpu):
        said = refusal(backend.fake_quantize, (x, SCALE, ZERO, BITS, 1), {"out": x})
        assert "out must have the strides [60, 12, 4, 1], it has [120, 24, 8, 2]" in said
