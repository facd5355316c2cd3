"""Brings a traced graph into the form in which it is walked."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ptq4cuda.graph.fold import fold_batch_norm
from ptq4cuda.graph.layers import is_addition, quantized_spec
from ptq4cuda.graph.residual import mark_residuals


def prepare(network: fx.GraphModule, quantized: Callable[[str], bool], executable: bool) -> int:
    """Fold BatchNorm, compute shortcuts first and, for a network that integers can execute, mark residual operands.

    Args:
        network: a traced network.
        quantized: tells of the name of a layer that can be quantized whether it is.
        executable: whether the scales of activations are folded into the weights.

    Returns:
        The number of BatchNorms folded.
    """
    folded = fold_batch_norm(network)
    shortcuts_first(network)
    if executable:
        mark_residuals(network, quantized)
    return folded


def shortcuts_first(network: fx.GraphModule) -> None:
    """Compute what is added to the output of a layer before the layer, where nothing of it waits for a layer.

    A solver that sees the layer then knows the shortcut of its block, and the error that it carries.
    """
    order = {node: i for i, node in enumerate(network.graph.nodes)}

    def is_layer(node: fx.Node) -> bool:
        return node.op == "call_module" and quantized_spec(network.get_submodule(str(node.target))) is not None

    for addition in list(network.graph.nodes):
        if not is_addition(addition) or len(addition.all_input_nodes) != 2:
            continue
        layer, other = sorted(addition.all_input_nodes, key=order.__getitem__)
        if not is_layer(layer):
            continue
        late: set[fx.Node] = set()
        waiting = [other]
        while waiting:
            node = waiting.pop()
            if node not in late and order[node] >= order[layer]:
                late.add(node)
                waiting += node.all_input_nodes
        if layer in late or any(is_layer(node) or node.op == "output" for node in late):
            continue
        for node in sorted(late, key=order.__getitem__):
            layer.prepend(node)
        order = {node: i for i, node in enumerate(network.graph.nodes)}
    network.graph.lint()
