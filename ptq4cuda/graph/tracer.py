"""Symbolic tracing that no other thread notices.

torch.fx.Tracer.trace replaces nn.Module.__call__, nn.Module.__getattr__, the functions of math and all that fx.wrap
registered for the whole process while it runs: networks that other threads call in the meantime fail. This tracer
records the same graph of a private copy of a model, node for node, and leaves everything that is shared as it is:
the copy's own modules send calls and reads of parameters to the tracer, and doubles with globals of their own, in
which functions that are recorded stand for those that are not, take the place of their methods.
"""

from __future__ import annotations

import builtins
import copy
import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from ptq4cuda.compat import CALL, PARAMETERS, is_wrapped, number_names_anew, own_call
from ptq4cuda.containers import contents
from ptq4cuda.graph.functionalize import INPLACE_OPERATORS
from ptq4cuda.graph.layers import quantized_spec, why_left
from ptq4cuda.graph.shapes import Shapes


class _Proxy(fx.Proxy):
    """Records `x += y` and `x[i] = y` as what they are; fx.Proxy reads x = x + y and refuses the second.

    Sizes that are the same for all inputs are numbers: code may count with them and decide by them. The pieces of a
    tensor can be counted and iterated over where the call says how many there are.
    """

    tracer: Tracer

    def __len__(self) -> int:
        count = self.tracer.length_of(self.node)
        return super().__len__() if count is None else count

    def __getattr__(self, k: str) -> _Attribute:
        return _Attribute(self, k)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        if _SLOTS not in memo:
            return super().__deepcopy__(memo)
        slot = _Slot()
        memo[_SLOTS].append((slot, self))
        return slot

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute or a method of a value: the first who uses it makes it a node."""


def _inplace(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _inplace(_function))


class _Slot:
    """Stands for a value in a container."""


_SLOTS = "slots"  # in the memo of deepcopy


class Rebuilt:
    """Makes a container of a class of its own anew, with other values in its slots, as deepcopy would copy it."""

    __name__ = "rebuilt"

    def __init__(self, template: Any, slots: list[_Slot]) -> None:
        self.template, self.slots = template, slots

    def __call__(self, *values: Any) -> Any:
        """Return the container with these values."""
        return copy.deepcopy(self.template, {id(s): v for s, v in zip(self.slots, values, strict=True)})


def expect(value: Any, constant: Any, name: str) -> None:
    """Raise ValueError unless an argument has the value for which a network was traced."""
    if isinstance(value, Tensor) or value != constant:
        found = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"the network was quantized with {name}={constant!r}, and is called with {found}")


fx.node.has_side_effect(expect)  # or torch.fx would drop calls of it


class Tracer(fx.Tracer):
    """Traces a model that no one else uses; its modules are the tracer's while it runs.

    Args:
        opaque: classes of modules that are one node, although they are no modules of torch.nn.
        constants: arguments of forward that are not traced; the network expects them to have this value.

    Attributes:
        blamed: after a failed trace: the class of the innermost module that failed and could be one node.
    """

    def __init__(
        self, opaque: frozenset[type[nn.Module]] = frozenset(), constants: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.opaque = opaque
        self.constants = constants or {}
        self.blamed: type[nn.Module] | None = None
        # Or names would depend on what else is traced.
        number_names_anew(self)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module's forward; arguments as in torch.fx."""
        self.root = root
        self.root_module_name = type(root).__name__
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.graph = fx.Graph(tracer_cls=type(self))
        self.shapes = Shapes(root)
        self.tensor_attrs = {}
        self._name_tensors(root, "")
        with self._listening(root) as doubles:
            forward, args = self.create_args_for_root(doubles.of(type(root).forward), True, concrete_args)
            annotations = getattr(forward, "__annotations__", {})
            self.create_node(
                "output", "output", (self.create_arg(forward(*args)),), {}, type_expr=annotations.get("return")
            )
        self.submodule_paths = None
        return self.graph

    def _name_tensors(self, module: nn.Module, prefix: str) -> None:
        for name, value in vars(module).items():
            if isinstance(value, (Tensor, torch.ScriptObject)):
                self.tensor_attrs[value] = prefix + name
        for name, child in module.named_children():
            self._name_tensors(child, f"{prefix}{name}.")

    @contextmanager
    def _listening(self, root: nn.Module) -> Iterator[_Doubles]:
        """Let the modules of a model send calls and reads of parameters here, and record functions."""
        doubles = _Doubles()
        names = {id(parameter): name for name, parameter in root.named_parameters()}
        proxies: dict[str, fx.Proxy] = {}

        def read(parameter: object) -> object:
            name = names.get(id(parameter))
            if name is None:
                return parameter
            if name not in proxies:
                proxies[name] = self.create_proxy("get_attr", name, (), {})
            return proxies[name]

        changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for module in list(root.modules()):
                new: dict[str, Any] = {CALL: functools.partial(self._called, module)}
                if isinstance(vars(module).get(PARAMETERS), dict):
                    new[PARAMETERS] = _Parameters(vars(module)[PARAMETERS], read)
                if not self.is_leaf_module(module, ""):
                    new |= doubles.of_methods(module)
                changed.append((vars(module), {name: vars(module).get(name, _ABSENT) for name in new}))
                vars(module).update(new)
            yield doubles
        finally:
            for attributes, before in changed:
                attributes.update(before)
                for name in [name for name, value in before.items() if value is _ABSENT]:
                    del attributes[name]

    def _called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.call_module(module, own_call(module), args, kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a leaf, trace through other modules."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.blamed is None and self._may_be_leaf(m):
                self.blamed = type(m)
            raise

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note who calls; what torch.fx notes itself may come from another thread that compiles."""
        node = super().create_node(*args, **kwargs)
        if self.module_stack:
            node.meta["nn_module_stack"] = copy.copy(self.module_stack)
        self.shapes.visit(node)
        return node

    def length_of(self, node: fx.Node) -> int | None:
        """Return how many pieces a value has, or a shape dimensions, where that is known."""
        shape, count = self.shapes.numbers.get(node), node.args[1] if len(node.args) > 1 else None
        if isinstance(shape, tuple):
            return len(shape)
        if node.target in (torch.chunk, "chunk") and isinstance(count, int):
            return count
        return len(count) if node.target in (torch.split, "split") and isinstance(count, (tuple, list)) else None

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a branch where all inputs would take the same."""
        known = self.shapes.known(obj.node)
        return super().to_bool(obj) if known is None else bool(known)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return forward and its arguments: proxies, and what is constant."""
        forward, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, argument in enumerate(args):
            name = str(argument.node.target) if isinstance(argument, fx.Proxy) else ""
            if name in self.constants:
                args[i] = self.constants[name]
                self.create_proxy("call_function", expect, (argument, args[i], name), {})
        return forward, args

    def create_arg(self, a: Any) -> Any:
        """Return the form in which a graph holds an argument; containers of any class keep it."""
        plain = type(a) in (tuple, list, dict, slice, range, immutable_list, immutable_dict) or hasattr(a, "_fields")
        if plain or isinstance(a, (fx.Proxy, fx.Node)) or contents(a) is None:
            return super().create_arg(a)
        memo: dict[Any, Any] = {_SLOTS: []}
        template = copy.deepcopy(a, memo)
        found: list[tuple[_Slot, fx.Proxy]] = memo[_SLOTS]
        if not found:
            return super().create_arg(a)
        rebuilt = Rebuilt(template, [slot for slot, _ in found])
        return self.create_node("call_function", rebuilt, tuple(proxy.node for _, proxy in found), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what code gets in place of a value."""
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over the pieces of a value where their number is known."""
        count = self.length_of(obj.node)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])  # type: ignore[index]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is one node."""
        if why_left(m):  # a method was replaced: its code is traced, as that of a class of one's own
            return False
        if quantized_spec(m) is not None or super().is_leaf_module(m, module_qualified_name):
            return True
        return type(m) in self.opaque and self._may_be_leaf(m)

    def _may_be_leaf(self, module: nn.Module) -> bool:
        """Tell whether nothing is lost if a module is one node: no layer is in it, or a graph had it so before."""
        if not any(quantized_spec(inner) for inner in module.modules()):
            return True
        if module is self.root or not isinstance(self.root, fx.GraphModule):
            return False
        calls = (node.target for node in self.root.graph.nodes if node.op == "call_module")
        return any(self.root.get_submodule(str(target)) is module for target in calls)


_ABSENT = object()


class _Parameters(dict[str, Any]):
    """The parameters of a module; code that reads one by name gets what the tracer makes of it."""

    def __init__(self, parameters: dict[str, Any], read: Callable[[object], object]) -> None:
        super().__init__(parameters)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        return self.read(super().__getitem__(name))


class _Doubles:
    """Makes doubles of functions: the same code, with globals in which recorded functions stand for others."""

    def __init__(self) -> None:
        self.math = {id(f) for name, f in vars(math).items() if callable(f) and not name.startswith("_")}
        self.known: dict[int, tuple[Any, Any]] = {}  # by the id of the original, which is kept
        self.methods: dict[type[nn.Module], dict[str, Any]] = {}

    def of_methods(self, module: nn.Module) -> dict[str, Any]:
        """Return doubles of the functions that a module has, by its class or as attributes, where they differ."""
        kind = type(module)
        if kind not in self.methods:
            functions: dict[str, Any] = {}
            for base in (base for base in kind.__mro__ if base not in (nn.Module, object)):
                functions = {name: f for name, f in vars(base).items() if not name.startswith("__")} | functions
            self.methods[kind] = {name: f for name, f in functions.items() if self._differing(f) is not None}
        found: dict[str, Any] = {}
        for name, value in self.methods[kind].items():
            if name not in vars(module):
                double = self._differing(value)
                found[name] = double if isinstance(value, staticmethod) else MethodType(double, module)
        for name, value in vars(module).items():
            double = self._differing(value)
            if double is not None:
                found[name] = MethodType(double, value.__self__) if isinstance(value, MethodType) else double
        return found

    def _differing(self, value: Any) -> Any:
        """Return the double of a function or of a method's function, None where it has no other."""
        function = value.__func__ if isinstance(value, (staticmethod, MethodType)) else value
        double = self.of(function) if isinstance(function, FunctionType) else function
        return None if double is function else double

    def of(self, value: Any) -> Any:
        """Return the double of a function, the recording form of one of math, or the value itself."""
        if id(value) in self.known:
            return self.known[id(value)][1]
        self.known[id(value)] = value, value  # what it calls may call it
        new = value
        if id(value) in self.math:
            new = _recording(value)
        elif isinstance(value, FunctionType):
            new = self._double(value)
        self.known[id(value)] = value, new
        return new

    def _double(self, function: FunctionType) -> FunctionType:
        outer = function.__globals__
        replaced: dict[str, Any] = {}
        if _is_own(outer.get("__name__", "")):
            names = _names(function.__code__)
            for name in names:
                value: Any = outer.get(name, getattr(builtins, name, None))
                if is_wrapped(outer, name):
                    replaced[name] = _recording(value)
                elif isinstance(value, ModuleType):
                    replaced[name] = self._module(value, names)
                else:
                    replaced[name] = self.of(value)
                if replaced[name] is value:
                    del replaced[name]
        cells = tuple(self._cell(cell) for cell in function.__closure__ or ())
        if not replaced and all(new is old for new, old in zip(cells, function.__closure__ or (), strict=True)):
            return function
        double = FunctionType(
            function.__code__, {**outer, **replaced}, function.__name__, function.__defaults__, cells or None
        )
        double.__kwdefaults__ = function.__kwdefaults__
        double.__annotations__ = function.__annotations__
        vars(double).update(vars(function))
        return double

    def _cell(self, cell: CellType) -> CellType:
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            return cell
        new = self.of(value) if isinstance(value, FunctionType) else value
        return cell if new is value else CellType(new)

    def _module(self, module: ModuleType, names: set[str]) -> ModuleType:
        """Return a module in which the functions with these names are doubles."""
        if module is not math and not _is_own(module.__name__):
            return module
        values = {name: vars(module)[name] for name in names & vars(module).keys()}
        new = {name: double for name, value in values.items() if (double := self.of(value)) is not value}
        if not new:
            return module
        double = ModuleType(module.__name__)
        vars(double).update(vars(module) | new)
        return double


def _names(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in a piece of code, inner functions included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_own(module_name: str) -> bool:
    """Tell whether a module's code may be a model's own: not of the standard library, torch or numpy."""
    top = module_name.partition(".")[0]
    return top not in sys.stdlib_module_names and top not in ("torch", "numpy")


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that records its call where an argument is a proxy."""

    @functools.wraps(function)
    def recording(*args: Any, **kwargs: Any) -> Any:
        proxies: list[fx.Proxy] = []
        fx.node.map_aggregate((args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else None)
        if not proxies:
            return function(*args, **kwargs)
        recorded = proxies[0].tracer.create_proxy("call_function", function, args, kwargs)
        recorded.node.meta["is_wrapped"] = True  # the code of the graph registers it, for who traces it again
        return recorded

    return recording
