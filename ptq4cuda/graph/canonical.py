"""Brings a traced graph into one form, so that folding and the walk need few cases.

Weighted functions with constant weights become modules, a layer that is called at several places becomes one layer
for each call, what does nothing in evaluation mode goes, and views become reshapes: of channels_last,
x.view(len(x), -1) is no view. The graph must be free of in-place operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ptq4cuda.graph.copying import copy_sharing, held_modules
from ptq4cuda.graph.layers import BATCH_NORM_OF_RANK, BATCH_NORMS, is_concatenation, leave, quantized_spec
from ptq4cuda.graph.network import Network
from ptq4cuda.graph.readers import is_number, readers
from ptq4cuda.graph.shapes import DROPOUTS, Shapes, infer_shapes
from ptq4cuda.nn import SPECS, LayerSpec, spec_of

_IDENTITIES = (nn.Identity, *DROPOUTS)
_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
)


def canonicalize(network: fx.GraphModule) -> None:
    """Bring a traced network into canonical form."""
    _answer_questions(network)
    for node in list(network.graph.nodes):
        if _does_nothing(node, network):
            node.replace_all_uses_with(_source(node))
            network.graph.erase_node(node)
        elif node.op == "call_method" and node.target in ("view", "view_as"):
            _reshape(node)
        elif is_concatenation(node.target):
            given = arguments(node, "tensors dim", dim=0)
            node.target, node.args, node.kwargs = torch.cat, (given["tensors"], given.get("axis", given["dim"])), {}
    made = _make_modules(network)
    network.graph.eliminate_dead_code()
    named = [n for n in network.graph.nodes if n.op in ("get_attr", "call_module") and n not in made]
    taken = {prefix for node in named for prefix in _prefixes(str(node.target))}
    for node, name in made.items():
        module = network.get_submodule(str(node.target))
        network.delete_submodule(str(node.target))
        _call(node, name, module, network, taken)
    _separate_calls(network, taken)
    drop_unused(network)
    _leave_what_is_read(network)


def drop_unused(network: fx.GraphModule) -> None:
    """Remove nodes, modules, parameters and buffers that the output does not need any more, and recompile."""
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    used = {str(node.target) for node in network.graph.nodes if node.op in ("get_attr", "call_module")}
    used.update(network.unread if isinstance(network, Network) else ())
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    for name, _ in tensors:
        if used.isdisjoint(_prefixes(name)):
            owner, _, attribute = name.rpartition(".")
            delattr(network.get_submodule(owner), attribute)
    network.graph.lint()
    network.recompile()


def constant(node: object, network: fx.GraphModule) -> Tensor | None:
    """Return the value of a node that is computed from parameters and buffers only, or None."""
    if not isinstance(node, fx.Node):
        return None
    needed: dict[fx.Node, Any] = {}
    pending = [node]
    while pending:
        n = pending.pop()
        if n.op == "placeholder" or (n.op != "get_attr" and not n.all_input_nodes):
            return None
        if n not in needed:
            needed[n] = None
            pending.extend(n.all_input_nodes)
    interpreter = fx.Interpreter(network, garbage_collect_values=False)
    with torch.no_grad():
        for n in network.graph.nodes:
            if n in needed:
                args, kwargs = fx.node.map_arg((n.args, n.kwargs), needed.__getitem__)
                needed[n] = getattr(interpreter, n.op)(n.target, args, kwargs)
    value = needed[node]
    return value if isinstance(value, Tensor) else None


def arguments(node: fx.Node, names: str, **defaults: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, with defaults for those that are not given."""
    return {**defaults, **dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def _does_nothing(node: fx.Node, network: fx.GraphModule) -> bool:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        return isinstance(module, _IDENTITIES) and not module.training
    if node.target is torch.dropout:
        return arguments(node, "input p train")["train"] is False
    return node.target in _DROPOUTS and arguments(node, "input p training", training=True)["training"] is False


def _reshape(node: fx.Node) -> None:
    """Let a view be a copy where it has to."""
    if node.target == "view_as":
        node.target = "reshape_as"
        return
    size = node.args[1:] or (node.kwargs.get("size"),)
    if size[0] is not None and not isinstance(size[0], torch.dtype):  # a view of another dtype stays one
        node.target, node.args, node.kwargs = "reshape", (node.args[0], *size), {}


# --- parameters that other code reads -------------------------------------------------------------------------


class Like(nn.Module):
    """Has the dtype and the device that a parameter would have: it follows .to() and .half() with the network."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self.register_buffer("empty", empty, persistent=False)

    def forward(self) -> Tensor:
        """Return an empty tensor."""
        assert isinstance(self.empty, Tensor)
        return self.empty


_ABOUT_DTYPE_OR_DEVICE = (
    *("dtype", "device", "itemsize", "is_cuda", "is_cpu", "is_mps", "is_xpu", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_signed"),
)


def _answer_questions(network: fx.GraphModule) -> None:
    """Let what the code asks about parameters of modules that are called not depend on them: they may be replaced."""
    called = {node.target for node in network.graph.nodes if node.op == "call_module"}
    for node in list(network.graph.nodes):
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] in called:
            parameter = constant(node, network)
            questions = list(_questions_about(node))
            if parameter is None or not questions:
                continue
            name = f"{node.name}_like"
            while hasattr(network, name):
                name += "_"
            network.add_submodule(name, Like(parameter))
            for question in questions:
                _answer(question, parameter, name, network.graph)
    network.graph.eliminate_dead_code()


def _questions_about(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that ask about a parameter, or about what is the same without a gradient."""
    for user in list(node.users):
        if (user.target is getattr and user.args[1] == "data") or user.target == "detach":
            yield from _questions_about(user)
        elif is_number(user) and len(user.all_input_nodes) == 1:
            yield user


def _answer(question: fx.Node, parameter: Tensor, like: str, graph: fx.Graph) -> None:
    if question.target is getattr:
        name, answer = str(question.args[1]), getattr(parameter, str(question.args[1]), None)
    else:
        name = str(question.target)
        answer = getattr(parameter, name)(*question.args[1:], **question.kwargs)
    if name in _ABOUT_DTYPE_OR_DEVICE:
        with graph.inserting_before(question):
            question.replace_input_with(question.all_input_nodes[0], graph.call_module(like))
        return
    answer = tuple(answer) if isinstance(answer, torch.Size) else answer
    for reader in list(question.users):
        substitute(reader, question, answer)


def substitute(reader: fx.Node, node: fx.Node, value: Any) -> None:
    """Let a node read a value instead of another node."""

    def replaced(n: fx.Node) -> Any:
        return value if n is node else n

    reader.args, reader.kwargs = fx.node.map_arg((reader.args, reader.kwargs), replaced)


def _leave_what_is_read(network: fx.GraphModule) -> None:
    """Leave layers whose parameters are read by other code than their own: nothing may be folded into them."""
    called = {
        str(n.target): network.get_submodule(str(n.target)) for n in network.graph.nodes if n.op == "call_module"
    }
    for node in network.graph.nodes:
        owner, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and owner in called and readers(node) and not isinstance(called[owner], BATCH_NORMS):
            leave(called[owner], f"the model reads its {name} elsewhere")
    for module in called.values():
        for part in set(called.values()) & held_modules(module) - {module}:
            leave(part, f"{type(module).__name__} holds it, too")


# --- functions ------------------------------------------------------------------------------------------------


def _make_modules(network: fx.GraphModule) -> dict[fx.Node, str]:
    """Replace functions by calls of modules with provisional names; return the names that they should have."""
    made: dict[fx.Node, str] = {}
    shapes = infer_shapes(network)
    for node in list(network.graph.nodes):
        make = _MAKERS.get(node.target) if node.op == "call_function" else None
        module = make(node, network, shapes) if make is not None else None
        if module is None:
            continue
        provisional = f"_made_{node.name}"
        network.add_submodule(provisional, module.eval())
        with network.graph.inserting_before(node):
            new = network.graph.call_module(provisional, (_source(node),))
        node.replace_all_uses_with(new)
        shapes.rename(node, new)
        made[new] = _wanted_name(node)
        network.graph.erase_node(node)
    return made


def _wanted_name(node: fx.Node) -> str:
    """Return the name of the module whose forward made a call: of a layer itself, of the call inside of others."""
    scope = list(node.meta.get("nn_module_stack", {}).values())[-1:]
    if not scope:
        return node.name
    path, kind = scope[0]
    layers = [spec.float_class for spec in SPECS if spec.quantized is not None]
    layer = isinstance(kind, type) and issubclass(kind, (*layers, *BATCH_NORMS))
    return path if layer and path else f"{path}.{node.name}".lstrip(".")


def _parameters(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    buffers = dict(module.named_buffers())
    for name, tensor in tensors.items():
        value = None if tensor is None else tensor.detach().clone()
        if name in buffers:
            module.register_buffer(name, value)
        else:
            module.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
    return module


def _constants(network: fx.GraphModule, **nodes: object) -> dict[str, Tensor | None] | None:
    """Return the values of arguments, or None where one is neither constant nor absent."""
    values = {name: constant(node, network) for name, node in nodes.items()}
    return values if all(values[name] is not None or nodes[name] is None for name in nodes) else None


def _literal(*values: Any) -> bool:
    items = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    return not any(isinstance(item, fx.Node) for item in items)


def _layer(spec: LayerSpec, node: fx.Node, network: fx.GraphModule, shapes: Shapes) -> nn.Module | None:
    names = spec.arguments.split()
    a = arguments(node, f"input weight bias {spec.arguments}", bias=None)
    tensors = _constants(network, weight=a["weight"], bias=a["bias"])
    geometry = {name: tuple(v) if isinstance(v := a[name], list) else v for name in names if name in a}
    if tensors is None or (weight := tensors["weight"]) is None or weight.dim() != spec.dims + 2:
        return None
    return _parameters(spec.layer_for(weight, geometry), **tensors) if _literal(*geometry.values()) else None


def _batch_norm(node: fx.Node, network: fx.GraphModule, shapes: Shapes) -> nn.Module | None:
    """Make the BatchNorm of the input's dimensions, which a function does not tell."""
    names = "input running_mean running_var weight bias training momentum eps"
    a = arguments(node, names, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5)
    tensors = _constants(network, **{k: a[k] for k in ("running_mean", "running_var", "weight", "bias")})
    if tensors is None or tensors["running_var"] is None or a["training"] is not False or not _literal(a["eps"]):
        return None
    shape = shapes.of(a["input"])
    beside = [spec for n in (a["input"], *node.users) if (spec := _convolution(n, network)) is not None]
    kind = BATCH_NORM_OF_RANK.get(len(shape)) if shape is not None else beside[0].norm if beside else None
    if kind is None:
        return None
    norm = kind(len(tensors["running_var"]), eps=a["eps"], device="meta")
    return _parameters(norm, **tensors, num_batches_tracked=None)


def _convolution(node: object, network: fx.GraphModule) -> LayerSpec | None:
    """Return which convolution a node calls, None where it calls none."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        spec = spec_of(network.get_submodule(str(node.target)))
    else:
        spec = next((spec for spec in SPECS if spec.function is node.target), None)
    return spec if spec is not None and spec.dims else None


_MAKERS: dict[Any, Callable[[fx.Node, fx.GraphModule, Shapes], nn.Module | None]] = {
    **{spec.function: partial(_layer, spec) for spec in SPECS if spec.quantized is not None},
    F.batch_norm: _batch_norm,
}


# --- modules called several times -----------------------------------------------------------------------------


def _separate_calls(network: fx.GraphModule, taken: set[str]) -> None:
    """Give each call of a layer a module of its own: inputs differ, so quantizers do."""
    called: set[str] = set()
    for node in network.graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            module = network.get_submodule(name)
            if name in called and quantized_spec(module) is not None:
                _call(node, name, copy_sharing(module), network, taken)
            called.add(name)


def _call(node: fx.Node, name: str, module: nn.Module, network: fx.GraphModule, taken: set[str]) -> None:
    """Let a node call a module that gets this name, or where it is taken the name of a further call."""
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}_call{count}"
    taken.add(free)
    network.add_submodule(free, module)
    node.target = free


def _source(node: fx.Node) -> Any:
    """Return the first argument of a call, which may be a list of nodes."""
    return node.args[0] if node.args else node.kwargs["input"]


def _prefixes(name: str) -> list[str]:
    """Return a, a.b and a.b.c for a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
