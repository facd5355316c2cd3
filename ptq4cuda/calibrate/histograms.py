"""Histograms for reports: where the input and the weights of a layer lie in the ranges of their quantizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ptq4cuda.artifact.record import Histogram
from ptq4cuda.nn import LayerSpec, QuantModule
from ptq4cuda.processes import ALONE, Processes

_VALUES = 1 << 16  # that are looked at: more would take longer than what else a layer needs
_SAMPLES = 4  # at least, of however many values
_WITHIN, _BESIDE = 32, 8  # bins of the range, and on either side of it


def some_samples(spec: LayerSpec, inputs: Sequence[Tensor], processes: Processes = ALONE) -> list[Tensor]:
    """Return inputs of a layer for samples that are evenly spread over all, however these are batched.

    Args:
        spec: of the layer.
        inputs: chunk by chunk, [N, ...] each.
        processes: whose chunks follow each other.
    """
    sizes, before = processes.placed([extent_of(spec, x) for x in inputs])
    picked = picked_samples(sizes)[before:]
    return processes.gather([rows_of(spec, x, rows) for x, rows in zip(inputs, picked, strict=False) if rows])


def extent_of(spec: LayerSpec, x: Tensor) -> tuple[int, int]:
    """Return how many samples and values a chunk has; it may be one sample without a dimension for it."""
    return (1 if spec.is_single(x) else len(x)), x.numel()


def picked_samples(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return which samples of each chunk are looked at, of how many samples and values in each chunk."""
    total = sum(size for size, _ in sizes)
    count = min(total, max(_SAMPLES, _VALUES * sizes[0][0] // max(1, sizes[0][1])))
    wanted = [i * total // count for i in range(count)]
    picked, first = [], 0
    for size, _ in sizes:
        picked.append([i - first for i in wanted if first <= i < first + size])
        first += size
    return picked


def rows_of(spec: LayerSpec, x: Tensor, rows: list[int]) -> Tensor:
    """Return some samples of a chunk."""
    return x if spec.is_single(x) else x[rows]


def histogram(parts: Iterable[Tensor], axis: int, lowest: Tensor, step: Tensor, bits: Tensor) -> Histogram | None:
    """Count where values lie in the range of their channel; None where no channel has a range.

    Args:
        parts: tensors of any shapes with C channels.
        axis: of the channels.
        lowest: [C] or [1], the value of code 0.
        step: [C] or [1], between codes.
        bits: [C] or [1]; channels of none have no range and are passed over.
    """
    lowest, step, last = torch.broadcast_tensors(lowest.double(), step.double(), torch.exp2(bits.double()) - 1.0)
    live = last > 0
    if not bool(live.any()):
        return None
    counts = torch.zeros(_WITHIN + 2 * _BESIDE, dtype=torch.float64, device=step.device)
    zeros = clipped = total = 0
    for part in parts:
        values = part.detach().movedim(axis, -1)
        values = values.reshape(-1, values.shape[-1])
        values = values[:: max(1, values.numel() // _VALUES)].double()
        code = ((values - lowest) / step).masked_fill(values == 0, torch.nan)  # not yet rounded
        code, most = (t[:, live.expand(values.shape[-1])] for t in (code, last.expand_as(code)))
        told = ~code.isnan()
        total += code.numel()
        zeros += code.numel() - int(told.sum())
        code, most = code[told], most[told]
        clipped += int(((code < -0.5) | (code > most + 0.5)).sum())
        bins = ((code + 0.5) / (most + 1.0) * _WITHIN).floor().add_(_BESIDE).clamp_(0, len(counts) - 1)
        counts += torch.bincount(bins.long(), minlength=len(counts))
    shares = counts * (1000.0 / max(1.0, float(counts.sum())))
    highest = lowest + last * step
    return Histogram(
        [int(n) for n in shares.round()],
        *(float(f"{float(v) + 0.0:.4g}") for v in (lowest[live].min(), highest[live].max())),
        *(round(100.0 * n / max(1, total), 3) for n in (clipped, zeros)),
    )


def input_histogram(module: QuantModule, inputs: Iterable[Tensor]) -> Histogram | None:
    """Count the values of a layer's input in the ranges of its quantizer; None where it has none."""
    quantizer = module.activation
    if quantizer is None:
        return None
    lowest = -quantizer.zero_point * quantizer.scale
    return histogram(inputs, quantizer.axis, lowest, quantizer.scale, quantizer.bits)


def weight_histogram(module: QuantModule, rows: Tensor) -> Histogram | None:
    """Count weights in float, rows [O, C / groups, *kernel], in the ranges of their codes."""
    weight, scale = module.weight_to_quantize(rows), module.weight_scale
    return histogram([weight], 0, module.weight_offset * scale, scale, module.weight_bits)
