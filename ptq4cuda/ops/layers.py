"""The code of run_layers: steps of a network in integers as numbers, for the operator that executes them in a row.

    run_layers(Tensor[] inputs, Tensor[] constants, int[] code, int dtype) -> Tensor[]

Values have numbers: the inputs first, then what steps give, in order. The code is

    how many values there are; how many are returned, and which; of each input, whether it holds features [*, C], 1,
    or images [N, C, H, W] or sequences [N, C, L], 0; then step by step its kind and its fields:

    0 quantize     source, out, constants from (scale, zero point, bits)
    1 convolve     source, residual or -1, out, second output or -1, constants (weight, prepare_layer's bytes),
                   outputs, kernel size, stride, padding, dilation, groups, span, whether `out` are values
    2 max pool     source, out, kernel size, stride, padding, dilation, ceil_mode
    3 concatenate  out, how many sources there are, and which
    4 flatten      source, out

A layer of features is a convolution of images of one pixel. csrc/cpu/layers.cpp reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ptq4cuda.ops.checks import floating_dtype, output_size
from ptq4cuda.ops.panels import NIBBLES

Pair = tuple[int, int]
QUANTIZE, CONVOLVE, MAX_POOL, CONCATENATE, FLATTEN = range(5)


class Code:
    """Writes the code of some steps, and gathers their constants.

    Args:
        features: of each input, whether it holds features.
    """

    def __init__(self, features: Sequence[bool]) -> None:
        self.values = len(features)
        self.constants: list[Tensor] = []
        self._inputs = [int(f) for f in features]
        self._steps: list[int] = []

    def _value(self) -> int:
        self.values += 1
        return self.values - 1

    def _keep(self, *constants: Tensor) -> int:
        self.constants += constants
        return len(self.constants) - len(constants)

    def quantize(self, source: int, scale: Tensor, zero_point: Tensor, bits: Tensor) -> int:
        """Return the number of the codes of a value."""
        out = self._value()
        self._steps += QUANTIZE, source, out, self._keep(scale, zero_point, bits)
        return out

    def convolve(
        self,
        source: int,
        weight: Tensor,
        prepared: Tensor,
        outputs: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        span: int | None,
        *,
        residual: int | None,
        values: bool,
        second: bool,
    ) -> list[int]:
        """Return the numbers of one or two outputs of a convolution; `values`: the first are no codes."""
        out = self._value()
        also = self._value() if second else -1
        self._steps += CONVOLVE, source, -1 if residual is None else residual, out, also
        self._steps += self._keep(weight), self._keep(prepared), outputs
        self._steps += *kernel_size, *stride, *padding, *dilation, groups, NIBBLES if span is None else span, values
        return [out, also] if second else [out]

    def max_pool(
        self, source: int, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
    ) -> int:
        """Return the number of pooled codes."""
        out = self._value()
        self._steps += MAX_POOL, source, out, *kernel_size, *stride, *padding, *dilation, ceil_mode
        return out

    def concatenate(self, sources: Sequence[int]) -> int:
        """Return the number of codes side by side."""
        out = self._value()
        self._steps += CONCATENATE, out, len(sources), *sources
        return out

    def flatten(self, source: int) -> int:
        """Return the number of the features that images are, in the order [C, H, W]."""
        out = self._value()
        self._steps += FLATTEN, source, out
        return out

    def returning(self, results: Sequence[int]) -> list[int]:
        """Return the code that returns these values, each of which is there once and no input."""
        return [int(n) for n in (self.values, len(results), *results, *self._inputs, *self._steps)]


def run_layers(
    inputs: Sequence[Tensor], constants: Sequence[Tensor], code: Sequence[int], dtype: int
) -> list[Tensor]:
    """Return what the operator does in form alone: its fake kernel."""
    numbers, of_values = iter(code), floating_dtype(dtype)
    count = next(numbers)
    results = [next(numbers) for _ in range(next(numbers))]
    features = [bool(next(numbers)) for _ in inputs]
    sizes: list[Any] = [list(x.shape) for x in inputs] + [None] * (count - len(inputs))
    flat, values = features + [False] * (count - len(inputs)), dict[int, bool]()
    for kind in numbers:
        _form(kind, numbers, sizes, flat, values)
    made = []
    for result in results:
        shape, kind_of = sizes[result], of_values if values.get(result) else torch.uint8
        if flat[result]:
            made.append(inputs[0].new_empty(shape, dtype=kind_of))
        else:
            ordered = inputs[0].new_empty((shape[0], *shape[2:], shape[1]), dtype=kind_of)
            made.append(ordered.movedim(-1, 1))
    return made


def _form(kind: int, numbers: Iterator[int], sizes: list[Any], flat: list[bool], values: dict[int, bool]) -> None:
    """Note the form of what a step gives."""

    def pairs(many: int) -> list[Pair]:
        return [(next(numbers), next(numbers)) for _ in range(many)]

    def moved(source: int, channels: Any, window: list[Pair], ceil_mode: bool) -> list[Any]:
        if flat[source]:
            return [*sizes[source][:-1], channels]
        n, _, *size = sizes[source]
        kernel, step, pad, spread = (pair[-len(size) :] for pair in window)  # sequences are images of height one
        return [n, channels, *output_size(size, kernel, step, pad, spread, ceil_mode)]

    if kind == QUANTIZE:
        source, out, _ = next(numbers), next(numbers), next(numbers)
        sizes[out], flat[out] = sizes[source], flat[source]
    elif kind == CONVOLVE:
        source, _, out, also, _, _, channels = (next(numbers) for _ in range(7))
        geometry = pairs(4)
        _, _, values[out] = next(numbers), next(numbers), bool(next(numbers))
        for made in (out, also) if also >= 0 else (out,):
            sizes[made], flat[made] = moved(source, channels, geometry, False), flat[source]
    elif kind == MAX_POOL:
        source, out = next(numbers), next(numbers)
        sizes[out] = moved(source, sizes[source][1], pairs(4), bool(next(numbers)))
    elif kind == CONCATENATE:
        out = next(numbers)
        sources = [next(numbers) for _ in range(next(numbers))]
        channels = sum(sizes[source][1] for source in sources)
        sizes[out] = [sizes[sources[0]][0], channels, *sizes[sources[0]][2:]]
    else:
        source, out = next(numbers), next(numbers)
        features = 1
        for size in sizes[source][1:]:
            features = features * size
        sizes[out], flat[out] = [sizes[source][0], features], True
