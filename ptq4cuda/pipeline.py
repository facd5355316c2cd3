"""quantize(): from a trained network to a quantized one, as in Banner, Nahshan, Soudry (2019), and past it.

batches -> statistics -> clip and bits -> integer weights -> modules
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ptq4cuda import graph
from ptq4cuda._version import __version__
from ptq4cuda.artifact.checkpoint import Checkpoint
from ptq4cuda.artifact.record import OutputRecord, QuantRecord, attach_record, tensor_bytes
from ptq4cuda.calibrate.allocator import memory_kept
from ptq4cuda.calibrate.by_batches import can_walk_batches, walk_batches
from ptq4cuda.calibrate.by_graph import walk_graph
from ptq4cuda.calibrate.by_modules import walk_modules
from ptq4cuda.calibrate.frontier import Memory
from ptq4cuda.calibrate.inputs import (
    Inputs,
    batch_size,
    check_model,
    check_shapes,
    collect_inputs,
    device_of,
    ordinary,
    samples_of,
    some_samples,
)
from ptq4cuda.calibrate.prepare import prepare
from ptq4cuda.calibrate.signals import LayerCall, Signal, Solution
from ptq4cuda.compat import tree_leaves
from ptq4cuda.config import QuantConfig
from ptq4cuda.containers import call_apart
from ptq4cuda.errors import naming_what_needs_memory
from ptq4cuda.execute.choice import lower
from ptq4cuda.graph.network import Network
from ptq4cuda.metrics import Measure, Noise
from ptq4cuda.processes import ALONE, Processes
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.solve.budget import FEWEST_SAMPLES, SAMPLES, VALUES, Shares, share_out, shares_bits, trial_config
from ptq4cuda.solve.clipping import ClipRule
from ptq4cuda.solve.layer import (
    bits_of,
    by_statistics_alone,
    needs_absdev,
    quantizer_of_operand,
    samples_wanted,
    solve_layer,
)
from ptq4cuda.solve.raising import Overrides, Trial, measure_parts, note_damage, raise_layers
from ptq4cuda.solve.steps import FEWEST_JUDGED, steps_left_out, steps_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    process_group: ProcessGroup | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Quantize a trained network after training, from a few unlabelled batches.

    A layer of up to 2,560 inputs (channels times kernel) is solved as a whole, in memory that is that of their
    square; a wider one in blocks of 1,024 inputs, with no more than 256 MiB of its samples and 1 GiB of its rows at a
    time beside a few copies of its weights, and in time that grows with the number of inputs.

    Args:
        model: a network in evaluation mode; it is not changed. It runs where its parameters are, in their dtype: an
            autocast around the call is off meanwhile.
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
        memory_limit: bytes of host memory that the process may take. Near it, tensors between layers, of all samples
            together, go to files, and batches that come from something else than a list; the files have no names and
            are gone when quantize() ends, however it ends. What Python, torch, the model, the batches of a list and
            the work on one batch take cannot go there: smaller batches take less. Default: no limit for the process,
            3 GiB for these tensors.
        spill_folder: for these files, on a disk. Default: the folder of temporary files, which may be in memory.
        process_group: of torch.distributed, whose processes all call this with the same model and configuration and
            batches of their own. All return the same network: that of one process with the batches of all, those of
            the first process first, bit for bit where the machines compute alike. All call evaluate, and what it
            returns in the first process counts.
        checkpoint: a folder, in which layers are kept as they are solved. Where a call was cut short, the next one
            with the same model, batches and configuration takes them from there, and returns the same network.

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
        OSError: the spill folder or that of the checkpoint has no room left; or, as ConnectionError, another process
            of the group has failed, has ended or did not come for 40 seconds.
    """
    processes = Processes.of(process_group)
    with processes.ending_together():
        model = graph.unwrap(model)
        check_model(model)
        memory = Memory(memory_limit, spill_folder)
        # In half precision, samples would tell what the model does there.
        with graph.buffers_kept(model), torch.autocast(device_of(model).type, enabled=False):
            return _quantize(model, batches, config, evaluate, max_drop, progress, memory, processes, checkpoint)


def _quantize(
    model: nn.Module,
    batches: Iterable[Any],
    config: QuantConfig,
    evaluate: Callable[[nn.Module], float] | None,
    max_drop: float,
    progress: bool,
    memory: Memory,
    processes: Processes,
    checkpoint: str | os.PathLike[str] | None,
) -> nn.Module:
    start = time.perf_counter()
    if graph.is_compiled(model):  # what runs it here would be compiled for nothing
        model = graph.own_copy(model)
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, got {type(config).__name__}")
    inputs = collect_inputs(model, batches, memory, processes)
    known = "" if processes.count == 1 and checkpoint is None else fingerprint(model)
    if processes.count > 1:
        processes.check_same(version=__version__, configuration=config.to_dict(), model=known)
    progress = progress and processes.rank == 0
    with naming_what_needs_memory("in a forward of the model"):
        check_shapes(model, inputs)
    measure = None if evaluate is None else Measure(evaluate, max_drop, model, processes)
    raising = measure is not None or config.target_sqnr is not None or config.size_budget is not None
    # What is fitted to samples is better on them than on others, so that layers are judged on these.
    inputs, judged = inputs.apart() if raising else (inputs, inputs)
    solved = Solved(processes, {} if raising else None)
    if checkpoint is not None:
        led_here = (__version__, config.to_dict(), known, fingerprint_of_batches(inputs))
        solved.checkpoint = Checkpoint(checkpoint, *led_here) if processes.rank == 0 else None
    with naming_what_needs_memory("in a forward of the model"):
        shares = Shares()
        if shares_bits(config) or steps_of(config):
            shares = solved.shares(lambda: shares_of(model, inputs, config, progress))
    config = replace(config, **shares.left_out)  # type: ignore[arg-type]

    def simulated(config: QuantConfig) -> tuple[nn.Module, QuantRecord]:
        network, record = quantize_once(model, inputs, config, "quantize" if progress else "", solved, shares.bits)
        if shares.left_out:
            without = " and ".join(f"{field} {way!r}" for field, way in shares.left_out.items())
            record.left_out = f"quantized with {without}, as samples that were not fitted to say"
        if judged is not inputs:
            note_noise(record, output_noise(model, network, judged))
            record.held_out = judged.samples
        return network, record

    def executed(network: nn.Module, record: QuantRecord) -> Trial:
        attach_record(network, record)
        with naming_what_needs_memory("in a forward in integers"):
            network = lower(network.eval(), model, inputs).eval()
        return Trial(network, record, None if measure is None else measure(network))

    network, record = simulated(config)
    note_damage(record, shares.parts)
    trial = executed(network, record)
    if raising:
        reference, _, _ = prepare(model, inputs, config)
        matching = config.bias_correction != "none"
        parts = processes.from_first(
            measure_parts(reference, network, judged, matching, "measure" if progress else "", processes)
        )
        trial = raise_layers(trial, parts, config, measure, lambda raised: executed(*simulated(raised)))
    if trial.record.few_samples:
        warnings.warn(f"ptq4cuda: {trial.record.few_samples}", stacklevel=3)
    trial.record.seconds = processes.from_first(time.perf_counter() - start)
    if processes.count > 1:
        processes.check_same(result=fingerprint(trial.network))
    return trial.network


@dataclass
class Solved:
    """Solves layers, and remembers them by their name and bits and those of all before, on which their input depends.

    Attributes:
        processes: of which the first one's result counts.
        kept: in memory, where there are several walks.
        checkpoint: of the first process, in files.
    """

    processes: Processes
    kept: dict[tuple[tuple[str, int, int], ...], Solution] | None = None
    checkpoint: Checkpoint | None = None

    def solution(self, key: tuple[tuple[str, int, int], ...], call: LayerCall, config: QuantConfig) -> Solution:
        """Return a solved layer; the caller may change it."""
        if self.kept is not None and key in self.kept:
            return copy.deepcopy(self.kept[key])
        outputs = None
        files = self.checkpoint
        found = self.processes.from_first(
            None if files is None else files.load(key, call, config.fold_activation_scale)
        )
        if found is None:
            own = solve_layer(call, config)
            # Of the samples of this process, and of the module that counts if that is its own.
            outputs = own.outputs if self.processes.count == 1 else None
            found = self.processes.from_first(replace(own, outputs=None))
            if files is not None:
                files.save(key, found)
        if self.kept is not None:
            self.kept[key] = found
            found = copy.deepcopy(found)
        return replace(found, outputs=outputs)

    def shares(self, measure: Callable[[], Shares]) -> Shares:
        """Return the bits that layers share out, which all processes measure unless the checkpoint has them."""
        files = self.checkpoint
        found = self.processes.from_first(None if files is None else files.load_shares())
        if found is None:
            found = self.processes.from_first(measure())
            if files is not None:
                files.save_shares(found)
        return found


def shares_of(model: nn.Module, inputs: Inputs, config: QuantConfig, progress: bool) -> Shares:
    """Return which steps are left out, and the bits of each layer where layers share them, as other samples say.

    Networks are quantized quickly for it, from a few samples, in each process.
    """
    count = inputs.samples
    if count < FEWEST_JUDGED and not shares_bits(config):
        return Shares()
    values = samples_of(*inputs.example)[0].numel()  # the same in all processes
    half = min(SAMPLES, (count + 1) // 2, max(FEWEST_SAMPLES, VALUES // max(1, values)))
    starts = 0, min(half, count - half)
    halves = [ordinary(model, some_samples(model, inputs, first, first + half)) for first in starts]

    tried: list[tuple[QuantConfig, Overrides, int, nn.Module, float]] = []

    def quantized(config: QuantConfig, shares: Overrides, fitted: int = 0) -> tuple[nn.Module, float]:
        """Return a network that is fitted to one half, and its noise on the other."""
        for *way, network, noise in tried:
            if way == [config, shares, fitted]:
                return network, noise
        bar = "trial" if progress else ""
        network = quantize_once(model, halves[fitted], config, bar, Solved(ALONE), shares, measured=False)[0].eval()
        tried.append((config, shares, fitted, network, output_noise(model, network, halves[1 - fitted]).relative))
        return tried[-1][3:]

    quick, left_out = trial_config(config), {}
    if count >= FEWEST_JUDGED:
        left_out = steps_left_out(quick, lambda way, fitted: quantized(way, {}, fitted)[1])
        config, quick = (replace(c, **left_out) for c in (config, quick))  # type: ignore[arg-type]
    if not shares_bits(config):
        return Shares(left_out=left_out)
    network, noise = quantized(quick, {})
    reference, _, _ = prepare(model, halves[0], quick)
    matching = config.bias_correction != "none"
    parts = measure_parts(reference, network, halves[0], matching, "measure" if progress else "", inputs.processes)
    bits = share_out(parts, config)
    alike = all(number == getattr(config, kind) for own in bits.values() for kind, number in own.items())
    if alike or noise <= quantized(quick, bits)[1]:
        bits = {}
    return Shares(bits, parts, left_out)


def quantize_once(
    model: nn.Module,
    inputs: Inputs,
    config: QuantConfig,
    progress: str,
    solved: Solved,
    shares: Overrides,
    measured: bool = True,
) -> tuple[nn.Module, QuantRecord]:
    """Walk the network once and quantize every layer on the way.

    Args:
        model: the float model.
        inputs: calibration data.
        config: how to quantize.
        progress: what its bar is called, "" for none.
        solved: by earlier walks, and by this one: layers before the first of other bits are not solved again.
        shares: the bits of layers that share out those of the network.
        measured: whether layers are measured, for a report.
    """
    record = QuantRecord(config, images=inputs.samples, float_bytes=tensor_bytes(model))

    before: list[tuple[str, int, int]] = []
    wanted: dict[str, int] = {}

    def solve(call: LayerCall) -> Solution:
        call.share = shares.get(call.name, {})
        wanted[call.name] = samples_wanted(call, config, record.images)
        before.append((call.name, *bits_of(call, config)))
        return solved.solution(tuple(before), call, config)

    def operand(signal: Signal) -> QuantParams:
        return inputs.processes.from_first(quantizer_of_operand(signal, config))

    def kept(name: str) -> str:
        return "" if config.quantizes(name) else "kept in float by overrides"

    with naming_what_needs_memory("in a forward of the model"):
        network, record.folded, record.reason = prepare(model, inputs, config)
    layers = [name for name, module in network.named_modules() if graph.quantized_spec(module)]
    for pattern in config.overrides:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"overrides: no layer is called {pattern!r}; the layers are {', '.join(layers)}")
    keep_before = ClipRule.named(config.clipping).looks_before
    if not record.reason:
        assert isinstance(network, Network)
        record.constants = dict(network.constants)
        if by_statistics_alone(config) and can_walk_batches(network, inputs):
            whole = config.activation_granularity == "per_tensor"
            result = walk_batches(network, inputs, solve, kept, progress, keep_before, needs_absdev(config), whole)
        else:
            result = walk_graph(network, inputs, solve, operand, kept, progress, keep_before, measured)
    else:
        record.walked_by = "modules"
        result = walk_modules(network, inputs, solve, kept, progress, keep_before, measured)
    record.layers = result.layers
    most = max(wanted, key=wanted.__getitem__, default="")
    if most and wanted[most]:
        few = [name for name in wanted if wanted[name]]
        others = f" and {len(few) - 1} other layers" if len(few) > 1 else ""
        record.few_samples = (
            f"{record.images} calibration samples are few for {most!r}{others}, with more inputs than the samples "
            f"have positions: such a fit follows the samples; {wanted[most]:,} would be enough"
        )
    used = inputs.processes.gather([(result.frontier_bytes, result.spilled_bytes)])
    record.frontier_bytes, record.spilled_bytes = map(max, zip(*used, strict=True))
    # What was clipped for the fit is in the data all the same.
    noise = output_noise(model, network, inputs) if result.clipped and measured else result.noise
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
    return noise.merged(inputs.processes)


def fingerprint(model: nn.Module) -> str:
    """Return what differs for two networks that are not the same."""
    # Layers that read one tensor may share its quantizer, or have a copy each, as in processes that are told of it.
    parts = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return _digest(str(model), itertools.chain(*parts))


def fingerprint_of_batches(inputs: Inputs) -> str:
    """Return what differs for two sets of batches that are not the same."""
    digests = [_digest("", ((str(leaf), leaf) for leaf in tree_leaves(batch))) for batch in inputs]
    return " ".join(inputs.processes.gather(digests))


def _digest(text: str, named: Iterable[tuple[str, Any]]) -> str:
    found = hashlib.sha256(text.encode())
    for name, value in named:
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            found.update(name.encode())
    return found.hexdigest()
