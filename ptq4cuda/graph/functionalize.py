"""Rewrites in-place operations, so that every node computes a new value and no value changes afterwards.

The walk keeps values, shares them between its two streams and looks back at what a tensor was before its activation:
none of this survives `y += x`. After such an operation on y, every later reader of y reads the result instead. Where
other tensors may share y's memory and are read later, the rewriting would have to know more about memory than the
graph tells, and the model is refused.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Argument
from torch.nn import functional as F

from ptq4cuda.graph.readers import is_number

INPLACE_OPERATORS = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
}

# What may return a view of its first argument: methods and functions, modules.
_VIEW_NAMES = (
    "view view_as reshape reshape_as flatten unflatten transpose permute swapaxes swapdims movedim moveaxis t chunk "
    "split split_with_sizes tensor_split unbind narrow select squeeze unsqueeze expand expand_as broadcast_to "
    "contiguous to type type_as float half bfloat16 double detach unfold diagonal real imag getattr ravel "
    "dropout dropout1d dropout2d dropout3d alpha_dropout "
    "Flatten Unflatten Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"
)
_VIEWS = frozenset(_VIEW_NAMES.split())
_SEVERAL = {"chunk", "split", "split_with_sizes", "tensor_split", "unbind"}  # views that do not overlap
_ASSIGNMENTS = {"copy_", "fill_", "zero_"}


class InPlaceError(ValueError):
    """The graph changes a tensor in a way that cannot be rewritten."""


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of x in which x[index] = value."""
    x = x.clone()
    x[index] = value
    return x


def functionalize(network: fx.GraphModule) -> None:
    """Rewrite every in-place operation of a graph.

    Raises:
        InPlaceError: a tensor is changed whose memory others share that are read later.
    """
    _Functionalizer(network).run()


class _Functionalizer:
    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.order: dict[fx.Node, int] = {node: i for i, node in enumerate(network.graph.nodes)}
        self.numbers: set[fx.Node] = set()  # nodes that compute sizes and the like rather than tensors
        for node in network.graph.nodes:
            computed = _is_arithmetic(node) and self.numbers.issuperset(node.all_input_nodes)
            if computed or is_number(node) or node.target == "item":
                self.numbers.add(node)

    def run(self) -> None:
        for node in list(self.network.graph.nodes):
            target = node.args[0] if node.args else node.kwargs.get("input")
            if self._make_pure(node) and isinstance(target, fx.Node):
                self._rebind(target, node, self.order[node])
        for module in self.network.modules():
            if getattr(module, "inplace", None) is True:
                module.inplace = False  # type: ignore[assignment]

    def _make_pure(self, node: fx.Node) -> bool:
        """Let a node return what it wrote into its first argument; tell whether it did write."""
        if isinstance(node.kwargs.get("out"), fx.Node):
            raise InPlaceError(f"{self._name(node)} writes into its argument out={node.kwargs['out']}")
        if node.op == "call_module":
            return getattr(self.network.get_submodule(str(node.target)), "inplace", None) is True
        if node.op == "call_method":
            return self._make_method_pure(node)
        if node.op != "call_function":
            return False
        if node.target in INPLACE_OPERATORS:
            node.target = INPLACE_OPERATORS[node.target]
            return node.args[0] not in self.numbers
        if node.target is operator.setitem:
            node.target = with_item
            return True
        name = self._name(node)
        if name.endswith("_") and getattr(node.target, "__module__", "") != "_operator":  # operator.and_
            pure = next((getattr(m, name[:-1]) for m in (F, torch) if hasattr(m, name[:-1])), None)
            if pure is None:
                raise InPlaceError(f"it calls {name}, which changes a tensor in place")
            node.target = pure
            return True
        return self._switch_off_inplace(node)

    @staticmethod
    def _make_method_pure(node: fx.Node) -> bool:
        name = str(node.target)
        if not name.endswith("_") or name.endswith("__") or name == "requires_grad_":
            return False
        if name in _ASSIGNMENTS:
            value = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()), 0)
            node.op, node.target, node.kwargs = "call_function", with_item, {}
            node.args = (node.args[0], ..., value)  # type: ignore[assignment]
        elif hasattr(Tensor, name[:-1]) and name != "bernoulli_":  # its probability means something else out of place
            node.target = name[:-1]
        else:
            raise InPlaceError(f"it calls {name}(), which changes a tensor in place")
        return True

    @staticmethod
    def _switch_off_inplace(node: fx.Node) -> bool:
        """Handle functions with an argument `inplace`, by name or by position."""
        if node.kwargs.get("inplace") is True:
            node.update_kwarg("inplace", False)
            return True
        try:
            position = list(inspect.signature(node.target).parameters).index("inplace")  # type: ignore[arg-type]
        except (TypeError, ValueError):  # a function of C, or one without such an argument
            return False
        if position < len(node.args) and node.args[position] is True:
            node.update_arg(position, False)
            return True
        return False

    def _rebind(self, old: fx.Node, new: fx.Node, position: int) -> None:
        """Let every reader of old after a position read new, and whatever shares its memory see the change."""
        root: fx.Node | None = old
        while root is not None:
            if root.op == "get_attr":
                raise InPlaceError(f"it changes {root.target!r} in its forward")
            root = self._viewed(root)
        # Views that are taken later are readers like others.
        earlier = [view for view in self._views_of(old) if self.order[view] < position]
        if any(self._read_after(view, position) for view in earlier):
            raise self._shared(old)
        for user in list(old.users):
            if self.order[user] > position:
                user.replace_input_with(old, new)
        view, parent = old, self._viewed(old)
        while parent is not None and self._name(parent) in _SEVERAL:  # the other pieces are other memory
            same = [n for n in parent.users if n is not view and not _are_disjoint(n, view)]
            if any(self.order[n] > position or self._read_after(n, position) for n in same):
                raise self._shared(view)
            view, parent = parent, self._viewed(parent)
        if parent is None or not self._read_after(parent, position, but=view):
            return
        if view is not old or view.target is not operator.getitem:
            raise self._shared(parent)
        with self.network.graph.inserting_after(new):
            whole = self.network.graph.call_function(with_item, (parent, view.args[1], new))
        self.order[whole] = position
        self._rebind(parent, whole, position)

    def _views_of(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if self._viewed(user) is node]

    def _read_after(self, node: fx.Node, position: int, but: fx.Node | None = None) -> bool:
        """Tell whether a tensor is read after a position, itself or through views of it, all but one."""
        if any(self.order[user] > position for user in node.users if user is not but):
            return True
        if any(self._read_after(view, position) for view in self._views_of(node) if view is not but):
            return True
        parent = self._viewed(node) if but is not None else None
        return parent is not None and self._read_after(parent, position, but=node)

    def _viewed(self, node: fx.Node) -> fx.Node | None:
        """Return the node that a node may be a view of."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or node in self.numbers:
            return None
        if node.target is operator.getitem:
            return source if self._is_basic(node.args[1]) else None
        return source if self._name(node) in _VIEWS else None

    def _is_basic(self, index: Argument) -> bool:
        """Tell whether an index selects a view, or an item of a tuple; tensors and lists as index make a copy."""
        parts: list[Argument] = []
        for item in index if isinstance(index, tuple) else (index,):
            parts += (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)
        return all(
            part in self.numbers if isinstance(part, fx.Node) else not isinstance(part, (list, Tensor))
            for part in parts
        )

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.network.get_submodule(str(node.target))).__name__
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")

    @staticmethod
    def _shared(node: fx.Node) -> InPlaceError:
        return InPlaceError(f"it changes {node.name!r} or a view of it in place while the other is still used")


def _is_arithmetic(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")


def _are_disjoint(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether two nodes select different pieces of a tuple; a negative index may be any."""
    if a.target is not operator.getitem or b.target is not operator.getitem:
        return False
    i, j = a.args[1], b.args[1]
    return isinstance(i, int) and isinstance(j, int) and i != j and (i < 0) == (j < 0)
