"""A copy of the model to quantize: traced and folded where torch.fx can do that."""

from __future__ import annotations

from torch import Tensor, nn

from ptq4cuda import graph
from ptq4cuda.calibrate.inputs import Inputs, constant_arguments
from ptq4cuda.compat import tree_map_only
from ptq4cuda.config import QuantConfig
from ptq4cuda.nn import spec_of


def prepare(model: nn.Module, inputs: Inputs, config: QuantConfig) -> tuple[nn.Module, int, str]:
    """Return a copy of the model to quantize: traced and folded where torch.fx can do that.

    Returns:
        The copy, the number of BatchNorms folded and, where it is not traced, why not.
    """
    constants = constant_arguments(model, inputs)
    traced, reason = graph.trace(model, [{}, constants])
    network = traced or graph.own_copy(model)
    check_has_convolution(network, type(model).__name__)
    if traced is not None:
        reason = graph.why_different(model, traced, *inputs.example)
        if reason and constants and not traced.constants:  # code that asks whether an argument is None, for example
            other, _ = graph.trace(model, [constants])
            if other is not None and not graph.why_different(model, other, *inputs.example):
                traced, reason = other, ""
        if not reason:
            return traced, graph.prepare(traced, config.quantizes, config.fold_activation_scale), ""
        network = graph.own_copy(model)
        check_has_convolution(network, type(model).__name__)
    else:
        graph.output_of(model, *inputs.example)  # which the comparison with a graph looks at otherwise
    if any(graph.why_left(module) or graph.hooks_of(module) for module in network.modules()):
        check_copy(model, network, inputs)
    return network, 0, reason


def check_has_convolution(network: nn.Module, model_name: str) -> None:
    """Raise ValueError where no convolution is left to quantize, and say why the first one is not."""
    if any((spec := graph.quantized_spec(module)) is not None and spec.dims for module in network.modules()):
        return
    convolutions = [
        (name, m) for name, m in network.named_modules() if (spec := spec_of(m)) is not None and spec.dims
    ]
    left = [f": {name!r} stays, {why}" for name, m in convolutions if (why := graph.why_float(m))]
    raise ValueError(f"the model has no convolution to quantize ({model_name}){''.join(left[:1])}")


def check_copy(model: nn.Module, network: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError if a copy of a model with hooks or replaced methods still reads what these do to the model.

    The samples are not those that the model may have seen last.
    """

    def other(x: Tensor) -> Tensor:
        x = x.flip(0) if x.dim() else x
        return x * 0.5 if x.is_floating_point() else x

    args, kwargs = tree_map_only(Tensor, other, inputs.example)
    different = graph.why_different(model, network, args, kwargs, "a copy of it")
    if different:
        raise ValueError(
            f"the model has hooks or replaced methods that work on this very object: {different}; let them reach the "
            "model's parts through their arguments"
        )
