"""One pass over a network in execution order, with two streams: in float, and as quantized so far.

At every layer to quantize the walk hands a LayerCall to a solver, puts the module that the solver returns in the
layer's place, runs the layer both ways and goes on. Closed-form solvers look at one stream only; error-compensating
ones compare the two. The tensors that are still needed (the frontier) are held for all calibration samples, chunk by
chunk, on the host, so that device memory is bounded by one chunk.

A model that torch.fx cannot trace is walked by its modules: one forward with both streams side by side along the
batch, each layer solved when it is first called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

from ptq4cuda import graph
from ptq4cuda.clipping import IDENTITY, Activation, ClipRule
from ptq4cuda.containers import map_tensors, tensors_of
from ptq4cuda.flow import Flow
from ptq4cuda.frontier import Frontier, Memory, naming_what_needs_memory
from ptq4cuda.inputs import Inputs, batch_size, device_of
from ptq4cuda.metrics import Noise
from ptq4cuda.nn import QuantModule, QuantTensor, quant_module_for
from ptq4cuda.outliers import find_outliers
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.record import LayerRecord, tensor_bytes
from ptq4cuda.statistics import ChannelHistogram, ChannelStatistics
from ptq4cuda.structure import replace_module

Layer = nn.Conv2d | nn.Linear
_LEAST_ALONE = 30.0  # dB between float outputs of one batch and of all at once, which differ by rounding


@dataclass(eq=False)
class Signal:
    """A value of the network over all calibration samples.

    Attributes:
        streams: for each chunk, the value in float and as quantized so far: one object where they are the same.
        before: for each chunk, the float tensor before `activation`, where the value is activation(before).
        activation: the activation that made the value.
        quantizers: fitted to this tensor and shared by all layers that read it, by (bits, channel axis).
        outliers: what is to be said about values that were clipped; None before they were looked for.
    """

    streams: list[tuple[Any, Any]]
    before: list[Tensor] | None = None
    activation: Activation = IDENTITY
    quantizers: dict[tuple[int, int], tuple[QuantParams, ClipRule]] = field(default_factory=dict)
    outliers: str | None = None

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
        self.outliers = found.remark if found is not None else ""
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
        remark: what is to be said about the walk, or "".
        frontier_bytes: most bytes of tensors between layers that were held on the host at a time.
        spilled_bytes: bytes of such tensors that went to files.
    """

    layers: list[LayerRecord]
    noise: Noise
    clipped: bool
    remark: str = ""
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


def walk_modules(network: nn.Module, inputs: Inputs, solve: Solver, kept: Kept, progress: bool) -> WalkResult:
    """Quantize the layers of any network in place, in one forward of all calibration samples.

    BatchNorm is not folded, and an activation before a layer is known only where it is a module.
    """
    names, flow = _observe(network, kept, inputs[0])
    walk = _ModuleWalk(names, flow.ends, solve, samples=sum(map(batch_size, inputs)))
    # They see what a module itself computes: the model's own hooks come before and after.
    hooks = [module.register_forward_hook(walk.on_layer, with_kwargs=True, prepend=True) for module in names]
    for module in network.modules():
        if graph.module_activation(module) is not None:
            hooks += [module.register_forward_pre_hook(walk.before_activation)]
            hooks += [module.register_forward_hook(walk.on_activation, prepend=True)]
    try:
        args, kwargs = _side_by_side(inputs)
        with (
            torch.no_grad(),
            _progress(len(flow.order), progress) as walk.bar,
            naming_what_needs_memory("in a forward of all calibration samples"),
        ):
            output = network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
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
    noise = Noise()
    noise.add(*_split(output), walk.samples)
    clipped = any(call.signal.outliers for call in walk.calls.values())
    return WalkResult(records, noise, clipped, _mixing(flow.output, output))


def _mixing(alone: Any, together: Any) -> str:
    """Say so if the float output for the first batch is not what it was when that batch came alone."""
    noise = Noise()
    for expected, found in zip(tensors_of(alone), tensors_of(together), strict=False):
        if expected.dim() and found[: len(expected)].shape == expected.shape:
            noise.add(expected, found[: len(expected)])
    if noise.sqnr is None or noise.sqnr > _LEAST_ALONE:
        return ""
    return (
        "its outputs for a sample depend on the other samples of a batch, which here were those of both streams: "
        "quantizers and weights may not fit"
    )


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


def _side_by_side(inputs: Inputs) -> tuple[Any, Any]:
    """Concatenate all batches along the batch, twice: the float stream, then the quantized one.

    Raises:
        ValueError: an argument without samples, as a grid, differs between batches.
    """
    sizes = [batch_size(batch) for batch in inputs]

    def join(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            if all(t.dim() > 0 and len(t) == size for t, size in zip(values, sizes, strict=True)):
                return torch.cat([*values, *values])
            if any(t.shape != first.shape or not torch.equal(t, first) for t in values):
                raise ValueError(
                    "torch.fx cannot trace the model, and a tensor that goes with all samples differs between "
                    "batches: give one batch"
                )
        if isinstance(first, (tuple, list)):
            return type(first)(join(items) for items in zip(*values, strict=True))
        if isinstance(first, dict):
            return {key: join([v[key] for v in values]) for key in first}
        return first

    return join([args for args, _ in inputs]), join([kwargs for _, kwargs in inputs])


def _split(value: Any) -> tuple[Any, Any]:
    """Return the float stream and the quantized one of a value that holds both along the batch; scalars mix both."""
    return (
        map_tensors(value, lambda t: t[: len(t) // 2] if t.dim() else t),
        map_tensors(value, lambda t: t[len(t) // 2 :] if t.dim() else t),
    )


class _ModuleWalk:
    def __init__(self, names: dict[nn.Module, str], ends: set[nn.Module], solve: Solver, samples: int) -> None:
        self.names, self.ends, self.solve, self.samples = names, ends, solve, samples
        self.calls: dict[nn.Module, LayerCall] = {}
        self.solved: dict[nn.Module, Solution] = {}
        self.noise: dict[nn.Module, Noise] = {}
        self.called: Counter[nn.Module] = Counter()
        self.left: dict[nn.Module, str] = {}
        self.entering: dict[nn.Module, Tensor] = {}
        # By the output of an activation, what went in. The versions tell whether either was changed in place since.
        self.before: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.bar: Any = None

    def before_activation(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.entering[module] = args[0].clone() if getattr(module, "inplace", False) else args[0]

    def on_activation(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        before = self.entering.pop(module)
        self.before[output] = (output._version, before, before._version, graph.module_activation(module))

    def activation_before(self, x: Tensor) -> tuple[Tensor | None, Activation]:
        """Return what x was before its activation, and the activation, where they are known."""
        version, before, version_before, activation = self.before.get(x, (0, None, 0, IDENTITY))
        if before is None or (x._version, before._version) != (version, version_before):
            return None, IDENTITY
        return before, activation

    def on_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        source = args[0] if args else kwargs["input"]
        if source.dim() == 0 or len(source) == 0 or len(source) % (2 * self.samples):
            self.left[module] = "its input does not keep the samples along dimension 0"
            return None
        x, quantized = _split(source)
        self.called[module] += 1
        if module not in self.solved:
            signal = Signal([(x, quantized)])
            before, activation = self.activation_before(source)
            if before is not None:
                signal.before, signal.activation = [_split(before)[0]], activation
            assert isinstance(module, (nn.Conv2d, nn.Linear))
            kind = graph.layer_kind(module)
            assert kind is not None
            importance = graph.layer_importance(
                module, torch.ones(len(module.weight), dtype=torch.float64, device="cpu")
            )
            signal.clip_outliers(quant_module_for(kind).activation_axis, importance, lambda tensor: tensor)
            if signal.outliers:
                x, quantized = signal.streams[0]
                output = torch.cat([module.forward(x)] * 2)
            self.calls[module] = LayerCall(
                self.names[module],
                module,
                kind,
                signal,
                first_or_last=module in self.ends,
                outputs=[_split(output)[0]],
                added=None,
                importance=importance,
            )
            with naming_what_needs_memory(f"at layer {self.names[module]!r}"):
                self.solved[module] = self.solve(self.calls[module])
            signal.streams, signal.before = [], None  # let the tensors go
            self.noise[module] = Noise()
            self.bar.update()
        y = _split(output)[0]
        y_quantized = self.solved[module].module(quantized)
        self.noise[module].add(y, y_quantized)
        return torch.cat([y, y_quantized])

    def records(self) -> list[LayerRecord]:
        records = [record_solution(self.calls[m], s, self.noise[m]) for m, s in self.solved.items()]
        for record, module in zip(records, self.solved, strict=True):
            if self.called[module] > 1:
                record.reason = f"called {self.called[module]} times, its input quantized for the first"
        return records
