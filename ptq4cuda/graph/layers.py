"""What the nodes and modules of a network are: layers to quantize, activations, nodes that only move values."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ptq4cuda.clipping import Activation

_QUANTIZABLE = {nn.Conv2d: "Conv2d", nn.Linear: "Linear"}
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
_FUNCTIONAL = {
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.conv_transpose2d: "conv_transpose2d",
    F.linear: "linear",
    torch.matmul: "matmul",
    operator.matmul: "matmul",
    torch.bmm: "bmm",
}

# Monotone maps that pass values on, so that act(x) then map is map(x) then act.
_TRANSPARENT_MODULES = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)
_TRANSPARENT_FUNCTIONS = (torch.flatten, F.max_pool2d, F.dropout, torch.cat)
_TRANSPARENT_METHODS = ("flatten", "view", "reshape", "contiguous")


def layer_kind(module: nn.Module) -> str | None:
    """Return "Conv2d" or "Linear" for a module that is quantized, else None.

    A subclass counts if it computes what its base does; one with a forward of its own is left alone.
    """
    for base, kind in _QUANTIZABLE.items():
        if not isinstance(module, base):
            continue
        methods = ("forward", "_conv_forward") if kind == "Conv2d" else ("forward",)
        if all(getattr(type(module), name) is getattr(base, name) for name in methods):
            return kind
    return None


def why_float(module: nn.Module) -> str | None:
    """Return why a module with weights stays in float; None for quantizable modules and those without weights."""
    if layer_kind(module) is not None or not isinstance(module, _WEIGHTED):
        return None
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return f"{type(module).__name__} has a forward of its own"
    return f"{type(module).__name__} is not supported"


def functional_kind(node: fx.Node) -> str | None:
    """Return the name of a weighted function that a node calls, or None."""
    return _FUNCTIONAL.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]


def module_activation(module: nn.Module) -> Activation | None:
    """Return the piecewise linear activation that a module computes, or None."""
    if type(module) is nn.ReLU:
        return Activation()
    if type(module) is nn.ReLU6:
        return Activation(upper=6.0)
    if type(module) is nn.LeakyReLU and 0.0 <= module.negative_slope < 1.0:
        return Activation(negative_slope=module.negative_slope)
    return None


def call_counts(network: fx.GraphModule) -> Counter[str]:
    """Return how often the graph calls each module."""
    return Counter(str(node.target) for node in network.graph.nodes if node.op == "call_module")


def activation_of(node: fx.Node, network: fx.GraphModule) -> Activation | None:
    """Return the piecewise linear activation that a node computes, or None."""
    if node.op == "call_module":
        return module_activation(network.get_submodule(str(node.target)))
    if node.target in (F.relu, torch.relu) or (node.op == "call_method" and node.target == "relu"):
        return Activation()
    if node.target is F.relu6:
        return Activation(upper=6.0)
    if node.target is F.leaky_relu:
        slope: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return Activation(negative_slope=slope) if isinstance(slope, float) and 0.0 <= slope < 1.0 else None
    return None


def is_transparent(node: fx.Node, network: fx.GraphModule) -> bool:
    """Tell whether a node only selects or rearranges values, so that an activation before it could follow it."""
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), _TRANSPARENT_MODULES)
    if node.op == "call_function":
        return node.target in _TRANSPARENT_FUNCTIONS
    return node.op == "call_method" and node.target in _TRANSPARENT_METHODS


def is_addition(node: fx.Node) -> bool:
    """Tell whether a node adds two values, elementwise and unscaled."""
    return node.target in (operator.add, operator.iadd, torch.add, "add", "add_") and not node.kwargs
