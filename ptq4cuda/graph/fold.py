"""Folds BatchNorm, and other scales and shifts per channel, into the layer before or after it."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ptq4cuda.compat import ASSERTION
from ptq4cuda.graph.canonical import arguments, constant, drop_unused, substitute
from ptq4cuda.graph.layers import BATCH_NORM_OF_RANK, BATCH_NORMS, layer_spec
from ptq4cuda.graph.readers import readers
from ptq4cuda.graph.shapes import Shapes, infer_shapes, is_move, source_of
from ptq4cuda.nn import LayerSpec

_INTERPOLATIONS = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear")  # their weights add up to one
_AVERAGES = (torch.mean, "mean", F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_MULTIPLY = (operator.mul, torch.mul, "mul")
_DIVIDE = (operator.truediv, torch.div, "div")
_ADD = (operator.add, torch.add, "add")
_SUBTRACT = (operator.sub, torch.sub, "sub")


def fold_batch_norm(network: fx.GraphModule) -> int:
    """Fold BatchNorms that use running statistics, in a graph in canonical form.

    One that alone reads the values of a layer is folded into that layer, and so are products with and sums of
    constants per channel: a BatchNorm that is written out. One that only convolutions without zero padding or linear
    layers read is folded into those. Between the two the values may be moved and averaged, as long as it is certain
    where the channels are, and the outputs of several layers concatenated. Where the shape is not known, a
    BatchNorm1d beside a linear layer is taken to see [N, C].

    Returns:
        The number of BatchNorms folded, not that of other products and sums.
    """
    shapes = infer_shapes(network)
    folded = 0
    for node in list(network.graph.nodes):
        gone = _fold_into_previous(node, network, shapes) or _fold_into_next(node, network, shapes)
        folded += gone and node.op == "call_module"
    drop_unused(network)
    return folded


def fold_sizes(network: fx.GraphModule) -> None:
    """Put numbers in the place of what a graph computes from shapes and is the same for all inputs.

    Checks that always hold go, as `torch._assert(x.ndim == 4, ...)` of a convolution's output.
    """
    shapes = infer_shapes(network)
    for node in list(network.graph.nodes):
        number = shapes.known(node)
        if number is not None:
            for user in list(node.users):
                substitute(user, node, number)
        if node.target is ASSERTION and node.args and node.args[0] is True:
            network.graph.erase_node(node)
    drop_unused(network)


@dataclass(frozen=True)
class _Layer:
    """A layer into which a scale and a shift can be folded."""

    module: Any
    spec: LayerSpec

    @property
    def rows(self) -> Tensor:
        return self.spec.rows(self.module)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias
        return bias

    @property
    def groups(self) -> int:
        return self.spec.groups(self.module)

    @property
    def inputs(self) -> int:
        return self.rows.shape[1] * self.groups

    def set(self, rows: Tensor, bias: Tensor) -> None:
        self.spec.set_rows(self.module, rows, bias)


@dataclass
class _Path:
    """From the values of a layer to a node, by nodes that only move them.

    Attributes:
        layer: the node of the layer.
        end: what the node reads.
        rank: of what the node reads, None where it is not known.
        axis: of the channels there, counted from the back.
    """

    layer: fx.Node
    end: fx.Node
    rank: int | None
    axis: int


def _fold_into_previous(node: fx.Node, network: fx.GraphModule, shapes: Shapes) -> bool:
    """Fold a BatchNorm, or a product or sum with a constant, into the layers before it; tell whether it was done."""
    paths = next((p for n in node.all_input_nodes if (p := _paths_from_layers(n, node, network, shapes))), None)
    if paths is None:
        return False
    layers = [layer for path in paths if (layer := _layer(path.layer, network)) is not None]
    channels = [len(layer.rows) for layer in layers]
    if node.op == "call_module":
        affine = _batch_norm_of(node, network, paths[0].rank, paths[0].axis, layers[0].spec)
    else:
        affine = _constants_of(node, paths[0], network)
    if affine is None or any(t.numel() not in (1, sum(channels)) for t in affine):
        return False
    parts = (t.double().expand(sum(channels)).split(channels) for t in affine)
    for layer, scale, shift in zip(layers, *parts, strict=True):
        bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(scale)
        layer.set(layer.rows.double() * _expand(scale.view(-1, 1), layer.rows), bias * scale + shift)
    node.replace_all_uses_with(paths[0].end)
    network.graph.erase_node(node)
    return True


def _paths_from_layers(end: fx.Node, reader: fx.Node, network: fx.GraphModule, shapes: Shapes) -> list[_Path] | None:
    """Return how the values of a layer, or of several that are concatenated, come to a node that alone reads them."""
    path = _path_from_layer(end, reader, network, shapes)
    if path is not None:
        return [path]
    if end.target is not torch.cat or readers(end) != [reader] or not isinstance(end.args[0], (list, tuple)):
        return None
    found = [_path_from_layer(n, end, network, shapes) for n in end.args[0] if isinstance(n, fx.Node)]
    paths = [path for path in found if path is not None and path.rank is not None]
    layers = {path.layer for path in paths}
    if not paths or not len(layers) == len(paths) == len(end.args[0]):
        return None
    rank, axis = paths[0].rank, paths[0].axis
    dim = end.args[1] if len(end.args) > 1 else 0
    if rank is None or dim not in (axis, rank + axis) or any((p.rank, p.axis) != (rank, axis) for p in paths):
        return None
    return [_Path(path.layer, end, rank, axis) for path in paths]


def _path_from_layer(end: fx.Node, reader: fx.Node, network: fx.GraphModule, shapes: Shapes) -> _Path | None:
    """Return how the values of a layer come to a node that alone reads them, None where they do not."""
    moves: list[fx.Node] = []
    node = end
    while readers(node) == [reader] and _keeps_channels(node, network):
        moves.append(node)
        node, reader = source_of(node), node
    layer = _layer(node, network)
    if layer is None or readers(node) != [reader]:
        return None
    shape, axis = shapes.of(node), layer.spec.axis
    for move in reversed(moves):
        if shape is None:
            return None
        kept = shapes.kept_axis(move, len(shape) + axis)
        shape = shapes.of(move)
        if kept is None or shape is None:
            return None
        axis = kept - len(shape)
    return _Path(node, end, None if shape is None else len(shape), axis)


def _fold_into_next(node: fx.Node, network: fx.GraphModule, shapes: Shapes) -> bool:
    """Fold a BatchNorm into the layers that read it; tell whether it was done."""
    source = node.args[0] if node.args else None
    if node.op != "call_module" or not isinstance(source, fx.Node):
        return False
    norm = network.get_submodule(str(node.target))
    if not isinstance(norm, BATCH_NORMS):
        return False
    found = [_path_to_layer(reader, node, network, shapes) for reader in readers(node)]
    paths = [path for path in found if path is not None]
    if not paths or len(paths) < len(found):
        return False
    shape = shapes.of(node)
    affine = _batch_norm_of(
        node, network, None if shape is None else len(shape), 1 - len(shape or "NC"), paths[0][0].spec
    )
    if affine is None or any(layer.inputs % len(affine[0]) for layer, _ in paths):
        return False
    repeats = [layer.inputs // len(affine[0]) for layer, _ in paths]
    if any(repeat > 1 and not merged for repeat, (_, merged) in zip(repeats, paths, strict=True)):
        return False
    for repeat, (layer, _) in zip(repeats, paths, strict=True):
        scale, shift = (t.repeat_interleave(repeat) for t in affine)
        weight, groups = layer.rows.double(), layer.groups
        # Output channel o of group g reads the input channels of group g.
        per_row = [t.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1) for t in (scale, shift)]
        by_weight = [_expand(t, weight) for t in per_row]
        bias = layer.bias.double() if layer.bias is not None else 0.0
        layer.set(weight * by_weight[0], bias + (weight * by_weight[1]).flatten(1).sum(1))
    node.replace_all_uses_with(source)
    network.graph.erase_node(node)
    return True


def _path_to_layer(
    reader: fx.Node, node: fx.Node, network: fx.GraphModule, shapes: Shapes
) -> tuple[_Layer, bool] | None:
    """Return the layer that reads the channels of axis 1, after moves, and whether others were merged into these."""
    shape, axis, merged = shapes.of(node), 1, False
    while _keeps_channels(reader, network):
        after = shapes.of(reader)
        if shape is None or after is None or len(readers(reader)) != 1:
            return None
        kept = shapes.kept_axis(reader, axis)
        if kept is None and not merged and shapes.merges_from(reader, axis):
            kept, merged = axis, True
        if kept is None:
            return None
        shape, axis, reader = after, kept, readers(reader)[0]
    layer = _layer(reader, network)
    if layer is None or layer.spec.sees_border(layer.module):
        return None
    if shape is not None and axis != (len(shape) - 1 if not layer.spec.dims else 1):
        return None
    return layer, merged


def _keeps_channels(node: fx.Node, network: fx.GraphModule) -> bool:
    """Tell whether a node moves values or averages them, so that a scale and a shift may come after it too."""
    if is_move(node, network):
        return True
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if type(module) in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
            return not any(_several(module.padding)) and getattr(module, "divisor_override", None) is None
        if type(module) is nn.Upsample:
            return module.mode in _INTERPOLATIONS
        return type(module) in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    if node.target is F.interpolate:
        return arguments(node, "input size scale_factor mode", mode="nearest")["mode"] in _INTERPOLATIONS
    if node.target is F.avg_pool2d:
        names = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
        given = arguments(node, names, padding=0, divisor_override=None)
        return not any(_several(given["padding"])) and given["divisor_override"] is None
    if node.op not in ("call_function", "call_method") or node.target not in _AVERAGES:
        return False
    return node.kwargs.keys() <= {"dim", "keepdim"} and 0 < len(node.args) < 4


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _layer(node: fx.Node | None, network: fx.GraphModule) -> _Layer | None:
    """Return the layer that a node calls if a BatchNorm can be folded into it: called nowhere else."""
    if node is None or node.op != "call_module":
        return None
    module = network.get_submodule(str(node.target))
    spec = layer_spec(module)
    calls = Counter(n.target for n in network.graph.nodes if n.op == "call_module")
    return _Layer(module, spec) if spec is not None and calls[node.target] == 1 else None


def _batch_norm_of(
    node: fx.Node, network: fx.GraphModule, rank: int | None, axis: int, beside: LayerSpec
) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift per channel of a BatchNorm, float64, or None.

    Args:
        node: of the BatchNorm.
        network: of the node.
        rank: of its input, None where it is not known: then it is taken to be what the layer beside it has.
        axis: of the layer's channels in its input, counted from the back.
        beside: the kind of the layer.
    """
    norm = network.get_submodule(str(node.target))
    kind = BATCH_NORM_OF_RANK.get(rank) if rank is not None else beside.norm
    if kind is None or type(norm) not in (kind, nn.SyncBatchNorm) or not isinstance(norm, BATCH_NORMS):
        return None
    if norm.training or (rank is not None and rank + axis != 1):
        return None
    if norm.running_var is None or norm.running_mean is None:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _constants_of(node: fx.Node, path: _Path, network: fx.GraphModule) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift of a product or a sum of a layer's output and a constant per channel, or None.

    Args:
        node: of the operation.
        path: from the layer.
        network: of both.
    """
    if len(node.args) != 2 or node.kwargs or node.op not in ("call_function", "call_method"):
        return None
    backwards = node.args[1] is path.end
    other = node.args[0] if backwards else node.args[1]
    weight = network.get_parameter(f"{path.layer.target}.weight")
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        value = torch.tensor(float(other), dtype=torch.float64, device=weight.device)
    else:
        found = constant(other, network)
        if found is None or found.dtype != weight.dtype or found.device != weight.device:
            return None
        value = found.double()
    # Only the channel axis may be longer than one, and the result must have the layer's dimensions.
    shape = (1,) * -path.axis + tuple(value.shape)
    rank = 1 - path.axis if path.rank is None else path.rank
    if value.dim() > rank or value.numel() != shape[path.axis]:
        return None
    value = value.flatten()
    if not bool(value.isfinite().all()):
        return None  # a mask: in a layer's bias it would be a value to quantize and to correct
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if node.target in _MULTIPLY:
        return value, zero
    if node.target in _ADD:
        return one, value
    if node.target in _SUBTRACT:
        return (-one, value) if backwards else (one, -value)
    if node.target in _DIVIDE and not backwards and bool((value != 0).all()):
        return 1.0 / value, zero
    return None


def _expand(scale: Tensor, weight: Tensor) -> Tensor:
    """View [a, b] so that it broadcasts over weights [a, b, ...]."""
    return scale.view(*scale.shape, *(1,) * (weight.dim() - 2))
