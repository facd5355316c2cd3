"""Folds BatchNorm into the layer before it."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ptq4cuda.graph.layers import call_counts

_FOLDS: dict[type[nn.Module], tuple[type[nn.Module], Callable[..., nn.Module]]] = {
    nn.Conv2d: (nn.BatchNorm2d, fuse_conv_bn_eval),
    nn.Linear: (nn.BatchNorm1d, fuse_linear_bn_eval),
}


def fold_batch_norm(network: fx.GraphModule) -> int:
    """Fold every BatchNorm that alone reads the output of a convolution or linear layer.

    Both must be called once in the graph, and the BatchNorm must use running statistics.

    Returns:
        The number of BatchNorms folded.
    """
    calls = call_counts(network)
    folded = 0
    for node in list(network.graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        layer_name, norm_name = str(source.target), str(node.target)
        layer, norm = network.get_submodule(layer_name), network.get_submodule(norm_name)
        if type(layer) not in _FOLDS or calls[layer_name] != 1 or calls[norm_name] != 1:
            continue
        norm_type, fuse = _FOLDS[type(layer)]
        if type(norm) is not norm_type or norm.running_var is None:
            continue
        network.set_submodule(layer_name, fuse(layer, norm))
        node.replace_all_uses_with(source)
        network.graph.erase_node(node)
        network.delete_submodule(norm_name)
        folded += 1
    network.graph.lint()
    network.recompile()
    return folded
