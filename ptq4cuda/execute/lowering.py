"""Lowers a quantized network to integers: activations stay codes between layers.

A quantized convolution, the residual sum behind it and the activation behind that become one integer convolution. It
returns the codes of its readers, where they reach it through max pooling and concatenation alone; these work on codes
as they do on values. Readers may disagree on the quantizer: the next convolution reads 4 bits, the next residual sum
8. A layer returns two outputs at most, of which one can be values; whoever wants anything else gets values, and a
visible Quantize turns them into codes again. Values have the memory format that they have in the float network.

On a GPU, codes that only convolutions read travel packed (ops.nibbles), where that saves a quarter of their bytes or
more. Pooling and concatenation, residual sums, depthwise and grouped convolutions and linear layers read bytes.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.execute.engines import IntegerConv2d, IntegerLinear
from ptq4cuda.graph.layers import activation_of, is_addition, is_concatenation
from ptq4cuda.graph.network import Network
from ptq4cuda.graph.readers import reads_shape
from ptq4cuda.graph.shapes import source_of
from ptq4cuda.graph.tracer import expect
from ptq4cuda.nn import QuantConv2d, Quantize, QuantLinear, QuantModule, QuantTensor
from ptq4cuda.ops import max_pool_codes, panels
from ptq4cuda.ops.nibbles import Nibbles
from ptq4cuda.quantizer import QuantParams

_LEAST_SAVING = 0.25  # of the bytes of codes that are packed


def lower_layers(
    network: nn.Module,
    dtype: torch.dtype = torch.float32,
    pack: bool | None = None,
    by_graph: bool | None = None,
) -> dict[str, str]:
    """Let the quantized layers of a network execute in integers, in place.

    quantize() does this; it is for networks that are put together of QuantConv2d and QuantLinear by hand. A network
    in integers has the state_dict of the simulated one, and can load it; in part it cannot.

    Args:
        network: as quantized, or a quantized layer alone.
        dtype: of the values that it computes with.
        pack: let codes travel packed between convolutions. Default: if the network is on a GPU.
        by_graph: let codes travel along the network's graph, in which no operation may be in place. Default: if it
            is a torch.fx.GraphModule.

    Returns:
        For each quantized layer that stays simulated, why.
    """
    graph = network if by_graph is not False and isinstance(network, fx.GraphModule) else None
    reload = _Reload(graph, dtype, pack)
    network.register_load_state_dict_pre_hook(reload.before)
    network.register_load_state_dict_post_hook(reload.after)
    return _lower(network, graph, dtype, pack)


def _lower(network: nn.Module, graph: fx.GraphModule | None, dtype: torch.dtype, pack: bool | None) -> dict[str, str]:
    layers = _quantized_layers(network)
    simulated = {name: layer for name, layer in layers.items() if layer.engine is None}
    reasons = {name: reason for name, layer in simulated.items() if (reason := _why_simulated(layer))}
    if graph is None:
        for name, layer in simulated.items():
            if name not in reasons:
                layer.execute_in_integers(_engine(layer, dtype))
    elif len(simulated) == len(layers):  # a graph is lowered once, as a whole
        if pack is None:
            pack = any(buffer.is_cuda for buffer in network.buffers())
        _Lowering(graph, reasons, dtype, pack).run()
    return reasons


def _quantized_layers(network: nn.Module) -> dict[str, QuantModule]:
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantModule)}


class _Reload:
    """Lets a lowered network load a state_dict: it is simulated meanwhile, then lowered for what it has loaded."""

    def __init__(self, network: fx.GraphModule | None, dtype: torch.dtype, pack: bool | None) -> None:
        self.dtype, self.pack = dtype, pack
        # It shares the network's modules, and keeps those that the lowered graph does not call.
        self.simulated = Network(network, network.graph) if network is not None else None  # which can be pickled
        self.lowered: set[str] = set()
        self.errors: list[str] = []

    def before(self, network: nn.Module, *arguments: Any) -> None:
        """Simulate the network; the last argument of a hook collects errors."""
        self.errors = arguments[-1]
        layers = _quantized_layers(network)
        self.lowered = {name for name, layer in layers.items() if layer.engine is not None}
        for engine in (module for module in network.modules() if isinstance(module, IntegerConv2d)):
            self.dtype = engine.dtype
        for layer in layers.values():
            layer.simulate()
        if self.simulated is None or not isinstance(network, fx.GraphModule):
            return
        for name, module in list(network.named_modules()):
            if isinstance(module, Quantize):
                network.delete_submodule(name)
            elif isinstance(module, QuantTensor):
                module.returns_codes = False
        held = dict(network.named_modules(remove_duplicate=False))
        for node in self.simulated.graph.nodes:
            if node.op == "call_module" and node.target not in held:
                network.add_submodule(node.target, self.simulated.get_submodule(node.target))
        network.graph = self.simulated.graph

    def after(self, network: nn.Module, _: object) -> None:
        """Lower the network again; what did not load whole stays simulated."""
        if not self.errors:
            graph = network if self.simulated is not None and isinstance(network, fx.GraphModule) else None
            reasons = _lower(network, graph, self.dtype, self.pack)
            self.errors += [
                f"{name or 'the layer'} cannot compute in integers any more: {reasons[name]}"
                for name in self.lowered & reasons.keys()
            ]


def _engine(
    layer: QuantModule,
    dtype: torch.dtype,
    activation: Activation = IDENTITY,
    residual: QuantParams | None = None,
    out: QuantParams | None = None,
    also: QuantParams | None = None,
    packed: Collection[str] = (),
) -> IntegerConv2d | IntegerLinear:
    if isinstance(layer, QuantConv2d):
        return IntegerConv2d.from_quantized(
            layer, activation=activation, residual=residual, out=out, also=also, packed=packed, dtype=dtype
        )
    assert isinstance(layer, QuantLinear) and not packed
    return IntegerLinear.from_quantized(
        layer, activation=activation, residual=residual, out=out, also=also, dtype=dtype
    )


def _why_simulated(layer: QuantModule) -> str:
    if not isinstance(layer, (QuantConv2d, QuantLinear)):
        return f"{type(layer).__name__} has no integer form"
    try:
        _engine(layer, torch.float32)
    except ValueError as error:
        return str(error)
    return ""


Key = tuple[bytes, ...]


def _key(params: QuantParams | None) -> Key | None:
    """Identify a quantizer by its values, and values by None."""
    if params is None:
        return None
    return tuple(t.cpu().numpy().tobytes() for t in (params.bits, params.scale, params.zero_point))


@dataclass(eq=False)
class _Chain:
    """A quantized layer and what its epilogue computes; `end` is the node whose value it returns.

    The values of the nodes before it (`inner`) exist nowhere, but they have the shape of the end's.
    """

    node: fx.Node
    layer: QuantModule
    end: fx.Node
    inner: list[fx.Node] = field(default_factory=list)
    residual: fx.Node | None = None  # of the QuantTensor
    activation: Activation = IDENTITY


class _Lowering:
    def __init__(self, network: fx.GraphModule, reasons: dict[str, str], dtype: torch.dtype, pack: bool) -> None:
        self.network, self.dtype, self.pack = network, dtype, pack
        self.chains: dict[fx.Node, _Chain] = {}  # by their ends
        self.ends: dict[fx.Node, fx.Node] = {}  # by the inner nodes of chains
        for node in network.graph.nodes:
            module = self._module(node)
            if isinstance(module, QuantModule) and str(node.target) not in reasons:
                chain = self._chain(node, module)
                self.chains[chain.end] = chain
                self.ends |= dict.fromkeys(chain.inner, chain.end)
        # What is wanted of each node: None for values, else the quantizer of the codes.
        self.wanted: dict[fx.Node, dict[Key | None, QuantParams | None]] = defaultdict(dict)
        # Who reads that: a layer's input, or None for whatever else.
        self.readers: dict[tuple[fx.Node, Key | None], set[QuantModule | None]] = defaultdict(set)
        self.measured: dict[fx.Node, None] = {}  # whose shape is read, of values or codes
        self.graph = fx.Graph()
        self.made: dict[tuple[fx.Node, Key | None], fx.Node] = {}

    def run(self) -> None:
        """Rewrite the graph."""
        nodes = list(self.network.graph.nodes)
        for node in nodes:
            if node.op in ("placeholder", "output") or node.target is expect:
                self._want(node, None)
        while unknown := [node for node in self.measured if not self.wanted[node]]:
            self._want(unknown[0], None)
        for node in self.measured:
            for key in self.wanted[node]:
                self.readers[node, key].add(None)
        done: set[fx.Node] = set()
        while nodes:  # in order, but for what reads the shape of a chain before its end
            late = [node for node in nodes if not self._make_all(node, done)]
            assert len(late) < len(nodes)
            nodes = late
        self.graph.lint()
        self.network.graph = self.graph
        self.network.recompile()

    def _make_all(self, node: fx.Node, done: set[fx.Node]) -> bool:
        """Make what is wanted of a node; tell whether it could be done by now."""
        wanted = self.wanted[node]
        if wanted and not done.issuperset(self._before(node)):
            return False
        for key, params in wanted.items():
            if (node, key) not in self.made:
                self.made[node, key] = self._make(node, params)
        done.add(node)
        return True

    def _before(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that must be made before a node."""
        chain = self.chains.get(node)
        if chain is None:
            return [self._measured(node, n) or n for n in node.all_input_nodes]
        return [source_of(n) for n in (chain.node, chain.residual) if n is not None]

    def _measured(self, node: fx.Node, source: fx.Node) -> fx.Node | None:
        """Return what has the shape of a node's source if the node reads nothing else of it."""
        return self.ends.get(source, source) if reads_shape(node, source) else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.network.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _chain(self, node: fx.Node, layer: QuantModule) -> _Chain:
        chain = _Chain(node, layer, node)

        def only_reader() -> fx.Node | None:
            found = [user for user in chain.end.users if not reads_shape(user, chain.end)]
            return found[0] if len(found) == 1 else None

        def extend(end: fx.Node) -> None:
            chain.inner.append(chain.end)
            chain.end = end

        reader = only_reader()
        if reader is not None and isinstance(layer, QuantConv2d) and is_addition(reader):
            others = [n for n in reader.all_input_nodes if n is not node]
            marked = self._module(others[0]) if len(others) == 1 else None
            if isinstance(marked, QuantTensor) and marked.scale.numel() and not _depends_on_shape(others[0], node):
                chain.residual = others[0]
                extend(reader)
                reader = only_reader()
        if reader is not None:
            activation = activation_of(reader, self.network)
            if activation is not None:
                chain.activation = activation
                extend(reader)
        return chain

    # --- what is wanted -----------------------------------------------------------------------------------

    def _want(self, node: fx.Node, params: QuantParams | None) -> None:
        waiting = [(node, params)]
        while waiting:
            node, params = waiting.pop()
            key = _key(params)
            if key not in self.wanted[node]:
                self.wanted[node][key] = params
                needs = self._needs(node, params)
                for i, (needed, form) in enumerate(needs):
                    is_input = node in self.chains and i == 0
                    self.readers[needed, _key(form)].add(self.chains[node].layer if is_input else None)
                waiting += needs

    def _needs(self, node: fx.Node, params: QuantParams | None) -> list[tuple[fx.Node, QuantParams | None]]:
        """Return what a node needs to give values, or codes."""
        chain = self.chains.get(node)
        if chain is not None:
            needs: list[tuple[fx.Node, QuantParams | None]] = [(source_of(chain.node), chain.layer.activation)]
            if chain.residual is not None:
                needs.append((source_of(chain.residual), self._residual_params(chain)))
            return needs
        if params is None:
            measured = {n: end for n in node.all_input_nodes if (end := self._measured(node, n)) is not None}
            self.measured |= dict.fromkeys(measured.values())
            return [(n, None) for n in node.all_input_nodes if n not in measured]
        operands = self._operands(node, params)
        return [(node, None)] if operands is None else list(operands)

    def _residual_params(self, chain: _Chain) -> QuantParams | None:
        if chain.residual is None:
            return None
        module = self._module(chain.residual)
        assert isinstance(module, QuantTensor)
        return module.params

    def _operands(self, node: fx.Node, params: QuantParams) -> list[tuple[fx.Node, QuantParams]] | None:
        """Return the codes from which a node makes codes by computing as it does with values; None if it cannot."""
        if params.axis % 4 != 1:
            return None
        if self._max_pool(node) is not None:
            return [(source_of(node), params)]
        if is_concatenation(node.target):
            return self._concatenated(node, params)
        return None

    def _max_pool(self, node: fx.Node) -> dict[str, Any] | None:
        """Return the arguments of a max pooling that works on codes too, or None."""
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        module = self._module(node)
        if type(module) is nn.MaxPool2d:
            given = {name: getattr(module, name) for name in names}
        elif node.target is F.max_pool2d:
            given = dict(zip(names, node.args[1:], strict=False)) | {
                k: v for k, v in node.kwargs.items() if k != "input"
            }
        else:
            return None
        return None if given.pop("return_indices", False) else given

    def _concatenated(self, node: fx.Node, params: QuantParams) -> list[tuple[fx.Node, QuantParams]] | None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        operands = node.args[0]
        if dim not in (1, -3) or not isinstance(operands, (list, tuple)):
            return None
        channels = max(p.numel() for p in (params.bits, params.scale, params.zero_point))
        if channels == 1:
            return [(n, params) for n in operands if isinstance(n, fx.Node)]
        first, parts = 0, []
        for operand in operands:
            size = self._channels(operand) if isinstance(operand, fx.Node) else None
            if size is None or not isinstance(operand, fx.Node):
                return None
            bits, scale, zero_point = (
                p if p.numel() == 1 else p[first : first + size]
                for p in (params.bits, params.scale, params.zero_point)
            )
            parts.append((operand, QuantParams(bits, scale, zero_point, params.axis)))
            first += size
        return parts if first == channels else None

    def _channels(self, node: fx.Node) -> int | None:
        """Return the number of channels of a node's value, where it is known without running it."""
        if node in self.chains:
            return int(self.chains[node].layer.weight_shape[0])
        if self._max_pool(node) is not None:
            return self._channels(source_of(node))
        if is_concatenation(node.target) and isinstance(node.args[0], (list, tuple)):
            sizes = [self._channels(n) if isinstance(n, fx.Node) else None for n in node.args[0]]
            return None if None in sizes else sum(s for s in sizes if s is not None)
        return None

    # --- how it is made -----------------------------------------------------------------------------------

    def _codes(self, node: fx.Node, params: QuantParams | None) -> fx.Node:
        return self.made[node, _key(params)]

    def _make(self, node: fx.Node, params: QuantParams | None) -> fx.Node:
        chain = self.chains.get(node)
        if chain is not None:
            outputs = self._outputs(node)
            if params is not None and _key(params) not in map(_key, outputs):
                return self._quantize(node, params)
            layer = self._integer_layer(chain, *outputs)
            parts = [layer]
            if len(outputs) == 2:
                parts = [self.graph.call_function(operator.getitem, (layer, i)) for i in range(2)]
            self.made |= {(node, _key(output)): part for output, part in zip(outputs, parts, strict=True)}
            return self._codes(node, params)
        if params is None:
            return self.graph.node_copy(node, lambda n: self._copied(node, n))
        operands = self._operands(node, params)
        if operands is None:
            return self._quantize(node, params)
        codes = [self._codes(operand, part) for operand, part in operands]
        pooling = self._max_pool(node)
        if pooling is not None:
            return self.graph.call_function(max_pool_codes, (codes[0],), pooling)
        return self.graph.call_function(torch.cat, (codes, 1))  # a tensor may be in it twice, in other codes

    def _copied(self, node: fx.Node, source: fx.Node) -> fx.Node:
        measured = self._measured(node, source)
        if measured is None:
            return self.made[source, None]
        return self.made[measured, None if None in self.wanted[measured] else next(iter(self.wanted[measured]))]

    def _outputs(self, node: fx.Node) -> list[QuantParams | None]:
        """Return the one or two outputs of an integer layer; values, of which all else can be made, are the first."""
        wanted = self.wanted[node]
        values: list[QuantParams | None] = [None] if None in wanted or len(wanted) > 2 else []
        return (values + [params for params in wanted.values() if params is not None])[:2]

    def _is_packed(self, node: fx.Node, params: QuantParams | None) -> bool:
        """Tell whether these codes of a node travel packed."""
        chain = self.chains.get(node)
        if not self.pack or params is None or chain is None or not isinstance(chain.layer, QuantConv2d):
            return False
        if _key(params) not in map(_key, self._outputs(node)):
            return False
        outputs, per_group = chain.layer.weight_shape[:2]
        readers = self.readers[node, _key(params)]
        if not panels.whole_octets(outputs, per_group, chain.layer.groups) or not all(
            isinstance(reader, QuantConv2d) and reader.groups == 1 for reader in readers
        ):
            return False
        return Nibbles.of(params.bits.expand(outputs)).bytes <= (1.0 - _LEAST_SAVING) * outputs

    def _integer_layer(self, chain: _Chain, out: QuantParams | None, also: QuantParams | None = None) -> fx.Node:
        residual = self._residual_params(chain)
        forms = {
            "source": (source_of(chain.node), chain.layer.activation),
            "out": (chain.end, out),
            "also": (chain.end, also),
        }
        packed = [name for name, form in forms.items() if self._is_packed(*form)]
        engine = _engine(chain.layer, self.dtype, chain.activation, residual, out, also, packed)
        chain.layer.execute_in_integers(engine, reads_codes=True)
        arguments = [self._codes(source_of(chain.node), chain.layer.activation)]
        if chain.residual is not None:
            marked = self._module(chain.residual)
            assert isinstance(marked, QuantTensor)
            marked.returns_codes = True
            codes = self._codes(source_of(chain.residual), residual)
            arguments.append(self.graph.call_module(str(chain.residual.target), (codes,)))
        values = out is None and isinstance(chain.layer, QuantConv2d)
        like: dict[str, Any] = {"like": self._origin(source_of(chain.node))} if values else {}
        return self.graph.create_node("call_module", chain.node.target, tuple(arguments), like, name=chain.node.name)

    def _origin(self, node: fx.Node) -> fx.Node:
        """Return the values that a node's codes were once made of."""
        while (node, None) not in self.made:
            node = source_of(self.chains[node].node) if node in self.chains else node.all_input_nodes[0]
        return self.made[node, None]

    def _quantize(self, node: fx.Node, params: QuantParams) -> fx.Node:
        """Make codes of a node's values."""
        if (node, None) not in self.made:
            self.made[node, None] = self._make(node, None)
        values = self.made[node, None]
        name = f"{values.name}_codes"
        while hasattr(self.network, name):
            name += "_"
        self.network.add_submodule(name, Quantize(params))
        return self.graph.call_module(name, (values,))


def _depends_on_shape(node: fx.Node, layer: fx.Node) -> bool:
    """Tell whether a node's value is computed from the shape of a layer's output."""
    reading = {user for user in layer.users if reads_shape(user, layer)}
    seen: set[fx.Node] = set()
    waiting = [node] if reading else []
    while waiting:
        n = waiting.pop()
        if n not in seen:
            seen.add(n)
            waiting += n.all_input_nodes
    return not reading.isdisjoint(seen)
