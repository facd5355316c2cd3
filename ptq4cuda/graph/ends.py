"""Which layers are the first and the last ones of a network: those keep more bits.

A first layer reads an image: an input of the model, or what steps that are no layers to quantize made of it alone. A
concatenation keeps an image for an image also beside other tensors; a sum with something else does not. A last layer
is one behind which no other lies: each head has its own. Layers that nobody trained, as an expectation over bins
or a blur with fixed weights, do not count: what is before a fixed one at the end is a last layer, too, and so is what
is behind one at the beginning a first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ptq4cuda.graph.layers import is_concatenation
from ptq4cuda.graph.readers import is_number

_LARGEST_RATIO = 4096.0  # of two fixed weights


@dataclass(eq=False)
class Step:
    """A call that computes a tensor.

    Attributes:
        operands: the steps that made the tensors that it computes with; none for inputs of the model and constants.
        layer: what identifies the layer, where it is one to quantize.
        is_input: of the model.
        joins: it puts tensors side by side.
    """

    operands: Sequence[Step] = ()
    layer: Hashable | None = None
    is_input: bool = False
    joins: bool = False


def is_lookup(function: object) -> bool:
    """Tell whether a function takes vectors from a table, which are no part of an image."""
    return function in (F.embedding, torch.embedding)


def find_ends(steps: Iterable[Step], fixed: Iterable[Hashable] = ()) -> set[Hashable]:
    """Return the layers that are first or last ones.

    Args:
        steps: in order of execution.
        fixed: layers that do not count, unless all are.
    """
    steps = list(steps)
    passed = set(fixed)
    if passed.issuperset(step.layer for step in steps if step.layer is not None):
        passed = set()
    computed: set[Step] = set()  # from an input
    image: set[Step] = set()
    ends: set[Hashable] = set()
    for step in steps:
        operands = [operand for operand in step.operands if operand in computed]
        if step.is_input or operands:
            computed.add(step)
        found = (any if step.joins else all)(operand in image for operand in operands)
        if step.is_input or (operands and found):
            if step.layer is not None:
                ends.add(step.layer)
            if step.layer is None or step.layer in passed:
                image.add(step)
    followed: set[Step] = set()  # by a layer that counts
    for step in reversed(steps):
        counts = step.layer is not None and step.layer not in passed
        if step.layer is not None and step not in followed:
            ends.add(step.layer)
        if counts or step in followed:
            followed.update(step.operands)
    return ends


def ends_of(network: fx.GraphModule, layers: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the first and the last ones among the layers of a graph.

    Args:
        network: a traced network.
        layers: the nodes of its layers to quantize.
    """
    layers = set(layers)

    def called(node: fx.Node) -> nn.Module | None:
        return network.get_submodule(str(node.target)) if node.op == "call_module" else None

    steps: dict[fx.Node, Step] = {}
    for node in network.graph.nodes:
        if not is_number(node):
            looked_up = is_lookup(node.target) or isinstance(called(node), nn.Embedding)
            steps[node] = Step(
                [] if looked_up else [steps[operand] for operand in node.all_input_nodes if operand in steps],
                layer=node if node in layers else None,
                is_input=node.op == "placeholder",
                joins=is_concatenation(node.target),
            )
    fixed = [node for node in layers if is_fixed(network.get_submodule(str(node.target)))]
    return find_ends(steps.values(), fixed)  # type: ignore[return-value]


def is_fixed(layer: nn.Module) -> bool:
    """Tell whether nobody trained a layer's weights: whole multiples of the least of them, or all filters equal."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().double()
    sizes = weight[weight != 0].abs()
    if weight.numel() < 2 or not sizes.numel():
        return False
    ratios = sizes / sizes.min()
    whole = bool((ratios <= _LARGEST_RATIO).all()) and bool(((ratios - ratios.round()).abs() <= 1e-5 * ratios).all())
    return whole or (len(weight) > 1 and weight[0].numel() > 1 and bool((weight == weight[:1]).all()))
