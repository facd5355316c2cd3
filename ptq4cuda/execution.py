"""Decides how a quantized network is executed, and makes it so."""

from __future__ import annotations

import copy
import re
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ptq4cuda.graph.lower import lower_layers
from ptq4cuda.inputs import batch_size
from ptq4cuda.metrics import Noise
from ptq4cuda.record import Trial, attach_record, record_of
from ptq4cuda.structure import structure_of
from ptq4cuda.timing import take_turns
from ptq4cuda.walk import Inputs

_SAMPLES = 2  # that the lowered network is tried on
_LEAST_SQNR = 15.0  # dB between the two executions, which agree bit for bit, in half precision to its rounding
_ROUNDS, _LEAST_SECONDS = 3, 0.05  # of timing: networks of less than a millisecond take more than three rounds
_MARGIN = 1.25  # times slower than simulation may integers be before "auto" gives them up; clocks are noisy


def lower(network: nn.Module, model: nn.Module, inputs: Inputs | None = None) -> nn.Module:
    """Return the network as its configuration wants it executed, and note in its record what runs how.

    Args:
        network: as quantized, simulated.
        model: the float model.
        inputs: samples to try the result on. Where it does not compute what the simulated network does, or, with
            execution "auto", takes longer, that one is returned, with the reason in the record. None for a network
            whose record tells how it was executed.

    Raises:
        ValueError: execution is "integer", and no layer can be executed in integers.
    """
    record = record_of(network)
    record.structure = structure_of(network)
    tried = inputs is not None or any(layer.execution == "integer" for layer in record.layers)
    if record.config.execution == "simulate" or not tried:
        return network
    lowered = copy.deepcopy(network)
    reasons = lower_layers(lowered, dtype_of(model))
    quantized = [layer for layer in record.layers if layer.execution != "float"]
    failure = ""
    if len(reasons) == len(quantized):
        failure = next(iter(reasons.values()), "there is no quantized layer")
    elif inputs is not None:
        samples = tree_map_only(torch.Tensor, lambda t: t[:_SAMPLES].clone(), inputs[0])
        failure = _failure(network, lowered, samples)
        if not failure:
            record.trial = _trial(model, network, lowered, samples)
    if failure and record.config.execution == "integer":
        raise ValueError(f"the network cannot be executed in integers: {failure}")
    if not failure and record.trial and record.config.execution == "auto":
        failure = _slower(record.trial)
    if failure:
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


Sample = tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]


@torch.no_grad()
def _failure(network: nn.Module, lowered: nn.Module, samples: Sample) -> str:
    """Return why a lowered network does not compute what the simulated one does, or ""."""
    args, kwargs = samples
    noise = Noise()
    try:
        noise.add(network(*args, **kwargs), lowered(*args, **kwargs))
    except (RuntimeError, ValueError, TypeError) as error:
        return sentence_of(error)
    if noise.sqnr is not None and noise.sqnr < _LEAST_SQNR:
        return f"its output would be {noise.sqnr:.0f} dB from the simulated one"
    return ""


def sentence_of(error: Exception) -> str:
    """Return what an error says, without the place in the sources that a native check begins with."""
    return re.sub(r"^\w+, .*?\.(h|cpp|cu|cuh):\d+, ", "", str(error).strip().split("\n")[0])


@torch.no_grad()
def _trial(model: nn.Module, network: nn.Module, lowered: nn.Module, samples: Sample) -> Trial:
    """Time the float network and both executions of the quantized one."""
    args, kwargs = samples
    executions = {"float": model, "simulate": network, "integer": lowered}
    calls = {name: partial(module, *args, **kwargs) for name, module in executions.items()}
    seconds = take_turns(calls, _ROUNDS, _LEAST_SECONDS)
    return Trial(batch_size(samples), *(min(seconds[name]) for name in executions))


def _slower(trial: Trial) -> str:
    """Return why simulation is the better execution, or ""."""
    if trial.integer_seconds <= _MARGIN * trial.simulate_seconds:
        return ""
    integer, simulate = (f"{1e3 * seconds:.1f} ms" for seconds in (trial.integer_seconds, trial.simulate_seconds))
    return f"slower in integers: {integer}, simulated {simulate}"
