"""What the nodes and modules of a network are: layers to quantize, activations, nodes that only move values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ptq4cuda.activation import Activation
from ptq4cuda.compat import CONV_FORWARD, BatchNorm
from ptq4cuda.graph.readers import readers
from ptq4cuda.nn import SPECS, LayerSpec, QuantModule, spec_of

_LEFT = "_ptq4cuda_left"  # an attribute of a module of a copied model: why it stays as it is
BATCH_NORMS = (BatchNorm,)
BATCH_NORM_OF_RANK: dict[int, type[BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_FUNCTIONS = (
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear, F.bilinear),
    *(torch.matmul, operator.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(F.scaled_dot_product_attention, F.embedding),
    *(F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm),
)
_METHODS = ("matmul", "mm", "bmm", "addmm", "baddbmm")

# Monotone maps that pass values on, so that act(x) then map is map(x) then act.
_TRANSPARENT_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.UpsamplingNearest2d),
)
_TRANSPARENT_FUNCTIONS = (
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk),
    *(torch.split, torch.cat, operator.getitem, F.max_pool2d, F.adaptive_max_pool2d),
    *(F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle),
)
_TRANSPARENT_METHODS = (
    *("flatten", "unflatten", "view", "reshape", "contiguous", "permute", "transpose", "squeeze", "unsqueeze"),
    *("chunk", "split"),
)

_MAXIMUM_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
)
_MAXIMUM_CALLS = (
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, torch.adaptive_max_pool1d),
    *(F.fractional_max_pool2d, F.fractional_max_pool3d, torch.max, torch.amax, "max", "amax"),
)


def leave(module: nn.Module, reason: str) -> None:
    """Let a module of a copied model stay as it is, in float: nothing is folded into it or replaces it."""
    setattr(module, _LEFT, reason)


def why_left(module: nn.Module) -> str:
    """Return why a module stays as it is, or ""."""
    return str(vars(module).get(_LEFT, ""))


def leave_what_is_patched(model: nn.Module) -> None:
    """Leave the modules of a copied model that may not compute what their class does."""
    for module in model.modules():
        for name in ("forward", CONV_FORWARD):
            if name in vars(module):
                leave(module, f"its {name} was replaced")
                continue
            owner = next((kind for kind in type(module).__mro__ if name in vars(kind)), object)
            code = vars(owner).get(name)
            if owner.__module__.startswith("torch.nn.") and not _is_of_torch(code):
                leave(module, f"{owner.__name__}.{name} was replaced")


def _is_of_torch(code: object) -> bool:
    return (getattr(code, "__module__", None) or "torch").partition(".")[0] == "torch"


def layer_spec(module: nn.Module) -> LayerSpec | None:
    """Return what kind of layer a module is that computes as torch.nn's class does and may be changed, else None.

    A subclass counts if it computes what its base does; one with a forward of its own is left alone.
    """
    spec = spec_of(module)
    return spec if spec is not None and not why_left(module) and spec.computes(module) else None


def quantized_spec(module: nn.Module) -> LayerSpec | None:
    """Return what kind of layer a module is that is quantized, else None."""
    spec = layer_spec(module)
    return spec if spec is not None and spec.quantized is not None else None


# --- what stays in float ----------------------------------------------------------------------------------------


def why_float(module: nn.Module) -> str | None:
    """Return why a module with weights stays in float; None for quantizable modules and those without weights."""
    if isinstance(module, BATCH_NORMS):
        return f"{type(module).__name__} is folded in a traced graph only"
    if _is_whole(module) and any(module.children()) and any(True for _ in module.parameters()):
        return f"{type(module).__name__} is not supported"
    own = next(module.parameters(recurse=False), None)
    spec = spec_of(module)
    replaced = spec is not None and spec.quantized is not None
    known = replaced or type(module).__module__.startswith("torch.nn.")
    if own is None or quantized_spec(module) is not None or isinstance(module, nn.PReLU) or not known:
        return None
    if replaced:
        return why_left(module) or f"{type(module).__name__} has a forward of its own"
    return f"{type(module).__name__} is not supported"


def hidden_modules(network: nn.Module) -> set[nn.Module]:
    """Return the modules inside of modules of torch.nn, which may compute without calling them, containers aside."""
    whole = [module for module in network.modules() if _is_whole(module)]
    return {child for module in whole for child in module.modules() if child is not module}


def _is_whole(module: nn.Module) -> bool:
    """Tell whether a module of torch.nn is more than a container."""
    home = type(module).__module__
    return home.startswith("torch.nn.modules.") and home not in (nn.Sequential.__module__, nn.Module.__module__)


def is_weighted(function: object) -> bool:
    """Tell whether a function multiplies with weights, or with another tensor, as layers do."""
    return function in _FUNCTIONS


def why_float_call(node: fx.Node, network: fx.GraphModule) -> str | None:
    """Return "" for a call of a layer to quantize, a reason for what stays in float, None for all other nodes."""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, BATCH_NORMS):
            return _why_not_folded(node, module, network)
        if quantized_spec(module) is not None:
            return "" if len(node.args) + len(node.kwargs) == 1 else "it is called with an output_size"
        # A module of torch.nn is one node with all that is in it.
        hidden = any(module.children()) and any(True for _ in module.parameters())
        return why_float(module) or (f"{type(module).__name__} is not supported" if hidden else None)
    if not is_weighted(node.target) and not (node.op == "call_method" and node.target in _METHODS):
        return None
    if any(node.target is spec.function for spec in SPECS if spec.quantized is not None):
        return f"a call of {call_name(node, network)} with weights that are not constant"
    return f"a call of {call_name(node, network)} is not supported"


def call_name(node: fx.Node, network: fx.GraphModule) -> str:
    """Return the name of what a node calls: the class of a module, or of the function or method."""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        return module.spec.name if isinstance(module, QuantModule) else type(module).__name__
    return str(getattr(node.target, "__name__", node.target))


def _why_not_folded(node: fx.Node, norm: BatchNorm, network: fx.GraphModule) -> str:
    source = node.all_input_nodes[0]
    if norm.running_var is None:
        return "it normalizes with the statistics of each batch"
    left = why_left(network.get_submodule(str(source.target))) if source.op == "call_module" else ""
    if left:
        return f"layer {source.target!r} before it stays as it is: {left}"
    after = ", ".join(dict.fromkeys(call_name(n, network) for n in readers(node)))
    before = call_name(source, network)
    if _called_spec(source, network) is not None and len(readers(source)) > 1:
        return f"layer {source.target!r} before it has other readers"
    if all((spec := _called_spec(n, network)) is not None and spec.dims for n in readers(node)):
        return "the convolution after it pads with zeros, which a shift would move"
    return f"between {before} and {after} there is no layer to fold it into"


def _called_spec(node: fx.Node, network: fx.GraphModule) -> LayerSpec | None:
    """Return the kind of layer that a node calls, which may be quantized by now."""
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, QuantModule):
        return module.spec
    return None if module is None else spec_of(module)


# --- activations ------------------------------------------------------------------------------------------------


def _piecewise_linear(lower: Any, upper: Any) -> Activation | None:
    """Return the activation that clamps to [0, upper], or None."""
    upper = math.inf if upper is None else upper
    if isinstance(lower, (int, float)) and lower == 0 and isinstance(upper, (int, float)) and upper > 0:
        return Activation(upper=float(upper))
    return None


def _leaky(slope: Any) -> Activation | None:
    return Activation(negative_slope=slope) if isinstance(slope, float) and 0.0 <= slope < 1.0 else None


def module_activation(module: nn.Module) -> Activation | None:
    """Return the piecewise linear activation that a module computes, or None."""
    if why_left(module):
        return None
    if type(module) is nn.ReLU:
        return Activation()
    if type(module) in (nn.ReLU6, nn.Hardtanh):
        return _piecewise_linear(module.min_val, module.max_val)
    if type(module) is nn.LeakyReLU:
        return _leaky(float(module.negative_slope))
    if type(module) is nn.PReLU and module.num_parameters == 1:
        return _leaky(module.weight.item())
    return None


# From the arguments after the input.
_ACTIVATIONS: dict[Any, Callable[..., Activation | None]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), lambda inplace=False: Activation()),
    F.relu6: lambda inplace=False: Activation(upper=6.0),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: _leaky(negative_slope),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: _piecewise_linear(min_val, max_val),
    **dict.fromkeys(
        (torch.clamp, torch.clip, "clamp", "clip"), lambda min=None, max=None: _piecewise_linear(min, max)
    ),
    **dict.fromkeys((torch.clamp_min, "clamp_min"), lambda min: _piecewise_linear(min, None)),
}


def activation_of(node: fx.Node, network: fx.GraphModule) -> Activation | None:
    """Return the piecewise linear activation that a node computes, or None."""
    if node.op == "call_module":
        return module_activation(network.get_submodule(str(node.target)))
    activation = _ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if activation is None or len(node.all_input_nodes) != 1 or not node.args:
        return None
    return activation(*node.args[1:], **node.kwargs)


def is_transparent(node: fx.Node, network: fx.GraphModule) -> bool:
    """Tell whether a node only selects or rearranges values, so that an activation before it could follow it."""
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), _TRANSPARENT_MODULES)
    if node.op == "call_function":
        return node.target in _TRANSPARENT_FUNCTIONS
    return node.op == "call_method" and node.target in _TRANSPARENT_METHODS


def is_maximum(node: fx.Node, network: fx.GraphModule) -> bool:
    """Tell whether a node returns of several values the largest one."""
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), _MAXIMUM_MODULES)
    return node.op in ("call_function", "call_method") and node.target in _MAXIMUM_CALLS


def is_concatenation(function: object) -> bool:
    """Tell whether a function puts tensors side by side."""
    return function in (torch.cat, torch.concat, torch.concatenate)


def is_addition(node: fx.Node) -> bool:
    """Tell whether a node adds two values, elementwise and unscaled."""
    return node.target in (operator.add, torch.add, "add") and not node.kwargs
