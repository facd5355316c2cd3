"""From what is known of a tensor to its quantizer: a clip rule, and bits for each channel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4cuda.calibrate.statistics import ChannelStatistics
from ptq4cuda.config import Activations
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.solve.bits import AllocationRule
from ptq4cuda.solve.clipping import ClipRule, TensorProfile, clip_error

FEW_VALUES = 128  # of a channel, whose extremes many others exceed


def needs_histogram(mean_bits: int, config: Activations) -> bool:
    """Tell whether a fit looks at the histogram."""
    rule, allocation = ClipRule.named(config.clipping), AllocationRule.named(config.allocation)
    return mean_bits < 8 and (rule.needs_histogram or allocation.needs_errors)


def fit_activation(profile: TensorProfile, mean_bits: int, axis: int, config: Activations) -> tuple[QuantParams, str]:
    """Return the quantizer of a tensor and the name of the clip rule that made it."""
    wanted = ClipRule.named(config.clipping)
    # Among tensors of fewer bits those of 8 bits keep their whole range: headroom costs ResNet-20 0.2 dB.
    at_eight = [ClipRule.named(wanted.at_eight_bits if config.bits == 8 else "minmax")]
    rules = at_eight if mean_bits == 8 else wanted.candidates(profile) or [ClipRule.named("minmax")]
    spread = wanted.spread(profile.statistics)
    alone = mean_bits == 8 or len(spread) == 1
    allocation = AllocationRule.named("uniform" if alone else config.allocation)
    several = len(rules) > 1
    fits = [_fit(profile, rule, allocation, spread, mean_bits, config.channel_bits, several) for rule in rules]
    best = min(fits, key=lambda fit: fit.error)
    low, high = best.low, best.high
    if mean_bits == 8 and wanted.foresees and int(profile.statistics.count.max()) < FEW_VALUES:
        low, high = beyond_few_values(low, high, best.bits, profile.statistics)
    constant = profile.activation(profile.statistics.mean)
    return QuantParams.from_range(low, high, best.bits, axis, constant), best.rule


def beyond_few_values(
    low: Tensor, high: Tensor, bits: Tensor, statistics: ChannelStatistics
) -> tuple[Tensor, Tensor]:
    """Return the ranges [C] that channels have of which few values are known, as of features of few images.

    One in n + 1 other values lies beyond the largest of n, by b in the mean where a tail is exponential. A range that
    goes on by x makes 2 b² exp(-x / b) / (n + 1) of noise beyond its end and (range / levels)² / 12 within, which is
    least where x = b ln(12 b levels² / ((n + 1) range)). No channel needs more than the range of all.
    """
    # The spread of few values leans on that of the other channels. One value has none: then the range of all is left.
    count, variance = statistics.count, statistics.std.square()
    spread = ((count * variance + 8.0 * variance.mean()) / (count + 8.0)).sqrt()
    spread = torch.where(count > 1, spread, high.max() - low.min())
    noise = 12.0 * spread * (torch.exp2(bits.double()) - 1.0).square() / (count + 1.0)
    own = (high.clamp_min(0.0) - low.clamp_max(0.0)).clamp_min(torch.finfo(torch.float32).tiny)
    more = torch.zeros_like(own)
    for _ in range(3):  # the range is with what is sought
        more = (spread * torch.log(noise / (own + more))).nan_to_num(0.0).clamp_min(0.0)
    return torch.maximum(low - more, low.min()), torch.minimum(high + more, high.max())


@dataclass(frozen=True, eq=False)
class _Fit:
    rule: str
    bits: Tensor
    low: Tensor
    high: Tensor
    error: float


def _fit(
    profile: TensorProfile,
    rule: ClipRule,
    allocation: AllocationRule,
    spread: Tensor,
    mean_bits: int,
    channel_bits: tuple[int, int],
    several: bool,
) -> _Fit:
    """Fit bits and limits by one rule; with a histogram, and several rules to choose from, measure the error too."""
    fewest, most = channel_bits
    # A row for each channel and a column for each number of bits.
    low, high, error, squared = (spread.new_zeros(len(spread), 9) for _ in range(4))

    def measure(wanted: Iterable[int]) -> None:
        for b in wanted:
            low[:, b], high[:, b] = rule.limits(profile, b)
            if profile.histogram is not None and several:
                error[:, b] = clip_error(profile.histogram, low[:, b], high[:, b], b, profile.exponent)

    if allocation.needs_errors:
        assert profile.histogram is not None
        measure(range(fewest, most + 1))
        for b in range(fewest, most + 1):
            squared[:, b] = clip_error(profile.histogram, low[:, b], high[:, b], b)
        bits = allocation.bits(spread, squared * profile.importance[:, None], mean_bits, fewest, most)
    else:
        bits = allocation.bits(spread, None, mean_bits, fewest, most)
        measure(bits.unique().tolist())
    chosen = bits.long()[:, None]
    of_bits = (table.gather(1, chosen).squeeze(1) for table in (low, high, error))
    chosen_low, chosen_high, chosen_error = of_bits
    return _Fit(rule.name, bits, chosen_low, chosen_high, float((chosen_error * profile.importance).sum()))
