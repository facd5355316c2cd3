"""Quantizes one layer: its input, then its weights for that input, then its bias."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ptq4cuda.calibrate.moments import Moments, Samples, layer_moments
from ptq4cuda.calibrate.signals import LayerCall, Signal, Solution, importance_for
from ptq4cuda.calibrate.statistics import ChannelStatistics
from ptq4cuda.config import QuantConfig, Weights
from ptq4cuda.nn import QuantModule
from ptq4cuda.nn.spec import WINDOW_BITS
from ptq4cuda.quantizer import QuantizedWeight, QuantParams
from ptq4cuda.solve.bits import AllocationRule
from ptq4cuda.solve.clipping import ClipRule, TensorProfile, with_headroom
from ptq4cuda.solve.correction import correct_bias
from ptq4cuda.solve.folding import scales_for_weights
from ptq4cuda.solve.least_squares import Target, fit_blocks, fit_weights
from ptq4cuda.solve.ranges import fit_activation, needs_histogram
from ptq4cuda.solve.rounding import round_for_output, round_to_nearest

_COMPENSATED = 0.5  # of the noise of rounding to nearest, that is left where inputs make up for each other's
_BY_CHANCE = 2.0  # times what taking away the mean of noise adds to it
_JUDGED = 1 << 24  # values of a layer's output that judge its bias, at most, or one sample
_TOGETHER = 1 << 18  # of these, that are in memory together, or one sample


def solve_layer(call: LayerCall, config: QuantConfig) -> Solution:
    """Quantize one layer: its input, then its weights for that input, then its bias."""
    weight_bits, activation_bits = bits_of(call, config)
    assert call.spec.quantized is not None
    module = call.spec.quantized.like(call.layer, folded=config.fold_activation_scale)
    try:
        quantizer, clip = quantizer_of(call, activation_bits, config)
        module.set_activation(quantizer)
        weight = module.weight_to_quantize(call.spec.rows(call.layer))
    except ValueError as error:
        raise ValueError(f"layer {call.name!r}: {error}") from error
    measured = None
    if config.rounding != "nearest" or config.target != "weights":
        signal, added = call.signal, call.added if config.target == "block" else None
        measured = layer_moments(
            module, signal.quantized, signal.frontier.each(call.outputs), added, signal.processes
        )
    module.set_weight(quantize_weight(weight, weight_bits, config.weights, module.groups, measured), call.layer.bias)
    outputs = match_output(module, call, config) if config.bias_correction == "output" else None
    return Solution(module, clip, outputs)


def by_statistics_alone(config: QuantConfig) -> bool:
    """Tell whether all that solve_layer asks of a layer's input are the statistics of its float values."""
    rule = ClipRule.named(config.clipping)
    return (
        (config.rounding, config.target) == ("nearest", "weights")
        and config.bias_correction != "output"
        and not AllocationRule.named(config.activation_allocation).needs_errors
        and not any(r.needs_histogram or r.needs_extremes for r in (rule, ClipRule.named(rule.at_eight_bits)))
    )


def needs_absdev(config: QuantConfig) -> bool:
    """Tell whether the fit of a quantizer looks at deviations from the mean."""
    by_spread = AllocationRule.named(config.activation_allocation).needs_spread
    return by_spread or ClipRule.named(config.clipping).looks_before


def bits_of(call: LayerCall, config: QuantConfig) -> tuple[int, int]:
    """Return the bits of a layer's weights and of its input."""
    bits = {"weight_bits": config.weight_bits, "activation_bits": config.activation_bits}
    if call.first_or_last:
        bits = dict.fromkeys(bits, config.first_last_bits)
    elif config.depthwise_bits is not None and call.spec.is_depthwise(call.layer):
        bits = dict.fromkeys(bits, config.depthwise_bits)
    else:
        bits.update(call.share)
    override = config.override_of(call.name)
    if isinstance(override, Mapping):
        bits.update(override)
    return bits["weight_bits"], bits["activation_bits"]


def samples_wanted(call: LayerCall, config: QuantConfig, samples: int) -> int:
    """Return how many calibration samples give as many positions as a layer that is fitted has inputs, 0 if they do.

    With fewer the data does not tell the inputs apart, and the fit follows the samples that there are. At 8 bits
    there is little to fit.

    Args:
        call: the layer.
        config: how it is quantized.
        samples: that there are.
    """
    if bits_of(call, config)[0] == 8 or (config.rounding == "nearest" and config.target == "weights"):
        return 0
    rows = call.spec.rows(call.layer)
    positions, inputs = sum(numel for _, numel in _extents(call)[0]) // len(rows), rows[0].numel()
    return math.ceil(samples * inputs / max(1, positions)) if positions < inputs else 0


def quantizer_of(call: LayerCall, bits: int, config: QuantConfig) -> tuple[QuantParams, str]:
    """Return the quantizer of a layer's input, which all layers that read it share, and the name of its clip rule."""
    signal, axis = call.signal, call.spec.axis
    if (bits, axis) not in signal.quantizers:
        channel_axis = axis if config.activation_granularity == "per_channel" else None
        statistics = signal.statistics(channel_axis, needs_absdev(config))
        if not bool(torch.isfinite(statistics.mean).all()):
            raise ValueError("its input contains NaN or Inf on the calibration data")
        profile = TensorProfile(
            statistics=statistics,
            activation=signal.activation if signal.before is not None else signal.activation.applied,
            known=signal.before is not None or not bool((statistics.min >= 0).all()),
            histogram=signal.histogram(channel_axis) if needs_histogram(bits, config.activations) else None,
            importance=importance_for(call.readers).to(statistics.mean.device)
            if channel_axis is not None
            else torch.ones_like(statistics.mean),
            exponent=config.clip_exponent,
            extremes=partial(signal.extremes, axis, whole=channel_axis is None),
        )
        activations = replace(config.activations, channel_bits=_channel_bits(call, bits, config))
        quantizer, clip = fit_activation(profile, bits, axis, activations)
        weight_bits, _ = bits_of(call, config)
        if (
            config.fold_activation_scale
            and channel_axis is not None
            and weight_bits < 8
            and profile.histogram is not None
        ):
            mean = 0.0 if config.bias_correction == "none" else profile.histogram.mean
            power = profile.histogram.mean_square - mean**2
            left = 1.0 if config.rounding == "nearest" else _COMPENSATED
            quantizer = scales_for_weights(quantizer, power, call.readers, weight_bits, left)
        signal.quantizers[bits, axis] = quantizer, clip
    return signal.quantizers[bits, axis]


def _channel_bits(call: LayerCall, mean_bits: int, config: QuantConfig) -> tuple[int, int]:
    """Return the fewest and the most bits of a channel: windows leave room for 6."""
    fewest, most = config.channel_bits
    if config.fold_activation_scale and any(reader.spec.in_windows(reader.layer) for reader in call.readers):
        most = min(most, max(WINDOW_BITS, fewest, mean_bits))
    return fewest, most


def quantizer_of_operand(signal: Signal, config: QuantConfig) -> QuantParams:
    """Return the quantizer of a residual operand, 8 bits for each channel.

    It passes many sums, each of which adds its rounding noise, so that headroom is for networks of 8 bits alone: in
    others it costs more than it is worth (0.1 dB on ResNet-20).
    """
    if config.activation_bits == 8 and ClipRule.named(config.clipping).at_eight_bits == "headroom":
        low, high = signal.extremes(1)
        low, high = -with_headroom(low.clamp_max(0.0)), with_headroom(high.clamp_min(0.0))
    else:
        statistics = ChannelStatistics.over(lambda: signal.quantized, 1, signal.processes, absdev=False)
        low, high = statistics.min, statistics.max
    return QuantParams.from_range(low, high, torch.full_like(low, 8, dtype=torch.uint8))


@dataclass(frozen=True)
class _TargetOutputs:
    """What the layer's output is to be, chunk by chunk, as often as it is read."""

    call: LayerCall
    config: QuantConfig

    def __iter__(self) -> Iterator[Tensor]:
        outputs = self.call.signal.frontier.each(self.call.outputs)
        if self.config.target != "block" or self.call.added is None:
            return iter(outputs)
        # The layer is the last of its block to be quantized: let it make up for the error of what is added to it.
        return (y + (x - quantized) for y, (x, quantized) in zip(outputs, self.call.added, strict=True))


def _extents(call: LayerCall) -> tuple[list[tuple[int, int]], int]:
    """Return how many samples and values the output has for each chunk of all processes, and this one's first."""
    single = call.spec.is_single
    return call.signal.processes.placed([(1 if single(y) else len(y), y.numel()) for y in call.outputs])


def quantize_weight(
    weight: Tensor,
    mean_bits: int,
    config: Weights,
    groups: int,
    measured: tuple[Moments, Moments] | Samples | None,
) -> QuantizedWeight:
    """Quantize weights [O, ...]: bits of each output channel, what to reproduce, rounding, correction."""
    allocation = AllocationRule.named(config.allocation if mean_bits < 8 else "uniform")
    flat = weight.flatten(1)
    spread = flat.double().std(dim=1, correction=0) if allocation.needs_spread else flat.new_zeros(len(flat))
    bits = allocation.bits(spread, None, mean_bits, *config.channel_bits)
    if measured is None:
        quantized = round_to_nearest(weight, bits)
    else:
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


def match_output(module: QuantModule, call: LayerCall, config: QuantConfig) -> list[Tensor] | None:
    """Set the bias so that the mean of each output channel is that of the target, where that does good.

    It does harm where few samples tell the mean, and where what follows is blind to most of it: a sigmoid hardly sees
    values far below zero, whose mean a few peaks that were clipped would move. So each sample judges the mean of
    all others, by what is read of the output in the end, and the mean is left alone where that does more harm than
    the mean of so few samples does by chance.

    Returns:
        What the module gives then, for each chunk, held by the frontier; None where the bias is not all that is added
        to its products in the end.
    """
    axis, device = call.spec.axis, module.weight_scale.device
    frontier, processes = call.signal.frontier, call.signal.processes
    extents, chunk = _extents(call)
    judged: list[int] = []  # samples of each chunk that judge
    room = _JUDGED
    for samples, numel in extents:
        few = min(samples, room * samples // max(1, numel))
        judged.append(few if judged else max(1, few))
        room -= few * (numel // max(1, samples))
    first = sum(samples for samples, _ in extents[:chunk])
    bias = module.bias
    outputs: list[Tensor] = []
    apart = _adds_bias_last(module)
    if apart:
        module.register_buffer("bias", None)
    sums: list[Tensor] = []  # of what is missing, of each sample [N, O]
    seen: list[tuple[int, Tensor, Tensor]] = []  # held
    for target, quantized, some in zip(
        _TargetOutputs(call, config), call.signal.quantized, judged[chunk:], strict=False
    ):
        target, found = target.to(device), module(quantized.to(device))
        if apart:
            outputs.append(frontier.hold(found))
            found = found if bias is None else found + _along(bias, axis, found)
        if found.dim() == 1:
            target, found = target[None], found[None]
        others_than_channels = [d for d in range(1, found.dim()) if d != axis % found.dim()]
        missing = target - found
        if others_than_channels:  # float32 sums of so few are as good as others
            missing = missing.sum(others_than_channels, dtype=torch.float32)
        sums.append(missing.double())
        if some:  # copied, so that the rest need not stay in memory
            seen.append((first, *frontier.hold((target[:some].clone(), found[:some].clone()))))
        first += len(target)
    total = torch.cat(processes.gather(sums))
    each = sum(numel for _, numel in extents) / total.numel()  # values of a channel of a sample
    rest = max(1, len(total) - 1)
    others = (total.sum(0) - total if len(total) > 1 else total) / rest / each
    errors = []
    for first, *held in seen:
        target, found = frontier.fetch(tuple(held))
        shape = [1] * found.dim()
        shape[0], shape[axis] = len(found), found.shape[axis]
        shift = others[first : first + len(found)].to(found.dtype).view(shape)
        errors.append(_squared_errors(call, target, found, shift))
    error = harm = 0.0
    for unmatched, matched in processes.gather(errors):
        error, harm = error + unmatched, harm + matched - unmatched
    # Errors without a mean grow by 1 / (n - 1) of them where that of n - 1 samples is taken away.
    if not harm * rest > _BY_CHANCE * error:
        before = torch.zeros_like(total[0]) if bias is None else bias.double()
        bias = (before + total.mean(0) / each).float()
    module.register_buffer("bias", bias)
    if not apart:
        return None
    if bias is not None:
        for y in frontier.each(outputs):
            y += _along(bias.to(y.device), axis, y)
    return outputs


def _squared_errors(call: LayerCall, target: Tensor, found: Tensor, shift: Tensor) -> tuple[float, float]:
    """Return the squared error of what is read of a layer's output, as it is and shifted, some samples at a time."""
    size = max(1, _TOGETHER * len(found) // max(1, found.numel()))
    unmatched = matched = 0.0
    for t, y, s in zip(*(x.split(size) for x in (target, found, shift)), strict=True):
        wanted = call.read(t)
        own, shifted = (
            float((call.read(z) - wanted).square_().nan_to_num_(nan=0.0).sum(dtype=torch.float64)) for z in (y, y + s)
        )
        unmatched, matched = unmatched + own, matched + shifted
    return unmatched, matched


def _adds_bias_last(module: QuantModule) -> bool:
    """Tell whether what a module gives is, bit for bit, what it gives without a bias and that."""
    return module.dtype == torch.float32 and module.activation is not None and module.product_scale is not None


def _along(values: Tensor, axis: int, x: Tensor) -> Tensor:
    """View values of channels as a tensor of x's dimensions."""
    return values.view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])
