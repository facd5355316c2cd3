"""Lowers a quantized network to integers: activations stay codes between layers.

A quantized convolution, the residual sum behind it and the activation behind that become one integer convolution. It
returns the codes of its readers, where they reach it through max pooling, concatenation, reshapes and pixel shuffling
alone; these work on codes as they do on values. Readers may disagree on the quantizer: the next convolution reads 4
bits, the next residual sum 8. A layer returns two outputs at most, of which one can be values; whoever wants anything
else gets values, and a visible Quantize turns them into codes again.

What comes out is a LayerProgram, for any target. lower_layers lets our engines execute it (execute.regions).
"""

from __future__ import annotations

import contextlib
import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.artifact.record import QuantRecord, has_record, record_of
from ptq4cuda.execute import program as steps
from ptq4cuda.execute.engines import engine_of
from ptq4cuda.execute.program import LayerProgram, NotExecutable, Value, attach_program
from ptq4cuda.execute.regions import install
from ptq4cuda.graph.layers import activation_of, call_name, is_addition, is_concatenation, why_float_call
from ptq4cuda.graph.readers import reads_shape
from ptq4cuda.graph.shapes import name_of, source_of
from ptq4cuda.graph.tracer import expect
from ptq4cuda.nn import QuantModule, QuantTensor
from ptq4cuda.nn.quant_module import STATE_IS_REFUSED
from ptq4cuda.nn.spec import per_dim
from ptq4cuda.quantizer import QuantParams


def lower_layers(
    network: nn.Module,
    dtype: torch.dtype = torch.float32,
    pack: bool | None = None,
    by_graph: bool | None = None,
) -> dict[str, str]:
    """Let the quantized layers of a network execute in integers, in place.

    quantize() does this; it is for networks that are put together of QuantConv2d and QuantLinear by hand, and for
    simulated ones that have loaded a state_dict. A network in integers has the state_dict of the simulated one, but
    loads none.

    Args:
        network: as quantized, or a quantized layer alone.
        dtype: of the values that it computes with.
        pack: let codes travel packed between convolutions. Default: where the network is on a GPU.
        by_graph: let codes travel along the network's graph, in which no operation may be in place. Default: if it
            is a torch.fx.GraphModule.

    Returns:
        For each quantized layer that stays simulated, why.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, QuantModule)}
    simulated = {name: layer for name, layer in layers.items() if layer.engine is None}
    reasons = _why_simulated(simulated)
    if not (by_graph is not False and isinstance(network, fx.GraphModule)):
        for name, layer in simulated.items():
            if name not in reasons:
                layer.execute_in_integers(engine_of(steps.Layer.alone(layer, name), dtype))
    elif len(simulated) == len(layers):  # a graph is lowered once, as a whole
        lowered = lower_graph(network, reasons)
        install(lowered, network, dtype, pack)
        attach_program(network, lowered)
    network.register_load_state_dict_pre_hook(_refuse_state)
    if has_record(network):
        note_execution(record_of(network), reasons)
    return reasons


def note_execution(record: QuantRecord, reasons: dict[str, str]) -> None:
    """Say of each quantized layer in a record whether it computes in integers, and if not, why."""
    for layer in record.layers:
        if layer.execution != "float":
            layer.execution = "simulate" if layer.name in reasons else "integer"
            layer.reason = layer.reason or reasons.get(layer.name, "")


def _why_simulated(layers: dict[str, QuantModule]) -> dict[str, str]:
    """Return those layers that cannot be executed in integers, each with the reason."""
    reasons = {}
    for name, layer in layers.items():
        try:
            steps.Layer.alone(layer).check()
        except NotExecutable as reason:
            reasons[name] = str(reason)
    return reasons


def _refuse_state(network: nn.Module, *_: Any) -> None:
    if any(isinstance(module, QuantModule) and module.engine is not None for module in network.modules()):
        raise RuntimeError(STATE_IS_REFUSED)


def program_of(network: nn.Module) -> LayerProgram:
    """Return what a quantized network computes: its program in integers, or that of a simulated one if it had one.

    Args:
        network: as quantized; it is not changed.

    Raises:
        TypeError: it is no quantized network.
        ValueError: it was not traced as a whole, so that it has no program.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    layers = {name: module for name, module in network.named_modules() if isinstance(module, QuantModule)}
    if not layers:
        raise TypeError(f"{type(network).__name__} has no quantized layer: quantize it first")
    with contextlib.suppress(TypeError):
        return steps.program(network)
    if not isinstance(network, fx.GraphModule) or any(layer.engine is not None for layer in layers.values()):
        raise ValueError(
            f"{type(network).__name__} has no program: it was walked by its modules, not traced as a whole "
            "(report() says why)"
        )
    return lower_graph(network, _why_simulated(layers))


def lower_graph(network: fx.GraphModule, reasons: dict[str, str]) -> LayerProgram:
    """Return the program of a simulated network, which is not changed.

    Args:
        network: as quantized; no operation of its graph may be in place.
        reasons: for each quantized layer that stays simulated, why.
    """
    return _Lowering(network, reasons).run()


Key = tuple[bytes | int, ...]
_CHANNELS = -3  # the axis of the quantizers of images


def _of_images(params: QuantParams) -> bool:
    """Tell whether a quantizer's channels are those of images or of sequences."""
    return params.axis == 1 or params.axis < -1


def _key(params: QuantParams | None) -> Key | None:
    """Identify a quantizer by its values and, if channels differ, their axis; and values by None."""
    if params is None:
        return None
    axis = 0 if _channels_of(params) == 1 else 1 if params.axis < -1 else params.axis
    return (axis, *(t.cpu().numpy().tobytes() for t in (params.bits, params.scale, params.zero_point)))


def _channels_of(params: QuantParams) -> int:
    """Return how many channels a quantizer tells apart."""
    return max(p.numel() for p in (params.bits, params.scale, params.zero_point))


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
    def __init__(self, network: fx.GraphModule, reasons: dict[str, str]) -> None:
        self.network, self.reasons = network, reasons
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
        self.measured: dict[fx.Node, None] = {}  # whose shape is read, of values or codes
        self.steps: list[steps.Step] = []
        self.names: set[str] = set()
        self.made: dict[tuple[fx.Node, Key | None], Value] = {}

    def run(self) -> LayerProgram:
        nodes = list(self.network.graph.nodes)
        for node in nodes:
            if node.op in ("placeholder", "output") or node.target is expect:
                self._want(node, None)
        while unknown := [node for node in self.measured if not self.wanted[node]]:
            self._want(unknown[0], None)
        *nodes, output = nodes
        done: set[fx.Node] = set()
        while nodes:  # in order, but for what reads the shape of a chain before its end
            late = [node for node in nodes if not self._make_all(node, done)]
            assert len(late) < len(nodes)
            nodes = late
        return LayerProgram(tuple(self.steps), self._arguments(output, output.args[0]))

    def _make_all(self, node: fx.Node, done: set[fx.Node]) -> bool:
        """Make what is wanted of a node; tell whether it could be done by now."""
        wanted = self.wanted[node]
        if wanted and not done.issuperset(self._before(node)):
            return False
        for key, params in wanted.items():
            if (node, key) not in self.made:
                self._make(node, params)
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
        if reader is not None and layer.spec.adds_codes and is_addition(reader):
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
                waiting += self._needs(node, params)

    def _needs(self, node: fx.Node, params: QuantParams | None) -> list[tuple[fx.Node, QuantParams | None]]:
        """Return what a node needs to give values, or codes."""
        chain = self.chains.get(node)
        if chain is not None and self._returns(chain, params):
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

    @staticmethod
    def _returns(chain: _Chain, params: QuantParams | None) -> bool:
        """Tell whether a layer can return these codes, or values: those of its own channels."""
        spec = chain.layer.spec
        axes = (1, spec.axis) if spec.dims else (-1,)
        return params is None or _channels_of(params) == 1 or params.axis in axes

    def _operands(self, node: fx.Node, params: QuantParams) -> list[tuple[fx.Node, QuantParams]] | None:
        """Return the codes from which a node makes codes by computing as it does with values; None if it cannot."""
        if node in self.chains:
            return None
        if params.axis < -1 and self._max_pool(node) is not None:
            return [(source_of(node), params)]
        if _of_images(params) and is_concatenation(node.target):
            return self._concatenated(node, params)
        moved = self._moved(node, params)
        return [moved] if moved is not None and self._gives(*moved) else None

    def _gives(self, node: fx.Node, params: QuantParams) -> bool:
        """Tell whether a node gives these codes by itself: nobody has to quantize its values."""
        chain = self.chains.get(node)
        return self._returns(chain, params) if chain is not None else self._operands(node, params) is not None

    def _max_pool(self, node: fx.Node) -> dict[str, Any] | None:
        """Return the arguments of a max pooling that works on codes too, or None."""
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        module = self._module(node)
        if type(module) in (nn.MaxPool1d, nn.MaxPool2d):
            given = {name: getattr(module, name) for name in names}
            given["dims"] = 1 if type(module) is nn.MaxPool1d else 2
        elif node.target in (F.max_pool1d, F.max_pool2d):
            given = dict(zip(names, node.args[1:], strict=False)) | {
                k: v for k, v in node.kwargs.items() if k != "input"
            }
            given["dims"] = 1 if node.target is F.max_pool1d else 2
        else:
            return None
        return None if given.pop("return_indices", False) else given

    def _concatenated(self, node: fx.Node, params: QuantParams) -> list[tuple[fx.Node, QuantParams]] | None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        operands = node.args[0]
        if not (dim == 1 or (dim == params.axis < -1)) or not isinstance(operands, (list, tuple)):
            return None
        if _channels_of(params) == 1:
            return [(n, params) for n in operands if isinstance(n, fx.Node)]
        first, parts = 0, []
        for operand in operands:
            size = self._channels(operand) if isinstance(operand, fx.Node) else None
            if size is None or not isinstance(operand, fx.Node):
                return None
            parts.append((operand, _each(params, operator.itemgetter(slice(first, first + size)))))
            first += size
        return parts if first == _channels_of(params) else None

    # --- what moves values, and codes as well ---------------------------------------------------------------

    def _moved(self, node: fx.Node, params: QuantParams) -> tuple[fx.Node, QuantParams] | None:
        """Return the codes that a node moves to give these, or None."""
        factor = self._pixel_shuffle(node)
        if factor and (_channels_of(params) == 1 or _of_images(params)):
            return source_of(node), _each(params, lambda p: p.repeat_interleave(factor * factor), _CHANNELS)
        reshape = self._reshape(node)
        if reshape is None:
            return None
        source = source_of(node)
        axis = _CHANNELS if self._rank(source) == 4 else 1
        if reshape[0] != "flatten":
            last = params.axis == -1 and self._rank(node) == 2
            by_channel = last or _channels_of(params) == 1 or _of_images(params)
            return (source, _each(params, lambda p: p, axis)) if by_channel else None
        channels = self._channels(source)
        if channels is None or params.axis not in (1, -1):
            return None
        fields = [p for p in (params.bits, params.scale, params.zero_point) if p.numel() > 1]
        if any(
            p.numel() % channels or bool((p.view(channels, -1) != p.view(channels, -1)[:, :1]).any()) for p in fields
        ):
            return None  # the places of a channel have quantizers of their own
        return source, _each(params, lambda p: p.view(channels, -1)[:, 0], axis)

    def _pixel_shuffle(self, node: fx.Node) -> int:
        """Return the factor of a pixel shuffling, or 0."""
        module = self._module(node)
        if type(module) is nn.PixelShuffle:
            return module.upscale_factor
        factor = (*node.args[1:2], *node.kwargs.values())[:1] if node.target is F.pixel_shuffle else ()
        return factor[0] if factor and isinstance(factor[0], int) else 0

    def _reshape(self, node: fx.Node) -> tuple[Literal["flatten", "squeeze", "unsqueeze"], int] | None:
        """Return what a node does if it moves no channel of its source, and the dimension; or None."""
        name = name_of(node, self.network)
        if name not in ("flatten", "reshape", "squeeze", "unsqueeze") or not isinstance(
            node.args[0] if node.args else None, fx.Node
        ):
            return None
        source = source_of(node)
        rank = self._rank(source)
        if rank is None:
            return None
        if name in ("flatten", "reshape"):
            return ("flatten", 1) if self._flattens(node, source, rank) else None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if not isinstance(dim, int):
            return None
        dim %= rank + (name == "unsqueeze")
        return ("squeeze" if name == "squeeze" else "unsqueeze", dim) if dim >= 2 else None

    def _flattens(self, node: fx.Node, source: fx.Node, rank: int) -> bool:
        """Tell whether a node makes [N, F] of [N, *]."""
        module = self._module(node)
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) in ((1, -1), (1, rank - 1))
        if name_of(node, self.network) == "flatten":
            given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
            dims = (given.get("start_dim", 0), given.get("end_dim", -1))
            return dims in ((1, -1), (1, rank - 1))
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return len(sizes) == 2 and bool(sizes[1] == -1) and _is_batch_size(sizes[0], source)

    def _rank(self, node: fx.Node) -> int | None:
        """Return the number of dimensions of a node, None where it is not certain."""
        chain = self.chains.get(node)
        if chain is not None:
            return chain.layer.spec.dims + 2 if chain.layer.spec.dims else None
        if self._pixel_shuffle(node) or self._max_pool(node) is not None:
            return self._rank(source_of(node))
        if is_concatenation(node.target):
            ranks = {self._rank(n) for n in node.all_input_nodes}
            return ranks.pop() if len(ranks) == 1 else None
        reshape = self._reshape(node)
        if reshape is None:
            return None
        before = self._rank(source_of(node))
        assert before is not None
        return {"flatten": 2, "squeeze": before - 1, "unsqueeze": before + 1}[reshape[0]]

    def _channels(self, node: fx.Node) -> int | None:
        """Return the number of channels of a node's value, where it is known without running it."""
        if node in self.chains:
            return int(self.chains[node].layer.weight_shape[0])
        if self._max_pool(node) is not None:
            return self._channels(source_of(node))
        if is_concatenation(node.target) and isinstance(node.args[0], (list, tuple)):
            sizes = [self._channels(n) if isinstance(n, fx.Node) else None for n in node.args[0]]
            return None if None in sizes else sum(s for s in sizes if s is not None)
        factor, reshape = self._pixel_shuffle(node), self._reshape(node)
        if factor or (reshape is not None and reshape[0] != "flatten"):
            channels = self._channels(source_of(node))
            return channels // factor**2 if factor and channels is not None else channels
        return None

    # --- how it is made -----------------------------------------------------------------------------------

    def _codes(self, node: fx.Node, params: QuantParams | None) -> Value:
        return self.made[node, _key(params)]

    def _value(self, node: fx.Node, params: QuantParams | None) -> Value:
        """Name what is made of a node."""
        key = _key(params)
        if (node, key) not in self.made:
            name = stem = node.name if params is None else f"{node.name}_codes"
            count = 1
            while name in self.names:
                count += 1
                name = f"{stem}_{count}"
            self.names.add(name)
            self.made[node, key] = Value(name, params)
        return self.made[node, key]

    def _make(self, node: fx.Node, params: QuantParams | None) -> None:
        chain = self.chains.get(node)
        if chain is not None:
            outputs = self._outputs(node)
            if _key(params) in map(_key, outputs):
                self.steps.append(self._layer(chain, outputs))
            else:
                self._quantize(node, params)
            return
        if params is None:
            self.steps.append(self._float(node))
            return
        operands = self._operands(node, params)
        if operands is None:
            self._quantize(node, params)
            return
        codes = [self._codes(operand, part) for operand, part in operands]
        output = self._value(node, params)
        pooling, reshape = self._max_pool(node), self._reshape(node)
        if pooling is not None:
            self.steps.append(steps.MaxPool(codes[0], output, **_window(**pooling)))
        elif is_concatenation(node.target):
            self.steps.append(steps.Concatenate(tuple(codes), output))
        elif reshape is not None:
            self.steps.append(steps.Reshape(codes[0], output, *reshape))
        else:
            self.steps.append(steps.PixelShuffle(codes[0], output, self._pixel_shuffle(node)))

    def _outputs(self, node: fx.Node) -> list[QuantParams | None]:
        """Return the one or two outputs of an integer layer; values, of which all else can be made, are the first."""
        wanted, chain = self.wanted[node], self.chains[node]
        codes = [params for params in wanted.values() if params is not None and self._returns(chain, params)]
        values: list[QuantParams | None] = [None] if None in wanted or len(wanted) > 2 else []
        return (values + codes)[:2]

    def _layer(self, chain: _Chain, outputs: list[QuantParams | None]) -> steps.Layer:
        residual = None
        if chain.residual is not None:
            residual = self._codes(source_of(chain.residual), self._residual_params(chain))
        return steps.Layer.alone(
            chain.layer,
            str(chain.node.target),
            source=self._codes(source_of(chain.node), chain.layer.activation),
            outputs=tuple(self._value(chain.end, params) for params in outputs),
            activation=chain.activation,
            residual=residual,
        )

    def _quantize(self, node: fx.Node, params: QuantParams | None) -> None:
        """Make codes of a node's values."""
        if (node, None) not in self.made:
            self._make(node, None)
        self.steps.append(steps.Quantize(self.made[node, None], self._value(node, params)))

    def _float(self, node: fx.Node) -> steps.Input | steps.Float:
        """Return what a node computes in floating point, or is given."""
        if node.op == "placeholder":
            return steps.Input(str(node.target), self._value(node, None), _plain(node.args))
        args, kwargs = self._arguments(node, node.args), self._arguments(node, node.kwargs)
        reason = self.reasons.get(str(node.target)) or why_float_call(node, self.network) or ""
        what = str(node.target) if node.op == "get_attr" else call_name(node, self.network)
        return steps.Float(_KINDS[node.op], node.target, args, kwargs, self._value(node, None), reason, what)

    def _arguments(self, node: fx.Node, arguments: Any) -> Any:
        """Return arguments of a node with the values that have been made of other nodes."""

        def made(source: fx.Node) -> Value:
            measured = self._measured(node, source)
            if measured is None:
                return self.made[source, None]
            return self.made[measured, None if None in self.wanted[measured] else next(iter(self.wanted[measured]))]

        return _plain(arguments, made)


_KINDS: dict[str, Literal["function", "method", "module", "attribute"]] = {
    "call_function": "function",
    "call_method": "method",
    "call_module": "module",
    "get_attr": "attribute",
}


def _plain(arguments: Any, made: Callable[[fx.Node], Value] | None = None) -> Any:
    """Return arguments of a node in containers of Python's, with values in the place of nodes."""
    if isinstance(arguments, fx.Node):
        assert made is not None
        return made(arguments)
    if isinstance(arguments, tuple):
        items = [_plain(item, made) for item in arguments]
        return type(arguments)(*items) if hasattr(arguments, "_fields") else tuple(items)
    if isinstance(arguments, list):
        return [_plain(item, made) for item in arguments]
    if isinstance(arguments, dict):
        return {key: _plain(item, made) for key, item in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(_plain(item, made) for item in (arguments.start, arguments.stop, arguments.step)))
    return arguments


def _each(params: QuantParams, function: Callable[[Tensor], Tensor], axis: int | None = None) -> QuantParams:
    """Return a quantizer whose vectors of channels are something else."""
    bits, scale, zero_point = (
        p if p.numel() == 1 else function(p) for p in (params.bits, params.scale, params.zero_point)
    )
    return QuantParams(bits, scale, zero_point, params.axis if axis is None else axis)


def _window(
    dims: int, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> dict[str, Any]:
    """Return the arguments of a max pooling in their full form."""
    stride = kernel_size if stride is None or stride == [] else stride
    sizes = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    of_height_one = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    pairs = {name: (of_height_one[name],) * (2 - dims) + per_dim(value, dims) for name, value in sizes.items()}
    return {**pairs, "ceil_mode": bool(ceil_mode)}


def _is_batch_size(size: object, tensor: fx.Node) -> bool:
    """Tell whether this is the first of a tensor's sizes."""
    if not isinstance(size, fx.Node) or size.kwargs:
        return False
    if size.target == "size":
        return tuple(size.args) == (tensor, 0)
    sizes = size.args[0] if size.target is operator.getitem and size.args[1] == 0 else None
    if not isinstance(sizes, fx.Node) or sizes.kwargs:
        return False
    asked = {"size": (tensor,), getattr: (tensor, "shape")}
    return asked.get(sizes.target) == tuple(sizes.args)


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
