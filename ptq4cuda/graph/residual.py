"""Marks the operands of residual sums that travel as 8-bit codes beside the layer that adds them up."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ptq4cuda.graph.layers import is_addition, layer_kind, why_float_call
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
        if why_float_call(layer, network) != "" or not quantized(str(layer.target)) or len(layer.users) != 1:
            continue
        if layer_kind(network.get_submodule(str(layer.target))) != "Conv2d":
            continue
        name = f"{addition.name}_residual"
        network.add_submodule(name, QuantTensor())
        with network.graph.inserting_after(other):
            marked = network.graph.call_module(name, (other,))
        addition.replace_input_with(other, marked)
    network.graph.lint()
    network.recompile()
