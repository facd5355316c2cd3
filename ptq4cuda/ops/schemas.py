"""Schemas of the operators: the native library is built with them, and Python defines them where there is none.

The build reads this file without torch, so that it imports nothing.

A package of AOTInductor holds arguments as JSON, of which it makes them anew. So a dtype is an int, its number in
PyTorch (checks.DTYPES), since PyTorch 2.10 hands on another one for a ScalarType; and what can be infinite, which is
no number to JSON, or an empty list, which is not handed on, is None then (argument).
"""

from __future__ import annotations

import math
from typing import TypeVar

T = TypeVar("T")

_QUANTIZER = "Tensor scale, Tensor zero_point"
_CONVOLUTION = (
    "Tensor x, Tensor weight, Tensor? zero_sums, Tensor scale, Tensor bias, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, int low_bytes, int? span, "
    "float negative_slope, float? upper, "
    "Tensor? residual, Tensor? residual_scale, Tensor? residual_zero_point, "
    "Tensor[]? out_scale, Tensor[]? out_zero_point, Tensor[]? out_bits, Tensor[]? out_starts, int[]? out_bytes, "
    "int? dtype"
)
SCHEMAS = (
    "channel_statistics(Tensor x, int axis, Tensor? centre=None) -> Tensor",
    "channel_histogram(Tensor x, Tensor low, Tensor high, int bins, int axis) -> Tensor",
    f"fake_quantize(Tensor x, {_QUANTIZER}, Tensor bits, int axis) -> Tensor",
    f"fake_quantize.out(Tensor x, {_QUANTIZER}, Tensor bits, int axis, *, Tensor(a!) out) -> ()",
    f"quantize(Tensor x, {_QUANTIZER}, Tensor bits, int axis) -> Tensor",
    f"quantize.out(Tensor x, {_QUANTIZER}, Tensor bits, int axis, *, Tensor(a!) out) -> ()",
    f"quantize_pack(Tensor x, {_QUANTIZER}, int axis) -> Tensor",
    f"quantize_pack.out(Tensor x, {_QUANTIZER}, int axis, *, Tensor(a!) out) -> ()",
    f"unpack_dequantize(Tensor packed, {_QUANTIZER}, int axis, int channels, int dtype) -> Tensor",
    f"unpack_dequantize.out(Tensor packed, {_QUANTIZER}, int axis, *, Tensor(a!) out) -> ()",
    "pack_codes(Tensor codes, Tensor bits, Tensor offsets, int packed_bytes) -> Tensor",
    "pack_codes.out(Tensor codes, Tensor bits, Tensor offsets, *, Tensor(a!) out) -> ()",
    "unpack_codes(Tensor packed, Tensor bits, Tensor offsets, int length) -> Tensor",
    "unpack_codes.out(Tensor packed, Tensor bits, Tensor offsets, *, Tensor(a!) out) -> ()",
    "max_pool_codes(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) "
    "-> Tensor",
    f"conv2d_integer({_CONVOLUTION}) -> Tensor[]",
)
# What a processor executes at a stretch (ops.layers); each of the steps is an operator of its own, too.
CPU_SCHEMAS = (
    f"prepare_layer({_CONVOLUTION}) -> Tensor",
    "run_layers(Tensor[] inputs, Tensor[] constants, int[] code, int dtype) -> Tensor[]",
    "keep_layers(Tensor[] constants, int[] code, int dtype) -> int",
    "run_layers.kept(Tensor[] inputs, int number) -> Tensor[]",
    "drop_layers(Tensor number) -> ()",
    "memory_of_layers(Tensor[] inputs, Tensor[] constants, int[] code, int dtype) -> int",
)


def argument(value: T) -> T | None:
    """Return a value as the schemas hold it: None in place of an infinite number and of an empty list."""
    return None if value in (math.inf, []) else value
