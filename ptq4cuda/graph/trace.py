"""From a module to a torch.fx graph that computes the same, in the form that the walk reads (canonical.py)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ptq4cuda.compat import COMPUTED_WEIGHTS, remove_computed_weights, tree_leaves, version_of
from ptq4cuda.containers import call_apart, contents
from ptq4cuda.errors import is_out_of_memory, kind_and_line
from ptq4cuda.graph.canonical import canonicalize
from ptq4cuda.graph.copying import copy_model, hooks_of
from ptq4cuda.graph.fold import fold_sizes
from ptq4cuda.graph.functionalize import InPlaceError, functionalize
from ptq4cuda.graph.layers import leave_what_is_patched, quantized_spec
from ptq4cuda.graph.network import Network
from ptq4cuda.graph.tracer import Tracer
from ptq4cuda.graph.wrappers import unwrap_parts

_GRAPH = "its torch.fx graph"


def own_copy(model: nn.Module) -> nn.Module:
    """Copy a model, with plain tensors for weights that are computed from others (weight norm, pruning).

    Modules of the copy with hooks or with methods of their own are marked: layers among them stay in float.
    """
    model = copy_model(model)
    unwrap_parts(model)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _unparametrize(module)
        remove_computed_weights(module)
    leave_what_is_patched(model)
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


def trace(model: nn.Module, candidates: Sequence[Mapping[str, Any]] | None = None) -> tuple[Network | None, str]:
    """Trace a model in evaluation mode.

    What comes out depends on the model's code and attributes alone, so that load() finds what quantize() found.

    Args:
        model: is copied, not changed.
        candidates: arguments of forward to take for constants; the first with which tracing succeeds are. Default:
            none, or those with plain defaults.

    Returns:
        A network of its own in canonical form, or None and the reason.
    """
    reason = _why_not(model)
    if reason:
        return None, reason
    # Whatever torch.fx cannot express surfaces as some exception from the model's own code.
    try:
        traced = _trace_somehow(model, ({}, _constant_defaults(model)) if candidates is None else candidates)
        functionalize(traced)
    except InPlaceError as error:
        return None, str(error)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None, f"torch.fx cannot trace it ({kind_and_line(error)})"
    canonicalize(traced)
    fold_sizes(traced)
    return traced, ""


def _why_not(model: nn.Module) -> str:
    """Return why a graph would leave out what the model does, or ""."""
    for name, module in model.named_modules():
        if not all(isinstance(hook, COMPUTED_WEIGHTS) for hook in hooks_of(module)):
            return f"{f'its module {name!r}' if name else 'it'} has hooks, which a graph would not call"
    forward = vars(model).get("forward")
    if forward is None or (isinstance(forward, MethodType) and forward.__self__ is model):
        return ""
    return "its forward was replaced by a function that is no method of it"


def _trace_somehow(model: nn.Module, candidates: Sequence[Mapping[str, Any]]) -> Network:
    """Trace a model with as little left out as possible.

    Flags of forward decide on the code that runs; with constants it may be traceable. Then modules that cannot
    be traced and have no layers in them become nodes of their own, all of a class at a time.
    """
    first: Exception | None = None
    different = [constants for i, constants in enumerate(candidates) if constants not in candidates[:i]]
    for whole in (True, False):
        for constants in different:
            opaque: frozenset[type[nn.Module]] = frozenset()
            while True:
                tracer = Tracer(opaque, constants)
                try:
                    return _symbolic_trace(own_copy(model), tracer)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    first = first or error
                if whole or tracer.blamed is None or tracer.blamed in opaque:
                    break
                opaque |= {tracer.blamed}
    assert first is not None
    raise first


def output_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a model returns for the first calibration batch.

    Raises:
        ValueError: it fails; the message says what to do where the batch is to blame.
    """
    try:
        with torch.no_grad():
            return call_apart(model, args, kwargs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"the model fails on the first calibration batch ({kind_and_line(error)})"
        samples = max((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), key=Tensor.dim)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), samples.dtype)
        if samples.dtype != dtype:
            # Of integers a network computes nothing, and in float64 none is quantized.
            fit = samples.dtype in (torch.float32, torch.float16, torch.bfloat16)
            remedy = f"it as model.to({samples.dtype})" if fit else f"them as samples.to({dtype})"
            reason += f": its samples are {samples.dtype} and the model is {dtype}, give {remedy}"
        elif samples.dim() == 3:
            reason += ": its samples have three dimensions, and a batch of images has four, as torch.stack makes it"
        raise ValueError(reason) from error


def why_different(
    model: nn.Module, other: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], what: str = _GRAPH
) -> str:
    """Compare a trace, or whatever is to compute the same, with its model on an example; return "" or what is wrong.

    A trace bakes in every decision of the model's code that does not depend on tensors. Compare before BatchNorm is
    folded: that rounds weights anew, and deep networks in 16 bits or TF32 then differ more than a wrong trace might.

    Raises:
        ValueError: the model itself fails on the example.
    """
    expected = output_of(model, args, kwargs)
    try:
        with torch.no_grad(), _changes_of_inputs(other) as changes:
            found = call_apart(other, args, kwargs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{what} fails on the calibration data ({kind_and_line(error)})"
    if changes:
        return f"its module {changes[0]!r}, which torch.fx cannot trace, changes its input in place"
    return "" if same(expected, found) else f"{what} computes something else than the model"


@contextmanager
def _changes_of_inputs(traced: nn.Module) -> Iterator[list[str]]:
    """List the opaque modules that write into their inputs when they are called: functionalize() cannot see that."""
    found: list[str] = []
    hooks: list[RemovableHandle] = []

    def watch(name: str, module: nn.Module) -> None:
        versions: list[tuple[Tensor, int]] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not t.is_inference())
            versions[:] = [(t, version_of(t)) for t in tensors]

        def after(*_: Any) -> None:
            found.extend(name for t, version in versions if version_of(t) != version)
            versions.clear()

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))

    try:
        nodes = traced.graph.nodes if isinstance(traced, fx.GraphModule) else ()
        for name in {str(node.target) for node in nodes if node.op == "call_module"}:
            module = traced.get_submodule(name)
            if quantized_spec(module) is None and not type(module).__module__.startswith("torch.nn."):
                watch(name, module)
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _symbolic_trace(model: nn.Module, tracer: Tracer) -> Network:
    forward = vars(model).pop("forward", None)
    if isinstance(forward, MethodType):  # torch.fx looks for it in the class
        model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward.__func__})
    graph = tracer.trace(model)
    for node in graph.nodes:
        node.type = None  # annotations may be strings, of which torch.fx writes code that cannot be pickled
    return Network.of(tracer.root, graph, tracer.constants)


def _constant_defaults(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    plain = (bool, int, float, str, type(None))
    return {p.name: p.default for p in parameters if p.default is not p.empty and isinstance(p.default, plain)}


def same(a: Any, b: Any) -> bool:
    """Tell whether two results are the same but for rounding."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point() or a.numel() == 0:
            return torch.equal(a, b)
        # The largest value is the measure of all: what cancels to nearly zero may round in another way.
        limit = max(1e-3, 16 * torch.finfo(a.dtype).eps) * float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
        return torch.allclose(a, b, rtol=0.0, atol=limit, equal_nan=True)
    if type(a) is not type(b) and not {type(a), type(b)} <= {tuple, list, torch.Size}:
        return False
    if isinstance(a, Mapping) and a.keys() != b.keys():
        return False
    held, other = contents(a), contents(b)
    if held is None or other is None:
        return True
    return len(held) == len(other) and all(map(same, held, other))
