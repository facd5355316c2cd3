"""Decides how a quantized network is executed, and makes it so."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ptq4cuda.graph.lower import lower_layers
from ptq4cuda.metrics import Noise
from ptq4cuda.record import attach_record, record_of
from ptq4cuda.structure import structure_of
from ptq4cuda.walk import Inputs

_SAMPLES = 2  # that the lowered network is tried on
_LEAST_SQNR = 15.0  # dB between the two executions, which differ by the rounding of ties alone


def lower(network: nn.Module, dtype: torch.dtype, inputs: Inputs | None = None) -> nn.Module:
    """Return the network as its configuration wants it executed, and note in its record what runs how.

    Args:
        network: as quantized, simulated.
        dtype: of the float model.
        inputs: samples to try the result on. Where it cannot compute what the simulated network does, that one is
            returned, with the reason in the record. None for a network whose record tells how it was executed.

    Raises:
        ValueError: execution is "integer", and no layer can be executed in integers.
    """
    record = record_of(network)
    record.structure = structure_of(network)
    tried = inputs is not None or any(layer.execution == "integer" for layer in record.layers)
    if record.config.execution == "simulate" or not tried:
        return network
    lowered = copy.deepcopy(network)
    reasons = lower_layers(lowered, dtype)
    quantized = [layer for layer in record.layers if layer.execution != "float"]
    failure = _failure(network, lowered, inputs) if inputs is not None and len(reasons) < len(quantized) else ""
    if failure or len(reasons) == len(quantized):
        failure = failure or next(iter(reasons.values()), "there is no quantized layer")
        if record.config.execution == "integer":
            raise ValueError(f"the network cannot be executed in integers: {failure}")
        reasons = {layer.name: failure for layer in quantized}
        lowered = network
    for layer in quantized:
        layer.execution = "simulate" if layer.name in reasons else "integer"
        if layer.name in reasons and not layer.reason:
            layer.reason = reasons[layer.name]
    attach_record(lowered, record)
    return lowered


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype that a float model computes in."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@torch.no_grad()
def _failure(network: nn.Module, lowered: nn.Module, inputs: Inputs) -> str:
    """Return why a lowered network does not compute what the simulated one does, or ""."""
    args, kwargs = tree_map_only(torch.Tensor, lambda t: t[:_SAMPLES], inputs[0])
    noise = Noise()
    try:
        noise.add(network(*args, **kwargs), lowered(*args, **kwargs))
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error).strip().split("\n")[0]
    if noise.sqnr is not None and noise.sqnr < _LEAST_SQNR:
        return f"its output would be {noise.sqnr:.0f} dB from the simulated one"
    return ""
