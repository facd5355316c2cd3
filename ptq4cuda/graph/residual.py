"""Marks the operands of residual sums that travel as 8-bit codes beside the layer that adds them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ptq4cuda.graph.bind import Interpreter
from ptq4cuda.graph.canonical import constant
from ptq4cuda.graph.layers import is_addition, quantized_spec, why_float_call
from ptq4cuda.graph.readers import readers
from ptq4cuda.graph.shapes import Shape, infer_shapes
from ptq4cuda.nn import QuantTensor


def mark_residuals(network: fx.GraphModule, quantized: Callable[[str], bool]) -> None:
    """Put a QuantTensor before every addition to the output of a quantized convolution, on the other operand.

    An integer convolution adds the operand to its sums before they become codes, so it reads 8-bit codes of it. What
    simulates the network does the same.

    Args:
        network: a traced network.
        quantized: tells of the name of a layer whether it is quantized.
    """
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    for addition in list(network.graph.nodes):
        if not is_addition(addition) or len(addition.all_input_nodes) != 2:
            continue
        other, layer = sorted(addition.all_input_nodes, key=order.__getitem__)
        if why_float_call(layer, network) != "" or not quantized(str(layer.target)) or readers(layer) != [addition]:
            continue
        spec = quantized_spec(network.get_submodule(str(layer.target)))
        if spec is None or not spec.adds_codes:
            continue
        name = f"{addition.name}_residual"
        while hasattr(network, name):  # a name of the model's
            name += "_"
        network.add_submodule(name, QuantTensor(spec.axis))
        with network.graph.inserting_after(other):
            marked = network.graph.call_module(name, (other,))
        addition.replace_input_with(other, marked)
    network.graph.lint()
    network.recompile()


@torch.no_grad()
def operands_as_codes(network: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[fx.Node]:
    """Return the marks whose operand can travel as codes: an image for each image that the layer returns.

    What is broadcast over the layer's output (numbers, parameters, pooled tensors) and what holds no floating point
    values is added as it is.

    Args:
        network: as mark_residuals leaves it.
        args: of a calibration batch.
        kwargs: of a calibration batch.
    """
    probe, inferred = _Shapes(network), infer_shapes(network)
    probe.call(args, kwargs)
    found = set()
    for node in network.graph.nodes:
        mark = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(mark, QuantTensor):
            continue
        (addition,) = node.users
        (layer,) = (operand for operand in addition.all_input_nodes if operand is not node)
        shape = probe.shapes.get(node)
        # A constant has a batch of its own, which may be as large as this one by chance, as a pooled image may be.
        (source,) = node.all_input_nodes
        by_chance = constant(source, network) is not None or _is_broadcast(inferred.of(source), inferred.of(layer))
        if not by_chance and shape is not None and len(shape) == 1 - mark.axis and shape == probe.shapes[layer]:
            found.add(node)
    return found


def _is_broadcast(a: Shape | None, b: Shape | None) -> bool:
    """Tell whether of two shapes that are added one has a dimension of 1 where the other may have more."""
    if a is None or b is None:
        return False
    return len(a) != len(b) or any((x == 1) != (y == 1) for x, y in zip(a, b, strict=True))


class _Shapes(Interpreter):
    """Runs a network and remembers the shapes of floating tensors."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point():
            self.shapes[n] = value.shape
        return value
