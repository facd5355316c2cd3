"""quantize(): from a trained network to a quantized one, as in Banner, Nahshan, Soudry (2019), and past it.

batches -> statistics -> clip and bits -> integer weights -> modules
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ptq4cuda import graph
from ptq4cuda.activation import TensorProfile, fit_activation, needs_histogram
from ptq4cuda.bit_allocation import allocate_bits
from ptq4cuda.clipping import ClipRule
from ptq4cuda.config import QuantConfig
from ptq4cuda.correction import correct_bias
from ptq4cuda.execution import lower
from ptq4cuda.frontier import Memory, first_line, is_out_of_memory, naming_what_needs_memory
from ptq4cuda.graph.network import Network
from ptq4cuda.inputs import Batch, Inputs, batch_size, check_model, collect_inputs, constant_arguments
from ptq4cuda.least_squares import Target, fit_blocks, fit_weights
from ptq4cuda.metrics import Noise
from ptq4cuda.moments import Moments, Samples, layer_moments
from ptq4cuda.nn import QuantModule, quant_module_for
from ptq4cuda.quantizer import QuantizedWeight, QuantParams
from ptq4cuda.record import QuantRecord, Trade, attach_record, tensor_bytes
from ptq4cuda.rounding import round_for_output, round_to_nearest
from ptq4cuda.sensitivity import layer_damage, mean_bits, next_step
from ptq4cuda.walk import LayerCall, Solution, walk_graph, walk_modules

DEFAULT_CONFIG = QuantConfig()


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    config: QuantConfig = DEFAULT_CONFIG,
    *,
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
        progress: show a progress bar when it takes longer than a moment.
        memory_limit: bytes of host memory that tensors between layers may take, of all samples together; beyond it
            they go to files, which have no names and are gone when quantize() ends, however it ends. Default: 8 GiB.
        spill_folder: for these files. Default: the folder of temporary files.

    Returns:
        A new module in evaluation mode that is called like the model; report(network) tells what was done. A model
        that torch.fx can trace becomes a torch.fx.GraphModule with its BatchNorms folded, which has the model's
        attributes and methods where these need no float layers; another a copy with its layers replaced.

    Raises:
        TypeError: model, batches or config are of the wrong kind.
        ValueError: the model is in training mode, has no convolution to quantize, or its weights have NaN or Inf, no
            values, or another dtype than float32, float16 and bfloat16; overrides name no layer; the batches are
            empty, single images or contain NaN or Inf, or a layer's input does; the model fails on one of them.
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
    network, record = quantize_once(model, inputs, config, progress, memory)
    if config.target_sqnr is not None or config.size_budget is not None:
        network, record = raise_layers(model, inputs, config, progress, memory, network, record)
    attach_record(network, record)
    with naming_what_needs_memory("in a forward in integers"):
        network = lower(network.eval(), model, inputs).eval()
    record.seconds = time.perf_counter() - start
    return network


@torch.no_grad()
def check_shapes(model: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError where the model fails on a batch of other shapes or dtypes than the first."""
    first = _shapes(inputs[0])
    seen = {first}
    for index, batch in enumerate(inputs):
        shapes = _shapes(batch)
        if shapes in seen:
            continue
        seen.add(shapes)
        args, kwargs = tree_map_only(Tensor, torch.clone, batch)  # the model may write into them
        try:
            model(*args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"the model fails on calibration batch {index}, whose samples are {', '.join(shapes)}, those of "
                f"batch 0 {', '.join(first)} ({first_line(error)})"
            ) from error


def _shapes(batch: Batch) -> tuple[str, ...]:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return tuple(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape[1:])}" for t in tensors)


def quantize_once(
    model: nn.Module, inputs: Inputs, config: QuantConfig, progress: bool, memory: Memory
) -> tuple[nn.Module, QuantRecord]:
    """Walk the network once and quantize every layer on the way."""
    record = QuantRecord(config, images=sum(map(batch_size, inputs)), float_bytes=tensor_bytes(model))

    def solve(call: LayerCall) -> Solution:
        return solve_layer(call, config)

    def kept(name: str) -> str:
        return "" if config.quantizes(name) else "kept in float by overrides"

    with naming_what_needs_memory("in a forward of the model"):
        network, record.folded, record.reason = prepare(model, inputs, config)
    layers = [name for name, module in network.named_modules() if graph.layer_kind(module)]
    for pattern in config.overrides:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"overrides: no layer is called {pattern!r}; the layers are {', '.join(layers)}")
    if not record.reason:
        assert isinstance(network, Network)
        record.constants = dict(network.constants)
        result = walk_graph(network, inputs, solve, kept, progress, memory)
    else:
        record.walked_by = "modules"
        result = walk_modules(network, inputs, solve, kept, progress, memory)
        try_once(network, inputs)
    record.layers = result.layers
    record.frontier_bytes, record.spilled_bytes = result.frontier_bytes, result.spilled_bytes
    # What was clipped for the fit is in the data all the same.
    noise = output_noise(model, network, inputs) if result.clipped else result.noise
    record.sqnr, record.median_sqnr, record.worst_sqnr = noise.sqnr, noise.median_sqnr, noise.worst_sqnr
    record.bytes = tensor_bytes(network)
    return network, record


@torch.no_grad()
def try_once(network: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError where a model's own code needs the float layers that were replaced."""
    args, kwargs = tree_map_only(Tensor, torch.clone, inputs[0])  # the model may write into them
    try:
        network(*args, **kwargs)
    except (AttributeError, StopIteration) as error:  # or iterates over parameters, of which there are none
        raise ValueError(
            f"the model's own code reads what a quantized layer does not have ({error}): leave that layer in float "
            "by overrides"
        ) from error


@torch.no_grad()
def output_noise(model: nn.Module, network: nn.Module, inputs: Inputs) -> Noise:
    """Return the noise of a network's output on the calibration data."""
    noise = Noise()
    for batch in inputs:
        outputs = []
        for called in (model, network):
            args, kwargs = tree_map_only(Tensor, torch.clone, batch)  # the model may write into them
            outputs.append(called(*args, **kwargs))
        noise.add(outputs[0], outputs[1], batch_size(batch))
    return noise


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
        reason = graph.why_different(model, traced, *inputs[0])
        if reason and constants and not traced.constants:  # code that asks whether an argument is None, for example
            other, _ = graph.trace(model, [constants])
            if other is not None and not graph.why_different(model, other, *inputs[0]):
                traced, reason = other, ""
        if not reason:
            return traced, graph.prepare(traced, config.quantizes, config.fold_activation_scale), ""
        network = graph.own_copy(model)
        check_has_convolution(network, type(model).__name__)
    else:
        graph.output_of(model, *inputs[0])  # which the comparison with a graph looks at otherwise
    if any(graph.why_left(module) or graph.hooks_of(module) for module in network.modules()):
        check_copy(model, network, inputs)
    return network, 0, reason


def check_has_convolution(network: nn.Module, model_name: str) -> None:
    """Raise ValueError where no convolution is left to quantize, and say why the first one is not."""
    if any(graph.layer_kind(module) == "Conv2d" for module in network.modules()):
        return
    left = [f": {name!r} stays, {why}" for name, m in network.named_modules() if (why := graph.why_left(m))]
    raise ValueError(f"the model has no nn.Conv2d to quantize ({model_name}){''.join(left[:1])}")


def check_copy(model: nn.Module, network: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError if a copy of a model with hooks or replaced methods still reads what these do to the model.

    The samples are not those that the model may have seen last.
    """

    def other(x: Tensor) -> Tensor:
        x = x.flip(0) if x.dim() else x
        return x * 0.5 if x.is_floating_point() else x

    args, kwargs = tree_map_only(Tensor, other, inputs[0])
    different = graph.why_different(model, network, args, kwargs, "a copy of it")
    if different:
        raise ValueError(
            f"the model has hooks or replaced methods that work on this very object: {different}; let them reach the "
            "model's parts through their arguments"
        )


def raise_layers(
    model: nn.Module,
    inputs: Inputs,
    config: QuantConfig,
    progress: bool,
    memory: Memory,
    network: nn.Module,
    record: QuantRecord,
) -> tuple[nn.Module, QuantRecord]:
    """Raise layers to 8 bits, worst first, until the output is as good as asked or the size is used up.

    Returns:
        The network and its record, whose `trade` tells what every step cost and bought.
    """
    reference, _, _ = prepare(model, inputs, config)
    damage = layer_damage(reference, network, inputs)
    order = [
        name
        for name in sorted(damage, key=damage.__getitem__, reverse=True)
        if config.override_of(name) is None and min(mean_bits(network, name)) < 8
    ]
    trade = [Trade((), record.sqnr, record.bytes)]
    raised = 0
    while raised < len(order):
        wanted = next_step(config, trade[-1], record.float_bytes, damage, order, raised, network)
        if wanted == raised:
            break
        overrides = {name: {"weight_bits": 8, "activation_bits": 8} for name in order[:wanted]}
        network, record = quantize_once(
            model, inputs, replace(config, overrides={**config.overrides, **overrides}), progress, memory
        )
        raised = wanted
        trade.append(Trade(tuple(order[:raised]), record.sqnr, record.bytes))
    record.config, record.trade = config, trade
    for layer in record.layers:
        layer.damage = damage.get(layer.name)
    return network, record


# --- one layer ------------------------------------------------------------------------------------------------


def solve_layer(call: LayerCall, config: QuantConfig) -> Solution:
    """Quantize one layer: its input, then its weights for that input, then its bias."""
    weight_bits, activation_bits = bits_of(call, config)
    module = quant_module_for(call.kind).like(call.layer, folded=config.fold_activation_scale)  # type: ignore[arg-type]
    try:
        quantizer, clip = quantizer_of(call, activation_bits, module.activation_axis, config)
        module.set_activation(quantizer)
        weight = module.weight_to_quantize(call.layer.weight.detach())
    except ValueError as error:
        raise ValueError(f"layer {call.name!r}: {error}") from error
    measured = None
    if config.rounding != "nearest" or config.target != "weights":
        inputs = [quantized for _, quantized in call.signal.streams]
        measured = layer_moments(module, inputs, target_outputs(call, config))
    module.set_weight(quantize_weight(weight, weight_bits, config, call.layer, measured), call.layer.bias)
    if config.bias_correction == "output":
        match_output(module, call, config)
    return Solution(module, clip)


def bits_of(call: LayerCall, config: QuantConfig) -> tuple[int, int]:
    """Return the bits of a layer's weights and of its input."""
    bits = {"weight_bits": config.weight_bits, "activation_bits": config.activation_bits}
    groups = getattr(call.layer, "groups", 1)
    if call.first_or_last:
        bits = dict.fromkeys(bits, config.first_last_bits)
    elif config.depthwise_bits is not None and groups > 1 and call.layer.weight.shape[1] == 1:
        bits = dict.fromkeys(bits, config.depthwise_bits)
    override = config.override_of(call.name)
    if isinstance(override, Mapping):
        bits.update(override)
    return bits["weight_bits"], bits["activation_bits"]


def quantizer_of(call: LayerCall, bits: int, axis: int, config: QuantConfig) -> tuple[QuantParams, ClipRule]:
    """Return the quantizer of a layer's input and its clip rule; layers that read one tensor share its quantizer."""
    signal = call.signal
    if (bits, axis) not in signal.quantizers:
        channel_axis = axis if config.activation_granularity == "per_channel" else None
        statistics = signal.statistics(channel_axis)
        if not bool(torch.isfinite(statistics.mean).all()):
            raise ValueError("its input contains NaN or Inf on the calibration data")
        profile = TensorProfile(
            statistics=statistics,
            activation=signal.activation,
            known=signal.before is not None or not bool((statistics.min >= 0).all()),
            histogram=signal.histogram(channel_axis) if needs_histogram(bits, config) else None,
            importance=call.importance.to(statistics.mean.device)
            if channel_axis is not None
            else torch.ones_like(statistics.mean),
        )
        signal.quantizers[bits, axis] = fit_activation(profile, bits, axis, config)
    return signal.quantizers[bits, axis]


def target_outputs(call: LayerCall, config: QuantConfig) -> list[Tensor]:
    """Return what the layer's output is to be, for each chunk."""
    if config.target != "block" or call.added is None:
        return call.outputs
    # The layer is the last of its block to be quantized: let it make up for the error of what is added to it.
    return [y + (x - quantized) for y, (x, quantized) in zip(call.outputs, call.added, strict=True)]


def quantize_weight(
    weight: Tensor,
    mean_bits: int,
    config: QuantConfig,
    layer: nn.Conv2d | nn.Linear,
    measured: tuple[Moments, Moments] | Samples | None,
) -> QuantizedWeight:
    """Quantize weights [O, ...]: bits of each output channel, what to reproduce, rounding, correction."""
    bits = torch.full((len(weight),), mean_bits, dtype=torch.uint8, device=weight.device)
    if config.weight_allocation == "analytic" and mean_bits < 8:
        fewest, most = config.channel_bits
        bits = allocate_bits(weight.flatten(1).double().std(dim=1, correction=0), mean_bits, fewest, most)
    if measured is None:
        quantized = round_to_nearest(weight, bits)
    else:
        groups = getattr(layer, "groups", 1)
        rows = weight.reshape(groups, len(weight) // groups, -1)
        if isinstance(measured, Samples):
            target = fit_blocks(rows, measured, fit=config.target != "weights")
        elif config.target != "weights":
            target = fit_weights(rows.double(), measured)
        else:
            target = Target(rows.double(), (measured[0] + measured[1]).covariance)
        quantized = round_for_output(target.weight, bits, target.covariance, config.rounding)
        quantized = replace(quantized, codes=quantized.codes.view(weight.shape))
    if config.bias_correction == "output":
        return quantized
    return correct_bias(quantized, weight, config.bias_correction)


def match_output(module: QuantModule, call: LayerCall, config: QuantConfig) -> None:
    """Set the bias so that the mean of each output channel is that of the target."""
    axis = module.activation_axis
    shift: Tensor | None = None
    for target, (_, quantized) in zip(target_outputs(call, config), call.signal.streams, strict=True):
        device = module.weight_scale.device
        missing = target.to(device) - module(quantized.to(device))
        others = [d for d in range(missing.dim()) if d != axis % missing.dim()]
        part = missing.sum(others, dtype=torch.float64)
        shift = part if shift is None else shift + part
    assert shift is not None
    count = sum(t.numel() for t in call.outputs) / len(shift)
    bias = torch.zeros_like(shift) if module.bias is None else module.bias.double()
    module.register_buffer("bias", (bias + shift / count).float())
