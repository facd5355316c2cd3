"""From what is known of a tensor to its quantizer: a clip rule, and bits for each channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4cuda.activation import Activation
from ptq4cuda.calibrate.statistics import ChannelHistogram, ChannelStatistics
from ptq4cuda.config import QuantConfig
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.solve.bits import allocate_bits, allocate_by_gain
from ptq4cuda.solve.clipping import ClipRule, clip_error, clip_range, kld_clip, percentile_clip, search_clip

_CLOSED_FORMS: tuple[ClipRule, ...] = ("laplace", "gaussian")
_CANDIDATES: dict[ClipRule, tuple[ClipRule, ...]] = {
    "mix": _CLOSED_FORMS,
    "auto": (*_CLOSED_FORMS, "percentile", "mse", "minmax"),
}


@dataclass(frozen=True, eq=False)
class TensorProfile:
    """What the fit of a quantizer looks at.

    Attributes:
        statistics: moments of each channel in float, before the activation where there is one.
        activation: made the tensor.
        known: False for values that are never negative and come from no known activation.
        histogram: of the tensor as the quantized network delivers it; None where no rule asks for it.
        importance: float64 [C], what a squared error of each channel costs.
    """

    statistics: ChannelStatistics
    activation: Activation
    known: bool
    histogram: ChannelHistogram | None
    importance: Tensor


def needs_histogram(mean_bits: int, config: QuantConfig) -> bool:
    """Tell whether a fit looks at the histogram."""
    return mean_bits < 8 and (
        config.clipping not in (*_CLOSED_FORMS, "minmax") or config.activation_allocation == "greedy"
    )


def fit_activation(
    profile: TensorProfile, mean_bits: int, axis: int, config: QuantConfig
) -> tuple[QuantParams, ClipRule]:
    """Return the quantizer of a tensor and the clip rule that made it."""
    best: _Fit | None = None
    for rule in _rules(profile, mean_bits, config):
        fit = _fit(profile, mean_bits, rule, config)
        if best is None or fit.error < best.error:
            best = fit
    assert best is not None
    constant = profile.activation(profile.statistics.mean)
    return QuantParams.from_range(best.low, best.high, best.bits, axis, constant), best.rule


def _rules(profile: TensorProfile, mean_bits: int, config: QuantConfig) -> tuple[ClipRule, ...]:
    if mean_bits == 8:  # needs no clipping
        return ("minmax",)
    rules = _CANDIDATES.get(config.clipping, (config.clipping,))
    if not profile.known:  # not spread symmetrically about the mean, as the closed forms assume
        rules = tuple(rule for rule in rules if rule not in _CLOSED_FORMS)
    return rules or ("minmax",)


@dataclass(frozen=True, eq=False)
class _Fit:
    rule: ClipRule
    bits: Tensor
    low: Tensor
    high: Tensor
    error: float


def _fit(profile: TensorProfile, mean_bits: int, rule: ClipRule, config: QuantConfig) -> _Fit:
    """Fit bits and limits by one rule; with a histogram, measure the error too."""
    statistics = profile.statistics
    channels = len(statistics.mean)
    uniform = config.activation_allocation == "uniform" or mean_bits == 8 or channels == 1
    fewest, most = config.channel_bits
    if uniform:
        bits = torch.full((channels,), mean_bits, dtype=torch.uint8, device=statistics.mean.device)
    elif config.activation_allocation == "analytic":
        spread = statistics.std if config.clipping == "gaussian" else statistics.absdev
        bits = allocate_bits(spread, mean_bits, fewest, most)
    else:
        bits = torch.empty(0, device="cpu")
    if profile.histogram is None:
        low, high = clip_range(statistics, bits, rule, profile.activation)  # type: ignore[arg-type]
        return _Fit(rule, bits, low, high, 0.0)

    # A row for each channel and a column for each number of bits.
    shape = (channels, 9)
    low, high, error, squared = (statistics.mean.new_zeros(shape) for _ in range(4))
    wanted = bits.unique().tolist() if len(bits) else range(fewest, most + 1)
    for b in wanted:
        low[:, b], high[:, b] = _limits(profile, b, rule, config)
        error[:, b] = clip_error(profile.histogram, low[:, b], high[:, b], b, config.clip_exponent)
        squared[:, b] = clip_error(profile.histogram, low[:, b], high[:, b], b)
    if not len(bits):
        bits = allocate_by_gain(squared * profile.importance[:, None], mean_bits, fewest, most)
    chosen = bits.long()[:, None]
    low, high, error = (table.gather(1, chosen).squeeze(1) for table in (low, high, error))
    return _Fit(rule, bits, low, high, float((error * profile.importance).sum()))


def _limits(profile: TensorProfile, bits: int, rule: ClipRule, config: QuantConfig) -> tuple[Tensor, Tensor]:
    histogram = profile.histogram
    assert histogram is not None
    if rule == "mse":
        return search_clip(histogram, bits, config.clip_exponent)
    if rule == "percentile":
        return percentile_clip(histogram)
    if rule == "kld":
        return kld_clip(histogram, bits)
    if rule == "minmax":
        return histogram.low, histogram.high
    everywhere = torch.full_like(profile.statistics.mean, bits)
    return clip_range(profile.statistics, everywhere, rule, profile.activation)  # type: ignore[arg-type]
