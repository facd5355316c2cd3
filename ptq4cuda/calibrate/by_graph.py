"""One pass over a traced network in execution order, with two streams: in float, and as quantized so far."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ptq4cuda import graph
from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.artifact.record import LayerRecord
from ptq4cuda.calibrate.frontier import Usage
from ptq4cuda.calibrate.importance import output_importance
from ptq4cuda.calibrate.inputs import Inputs, batch_size
from ptq4cuda.calibrate.signals import (
    Kept,
    LayerCall,
    Reader,
    Signal,
    Solver,
    WalkResult,
    progress_bar,
    record_float,
    record_solution,
)
from ptq4cuda.compat import tree_leaves
from ptq4cuda.errors import naming_what_needs_memory
from ptq4cuda.metrics import Noise
from ptq4cuda.nn import QuantTensor
from ptq4cuda.quantizer import QuantParams


def walk_graph(
    network: fx.GraphModule,
    inputs: Inputs,
    solve: Solver,
    operand: Callable[[Signal], QuantParams],
    kept: Kept,
    progress: str,
    keep_before: bool = True,
    measured: bool = True,
) -> WalkResult:
    """Quantize the layers of a traced network in place.

    Args:
        network: as prepare() returns it.
        inputs: calibration data.
        solve: quantizes a layer.
        operand: fits the quantizer of a residual operand.
        kept: tells why a layer stays in float.
        progress: what its bar is called, "" for none.
        keep_before: what values were before their activation, for rules that look at that.
        measured: whether layers are measured, for a report; if not there are no records of them.

    Raises:
        MemoryError: memory does not suffice; the message names the layer.
        OSError: nor does the folder that the rest goes to.
    """
    with naming_what_needs_memory("in a forward of the model"):
        walk = GraphWalk(network, inputs, solve, operand, kept, keep_before, measured)
    with torch.no_grad(), progress_bar(len(walk.layers), progress) as bar:
        for node in network.graph.nodes:
            name = str(node.target) if node.op == "call_module" else node.name
            with naming_what_needs_memory(f"at {'layer' if node in walk.layers else 'operation'} {name!r}"):
                walk.visit(node)
            bar.update(node in walk.layers)
    network.recompile()
    return WalkResult(walk.records, walk.noise, walk.clipped, *walk.usage.found)


class GraphWalk:
    """What a walk knows of a network, and what it does at each node."""

    def __init__(
        self,
        network: fx.GraphModule,
        inputs: Inputs,
        solve: Solver,
        operand: Callable[[Signal], QuantParams],
        kept: Kept,
        keep_before: bool,
        measured: bool = True,
    ) -> None:
        self.network, self.inputs, self.solve, self.operand, self.kept = network, inputs, solve, operand, kept
        self.interpreter = fx.Interpreter(network, garbage_collect_values=False)
        self.frontier, self.processes = inputs.frontier, inputs.processes
        self.usage = Usage(inputs.frontier)
        self.signals: dict[fx.Node, Signal] = {}
        self.records: list[LayerRecord] = []
        self.noise = Noise()
        self.clipped = False

        self.layers = [node for node in network.graph.nodes if self._why_float(node) == ""]
        # A tensor's readers are weighed together, also when the first of them is quantized already.
        self.float_layers: dict[fx.Node, Any] = {node: self._module(node) for node in self.layers}
        self.specs = {node: spec for node in self.layers if (spec := graph.quantized_spec(self._module(node)))}
        self.ends = graph.ends_of(network, self.layers)
        self.costs = output_importance(network, inputs)
        self.as_codes = graph.operands_as_codes(network, *inputs.example)
        self.last_uses = _last_uses(network, lambda node: True)
        # Who asks what a value was before its activation, and hands it on.
        self.last_looks = _last_uses(network, lambda n: n in self.float_layers or graph.is_transparent(n, network))
        self.looked_at = set(itertools.chain.from_iterable(self.last_looks.values()))
        self.keep_before, self.described = keep_before, measured

    def _module(self, node: fx.Node) -> nn.Module:
        return self.network.get_submodule(str(node.target))

    def _why_float(self, node: fx.Node) -> str | None:
        """Return "" for a layer to quantize, a reason for what stays in float, None for all other nodes."""
        reason = graph.why_float_call(node, self.network)
        return self.kept(str(node.target)) if reason == "" else reason

    def visit(self, node: fx.Node) -> None:
        """Run one node on all chunks of both streams."""
        reason = self._why_float(node)
        if node.op == "placeholder":
            signal = self._placeholder(node)
        elif node.op == "output":
            for i, batch in enumerate(self.inputs):
                expected, found = (self._arguments(node, i, stream)[0][0] for stream in (0, 1))
                self.noise.add(expected, found, batch_size(batch))
            self.noise = self.noise.merged(self.processes)
            return
        elif reason == "":
            signal = self._solve(node)
        elif node.op == "call_module" and isinstance(self._module(node), QuantTensor):
            signal = self._quantize_tensor(node)
        else:
            if reason:
                module = self._module(node) if node.op == "call_module" else None
                name = str(node.target) if module is not None else node.name
                self.records.append(record_float(name, module, graph.call_name(node, self.network), reason))
            signal = self._operation(node)
        self.signals[node] = signal
        for used in self.last_looks.get(node, []):
            self.signals[used].before = None
        for used in self.last_uses.get(node, []):
            del self.signals[used]
        if not node.users:
            del self.signals[node]

    def _placeholder(self, node: fx.Node) -> Signal:
        streams = []
        for args, kwargs in self.inputs:
            value = graph.bind(self.network, args, kwargs)[str(node.target)]  # which stays where it is
            streams.append((value, value))
        return self._signal(streams)

    def _signal(self, streams: list[tuple[Any, Any]]) -> Signal:
        return Signal(self.frontier, self.processes, streams)

    def _arguments(self, node: fx.Node, chunk: int, stream: int) -> tuple[Any, Any]:
        def value(used: fx.Node) -> Any:
            return self.frontier.fetch(self.signals[used].streams[chunk][stream])

        return map_arg(node.args, value), map_arg(node.kwargs, value)

    def _run(self, node: fx.Node, arguments: tuple[Any, Any]) -> Any:
        return getattr(self.interpreter, node.op)(node.target, *arguments)

    def _both(self, node: fx.Node, chunk: int) -> tuple[Any, Any]:
        """Run a node on both streams of a chunk, once where they are the same."""
        result = self.frontier.hold(self._run(node, self._arguments(node, chunk, 0)))
        pairs = [self.signals[used].streams[chunk] for used in node.all_input_nodes]
        if all(a is b for a, b in pairs):
            return result, result
        return result, self.frontier.hold(self._run(node, self._arguments(node, chunk, 1)))

    def _used_up(self, node: fx.Node, chunk: int) -> None:
        """Let go of a chunk of what nothing needs once a node has run on it."""
        for used in self.last_uses.get(node, []):
            self.signals[used].drop(chunk)

    def _operation(self, node: fx.Node) -> Signal:
        """Run what is no layer on all chunks of both streams."""
        activation, run_before = self._before(node)
        streams, before = [], []
        for i in range(len(self.inputs)):
            if run_before is not None:
                before.append(run_before(i))
            streams.append(self._both(node, i))
            self._used_up(node, i)
        return Signal(self.frontier, self.processes, streams, before or None, activation)

    def _solve(self, node: fx.Node) -> Signal:
        layer, source = self._module(node), node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(source, fx.Node)
        signal = self.signals[source]
        call = LayerCall.of(
            str(node.target),
            layer,
            self.specs[node],
            signal,
            self._layers_reading(source),
            run=layer,
            first_or_last=node in self.ends,
        )
        call.added = self._added(node, call.outputs)
        call.read = self._reader(node)
        self.clipped |= bool(signal.outliers)
        solution = self.solve(call)
        streams, noise = [], Noise()
        for y, y_quantized in zip(call.outputs, solution.outputs_for(signal), strict=True):
            if self.described:
                noise.add(y, y_quantized)
            streams.append((y, y_quantized))
        self.network.set_submodule(call.name, solution.module)
        if self.described:
            self.records.append(record_solution(call, solution, noise.merged(self.processes)))
        return self._signal(streams)

    def _clip_outliers(self, signal: Signal, axis: int, importance: Tensor) -> None:
        signal.clip_outliers(axis, importance)
        self.clipped |= bool(signal.outliers)

    def _quantize_tensor(self, node: fx.Node) -> Signal:
        """Quantize a residual operand to 8 bits, in the quantized stream."""
        module, source = self._module(node), node.all_input_nodes[0]
        assert isinstance(module, QuantTensor)
        signal = self.signals[source]
        if node not in self.as_codes:
            return self._signal(list(signal.streams))
        channels = signal.streams[0][0].shape[1]
        self._clip_outliers(signal, 1, torch.ones(channels, dtype=torch.float64, device="cpu"))
        module.set(self.operand(signal).to(self.frontier.device))
        result = []
        for i, (x, quantized) in enumerate(list(signal.streams)):
            result.append((x, self.frontier.hold(module(self.frontier.fetch(quantized)))))
            self._used_up(node, i)
        return self._signal(result)

    def _reader(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        """Return what the nodes that follow one by one make of a node's value, up to the next layer, sum or fork."""
        following: list[fx.Node] = []
        while True:
            users = list(node.users)
            if len(users) != 1 or users[0].op == "output" or users[0].all_input_nodes != [node]:
                break
            node = users[0]
            module = self._module(node) if node.op == "call_module" else None
            if self._why_float(node) is not None or isinstance(module, QuantTensor):
                break
            following.append(node)

        def read(x: Tensor) -> Tensor:
            value = x.clone() if following else x  # they may write into it
            for n in following:
                result = self._run(
                    n, map_arg((n.args, n.kwargs), dict.fromkeys(n.all_input_nodes, value).__getitem__)
                )
                if not isinstance(result, Tensor) or len(result) != len(x):
                    break  # it does not keep the samples
                value = result
            return value

        return read

    def _layers_reading(self, source: fx.Node) -> list[Reader]:
        nodes = [node for node in source.users if node in self.layers]
        return [Reader(self.specs[node], self.float_layers[node], self.costs.get(node)) for node in nodes]

    def _added(self, node: fx.Node, outputs: list[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
        """Return both streams of what is added to a node's value next, where it is known by then."""
        users = graph.readers(node)
        if len(users) != 1 or not graph.is_addition(users[0]):
            return None
        others = [operand for operand in users[0].all_input_nodes if operand is not node]
        if len(others) != 1 or others[0] not in self.signals:
            return None
        streams = self.signals[others[0]].streams
        if not all(isinstance(value, Tensor) and value.is_floating_point() for value, _ in streams):
            return None  # numbers and masks carry no error
        if all(value is quantized for value, quantized in streams):
            return None  # nor do constants and inputs, which may be infinite
        return [
            (_summand(value, y), _summand(quantized, y))
            for (value, quantized), y in zip(self.frontier.each(streams), outputs, strict=True)
        ]

    def _before(self, node: fx.Node) -> tuple[Activation, Callable[[int], Tensor] | None]:
        """Return the activation that made a value, and what tells of a chunk what it was before, if that is kept.

        Nodes that only move values hand it on. The activation is the identity where nobody asks.
        """
        if node not in self.looked_at:
            return IDENTITY, None
        used = [s for n in node.all_input_nodes if _has_tensors((s := self.signals[n]).streams[0][0])]  # not sizes
        activation = graph.activation_of(node, self.network)
        if activation is not None and len(used) == 1:
            return activation, (lambda chunk: used[0].streams[chunk][0]) if self.keep_before else None
        handed_on = {s.activation for s in used}
        if not graph.is_transparent(node, self.network) or len(handed_on) != 1:
            return IDENTITY, None
        activation = handed_on.pop()
        if activation == IDENTITY or not self.keep_before:
            return activation, None

        def run_before(chunk: int) -> Tensor:
            def before(n: fx.Node) -> Any:
                held = self.signals[n].before
                return self.frontier.fetch(self.signals[n].streams[chunk][0] if held is None else held[chunk])

            held: Tensor = self.frontier.hold(
                self._run(node, (map_arg(node.args, before), map_arg(node.kwargs, before)))
            )
            return held

        return activation, run_before


def _last_uses(network: fx.GraphModule, counts: Callable[[fx.Node], bool]) -> dict[fx.Node, list[fx.Node]]:
    """Return by node the values that it is the last one to use, among nodes that count."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in filter(counts, reversed(network.graph.nodes)):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
    return last


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _summand(x: Tensor, y: Tensor) -> Tensor:
    """Return what a sum with x adds to each value of y: the mean where y is broadcast over x."""
    if x.dim() > y.dim():
        x = x.mean(tuple(range(x.dim() - y.dim())))
    spread = [d for d in range(-x.dim(), 0) if x.shape[d] > 1 and y.shape[d] == 1]
    return x.mean(spread, keepdim=True) if spread else x
