"""The network that a traced model becomes: a torch.fx.GraphModule with what the model offers beside its forward.

The model's attributes are the network's. Its methods run with the network in the place of the model, as far as that
is right: they may read attributes and call the network. They cannot reach its layers, for these compute something
else now: BatchNorm is folded into them, and codes travel between them.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, fx, nn

from ptq4cuda.compat import BUFFERS, HOOKS, MODULES, NON_PERSISTENT, PARAMETERS, forget_source_with, parts_of

_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))  # names that torch.fx uses itself
_OF_MODULES = frozenset(vars(nn.Module()))
_OF_GRAPHS = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - _OF_MODULES - {"meta"}


@dataclass
class _Model:
    """What a network knows of its model.

    Attributes:
        kind: the model's class.
        hidden: attributes whose names torch.fx uses itself: only methods of the model see them.
        lost: names of attributes that hold layers.
        parts: names of its modules and tensors.
        functions: modules without weights, by name.
        unread: names of its own tensors that its forward does not read.
        constants: arguments of its forward for whose values alone it was traced.
    """

    kind: type[nn.Module]
    hidden: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    functions: dict[str, nn.Module] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    constants: Mapping[str, Any] = field(default_factory=dict)


class Network(fx.GraphModule):
    """A traced network. Names of modules and tensors that torch.fx uses itself end in an underscore."""

    _model: _Model

    @classmethod
    def of(cls, model: nn.Module, graph: fx.Graph, constants: Mapping[str, Any]) -> Network:
        """Return the network that a graph of a model describes; the model is the network's to change."""
        known = _Model(type(model), constants=constants)
        known.parts = [name for part in parts_of(model) for name in part]
        known.functions = {name: m for name, m in model.named_children() if not _reaches_weights(m, set())}
        kept: dict[str, Any] = {"_model": known}
        for name, value in vars(model).items():
            if name in _OF_MODULES:
                continue
            if _reaches_weights(value, set()):
                known.lost.append(name)
            elif name in _RESERVED:
                known.hidden[name] = value
            else:
                kept[name] = value
        _rename(model, graph)
        network = cls(model, graph, type(model).__name__)
        own = {name for part in parts_of(network) for name in part}
        vars(network).update({name: value for name, value in kept.items() if name not in own})
        known.unread = [name for tensors in parts_of(model)[1:] for name in tensors if name not in own]
        network._take_unread(model)
        return network

    def _take_unread(self, model: nn.Module) -> None:
        for own, tensors in zip(parts_of(self)[1:], parts_of(model)[1:], strict=True):
            own.update({name: tensors[name] for name in self.unread if name in tensors})
        vars(self)[NON_PERSISTENT].update(name for name in self.unread if name in vars(model)[NON_PERSISTENT])

    @property
    def unread(self) -> Sequence[str]:
        """Names of the model's own parameters and buffers that its forward does not read, as a mean of the data."""
        return self._model.unread

    @property
    def constants(self) -> Mapping[str, Any]:
        """Arguments of forward for whose values alone the network was traced."""
        return self._model.constants

    def recompile(self) -> Any:
        """Compile the graph; the process does not keep the code of what was compiled before."""
        code = super().recompile()
        forget_source_with(type(self).forward)
        del type(self).__call__  # that of torch.fx prints the stack of what fails, and cuts it off the exception
        return code

    def __getattr__(self, name: str) -> Any:
        modules = vars(self).get(MODULES, {})
        if name in modules:
            return modules[name]
        model = vars(self).get("_model")
        if model is None or name.startswith("__") or not (name in model.lost or hasattr(model.kind, name)):
            return super().__getattr__(name)
        return getattr(_view(self), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        copied: Network = super().__deepcopy__(memo)  # type: ignore[assignment]
        # torch.fx copies what it knows, and no hooks.
        missing = {name: value for name, value in vars(self).items() if name not in vars(copied) or name in HOOKS}
        vars(copied).update(copy.deepcopy(missing, memo))
        unread = nn.Module()
        vars(unread).update(
            copy.deepcopy({name: vars(self)[name] for name in (PARAMETERS, BUFFERS, NON_PERSISTENT)}, memo)
        )
        copied._take_unread(unread)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # Not as torch.fx does it, which pickles code and traces it again: what it calls would have to be importable.
        state = {name: value for name, value in vars(self).items() if name not in _OF_GRAPHS}
        return _restored, (state, _nodes(self.graph), type(self).__name__)

    def train(self, mode: bool = True) -> Network:
        """Stay in evaluation mode, and say so."""
        return stay_in_evaluation(self, mode, stacklevel=3)  # type: ignore[return-value]


def stay_in_evaluation(network: nn.Module, mode: bool = True, stacklevel: int = 2) -> nn.Module:
    """Take the place of nn.Module.train: a quantized network has no weights to train."""
    if mode:
        warnings.warn(
            "a quantized network stays in evaluation mode: train the float model, and quantize it again",
            stacklevel=stacklevel,
        )
    return nn.Module.train(network, False)


class _Name(str):
    """Stands for the node of this name."""


def _nodes(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Describe a graph, node by node, without what only the process knows that made it."""

    def name(node: fx.Node) -> Any:
        return _Name(node.name)

    return [
        (n.op, n.target, fx.node.map_arg(n.args, name), fx.node.map_arg(n.kwargs, name), n.name) for n in graph.nodes
    ]


def _restored(state: dict[str, Any], nodes: list[tuple[Any, ...]], class_name: str) -> Network:
    """Return a network from its pickled form."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def node(value: Any) -> Any:
        return made[value] if isinstance(value, _Name) else value

    for op, target, args, kwargs, name in nodes:
        args, kwargs = fx.node.map_aggregate(args, node), fx.node.map_aggregate(kwargs, node)
        made[name] = graph.create_node(op, target, args, kwargs, name)
    root = nn.Module()
    vars(root).update(state)
    network = Network(root, graph, class_name)
    vars(network).update(state)
    return network


def _rename(model: nn.Module, graph: fx.Graph) -> None:
    """Give what a graph reads of a model under a name that torch.fx uses itself another one."""
    new: dict[str, str] = {}
    stores = parts_of(model)
    tensors = {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}
    for name in [name for store in (*stores, tensors) for name in store if name in _RESERVED]:
        free = f"{name}_"
        while free in _RESERVED or hasattr(model, free):
            free += "_"
        new[name] = free
        for store in (*stores, vars(model)):
            if name in store and not (store is vars(model) and name not in tensors):
                store[free] = store.pop(name)
        if name in vars(model)[NON_PERSISTENT]:
            vars(model)[NON_PERSISTENT].add(free)

    def renamed(path: str) -> str:
        first, dot, rest = path.partition(".")
        return new.get(first, first) + dot + rest

    for node in graph.nodes if new else ():
        if node.op in ("get_attr", "call_module"):
            node.target = renamed(node.target)
        stack = node.meta.get("nn_module_stack", {})
        for key, (path, kind) in stack.items():
            stack[key] = renamed(path), kind


def _reaches_weights(value: Any, seen: set[int]) -> bool:
    """Tell whether a module with parameters or buffers can be reached from a value."""
    if id(value) in seen or isinstance(value, (type, str, bytes, int, float, complex, Tensor)):
        return False
    seen.add(id(value))
    inner: list[Any] = []
    if isinstance(value, nn.Module):
        if any(True for _ in value.parameters()) or any(True for _ in value.buffers()):
            return True
    elif isinstance(value, Mapping):
        inner += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner += value
    elif isinstance(value, MethodType):
        inner += value.__self__, value.__func__
    elif isinstance(value, FunctionType):
        inner += inspect.getclosurevars(value).nonlocals.values()
    elif isinstance(value, partial):
        inner += value.func, *value.args, *value.keywords.values()
    elif isinstance(value, weakref.ref):
        inner.append(value())
    if not isinstance(value, FunctionType):
        inner += getattr(value, "__dict__", {}).values()
    return any(_reaches_weights(item, seen) for item in inner)


# --- the model's methods --------------------------------------------------------------------------------------


class _View:
    """A network in the place of its model: the model's class, the network's attributes, and no layers."""

    _network: Network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._network(*args, **kwargs)

    forward = __call__

    def eval(self) -> _View:
        return self

    def __getattr__(self, name: str) -> Any:
        network, model = self._network, self._network._model
        described = inspect.getattr_static(model.kind, name, None)
        if isinstance(described, property) and described.fget is not None:  # it failed; do so again, and say why
            return described.fget(self)
        if name in model.functions:
            return model.functions[name]
        for tensors in parts_of(network)[1:]:
            if name in tensors:
                return tensors[name]
        raise _unreachable(model, name)


def _unreachable(model: _Model, name: str) -> AttributeError:
    if name in model.parts or name in (MODULES, PARAMETERS, BUFFERS):
        what = f"{name!r}" if name in model.parts else "layers and parameters"
        return AttributeError(
            f"a method of {model.kind.__name__} reads {what}, which its quantized network does not have as the model "
            "has them: BatchNorm is folded into layers, and codes travel between them. Methods may call the network "
            "itself and read other attributes"
        )
    if name in model.lost:
        return AttributeError(f"{name!r} of the model holds float layers: its quantized network does not have it")
    return AttributeError(f"{model.kind.__name__!r} object has no attribute {name!r}")


def _view(network: Network) -> Any:
    model = network._model

    def refusing(name: str) -> property:
        def refuse(_: Any) -> Any:
            raise _unreachable(model, name)

        return property(refuse)

    def hidden(value: Any) -> property:
        return property(lambda _: value)

    names = [name for name in (*model.parts, *model.lost) if name in _RESERVED]
    namespace: dict[str, Any] = {name: refusing(name) for name in (MODULES, PARAMETERS, BUFFERS, *names)}
    namespace |= {name: hidden(value) for name, value in model.hidden.items()}
    metaclass: Any = type(model.kind)
    kind = metaclass(model.kind.__name__, (_View, model.kind), {**namespace, "__slots__": ("_network",)})
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", vars(network))
    object.__setattr__(view, "_network", network)
    return view
