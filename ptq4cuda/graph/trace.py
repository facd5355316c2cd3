"""From a module to a torch.fx graph that computes the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn


def without_inplace(model: nn.Module) -> nn.Module:
    """Switch in-place activations off: statistics are taken before an activation, which must not overwrite them."""
    for module in model.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False  # type: ignore[assignment]
    return model


def trace(model: nn.Module) -> tuple[fx.GraphModule | None, str]:
    """Trace a model in evaluation mode.

    Args:
        model: is copied, not changed.

    Returns:
        A graph module of its own without in-place activations, or None and the reason.
    """
    # Whatever torch.fx cannot express surfaces as some exception from the model's own code.
    try:
        traced = fx.symbolic_trace(without_inplace(copy.deepcopy(model)))
    except Exception as error:
        return None, f"torch.fx cannot trace it ({_first_line(error)})"
    for node in traced.graph.nodes:
        if node.kwargs.get("inplace") is True:
            node.update_kwarg("inplace", False)
        if node.op == "call_method" and node.target == "relu_":
            node.target = "relu"
    traced.graph.lint()
    traced.recompile()
    return traced, ""


def why_different(model: nn.Module, traced: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Compare a trace with its model on an example; return "" or what is wrong with it.

    A trace bakes in every decision of the model's code that does not depend on tensors.
    """
    try:
        with torch.no_grad():
            expected, found = model(*args, **kwargs), traced(*args, **kwargs)
    except Exception as error:
        return f"its torch.fx graph fails on the calibration data ({_first_line(error)})"
    return "" if _same(expected, found) else "its torch.fx graph computes something else than the model"


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.shape == b.shape
            and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        )
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b)
