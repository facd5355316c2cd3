"""Passes over a traced network, one batch after the other, where statistics of the float network are all that counts.

Nothing but these is held from one batch to the next. What comes out is what the walk that holds all batches makes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ptq4cuda.activation import Activation
from ptq4cuda.artifact.record import LayerRecord
from ptq4cuda.calibrate.by_graph import GraphWalk
from ptq4cuda.calibrate.frontier import Frontier, Memory, Usage
from ptq4cuda.calibrate.histograms import extent_of, picked_samples, rows_of
from ptq4cuda.calibrate.inputs import Inputs, batch_size
from ptq4cuda.calibrate.outliers import Extremes, Outliers, suspected
from ptq4cuda.calibrate.signals import (
    Kept,
    LayerCall,
    Signal,
    Solution,
    Solver,
    WalkResult,
    importance_for,
    progress_bar,
    record_solution,
)
from ptq4cuda.calibrate.statistics import ChannelStatistics
from ptq4cuda.errors import naming_what_needs_memory
from ptq4cuda.metrics import Noise
from ptq4cuda.nn import QuantTensor
from ptq4cuda.processes import Processes
from ptq4cuda.quantizer import QuantParams


def can_walk_batches(network: nn.Module, inputs: Inputs) -> bool:
    """Tell whether the float network is all that counts in one that is prepared, and whether batches are worth it.

    What is added as codes has the range of what is quantized before it. Of very few samples parts are compared, which
    the walk that holds them does.
    """
    return len(inputs.sizes) > 2 and not any(isinstance(module, QuantTensor) for module in network.modules())


def walk_batches(
    network: fx.GraphModule,
    inputs: Inputs,
    solve: Solver,
    kept: Kept,
    progress: str,
    keep_before: bool,
    absdev: bool,
    whole: bool,
) -> WalkResult:
    """Quantize the layers of a traced network in place, as walk_graph does, where `solve` asks for statistics alone.

    All batches are read for statistics, for deviations from the mean, where these are looked at, and for what became
    of the outputs; and once more for each tensor with outliers.

    Args:
        network: as prepare() returns it.
        inputs: calibration data.
        solve: quantizes a layer, for which it asks for the statistics of its input alone.
        kept: tells why a layer stays in float.
        progress: what its bar is called, "" for none.
        keep_before: what values were before their activation, for rules that look at that.
        absdev: whether deviations are taken about the mean of all batches, and not of each.
        whole: statistics are those of a tensor, not of its channels.

    Raises:
        MemoryError: memory does not suffice; the message names the layer.
    """
    with naming_what_needs_memory("in a forward of the model"):
        walk = _BatchWalk(network, inputs, solve, kept, keep_before, whole)
    with torch.no_grad(), progress_bar(len(walk.layers), progress) as bar:
        walk.measure(absdev)
        for node in walk.layers:
            with naming_what_needs_memory(f"at layer {str(node.target)!r}"):
                walk.solve_layer(node)
            bar.update()
        walk.compare()
        records = walk.finished_records()
    for node, solution in walk.solutions.items():
        network.set_submodule(str(node.target), solution.module)
    network.recompile()
    return WalkResult(records, walk.noise, walk.clipped, *walk.usage.found)


@dataclass(eq=False)
class _Measured:
    """What is measured of the input of layers.

    Attributes:
        activation: that made the value.
        before_is_known: whether it is known what it was before, of which statistics are then.
        parts: statistics of each batch; of a process alone they are merged as they come.
        extremes: of all batches, of the value and, where it is known, of what it was before.
        extents: samples and values of each batch.
    """

    activation: Activation
    before_is_known: bool
    parts: list[ChannelStatistics] = field(default_factory=list)
    extremes: list[Extremes] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)

    def add(self, part: ChannelStatistics, processes: Processes) -> None:
        self.parts.append(part)
        if processes.count == 1:
            self.parts = [ChannelStatistics.merged(self.parts)]

    def add_extremes(self, found: list[Extremes]) -> None:
        pairs = zip(self.extremes, found, strict=True) if self.extremes else None
        self.extremes = found if pairs is None else [before.merge(own) for before, own in pairs]

    def statistics(self, processes: Processes) -> ChannelStatistics:
        return ChannelStatistics.merged(processes.gather(self.parts))

    def outliers(self, axis: int, processes: Processes) -> tuple[Outliers | None, Outliers | None]:
        found: list[Outliers | None] = [None, None]
        for i, own in enumerate(self.extremes):
            every = functools.reduce(Extremes.merge, processes.gather([own]))
            found[i] = every.outliers(axis, every.samples)
        return found[0], found[1]


@dataclass(eq=False)
class _KnownSignal(Signal):
    """The input of a layer of which statistics are known, and nothing else."""

    known: ChannelStatistics | None = None

    def statistics(self, axis: int | None, absdev: bool) -> ChannelStatistics:
        assert self.known is not None
        return self.known


_Key = tuple[fx.Node, int]  # a tensor, and the axis of its channels


class _BatchWalk(GraphWalk):
    def __init__(
        self,
        network: fx.GraphModule,
        inputs: Inputs,
        solve: Solver,
        kept: Kept,
        keep_before: bool,
        whole: bool,
    ) -> None:
        super().__init__(network, inputs, solve, _no_operand, kept, keep_before)
        # What one batch makes is let go of before the next: there is nothing to keep to a limit by files.
        self.frontier = Frontier(inputs.frontier.device, Memory(sys.maxsize))
        self.usage = Usage(self.frontier)
        self.batches, self.whole = inputs, whole
        self.measured: dict[_Key, _Measured] = {}
        self.clips: dict[fx.Node, tuple[Outliers | None, Outliers | None]] = {}  # also of what was before activations
        self.extents: dict[tuple[int, int], tuple[int, int]] = {}  # that there are, each of them once
        self.known: dict[_Key, _KnownSignal] = {}
        self.calls: dict[fx.Node, LayerCall] = {}
        self.solutions: dict[fx.Node, Solution] = {}
        self.noises: dict[fx.Node, Noise] = {}
        self.samples: dict[fx.Node, list[Tensor]] = {}
        # Of the batch under way:
        self.batch = 0
        self.seen: set[_Key] = set()
        self.at_layer: Callable[[fx.Node, Signal], tuple[Tensor, Tensor]]

    def _each_batch(self, at_layer: Callable[[fx.Node, Signal], tuple[Tensor, Tensor]]) -> None:
        """Take each batch through the network; `at_layer` returns the output of a layer in both streams."""
        self.at_layer = at_layer
        for number, batch in enumerate(self.batches):
            self.batch, self.records, self.seen = number, [], set()
            self.inputs = Inputs([batch], self.frontier)
            with naming_what_needs_memory("in a forward of the model"):
                for node in self.network.graph.nodes:
                    self.visit(node)
            self.signals.clear()

    def visit(self, node: fx.Node) -> None:
        """Run one node on the batch."""
        if node.op != "output":
            super().visit(node)
        elif self.solutions:
            expected, found = (self._arguments(node, 0, stream)[0][0] for stream in (0, 1))
            self.noise.add(expected, found, batch_size(self.inputs[0]))

    def _key(self, node: fx.Node) -> _Key:
        return node.all_input_nodes[0], self.specs[node].axis

    def _solve(self, node: fx.Node) -> Signal:
        source, _ = self._key(node)
        signal = self.signals[source]
        if source in self.clips:
            signal.clip_by(*self.clips[source])
        return self._signal([self.at_layer(node, signal)])

    def _float(self, node: fx.Node, x: Tensor) -> Tensor:
        y: Tensor = self.frontier.hold(self._module(node)(self.frontier.fetch(x)))
        return y

    def measure(self, absdev: bool) -> None:
        """Measure the inputs of all layers, without the outliers of any."""
        while True:
            self.measured.clear()
            self._each_batch(self._measure)
            if not self._find_outliers():
                break
        if not absdev:
            return
        centres = {key: measured.statistics(self.processes).mean for key, measured in self.measured.items()}
        for measured in self.measured.values():
            measured.parts = []
        self._each_batch(functools.partial(self._measure, centres=centres))

    def _measure(
        self, node: fx.Node, signal: Signal, centres: Mapping[_Key, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        key, x = self._key(node), signal.streams[0][0]
        if key not in self.seen:
            self.seen.add(key)
            measured = self.measured.setdefault(key, _Measured(signal.activation, signal.before is not None))
            axis, values = key[1], [x, *(signal.before or [])]
            if centres is None:
                extent = extent_of(self.specs[node], x)
                measured.extents.append(self.extents.setdefault(extent, extent))
                most = suspected(self.batches.samples * -(-len(x) // batch_size(self.inputs[0])))
                importance = importance_for(self._layers_reading(key[0]))
                measured.add_extremes([Extremes.of(v, axis, importance, most) for v in values])
            centre = None if centres is None else centres[key]
            measured.add(ChannelStatistics.of(values[-1], None if self.whole else axis, centre), self.processes)
        y = self._float(node, x)
        return y, y

    def _find_outliers(self) -> bool:
        """Look for outliers, and tell whether there are any: what comes after them has to be measured again."""
        for node in self.layers:
            source, axis = key = self._key(node)
            if source in self.clips:
                continue
            found = self.measured[key].outliers(axis, self.processes)
            self.clips[source] = found
            if any(clip is not None for clip in found):
                return True
        return False

    def solve_layer(self, node: fx.Node) -> None:
        """Solve a layer by what was measured of its input."""
        key, layer = self._key(node), self._module(node)
        measured, (clip, _) = self.measured[key], self.clips[key[0]]
        if key not in self.known:
            self.known[key] = _KnownSignal(
                self.frontier,
                self.processes,
                [],
                before=[] if measured.before_is_known else None,
                activation=measured.activation,
                outliers="" if clip is None else clip.remark,
                known=measured.statistics(self.processes),
            )
        signal = self.known[key]
        self.clipped |= bool(signal.outliers)
        first_or_last, readers = node in self.ends, self._layers_reading(key[0])
        call = LayerCall(str(node.target), layer, self.specs[node], signal, layer, first_or_last, [], readers)
        self.calls[node], self.solutions[node] = call, self.solve(call)

    def compare(self) -> None:
        """Run the network in both streams, and note the noise and some samples at each layer."""
        picked: dict[fx.Node, dict[int, list[int]]] = {}  # rows of the few batches that have any
        values: dict[fx.Node, int] = {}
        room: dict[fx.Node, Tensor] = {}
        for node in self.layers:
            extents, before = self.processes.placed(self.measured[self._key(node)].extents)
            own = list(zip(picked_samples(extents)[before:], self.measured[self._key(node)].extents, strict=False))
            values[node] = sum(len(rows) * (numel // samples) for rows, (samples, numel) in own)
            picked[node] = {batch: rows for batch, (rows, _) in enumerate(own) if rows}
            self.noises[node], self.samples[node] = Noise(), []

        def keep(node: fx.Node, x: Tensor) -> None:
            # In one block: small ones between large ones would keep the heap from using the place of these again.
            room.setdefault(node, x.new_empty(values[node]))
            kept = room[node].as_strided(x.shape, torch.empty_like(x, device="meta").stride())
            room[node] = room[node][x.numel() :]
            self.samples[node].append(kept.copy_(x))

        def compared(node: fx.Node, signal: Signal) -> tuple[Tensor, Tensor]:
            x, quantized = signal.streams[0]
            if self.batch in picked[node]:
                keep(node, rows_of(self.specs[node], quantized, picked[node][self.batch]))
            y = self._float(node, x)
            y_quantized = self.frontier.hold(self.solutions[node].module(self.frontier.fetch(quantized)))
            self.noises[node].add(y, y_quantized)
            if self.processes.count == 1:
                self.noises[node].sum_up()
            return y, y_quantized

        self._each_batch(compared)
        self.noise = self.noise.merged(self.processes)

    def finished_records(self) -> list[LayerRecord]:
        """Return what became of the layers, in execution order."""
        in_float, records = iter(self.records), []
        for node in self.network.graph.nodes:
            if node in self.solutions:
                noise, samples = self.noises[node].merged(self.processes), self.processes.gather(self.samples[node])
                records.append(record_solution(self.calls[node], self.solutions[node], noise, samples))
            elif self._why_float(node):
                records.append(next(in_float))
        return records


def _no_operand(signal: Signal) -> QuantParams:
    raise AssertionError("no operand of a sum is quantized here")
