"""quantize(): from a trained network to a quantized one, as in Banner, Nahshan, Soudry (2019), and past it.

batches -> statistics -> clip and bits -> integer weights -> modules
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ptq4cuda import graph
from ptq4cuda.artifact.record import OutputRecord, QuantRecord, attach_record, tensor_bytes
from ptq4cuda.calibrate.allocator import memory_kept
from ptq4cuda.calibrate.by_graph import walk_graph
from ptq4cuda.calibrate.by_modules import walk_modules
from ptq4cuda.calibrate.frontier import Memory
from ptq4cuda.calibrate.inputs import (
    Inputs,
    apart,
    batch_size,
    check_model,
    check_shapes,
    collect_inputs,
    some_samples,
)
from ptq4cuda.calibrate.prepare import prepare
from ptq4cuda.calibrate.signals import LayerCall, Signal, Solution
from ptq4cuda.config import QuantConfig
from ptq4cuda.containers import call_apart
from ptq4cuda.errors import naming_what_needs_memory
from ptq4cuda.execute.choice import lower
from ptq4cuda.graph.network import Network
from ptq4cuda.metrics import Measure, Noise
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.solve.budget import MOST_BITS, SAMPLES, WORTH, share_out, trial_config
from ptq4cuda.solve.layer import bits_of, quantizer_of_operand, samples_wanted, solve_layer
from ptq4cuda.solve.raising import Overrides, Trial, measure_parts, raise_layers

DEFAULT_CONFIG = QuantConfig()


@memory_kept()
def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    config: QuantConfig = DEFAULT_CONFIG,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    max_drop: float = 0.5,
    progress: bool = True,
    memory_limit: int | None = None,
    spill_folder: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Quantize a trained network after training, from a few unlabelled batches.

    A layer of up to 2,560 inputs (channels times kernel) is solved as a whole, in memory that is that of their
    square; a wider one in blocks of 1,024 inputs, with no more than 256 MiB of its samples and 1 GiB of its rows at a
    time beside a few copies of its weights, and in time that grows with the number of inputs.

    Args:
        model: a network in evaluation mode; it is not changed. It runs where its parameters are.
        batches: calibration data, an iterable of tensors [N, ...], of tuples or lists whose first item is one
            (targets are ignored), or of dicts whose keys are arguments of the model's forward: tensors, numbers,
            strings, None, and containers of these. Of tensors the first with the most dimensions has the samples.
        config: how to quantize.
        evaluate: your own measure of a network, higher is better. It is called with the model, then with quantized
            networks, all in evaluation mode, and decides: weights and inputs of layers are raised to 6 and 8 bits,
            those that hurt most for their cost first, until it is no more than `max_drop` below what it is of the
            model. It is called at most 4 + 2 ceil(log2(marks)) times, where marks are decibels of noise between the
            configured bits and 8 bits everywhere, 24 from 4 bits on. Where nothing reaches the limit, the best
            network that was found is returned with a warning, and the report says so.
        max_drop: in units of what evaluate returns.
        progress: show a progress bar when it takes longer than a moment.
        memory_limit: bytes of host memory that tensors between layers may take, of all samples together; beyond it
            they go to files, which have no names and are gone when quantize() ends, however it ends. Default: 8 GiB.
            Beside them there are the batches, the model and its copies, and a few times what a layer makes of one
            batch: smaller batches take less.
        spill_folder: for these files, on a disk. Default: the folder of temporary files, which may be in memory.

    Returns:
        A new module in evaluation mode that is called like the model; report(network) tells what was done. A model
        that torch.fx can trace becomes a torch.fx.GraphModule with its BatchNorms folded, which has the model's
        attributes and methods where these need no float layers; another a copy with its layers replaced.

    Raises:
        TypeError: model, batches or config are of the wrong kind, or evaluate returns no number.
        ValueError: the model is in training mode, has no convolution to quantize, or its weights have NaN or Inf, no
            values, or another dtype than float32, float16 and bfloat16; overrides name no layer; the batches are
            empty, single images or contain NaN or Inf, or a layer's input does; the model fails on one of them, or
            evaluate does on a network.
        MemoryError: memory does not suffice; the message says where.
        OSError: the spill folder has no room left.
    """
    start = time.perf_counter()
    model = graph.unwrap(model)
    check_model(model)
    if graph.is_compiled(model):  # what runs it here would be compiled for nothing
        model = graph.own_copy(model)
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, got {type(config).__name__}")
    memory = Memory(memory_limit, spill_folder)
    inputs = collect_inputs(model, batches)
    with naming_what_needs_memory("in a forward of the model"):
        check_shapes(model, inputs)
    measure = None if evaluate is None else Measure(evaluate, max_drop, model)
    raising = measure is not None or config.target_sqnr is not None or config.size_budget is not None
    # What is fitted to samples is better on them than on others, so that layers are judged on these.
    inputs, judged = apart(inputs) if raising else (inputs, inputs)
    solved: Solved | None = {} if raising else None
    with naming_what_needs_memory("in a forward of the model"):
        shares = shares_of(model, inputs, config, memory)

    def simulated(config: QuantConfig) -> tuple[nn.Module, QuantRecord]:
        network, record = quantize_once(model, inputs, config, progress, memory, solved, shares)
        if judged is not inputs:
            note_noise(record, output_noise(model, network, judged))
            record.held_out = sum(map(batch_size, judged))
        return network, record

    def executed(network: nn.Module, record: QuantRecord) -> Trial:
        attach_record(network, record)
        with naming_what_needs_memory("in a forward in integers"):
            network = lower(network.eval(), model, inputs).eval()
        return Trial(network, record, None if measure is None else measure(network))

    network, record = simulated(config)
    trial = executed(network, record)
    if raising:
        reference, _, _ = prepare(model, inputs, config)
        parts = measure_parts(reference, network, judged, match_means=config.bias_correction != "none")
        trial = raise_layers(trial, parts, config, measure, lambda raised: executed(*simulated(raised)))
    if trial.record.few_samples:
        warnings.warn(f"ptq4cuda: {trial.record.few_samples}", stacklevel=2)
    trial.record.seconds = time.perf_counter() - start
    return trial.network


# Layers that were solved: by their name and bits, and those of all before them, on which their input depends.
Solved = dict[tuple[tuple[str, int, int], ...], Solution]


def shares_of(model: nn.Module, inputs: Inputs, config: QuantConfig, memory: Memory) -> Overrides:
    """Return the bits of each layer, where layers share out those of the network and other samples say that it helps.

    Where bits are needed is told by a network that is quantized quickly, from a few samples.
    """
    quick = trial_config(config)
    if quick is None:
        return {}
    count = sum(map(batch_size, inputs))
    half = min(SAMPLES, (count + 1) // 2)
    some, others = (some_samples(model, inputs, first, first + half) for first in (0, min(half, count - half)))

    def quantized(shares: Overrides) -> nn.Module:
        return quantize_once(model, some, quick, False, memory, None, shares)[0].eval()

    network = quantized({})
    reference, _, _ = prepare(model, some, quick)
    parts = measure_parts(reference, network, some, config.bias_correction != "none", MOST_BITS)
    shares = share_out(parts, config)
    if all(bits == getattr(config, kind) for own in shares.values() for kind, bits in own.items()):
        return {}
    alike, shared = (output_noise(model, n, others).relative for n in (network, quantized(shares)))
    return shares if shared < WORTH * alike else {}


def quantize_once(
    model: nn.Module,
    inputs: Inputs,
    config: QuantConfig,
    progress: bool,
    memory: Memory,
    solved: Solved | None,
    shares: Overrides,
) -> tuple[nn.Module, QuantRecord]:
    """Walk the network once and quantize every layer on the way.

    Args:
        model: the float model.
        inputs: calibration data.
        config: how to quantize.
        progress: whether to show it.
        memory: for tensors between layers.
        solved: by earlier walks, and by this one: layers before the first of other bits are not solved again.
        shares: the bits of layers that share out those of the network.
    """
    record = QuantRecord(config, images=sum(map(batch_size, inputs)), float_bytes=tensor_bytes(model))

    before: list[tuple[str, int, int]] = []
    wanted: dict[str, int] = {}

    def solve(call: LayerCall) -> Solution:
        call.share = shares.get(call.name, {})
        wanted[call.name] = samples_wanted(call, config, record.images)
        if solved is None:
            return solve_layer(call, config)
        before.append((call.name, *bits_of(call, config)))
        key = tuple(before)
        if key not in solved:
            solved[key] = solve_layer(call, config)
        return copy.deepcopy(solved[key])  # the walk may give the layer's hooks to its module

    def operand(signal: Signal) -> QuantParams:
        return quantizer_of_operand(signal, config)

    def kept(name: str) -> str:
        return "" if config.quantizes(name) else "kept in float by overrides"

    with naming_what_needs_memory("in a forward of the model"):
        network, record.folded, record.reason = prepare(model, inputs, config)
    layers = [name for name, module in network.named_modules() if graph.quantized_spec(module)]
    for pattern in config.overrides:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"overrides: no layer is called {pattern!r}; the layers are {', '.join(layers)}")
    if not record.reason:
        assert isinstance(network, Network)
        record.constants = dict(network.constants)
        result = walk_graph(network, inputs, solve, operand, kept, progress, memory)
    else:
        record.walked_by = "modules"
        result = walk_modules(network, inputs, solve, kept, progress, memory)
    record.layers = result.layers
    most = max(wanted, key=wanted.__getitem__, default="")
    if most and wanted[most]:
        few = [name for name in wanted if wanted[name]]
        others = f" and {len(few) - 1} other layers" if len(few) > 1 else ""
        record.few_samples = (
            f"{record.images} calibration samples are few for {most!r}{others}, with more inputs than the samples "
            f"have positions: such a fit follows the samples; {wanted[most]:,} would be enough"
        )
    record.frontier_bytes, record.spilled_bytes = result.frontier_bytes, result.spilled_bytes
    # What was clipped for the fit is in the data all the same.
    noise = output_noise(model, network, inputs) if result.clipped else result.noise
    note_noise(record, noise)
    record.bytes = tensor_bytes(network)
    return network, record


def note_noise(record: QuantRecord, noise: Noise) -> None:
    """Note how close a network's outputs are."""
    record.sqnr, record.median_sqnr, record.worst_sqnr = noise.sqnr, noise.median_sqnr, noise.worst_sqnr
    record.least_sqnr = noise.least_sqnr
    if len(noise.outputs) > 1:
        record.outputs = [OutputRecord(name, *found) for name, found in noise.outputs.items()]


@torch.no_grad()
def output_noise(model: nn.Module, network: nn.Module, inputs: Inputs) -> Noise:
    """Return the noise of a network's output on the calibration data."""
    noise = Noise()
    for batch in inputs:
        noise.add(call_apart(model, *batch), call_apart(network, *batch), batch_size(batch))
    return noise
