"""From a module to a torch.fx graph that computes the same, in the form that the walk reads (canonical.py)."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_map_only

from ptq4cuda.graph.canonical import canonicalize
from ptq4cuda.graph.functionalize import INPLACE_OPERATORS, InPlaceError, functionalize
from ptq4cuda.graph.layers import layer_kind


def own_copy(model: nn.Module) -> nn.Module:
    """Copy a model, with plain tensors for weights that are computed from others (weight norm, pruning)."""
    # Hooks leave computed weights as attributes, which deepcopy refuses to copy.
    computed = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf)
    model = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _unparametrize(module)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
                hook.remove(module)
                del module._forward_pre_hooks[key]
    return model


def _unparametrize(module: nn.Module) -> None:
    """Turn parametrized tensors into plain ones.

    torch's remove_parametrizations takes properties out of the module's class, which a copy shares with its original.
    """
    computed = module.parametrizations
    assert isinstance(computed, nn.ModuleDict)
    values = {name: getattr(module, name).detach().clone() for name in computed}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        if any(True for _ in computed[name].parameters()):
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(name, value)


def trace(model: nn.Module) -> tuple[fx.GraphModule | None, str]:
    """Trace a model in evaluation mode.

    Args:
        model: is copied, not changed.

    Returns:
        A graph module of its own in canonical form, or None and the reason.
    """
    # Whatever torch.fx cannot express surfaces as some exception from the model's own code.
    model = own_copy(model)
    try:
        traced = _symbolic_trace(model, {})
    except Exception as error:
        # Flags of forward decide on the code that runs; with their defaults it may be traceable.
        defaults = _constant_defaults(model)
        try:
            if not defaults:
                raise
            traced = _symbolic_trace(model, defaults)
        except Exception:
            return None, f"torch.fx cannot trace it ({_first_sentence(error)})"
    try:
        functionalize(traced)
    except InPlaceError as error:
        return None, str(error)
    canonicalize(traced)
    return traced, ""


def why_different(model: nn.Module, traced: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Compare a trace with its model on an example; return "" or what is wrong with it.

    A trace bakes in every decision of the model's code that does not depend on tensors. Compare before BatchNorm is
    folded: that rounds weights anew, and deep networks in 16 bits or TF32 then differ more than a wrong trace might.

    Raises:
        ValueError: the model itself fails on the example.
    """

    def run(network: nn.Module) -> Any:
        own = tree_map_only(Tensor, torch.clone, (args, kwargs))  # a model may write into its input
        with torch.no_grad():
            return network(*own[0], **own[1])

    try:
        expected = run(model)
    except Exception as error:
        raise ValueError(f"the model fails on the first calibration batch ({_first_sentence(error)})") from error
    try:
        found = run(traced)
    except Exception as error:
        return f"its torch.fx graph fails on the calibration data ({_first_sentence(error)})"
    return "" if _same(expected, found) else "its torch.fx graph computes something else than the model"


# --- torch.fx, with assignments in place ----------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Records `x += y` and `x[i] = y` as what they are; fx.Proxy reads x = x + y and refuses the second.

    The pieces of a tensor can be counted and iterated over where the call says how many there are.
    """

    def __len__(self) -> int:
        pieces = _pieces(self.node)
        return super().__len__() if pieces is None else pieces

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _pieces(node: fx.Node) -> int | None:
    count = node.args[1] if len(node.args) > 1 else None
    if node.target in (torch.chunk, "chunk") and isinstance(count, int):
        return count
    return len(count) if node.target in (torch.split, "split") and isinstance(count, (tuple, list)) else None


def _inplace(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _inplace(_function))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        pieces = _pieces(obj.node)
        return super().iter(obj) if pieces is None else iter([obj[i] for i in range(pieces)])  # type: ignore[index]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return layer_kind(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _symbolic_trace(model: nn.Module, constants: dict[str, Any]) -> fx.GraphModule:
    """Trace a model with constants for some of its arguments, which the result does not take."""
    tracer = _Tracer()
    graph = tracer.trace(model, constants)
    parameters = inspect.signature(model.forward).parameters
    for node in list(graph.nodes):
        if node.op == "placeholder" and constants and str(node.target).lstrip("*") not in parameters:
            checks = [*node.users, *(u for user in node.users for u in user.users)]
            for check in reversed(checks):
                graph.erase_node(check)
            graph.erase_node(node)
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


def _constant_defaults(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    plain = (bool, int, float, str, type(None))
    return {p.name: p.default for p in parameters if p.default is not p.empty and isinstance(p.default, plain)}


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point() or a.numel() == 0:
            return torch.equal(a, b)
        # The largest value is the measure of all: what cancels to nearly zero may round in another way.
        limit = max(1e-3, 16 * torch.finfo(a.dtype).eps) * float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
        return torch.allclose(a, b, rtol=0.0, atol=limit, equal_nan=True)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b)
