"""Decides how a quantized network is executed, and makes it so: by what the network is, never by a clock."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ptq4cuda import graph
from ptq4cuda.artifact.record import attach_record, record_of
from ptq4cuda.artifact.structure import structure_of
from ptq4cuda.calibrate.inputs import Batch, Inputs
from ptq4cuda.containers import call_apart
from ptq4cuda.execute.lowering import lower_layers, note_execution
from ptq4cuda.metrics import Noise

_LEAST_SQNR = 15.0  # dB between the two executions, which agree bit for bit, in half precision to its rounding


def lower(network: nn.Module, model: nn.Module, inputs: Inputs | None = None) -> nn.Module:
    """Return the network as its configuration wants it executed, and note in its record what runs how.

    With execution "auto" a layer computes in integers if lower_layers can lower it: the choice follows from the
    network and is the same in every run.

    Args:
        network: as quantized, simulated.
        model: the float model.
        inputs: calibration batches; the first is computed both ways. Where the results differ, the simulated network
            is returned, with the reason in the record. None for a network whose record tells how it was executed.

    Raises:
        ValueError: execution is "integer", and no layer can be executed in integers.
    """
    record = record_of(network)
    record.structure = structure_of(network)
    tried = inputs is not None or any(layer.execution == "integer" for layer in record.layers)
    if record.config.execution == "simulate" or not tried:
        return network
    lowered = graph.copy_model(network)
    attach_record(lowered, record)
    quantized = [layer.name for layer in record.layers if layer.execution != "float"]
    reasons = lower_layers(lowered, dtype_of(model), by_graph=record.walked_by == "graph")
    failure = ""
    if len(reasons) == len(quantized):
        failure = next(iter(reasons.values()), "there is no quantized layer")
    elif inputs is not None:
        failure = _difference(network, lowered, inputs.example)
    if failure and record.config.execution == "integer":
        raise ValueError(f"the network cannot be executed in integers: {failure}")
    if failure:
        note_execution(record, dict.fromkeys(quantized, failure))
    return network if failure else lowered


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype that a float model computes in."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@torch.no_grad()
def _difference(network: nn.Module, lowered: nn.Module, batch: Batch) -> str:
    """Say so if a lowered network does not compute what the simulated one does; "" where it does."""
    noise = Noise()
    noise.add(_output(network, batch), _output(lowered, batch))
    if noise.sqnr is not None and noise.sqnr < _LEAST_SQNR:
        return f"its output would be {noise.sqnr:.0f} dB from the simulated one"
    return ""


def _output(network: nn.Module, batch: Batch) -> Any:
    """Call a network, always with the same random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return call_apart(network, *batch)
