"""One pass over a network in execution order, with two streams: in float, and as quantized so far.

At every layer to quantize the walk hands a LayerCall to a solver, puts the module that the solver returns in the
layer's place, runs the layer both ways and goes on. Closed-form solvers look at one stream only; error-compensating
ones compare the two. The tensors that are still needed (the frontier) are held for all calibration samples, chunk by
chunk, on the host, so that device memory is bounded by one chunk.

A model that torch.fx cannot trace is walked by its modules: for each layer, every chunk is run up to that layer, once
in float and once as quantized so far. Layers that are solved give what they gave before, as far as memory holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

from ptq4cuda import graph
from ptq4cuda.clipping import IDENTITY, Activation, ClipRule
from ptq4cuda.flow import Flow
from ptq4cuda.frontier import Frontier, Memory, naming_what_needs_memory
from ptq4cuda.inputs import Inputs, batch_size, device_of
from ptq4cuda.metrics import Noise
from ptq4cuda.nn import QuantModule, QuantTensor, quant_module_for
from ptq4cuda.outliers import Outliers, find_outliers
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.record import LayerRecord, tensor_bytes
from ptq4cuda.statistics import ChannelHistogram, ChannelStatistics
from ptq4cuda.structure import replace_module

Layer = nn.Conv2d | nn.Linear


@dataclass(eq=False)
class Signal:
    """A value of the network over all calibration samples.

    Attributes:
        streams: for each chunk, the value in float and as quantized so far: one object where they are the same.
        before: for each chunk, the float tensor before `activation`, where the value is activation(before).
        activation: the activation that made the value.
        quantizers: fitted to this tensor and shared by all layers that read it, by (bits, channel axis).
        outliers: what is to be said about values that were clipped; None before they were looked for.
        clip: clips them, where there were any.
    """

    streams: list[tuple[Any, Any]]
    before: list[Tensor] | None = None
    activation: Activation = IDENTITY
    quantizers: dict[tuple[int, int], tuple[QuantParams, ClipRule]] = field(default_factory=dict)
    outliers: str | None = None
    clip: Outliers | None = None

    def clip_outliers(self, axis: int, importance: Tensor, hold: Callable[[Tensor], Tensor]) -> None:
        """Clip both streams, once, to what all but a vanishing share of the samples confirm.

        Whatever fits the network to its data looks at these streams: a broken pixel that no quantizer holds would
        otherwise rule the weights and biases of all layers behind it.

        Args:
            axis: of the channels.
            importance: float64 [C], what a squared error of each channel costs.
            hold: keeps the results.
        """
        if self.outliers is not None:
            return
        found = find_outliers([value for value, _ in self.streams], axis, importance)
        self.outliers, self.clip = found.remark if found is not None else "", found
        if found is not None:
            for i, (value, quantized) in enumerate(self.streams):
                clipped = hold(found.clip(value))
                self.streams[i] = (clipped, clipped if quantized is value else hold(found.clip(quantized)))
        if self.before is not None:
            found = find_outliers(self.before, axis, importance)
            if found is not None:
                self.before = [hold(found.clip(value)) for value in self.before]

    def statistics(self, axis: int | None) -> ChannelStatistics:
        """Measure the float tensor along a channel axis, before its activation where it has one."""
        chunks = self.before if self.before is not None else [value for value, _ in self.streams]
        return ChannelStatistics.over(lambda: chunks, axis)

    def histogram(self, axis: int | None) -> ChannelHistogram:
        """Count the values of the tensor as quantized so far, as its readers see it."""
        return ChannelHistogram.over(lambda: [quantized for _, quantized in self.streams], axis)


@dataclass(eq=False)
class LayerCall:
    """What a solver sees of a layer.

    Attributes:
        name: of the module.
        layer: the float layer.
        kind: "Conv2d" or "Linear".
        signal: its input.
        first_or_last: True for layers that read an image and for those behind which no other lies.
        outputs: its float output, for each chunk.
        added: what is added to the output next (the shortcut of a residual block), both streams for each chunk, where
            it is known by then: of what the output is broadcast over, the mean.
        importance: float64 [C], what a squared error of each channel of the signal costs, in the layers to quantize
            that read it.
    """

    name: str
    layer: Layer
    kind: str
    signal: Signal
    first_or_last: bool
    outputs: list[Tensor]
    added: list[tuple[Tensor, Tensor]] | None
    importance: Tensor


@dataclass(eq=False)
class Solution:
    """What a solver returns: the quantized module and the clip rule of its input."""

    module: QuantModule
    clip: str


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


def record_solution(call: LayerCall, solution: Solution, noise: Noise) -> LayerRecord:
    """Describe a quantized layer."""
    module = solution.module
    layer = call.layer
    activation_bits = module.activation_bits
    return LayerRecord(
        name=call.name,
        kind=call.kind,
        weight_bits=float(module.weight_bits.float().mean()),
        activation_bits=None if activation_bits is None else float(activation_bits.float().mean()),
        clip=solution.clip,
        sqnr=noise.sqnr,
        float_bytes=4 * sum(p.numel() for p in (layer.weight, layer.bias) if p is not None),
        bytes=tensor_bytes(module),
        execution="simulate",
        reason=call.signal.outliers or "",
    )


def record_float(name: str, module: nn.Module | None, kind: str, reason: str) -> LayerRecord:
    """Describe a layer that stays in float."""
    size = tensor_bytes(module) if module is not None else 0
    return LayerRecord(name=name, kind=kind, float_bytes=size, bytes=size, reason=reason)


def _progress(total: int, show: bool) -> Any:
    """Return a progress bar that appears once the work takes longer than a moment."""
    return tqdm(total=total, desc="quantize", unit="layer", disable=not show, delay=1.0)


# --- by the graph -------------------------------------------------------------------------------------------


def walk_graph(
    network: fx.GraphModule,
    inputs: Inputs,
    solve: Solver,
    kept: Kept,
    progress: bool,
    memory: Memory,
) -> WalkResult:
    """Quantize the layers of a traced network in place.

    Raises:
        MemoryError: memory does not suffice; the message names the layer.
        OSError: nor does the folder that the rest goes to.
    """
    with naming_what_needs_memory("in a forward of the model"):
        walk = _GraphWalk(network, inputs, solve, kept, memory)
    with torch.no_grad(), _progress(len(walk.layers), progress) as bar:
        for node in network.graph.nodes:
            name = str(node.target) if node.op == "call_module" else node.name
            with naming_what_needs_memory(f"at {'layer' if node in walk.layers else 'operation'} {name!r}"):
                walk.visit(node)
            bar.update(node in walk.layers)
    network.recompile()
    frontier = walk.frontier
    return WalkResult(
        walk.records, walk.noise, walk.clipped, frontier_bytes=frontier.peak, spilled_bytes=frontier.spilled
    )


class _GraphWalk:
    def __init__(self, network: fx.GraphModule, inputs: Inputs, solve: Solver, kept: Kept, memory: Memory) -> None:
        self.network, self.inputs, self.solve, self.kept = network, inputs, solve, kept
        self.interpreter = fx.Interpreter(network, garbage_collect_values=False)
        self.frontier = Frontier(device_of(network), memory)
        self.signals: dict[fx.Node, Signal] = {}
        self.records: list[LayerRecord] = []
        self.noise = Noise()
        self.clipped = False

        self.layers = [node for node in network.graph.nodes if self._why_float(node) == ""]
        # A tensor's readers are weighed together, also when the first of them is quantized already.
        self.float_layers: dict[fx.Node, Any] = {node: self._module(node) for node in self.layers}
        self.ends = graph.ends_of(network, self.layers)
        self.costs = graph.output_importance(network, inputs)
        self.as_codes = graph.operands_as_codes(network, *inputs[0])
        # The values that are not needed any more once a node has run.
        self.last_uses: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(network.graph.nodes):
            for used in node.all_input_nodes:
                if used not in seen:
                    seen.add(used)
                    self.last_uses.setdefault(node, []).append(used)

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
            signal = Signal([self._both(node, i) for i in range(len(self.inputs))])
        self._set_activation(node, signal)
        self.signals[node] = signal
        for used in self.last_uses.get(node, []):
            del self.signals[used]
        if not node.users:
            del self.signals[node]

    def _placeholder(self, node: fx.Node) -> Signal:
        streams = []
        for args, kwargs in self.inputs:
            held = self.frontier.hold(graph.bind(self.network, args, kwargs)[str(node.target)])
            streams.append((held, held))
        return Signal(streams)

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

    def _solve(self, node: fx.Node) -> Signal:
        layer, source = self._module(node), node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(layer, (nn.Conv2d, nn.Linear)) and isinstance(source, fx.Node)
        kind = graph.layer_kind(layer)
        assert kind is not None
        signal, importance = self.signals[source], self._importance(source)
        self._clip_outliers(signal, quant_module_for(kind).activation_axis, importance)
        outputs = [self.frontier.hold(layer(self.frontier.fetch(x))) for x, _ in signal.streams]
        call = LayerCall(
            str(node.target),
            layer,
            kind,
            signal,
            first_or_last=node in self.ends,
            outputs=outputs,
            added=self._added(node, outputs),
            importance=importance,
        )
        solution = self.solve(call)
        streams, noise = [], Noise()
        for y, (_, quantized) in zip(call.outputs, signal.streams, strict=True):
            y_quantized = self.frontier.hold(solution.module(self.frontier.fetch(quantized)))
            noise.add(y, y_quantized)
            streams.append((y, y_quantized))
        self.network.set_submodule(call.name, solution.module)
        self.records.append(record_solution(call, solution, noise))
        return Signal(streams)

    def _clip_outliers(self, signal: Signal, axis: int, importance: Tensor) -> None:
        signal.clip_outliers(axis, importance, self.frontier.hold)
        self.clipped |= bool(signal.outliers)

    def _quantize_tensor(self, node: fx.Node) -> Signal:
        """Quantize a residual operand to 8 bits over its whole range, in the quantized stream."""
        module, source = self._module(node), node.all_input_nodes[0]
        assert isinstance(module, QuantTensor)
        signal = self.signals[source]
        streams = signal.streams
        if node not in self.as_codes:
            return Signal(streams)
        self._clip_outliers(signal, 1, torch.ones(streams[0][0].shape[1], dtype=torch.float64, device="cpu"))
        statistics = ChannelStatistics.over(lambda: [quantized for _, quantized in streams], 1)
        bits = torch.full_like(statistics.mean, 8, dtype=torch.uint8)
        module.set(QuantParams.from_range(statistics.min, statistics.max, bits).to(self.frontier.device))
        return Signal([(x, self.frontier.hold(module(self.frontier.fetch(quantized)))) for x, quantized in streams])

    def _importance(self, source: fx.Node) -> Tensor:
        readers = [node for node in source.users if node in self.layers]
        costs = []
        for reader in readers:
            layer = self.float_layers[reader]
            costs.append(
                graph.layer_importance(
                    layer, self.costs.get(reader, layer.weight.new_ones(len(layer.weight)).double())
                )
            )
        return torch.stack(costs).sum(0)

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
            for (value, quantized), y in zip(streams, outputs, strict=True)
        ]

    def _set_activation(self, node: fx.Node, signal: Signal) -> None:
        """Remember what the value was before its activation, also through nodes that only move values."""
        used = [s for n in node.all_input_nodes if _has_tensors((s := self.signals[n]).streams[0][0])]  # not sizes
        activation = graph.activation_of(node, self.network)
        if activation is not None and len(used) == 1:
            signal.before = [value for value, _ in used[0].streams]
            signal.activation = activation
        elif graph.is_transparent(node, self.network) and used:
            if any(s.before is None or s.activation != used[0].activation for s in used):
                return

            def run_before(chunk: int) -> Tensor:
                def before(n: fx.Node) -> Any:
                    held = self.signals[n].before
                    return self.frontier.fetch(self.signals[n].streams[chunk][0] if held is None else held[chunk])

                held: Tensor = self.frontier.hold(
                    self._run(node, (map_arg(node.args, before), map_arg(node.kwargs, before)))
                )
                return held

            signal.before = [run_before(i) for i in range(len(self.inputs))]
            signal.activation = used[0].activation


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _summand(x: Tensor, y: Tensor) -> Tensor:
    """Return what a sum with x adds to each value of y: the mean where y is broadcast over x."""
    if x.dim() > y.dim():
        x = x.mean(tuple(range(x.dim() - y.dim())))
    spread = [d for d in range(-x.dim(), 0) if x.shape[d] > 1 and y.shape[d] == 1]
    return x.mean(spread, keepdim=True) if spread else x


# --- by the modules -----------------------------------------------------------------------------------------


def walk_modules(
    network: nn.Module, inputs: Inputs, solve: Solver, kept: Kept, progress: bool, memory: Memory
) -> WalkResult:
    """Quantize the layers of any network in place, chunk by chunk.

    BatchNorm is not folded, and an activation before a layer is known only where it is a module.

    Raises:
        MemoryError: memory does not suffice; the message names the layer.
        OSError: nor does the folder that the rest goes to.
    """
    names, flow = _observe(network, kept, inputs[0])
    walk = _ModuleWalk(network, names, flow.ends, inputs, solve, memory)
    noise = Noise()
    with torch.no_grad(), _progress(len(flow.order), progress) as bar, walk.in_place():
        waiting = [module for module in flow.order if module in names]
        while waiting:
            for module in waiting:
                with naming_what_needs_memory(f"at layer {names[module]!r}"):
                    walk.solve_layer(module)
                bar.update()
            with naming_what_needs_memory("in a forward of the model"):
                noise = walk.compare()
            waiting = [module for module in walk.called if module not in walk.tried]  # what other batches call
    for module, solution in walk.solved.items():
        replace_module(network, module, solution.module)
    records = walk.records()
    hidden = graph.hidden_modules(network)
    for name, module in network.named_modules():
        if module in hidden:
            continue
        reason = graph.why_float(module) or (kept(name) if graph.layer_kind(module) else "")
        if module in names and module not in walk.solved:
            reason = walk.left.get(module, "never called as a module")
        if reason:
            records.append(record_float(name, module, type(module).__name__, reason))
    for function in flow.functions:
        reason = f"a call of {function}; only modules are quantized where torch.fx cannot trace the model"
        records.append(record_float(function, None, function, reason))
    clipped = any(call.signal.outliers for call in walk.solved_calls.values())
    frontier = walk.frontier
    return WalkResult(records, noise, clipped, frontier_bytes=frontier.peak, spilled_bytes=frontier.spilled)


def _observe(network: nn.Module, kept: Kept, example: Any) -> tuple[dict[nn.Module, str], Flow]:
    """Return the layers to quantize, with their names, and what a forward tells about them."""
    while True:
        hidden = graph.hidden_modules(network)
        modules = {module: name for name, module in network.named_modules() if module not in hidden}
        names = {m: name for m, name in modules.items() if graph.layer_kind(m) and not kept(name)}
        others = [m for m in modules if m not in names and (graph.layer_kind(m) or graph.why_float(m))]
        flow = Flow(names, others).run(network, *example)
        for module in flow.read:
            graph.leave(module, "other code than its own reads its parameters")
        for module in flow.watched:
            graph.leave(module, "its hooks tell it from a quantized layer")
        if not flow.read and not flow.watched:
            return names, flow


class _Reached(BaseException):
    """Ends a forward at the layer that is to be solved; no code of a model may take it for an error of its own."""


@dataclass(eq=False)
class _Arrival:
    """What a layer is called with: its input, and what that was before its activation, where it is known."""

    x: Tensor
    before: Tensor | None
    activation: Activation


class _ModuleWalk:
    def __init__(
        self,
        network: nn.Module,
        names: dict[nn.Module, str],
        ends: set[nn.Module],
        inputs: Inputs,
        solve: Solver,
        memory: Memory,
    ) -> None:
        self.network, self.names, self.ends, self.inputs, self.solve = network, names, ends, inputs, solve
        self.kinds = {module: str(graph.layer_kind(module)) for module in names}
        self.frontier = Frontier(device_of(network), memory)
        self.solved: dict[nn.Module, Solution] = {}
        self.solved_calls: dict[nn.Module, LayerCall] = {}
        self.noise: dict[nn.Module, Noise] = {}
        self.left: dict[nn.Module, str] = {}
        self.tried: set[nn.Module] = set()
        self.called: Counter[nn.Module] = Counter()  # in one forward, at most
        # Outputs of solved layers, by chunk, stream, layer and call, the oldest first.
        self.outputs: dict[tuple[int, bool, nn.Module, int], Tensor] = {}
        self.output_bytes = 0
        # Of the forward under way:
        self.chunk, self.quantized = 0, False
        self.until: nn.Module | None = None
        self.arrival: _Arrival | None = None
        self.calls: Counter[nn.Module] = Counter()
        self.settled = True  # whether no layer that is still to be solved was called
        self.entering: dict[nn.Module, Tensor] = {}
        # By the output of an activation, what went in. The versions tell whether either was changed in place since.
        self.before: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Take the place of the layers' forward, and watch the activations."""
        hooks = []
        for module in self.network.modules():
            if graph.module_activation(module) is not None:
                hooks += [module.register_forward_pre_hook(self._before_activation)]
                # It sees what a module itself computes: the model's own hooks come after.
                hooks += [module.register_forward_hook(self._on_activation, prepend=True)]
        try:
            for module in self.names:
                vars(module)["forward"] = partial(self._forward, module)
            yield
        finally:
            for module in self.names:
                vars(module).pop("forward", None)
            for hook in hooks:
                hook.remove()

    def _run(self, chunk: int, quantized: bool, until: nn.Module | None = None) -> Any:
        """Run the network on a chunk in one of the streams, always with the same random numbers."""
        self.chunk, self.quantized, self.until, self.arrival = chunk, quantized, until, None
        self.calls, self.settled, self.before = Counter(), True, WeakIdKeyDictionary()
        args, kwargs = tree_map_only(Tensor, torch.clone, self.inputs[chunk])  # the model may write into them
        device = self.frontier.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(chunk)
            try:
                return self.network(*args, **kwargs)
            except _Reached:
                return None
            finally:
                self.called |= self.calls
                self.entering.clear()

    def _forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0] if args else kwargs["input"]
        turn = self.calls[module]
        self.calls[module] += 1
        if module is self.until and turn == 0:
            self.arrival = _Arrival(x, *self._activation_before(x))
            raise _Reached
        if module not in self.solved:
            self.settled &= module in self.left
            return self._float(module, x)
        key = (self.chunk, self.quantized, module, turn)
        if key in self.outputs:
            held: Tensor = self.frontier.fetch(self.outputs[key])
            return held.clone()  # the model may write into it
        clip = self.solved_calls[module].signal.clip
        if clip is not None:
            x = clip.clip(x)
        y: Tensor = self.solved[module].module(x) if self.quantized else self._float(module, x)
        if self.settled:
            self._keep(key, y)
        return y

    def _float(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = type(module).forward(module, x)
        return y

    def _keep(self, key: tuple[int, bool, nn.Module, int], y: Tensor) -> None:
        """Keep an output for the forwards that follow, in half of the memory; the oldest go first."""
        size, room = y.numel() * y.element_size(), self.frontier.limit // 2
        while self.outputs and self.output_bytes + size > room:
            oldest = self.outputs.pop(next(iter(self.outputs)))
            self.output_bytes -= oldest.numel() * oldest.element_size()
        if size <= room and self.frontier.bytes + size <= self.frontier.limit:
            self.outputs[key] = self.frontier.hold(y.clone())
            self.output_bytes += size

    def _before_activation(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.entering[module] = args[0].clone() if getattr(module, "inplace", False) else args[0]

    def _on_activation(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        before = self.entering.pop(module)
        self.before[output] = (output._version, before, before._version, graph.module_activation(module))

    def _activation_before(self, x: Tensor) -> tuple[Tensor | None, Activation]:
        """Return what x was before its activation, and the activation, where they are known."""
        version, before, version_before, activation = self.before.get(x, (0, None, 0, IDENTITY))
        if before is None or (x._version, before._version) != (version, version_before):
            return None, IDENTITY
        return before, activation

    def _arrive(self, chunk: int, quantized: bool, module: nn.Module) -> _Arrival | None:
        """Return what a layer is called with, None where a chunk does not call it."""
        self._run(chunk, quantized, until=module)
        found, self.arrival = self.arrival, None
        if found is not None:
            found.x, found.before = self.frontier.hold(found.x), self.frontier.hold(found.before)
        return found

    def solve_layer(self, module: nn.Module) -> None:
        """Solve a layer for what it is called with, and first only."""
        self.tried.add(module)
        chunks, arrivals, streams = [], [], []
        for chunk in range(len(self.inputs)):
            found = self._arrive(chunk, False, module)
            # Before the first layer is solved both streams are one.
            other = self._arrive(chunk, True, module) if self.solved else found
            if found is None or other is None or found.x.shape != other.x.shape:
                continue
            if found.x.dim() == 0 or len(found.x) == 0 or len(found.x) % batch_size(self.inputs[chunk]):
                self.left[module] = "its input does not keep the samples along dimension 0"
                return
            chunks.append(chunk)
            arrivals.append(found)
            streams.append((found.x, other.x))
        if not streams:
            return
        signal = Signal(streams)
        befores = [found.before for found in arrivals if found.before is not None]
        if len(befores) == len(arrivals) and len({found.activation for found in arrivals}) == 1:
            signal.before, signal.activation = befores, arrivals[0].activation
        arrivals.clear()
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        kind = self.kinds[module]
        ones = torch.ones(len(module.weight), dtype=torch.float64, device="cpu")
        importance = graph.layer_importance(module, ones)
        signal.clip_outliers(quant_module_for(kind).activation_axis, importance, self.frontier.hold)
        fetch, hold = self.frontier.fetch, self.frontier.hold
        call = LayerCall(
            self.names[module],
            module,
            kind,
            signal,
            first_or_last=module in self.ends,
            outputs=[hold(self._float(module, fetch(x))) for x, _ in signal.streams],
            added=None,
            importance=importance,
        )
        solution = self.solve(call)
        noise = Noise()
        for chunk, y, (_, quantized) in zip(chunks, call.outputs, signal.streams, strict=True):
            y_quantized = solution.module(fetch(quantized))
            noise.add(fetch(y), y_quantized)
            self._keep((chunk, False, module, 0), y)
            self._keep((chunk, True, module, 0), y_quantized)
        call.outputs, signal.streams, signal.before = [], [], None  # let the tensors go
        self.solved[module], self.solved_calls[module], self.noise[module] = solution, call, noise

    def compare(self) -> Noise:
        """Run the network whole, in both streams, and return the noise of its output."""
        noise = Noise()
        for chunk, batch in enumerate(self.inputs):
            expected, found = (self._run(chunk, quantized) for quantized in (False, True))
            noise.add(expected, found, batch_size(batch))
        return noise

    def records(self) -> list[LayerRecord]:
        records = [record_solution(self.solved_calls[m], s, self.noise[m]) for m, s in self.solved.items()]
        for record, module in zip(records, self.solved, strict=True):
            if self.called[module] > 1:
                record.reason = f"called {self.called[module]} times, its input quantized for the first"
        return records
