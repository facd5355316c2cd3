"""What a walk carries through a network in two streams, in float and as quantized so far, and tells of a layer.

At every layer to quantize a walk hands a LayerCall to a solver, puts the module that the solver returns in the
layer's place, runs the layer both ways and goes on. Closed-form solvers look at one stream only; error-compensating
ones compare the two. The tensors that are still needed (the frontier) are held for all calibration samples, chunk by
chunk, on the host, so that device memory is bounded by one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.artifact.record import LayerRecord, tensor_bytes
from ptq4cuda.calibrate.frontier import Frontier
from ptq4cuda.calibrate.histograms import input_histogram, some_samples, weight_histogram
from ptq4cuda.calibrate.outliers import Outliers, find_outliers, sample_extremes
from ptq4cuda.calibrate.statistics import ChannelHistogram, ChannelStatistics
from ptq4cuda.metrics import Noise
from ptq4cuda.nn import LayerSpec, QuantModule
from ptq4cuda.processes import Processes
from ptq4cuda.quantizer import QuantParams


@dataclass(eq=False)
class Signal:
    """A value of the network over all calibration samples.

    Attributes:
        frontier: holds it.
        processes: who have the other samples.
        streams: for each chunk, the value in float and as quantized so far: one object where they are the same.
        before: for each chunk, the float tensor before `activation`, where the value is activation(before).
        activation: the activation that made the value.
        quantizers: fitted to this tensor and shared by all layers that read it, by (bits, channel axis).
        outliers: what is to be said about values that were clipped; None before they were looked for.
        clip: clips them, where there were any.
    """

    frontier: Frontier
    processes: Processes
    streams: list[tuple[Any, Any]]
    before: list[Any] | None = None
    activation: Activation = IDENTITY
    quantizers: dict[tuple[int, int], tuple[QuantParams, str]] = field(default_factory=dict)
    outliers: str | None = None
    clip: Outliers | None = None

    @property
    def values(self) -> Sequence[Any]:
        """The value in float, to be read chunk by chunk."""
        return self.frontier.each([value for value, _ in self.streams])

    @property
    def quantized(self) -> Sequence[Any]:
        """The value as quantized so far, to be read chunk by chunk."""
        return self.frontier.each([quantized for _, quantized in self.streams])

    def drop(self, chunk: int) -> None:
        """Let go of a chunk, which nothing needs any more."""
        self.streams[chunk] = (None, None)
        if self.before is not None:
            self.before[chunk] = None

    def clip_outliers(self, axis: int, importance: Tensor) -> None:
        """Clip both streams, once, to what all but a vanishing share of the samples confirm.

        Whatever fits the network to its data looks at these streams: a broken pixel that no quantizer holds would
        otherwise rule the weights and biases of all layers behind it.

        Args:
            axis: of the channels.
            importance: float64 [C], what a squared error of each channel costs.
        """
        if self.outliers is None:
            before = self.before
            self.clip_by(
                find_outliers(self.values, axis, importance, self.processes),
                None
                if before is None
                else find_outliers(self.frontier.each(before), axis, importance, self.processes),
            )

    def clip_by(self, found: Outliers | None, found_before: Outliers | None) -> None:
        """Clip both streams, and what was before the activation, once."""
        if self.outliers is not None:
            return
        hold = self.frontier.hold
        self.outliers, self.clip = found.remark if found is not None else "", found
        if found is not None:
            for i, (value, quantized) in enumerate(self.streams):
                clipped = hold(found.clip(value))
                self.streams[i] = (clipped, clipped if quantized is value else hold(found.clip(quantized)))
        if self.before is not None and found_before is not None:
            self.before = [hold(found_before.clip(value)) for value in self.before]

    def statistics(self, axis: int | None, absdev: bool) -> ChannelStatistics:
        """Measure the float tensor along a channel axis, before its activation where that is kept.

        Args:
            axis: of the channels; None for one of all.
            absdev: whether deviations are taken about the mean of all chunks, and not of each.
        """
        chunks = self.frontier.each(self.before) if self.before is not None else self.values
        return ChannelStatistics.over(lambda: chunks, axis, self.processes, absdev)

    def extremes(self, axis: int, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value of each channel in each sample, in float, [n, C] both.

        Args:
            axis: of the channels.
            whole: take all channels for one.
        """
        extremes = self.processes.gather([sample_extremes(x, axis) for x in self.values])
        low, high = (torch.cat(parts) for parts in zip(*extremes, strict=True))
        return (low.amin(1, keepdim=True), high.amax(1, keepdim=True)) if whole else (low, high)

    def histogram(self, axis: int | None) -> ChannelHistogram:
        """Count the values of the tensor as quantized so far, as its readers see it."""
        return ChannelHistogram.over(lambda: self.quantized, axis, processes=self.processes)


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer to quantize that reads a signal.

    Attributes:
        spec: what kind of layer it is.
        layer: in float.
        costs: float64 [O], what a squared error of each output channel costs; None for 1 each.
    """

    spec: LayerSpec
    layer: Any
    costs: Tensor | None = None

    def input_cost(self) -> Tensor:
        """Return what a squared error of each input channel costs, float64 [C]."""
        return self.spec.input_cost(self.layer, self.costs)


def importance_for(readers: Sequence[Reader]) -> Tensor:
    """Return what a squared error of each channel of a signal costs, in all layers that read it, float64 [C]."""
    return torch.stack([reader.input_cost() for reader in readers]).sum(0)


@dataclass(eq=False)
class LayerCall:
    """What a solver sees of a layer.

    Attributes:
        name: of the module.
        layer: the float layer.
        spec: what kind of layer it is.
        signal: its input.
        run: computes the float layer.
        first_or_last: True for layers that read an image and for those behind which no other lies.
        outputs: its float output, for each chunk.
        added: what is added to the output next (the shortcut of a residual block), both streams for each chunk, where
            it is known by then: of what the output is broadcast over, the mean.
        readers: all layers to quantize that read the signal.
        share: its bits, "weight_bits" and "activation_bits", where layers share out those of the network.
        read: makes of the output what other layers or the caller read: the activation, for one.
    """

    name: str
    layer: Any
    spec: LayerSpec
    signal: Signal
    run: Callable[[Tensor], Tensor]
    first_or_last: bool
    outputs: list[Tensor]
    readers: Sequence[Reader]
    added: list[tuple[Tensor, Tensor]] | None = None
    share: Mapping[str, int] = field(default_factory=dict)
    read: Callable[[Tensor], Tensor] = _as_it_is

    @classmethod
    def of(
        cls,
        name: str,
        layer: nn.Module,
        spec: LayerSpec,
        signal: Signal,
        readers: Sequence[Reader],
        *,
        run: Callable[[Tensor], Tensor],
        first_or_last: bool,
    ) -> LayerCall:
        """Clip what stands out of the input of a layer, and run the layer, in float, on every chunk."""
        signal.clip_outliers(spec.axis, importance_for(readers))
        hold, fetch = signal.frontier.hold, signal.frontier.fetch
        outputs = [hold(run(fetch(x))) for x, _ in signal.streams]
        return cls(name, layer, spec, signal, run, first_or_last, outputs, readers)


@dataclass(eq=False)
class Solution:
    """What a solver returns.

    Attributes:
        module: the quantized module.
        clip: the clip rule of its input.
        outputs: what the module makes of the signal as quantized so far, held by the frontier, for each chunk: where
            the solver knows.
    """

    module: QuantModule
    clip: str
    outputs: list[Tensor] | None = None

    def outputs_for(self, signal: Signal) -> Iterator[Tensor]:
        """Yield what the module makes of the signal as quantized so far, held by the frontier, for each chunk."""
        if self.outputs is not None:
            yield from signal.frontier.each(self.outputs)
            return
        hold, fetch = signal.frontier.hold, signal.frontier.fetch
        for _, quantized in signal.streams:
            yield hold(self.module(fetch(quantized)))


Kept = Callable[[str], str]  # why a layer that could be quantized stays in float, or ""
Solver = Callable[[LayerCall], Solution]


@dataclass(eq=False)
class WalkResult:
    """What a walk did.

    Attributes:
        layers: records of the layers in execution order, then of what stays in float.
        noise: of the network's output.
        clipped: whether outliers of the calibration data were clipped, which the noise then does not see.
        frontier_bytes: most bytes of tensors between layers that were held on the host at a time.
        spilled_bytes: bytes of such tensors that went to files.
    """

    layers: list[LayerRecord]
    noise: Noise
    clipped: bool
    frontier_bytes: int = 0
    spilled_bytes: int = 0


def record_solution(
    call: LayerCall, solution: Solution, noise: Noise, samples: list[Tensor] | None = None
) -> LayerRecord:
    """Describe a quantized layer.

    Args:
        call: the layer, before the tensors of its streams are let go.
        solution: what became of it.
        noise: of its output.
        samples: of its input as quantized so far; None: some of the signal's.
    """
    module = solution.module
    layer = call.layer
    if samples is None:
        samples = some_samples(call.spec, call.signal.quantized, call.signal.processes)
    some = [x.to(module.weight_scale.device) for x in samples]
    own = Noise()
    for x in some:
        own.add(call.run(x), module(x))
    activation_bits = module.activation_bits
    return LayerRecord(
        name=call.name,
        kind=call.spec.name,
        weight_bits=float(module.weight_bits.float().mean()),
        activation_bits=None if activation_bits is None else float(activation_bits.float().mean()),
        clip=solution.clip,
        sqnr=noise.sqnr,
        float_bytes=4 * sum(p.numel() for p in (layer.weight, layer.bias) if p is not None),
        bytes=tensor_bytes(module),
        execution="simulate",
        reason=call.signal.outliers or "",
        own_sqnr=None if own.sqnr is None else round(own.sqnr, 2),
        input_histogram=input_histogram(module, some),
        weight_histogram=weight_histogram(module, call.spec.rows(layer)),
    )


def record_float(name: str, module: nn.Module | None, kind: str, reason: str) -> LayerRecord:
    """Describe a layer that stays in float."""
    size = tensor_bytes(module) if module is not None else 0
    return LayerRecord(name=name, kind=kind, float_bytes=size, bytes=size, reason=reason)


def progress_bar(total: int, what: str) -> Any:
    """Return a progress bar, called what is done, that appears once that takes longer than a moment; none for ""."""
    return tqdm(total=total, desc=what, unit="layer", disable=not what, delay=1.0)
