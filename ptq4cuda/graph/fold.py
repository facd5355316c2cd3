"""Folds BatchNorm, and other scales and shifts per channel, into the layer before or after it."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import Tensor, fx, nn

from ptq4cuda.graph.canonical import constant, drop_unused
from ptq4cuda.graph.layers import BATCH_NORMS, layer_kind

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}

_MULTIPLY = (operator.mul, torch.mul, "mul")
_DIVIDE = (operator.truediv, torch.div, "div")
_ADD = (operator.add, torch.add, "add")
_SUBTRACT = (operator.sub, torch.sub, "sub")


def fold_batch_norm(network: fx.GraphModule) -> int:
    """Fold BatchNorms that use running statistics, in a graph in canonical form.

    One that alone reads the output of a layer is folded into that layer, and so are products with and sums of
    constants per channel: a BatchNorm that is written out. One that only convolutions without zero padding or linear
    layers read is folded into those. A BatchNorm1d beside a linear layer with as many features is taken to see
    [N, C].

    Returns:
        The number of BatchNorms folded.
    """
    folded = 0
    for node in list(network.graph.nodes):
        folded += _fold_into_previous(node, network) or _fold_into_next(node, network)
    drop_unused(network)
    return folded


def _fold_into_previous(node: fx.Node, network: fx.GraphModule) -> bool:
    """Fold a node into the layer before it; tell whether that was a BatchNorm, or the scale of one."""
    operands = [n for n in node.all_input_nodes if n.op == "call_module"]
    source = operands[0] if len(operands) == 1 else None
    layer = _layer(source, network)
    if source is None or layer is None or len(source.users) != 1:
        return False
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if node.op == "call_module":
        affine = _batch_norm_of(node, type_before(layer), network)
    else:
        affine = _constants_of(node, source, -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim(), network)
    if affine is None or any(t.numel() not in (1, channels) for t in affine):
        return False
    scale, shift = (t.double().expand(channels) for t in affine)
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(scale)
    shape = (1, -1) if isinstance(layer, _TRANSPOSED) else (-1, 1)
    _set(layer, layer.weight.double() * _expand(scale.view(shape), layer.weight), bias * scale + shift)
    node.replace_all_uses_with(source)
    network.graph.erase_node(node)
    return node.op == "call_module" or node.target in (*_MULTIPLY, *_DIVIDE)


def _fold_into_next(node: fx.Node, network: fx.GraphModule) -> bool:
    """Fold a BatchNorm into the layers that read it; tell whether it was done."""
    layers = [_layer(user, network) for user in node.users]
    source = node.args[0] if node.args else None
    if node.op != "call_module" or not layers or not isinstance(source, fx.Node):
        return False
    readers = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear)) and not pads_with_zeros(layer)]
    if len(readers) < len(layers):
        return False
    norms = [_batch_norm_of(node, type_before(layer), network) for layer in readers]
    channels = [r.in_features if isinstance(r, nn.Linear) else r.in_channels for r in readers]
    if any(n is None or len(n[0]) != c for n, c in zip(norms, channels, strict=True)):
        return False
    assert norms[0] is not None
    scale, shift = norms[0]
    for layer in readers:
        weight = layer.weight.double()
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        # Output channel o of group g reads the input channels of group g.
        per_row = [t.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1) for t in (scale, shift)]
        by_weight = [_expand(t, weight) for t in per_row]
        bias = layer.bias.double() if layer.bias is not None else 0.0
        _set(layer, weight * by_weight[0], bias + (weight * by_weight[1]).flatten(1).sum(1))
    node.replace_all_uses_with(source)
    network.graph.erase_node(node)
    return True


def pads_with_zeros(layer: nn.Module) -> bool:
    """Tell whether a layer sees zeros beyond the border of its input, which a shift would have to move."""
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return max(layer.kernel_size) > 1 if layer.padding == "same" else any(layer.padding)


def type_before(layer: nn.Module) -> type[nn.Module]:
    """Return the class of BatchNorm for the dimensions of a layer's tensors."""
    return next(norm for kind, norm in _FOLDS.items() if isinstance(layer, kind))


def _layer(node: fx.Node | None, network: fx.GraphModule) -> nn.Conv2d | nn.Linear | None:
    """Return the layer that a node calls if a BatchNorm can be folded into it: called nowhere else."""
    if node is None or node.op != "call_module":
        return None
    layer = network.get_submodule(str(node.target))
    if type(layer) not in _FOLDS and layer_kind(layer) is None:
        return None
    if isinstance(layer, _TRANSPOSED) and layer.groups > 1:
        return None
    calls = Counter(n.target for n in network.graph.nodes if n.op == "call_module")
    return layer if calls[node.target] == 1 else None  # type: ignore[return-value]


def _batch_norm_of(node: fx.Node, kind: type[nn.Module], network: fx.GraphModule) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift per channel of a BatchNorm, float64, or None."""
    norm = network.get_submodule(str(node.target))
    if type(norm) not in (kind, nn.SyncBatchNorm) or not isinstance(norm, BATCH_NORMS) or norm.training:
        return None
    if norm.running_var is None or norm.running_mean is None:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _constants_of(
    node: fx.Node, source: fx.Node, channel_axis: int, network: fx.GraphModule
) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift of a product or a sum of a layer's output and a constant per channel, or None.

    Args:
        node: of the operation.
        source: of the layer.
        channel_axis: of the layer's output, counted from the back.
        network: of both.
    """
    if len(node.args) != 2 or node.kwargs or node.op not in ("call_function", "call_method"):
        return None
    backwards = node.args[1] is source
    other = node.args[0] if backwards else node.args[1]
    weight = network.get_parameter(f"{source.target}.weight")
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        value = torch.tensor(float(other), dtype=torch.float64, device=weight.device)
    else:
        found = constant(other, network)
        if found is None or found.dtype != weight.dtype or found.device != weight.device:
            return None
        value = found.double()
    # Only the channel axis may be longer than one, and the result must have the layer's dimensions.
    shape = (1,) * (-channel_axis) + tuple(value.shape)
    if value.dim() > -channel_axis + 1 or value.numel() != shape[channel_axis]:
        return None
    value = value.flatten()
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if node.target in _MULTIPLY:
        return value, zero
    if node.target in _ADD:
        return one, value
    if node.target in _SUBTRACT:
        return (-one, value) if backwards else (one, -value)
    if node.target in _DIVIDE and not backwards:
        return 1.0 / value, zero
    return None


def _expand(scale: Tensor, weight: Tensor) -> Tensor:
    """View [a, b] so that it broadcasts over weights [a, b, ...]."""
    return scale.view(*scale.shape, *(1,) * (weight.dim() - 2))


def _set(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
