"""What an error of each channel of each tensor costs at the network's output, without gradients.

Squared errors that are independent of each other pass a layer with its squared weights, an activation with the
squared slope that its inputs see on average, a mean over n values divided by n². One walk from the output back adds
it up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ptq4cuda.calibrate.inputs import Inputs, samples_of
from ptq4cuda.calibrate.statistics import positives
from ptq4cuda.graph.bind import Interpreter
from ptq4cuda.graph.layers import activation_of, is_addition, is_concatenation, is_maximum, quantized_spec
from ptq4cuda.graph.readers import readers
from ptq4cuda.nn import LayerSpec, spec_of
from ptq4cuda.ops.checks import FLOATING

# What is positive is counted in as many samples as have so many values.
_SAMPLES, _VALUES = 64, 1 << 23


@dataclass
class _Seen:
    shape: torch.Size
    axis: int  # of the channels
    positive: Tensor  # share of positive values of each channel


class _Probe(Interpreter):
    """Runs the network and remembers of each tensor its shape, channel axis and how many values are positive.

    Attributes:
        sums: by node, for each channel how many values are positive and how many there are, float64 [2, C].
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.shapes: dict[fx.Node, tuple[torch.Size, int]] = {}
        self.sums: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point():
            axis = self._axis(n, value.shape)
            positive = positives(value if value.dtype in FLOATING else value.float(), axis)
            sums = torch.stack([positive, torch.full_like(positive, value.numel() // max(1, len(positive)))])
            shape, axis = self.shapes.setdefault(n, (value.shape, axis))
            total = self.sums.setdefault(n, sums.new_zeros(2, shape[axis]))
            if sums.shape == total.shape:  # not so where batches are of images of several sizes
                total += sums
        return value

    def seen(self) -> dict[fx.Node, _Seen]:
        """Return what was seen in all batches."""
        found = {}
        for node, (shape, axis) in self.shapes.items():
            positive, count = self.sums[node]
            found[node] = _Seen(shape, axis, positive / count.clamp_min(1.0))
        return found

    def _axis(self, n: fx.Node, shape: torch.Size) -> int:
        """Return the channel axis: the last one beside linear layers, which take images as [N, H, W, C]."""
        beside = [spec for node in (n, *n.users) if (spec := self._spec(node)) is not None]
        of_images = [spec for spec in beside if spec.dims and len(shape) == spec.dims + 2]
        if of_images and of_images[0] is self._spec(n):
            return 1
        if any(spec.dims == 0 for spec in beside):
            return len(shape) - 1
        if of_images:
            return 1
        usual = 1 if len(shape) in (2, 4) else len(shape) - 1
        seen = [self.shapes[node] for node in n.all_input_nodes if node in self.shapes]
        if len(shape) == 3 and any(s[:2] == shape[:2] or is_concatenation(n.target) for s, axis in seen if axis == 1):
            return 1  # of a sequence, as poolings and concatenations leave it
        return next((axis for s, axis in seen if s == shape), usual)

    def _spec(self, n: fx.Node) -> LayerSpec | None:
        return spec_of(self.submodules[str(n.target)]) if n.op == "call_module" else None


def output_importance(network: fx.GraphModule, inputs: Inputs) -> dict[fx.Node, Tensor]:
    """Return what a squared error of each channel of each node's value costs at the output, float64 [C].

    Args:
        network: a traced network.
        inputs: calibration data.

    Raises:
        ValueError: a convolution gets a single image without a batch dimension.
    """
    probe = _Probe(network)
    values = samples_of(*inputs.example)[0].numel()
    with torch.no_grad():
        for args, kwargs in inputs.head(max(_SAMPLES, _VALUES // max(1, values))):
            probe.call(args, kwargs)
    seen = probe.seen()
    for node, value in seen.items():
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        spec = None if module is None else spec_of(module)
        if spec is not None and spec.dims and len(value.shape) == spec.dims + 1:
            raise ValueError(f"layer {node.target!r} returns a single image, {list(value.shape)}, and no batch")
    costs: dict[fx.Node, Tensor] = {}
    for node in reversed(network.graph.nodes):
        if node.op == "output":
            for source in node.all_input_nodes:
                if source in seen:
                    _add(costs, source, torch.ones_like(seen[source].positive))
        elif node in costs:
            for source in node.all_input_nodes:
                if source in seen and node in readers(source):
                    _add(costs, source, _back(network, node, source, seen, costs[node]))
    return costs


def _add(costs: dict[fx.Node, Tensor], node: fx.Node, cost: Tensor) -> None:
    costs[node] = costs[node] + cost if node in costs else cost


def _back(
    network: fx.GraphModule, node: fx.Node, source: fx.Node, seen: dict[fx.Node, _Seen], cost: Tensor
) -> Tensor:
    """Return what a node makes a squared error of one of its inputs cost."""
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    shape, axis, positive = seen[source].shape, seen[source].axis, seen[source].positive
    spec = None if module is None else quantized_spec(module)
    if spec is not None:
        cost = spec.input_cost(module, cost)
        return cost if len(cost) == len(positive) else torch.full_like(positive, float(cost.mean()))
    activation = activation_of(node, network)
    if activation is not None and len(cost) == len(positive):
        return cost * (positive + (1.0 - positive) * activation.negative_slope**2)
    outputs = seen[node].shape
    if is_addition(node) and len(shape) == len(outputs) and shape != outputs:  # it is broadcast over the sum
        cost = cost * (_area(outputs, seen[node].axis) / _area(shape, axis))
        return cost if len(cost) == len(positive) else cost.sum().expand_as(positive)
    # Everything else: pooling, moving, adding. A value that several become one of counts for its share.
    if _is_image(shape, axis):
        left = _area(outputs, seen[node].axis) if _is_image(outputs, seen[node].axis) else 1
        area = _area(shape, axis) / left
        flattened = len(outputs) == 2 and len(cost) == math.prod(shape[1:])
        if area > 1 and not flattened:
            cost = cost / (area if is_maximum(node, network) else area**2)
    channels = len(positive)
    if len(cost) == channels:
        return cost
    if len(cost) % channels == 0 and len(outputs) == 2:  # flattened
        return cost.view(channels, -1).mean(1)
    if is_concatenation(node.target):
        return _part_of_concatenation(node, source, seen, cost)
    return torch.full_like(positive, float(cost.mean()))


def _is_image(shape: torch.Size, axis: int) -> bool:
    """Tell whether a tensor has channels first and positions behind: a tensor of rank 3 may be of tokens instead."""
    return len(shape) == 4 or (len(shape) == 3 and axis == 1)


def _area(shape: torch.Size, axis: int) -> int:
    return math.prod(size for d, size in enumerate(shape) if d not in (0, axis))


def _part_of_concatenation(node: fx.Node, source: fx.Node, seen: dict[fx.Node, _Seen], cost: Tensor) -> Tensor:
    first, total = 0, torch.zeros_like(seen[source].positive)
    for operand in node.args[0]:  # type: ignore[union-attr]
        size = len(seen[operand].positive) if operand in seen else 0  # type: ignore[index]
        if operand is source and first + size <= len(cost):
            total = total + cost[first : first + size]
        first += size
    return total
