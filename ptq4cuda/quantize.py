"""quantize(): from a trained network to a quantized one, as in Banner, Nahshan, Soudry (2019).

batches -> statistics -> clip and bits -> integer weights -> modules
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda import graph
from ptq4cuda.bit_allocation import allocate_bits
from ptq4cuda.clipping import clip_range
from ptq4cuda.config import QuantConfig
from ptq4cuda.correction import correct_bias
from ptq4cuda.nn import QuantModule, quant_module_for
from ptq4cuda.quantizer import QuantizedWeight, QuantParams
from ptq4cuda.record import QuantRecord, attach_record, tensor_bytes
from ptq4cuda.rounding import round_to_nearest
from ptq4cuda.walk import Inputs, LayerCall, Signal, Solution, device_of, walk_graph, walk_modules

DEFAULT_CONFIG = QuantConfig()


def quantize(
    model: nn.Module, batches: Iterable[Any], config: QuantConfig = DEFAULT_CONFIG, *, progress: bool = True
) -> nn.Module:
    """Quantize a trained network after training, from a few unlabelled batches.

    Args:
        model: a network in evaluation mode; it is not changed. It runs where its parameters are.
        batches: calibration data, an iterable of tensors [N, ...], of tuples or lists whose first item is one
            (targets are ignored), or of dicts whose keys are arguments of the model's forward.
        config: how to quantize.
        progress: show a progress bar when it takes longer than a moment.

    Returns:
        A new module that is called like the model; report(network) tells what was done. A model that torch.fx can
        trace becomes a torch.fx.GraphModule with its BatchNorms folded, another a copy with its layers replaced.

    Raises:
        TypeError: model, batches or config are of the wrong kind.
        ValueError: the model is in training mode, has no convolution to quantize, or has NaN or Inf in its weights;
            the batches are empty or contain NaN or Inf, or a layer's input does.
    """
    start = time.perf_counter()
    check_model(model)
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, got {type(config).__name__}")
    inputs = collect_inputs(model, batches)
    record = QuantRecord(config, images=sum(_batch_size(i) for i in inputs), float_bytes=tensor_bytes(model))

    def solve(call: LayerCall) -> Solution:
        return solve_layer(call, config)

    traced, record.reason = graph.trace(model)
    if not any(graph.layer_kind(module) == "Conv2d" for module in (traced or model).modules()):
        raise ValueError(f"the model has no nn.Conv2d to quantize ({type(model).__name__})")
    if traced is not None:
        record.reason = graph.why_different(model, traced, *inputs[0])
    network: nn.Module
    if traced is not None and not record.reason:
        network = traced
        record.folded = graph.fold_batch_norm(traced)
        record.layers, noise = walk_graph(traced, inputs, solve, progress)
    else:
        network = graph.own_copy(model)
        record.walked_by = "modules"
        record.layers, noise = walk_modules(network, inputs, solve, progress)
    record.sqnr = noise.sqnr
    record.seconds = time.perf_counter() - start
    attach_record(network, record)
    return network


# --- one layer ------------------------------------------------------------------------------------------------


def solve_layer(call: LayerCall, config: QuantConfig) -> Solution:
    """Quantize one layer with the paper's methods, all in closed form."""
    weight_bits = config.first_last_bits if call.first_or_last else config.weight_bits
    activation_bits = config.first_last_bits if call.first_or_last else config.activation_bits
    module = quant_module_for(call.kind).like(call.layer, folded=config.fold_activation_scale)  # type: ignore[arg-type]
    try:
        quantizer, clip = quantizer_of(call.signal, activation_bits, module.activation_axis, config)
        module.set_activation(quantizer)
        weight = quantize_weight(module.weight_to_quantize(call.layer.weight.detach()), weight_bits, config)
    except ValueError as error:
        raise ValueError(f"layer {call.name!r}: {error}") from error
    module.set_weight(weight, call.layer.bias)
    return Solution(module, clip)


def quantizer_of(signal: Signal, bits: int, axis: int, config: QuantConfig) -> tuple[QuantParams, str]:
    """Return the quantizer of a tensor and its clip rule; layers that read one tensor share its quantizer."""
    if (bits, axis) not in signal.quantizers:
        signal.quantizers[bits, axis] = fit_activation(signal, bits, axis, config)
    return signal.quantizers[bits, axis]


def fit_activation(signal: Signal, mean_bits: int, axis: int, config: QuantConfig) -> tuple[QuantParams, str]:
    """Fit the quantizer of a layer's input: statistics, bits of each channel, clip values."""
    per_channel = config.activation_granularity == "per_channel"
    statistics = signal.statistics(axis if per_channel else None)
    if not bool(torch.isfinite(statistics.mean).all()):
        raise ValueError("its input contains NaN or Inf on the calibration data")
    spread = statistics.std if config.clipping == "gaussian" else statistics.absdev
    bits = torch.full_like(spread, mean_bits, dtype=torch.uint8)
    if config.bit_allocation and per_channel and mean_bits < 8:
        bits = allocate_bits(spread, mean_bits)

    rule = config.clipping
    # 8 bits need no clipping; and values that are never negative, made by something other than a known activation,
    # are not spread symmetrically about their mean as the closed forms assume.
    if mean_bits == 8 or (signal.before is None and bool((statistics.min >= 0).all())):
        rule = "minmax"
    low, high = clip_range(statistics, bits, rule, signal.activation)
    constant = signal.activation(statistics.mean)
    return QuantParams.from_range(low, high, bits, axis, constant), rule


def quantize_weight(weight: Tensor, mean_bits: int, config: QuantConfig) -> QuantizedWeight:
    """Quantize weights [O, ...]: bits of each output channel, rounding, bias correction."""
    bits = torch.full((len(weight),), mean_bits, dtype=torch.uint8, device=weight.device)
    if config.bit_allocation and mean_bits < 8:
        bits = allocate_bits(weight.flatten(1).double().std(dim=1, correction=0), mean_bits)
    return correct_bias(round_to_nearest(weight, bits), weight, config.bias_correction)


# --- arguments ------------------------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Raise unless the model can be quantized."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"its module {training!r} is" if training else "it is"
        raise ValueError(f"the model must be in evaluation mode, but {where} in training mode: call model.eval()")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the model's {name!r} contains NaN or Inf")
    if any(isinstance(module, QuantModule) for module in model.modules()):
        raise ValueError("the model is quantized already")


def collect_inputs(model: nn.Module, batches: Iterable[Any]) -> Inputs:
    """Return args and kwargs of the model for each batch, on the model's device."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}: put it in a list")
    device = device_of(model)
    inputs = []
    for index, batch in enumerate(batches):
        args, kwargs = _as_arguments(model, batch, index)
        for tensor in (*args, *kwargs.values()):
            if tensor.dim() == 0 or len(tensor) == 0:
                raise ValueError(f"calibration batch {index} has the shape {list(tensor.shape)}, without samples")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"calibration batch {index} contains NaN or Inf")
        args = tuple(t.to(device) for t in args)
        inputs.append((args, {name: t.to(device) for name, t in kwargs.items()}))
    if not inputs:
        raise ValueError("batches is empty: quantization needs at least one batch of calibration data")
    return inputs


def _as_arguments(model: nn.Module, batch: Any, index: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        names = inspect.signature(model.forward).parameters
        kwargs = {name: batch[name] for name in names if isinstance(batch.get(name), Tensor)}
        if kwargs:
            return (), kwargs
        raise TypeError(
            f"calibration batch {index} is a dict with the keys {sorted(map(str, batch))}; none is a tensor for an "
            f"argument of the model's forward ({', '.join(names)})"
        )
    raise TypeError(
        f"calibration batch {index} must be a tensor, a (tensor, target) pair or a dict, got {type(batch).__name__}"
    )


def _batch_size(inputs: tuple[tuple[Tensor, ...], dict[str, Tensor]]) -> int:
    args, kwargs = inputs
    return len(next(iter((*args, *kwargs.values()))))
