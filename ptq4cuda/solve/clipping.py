"""Clip values: in closed form (Banner, Nahshan, Soudry 2019, section 2), and searched on a histogram.

A tensor clipped to [-α, α] and quantized to M bits loses the tails and rounds the rest. For a density that is
symmetric about its mean the expected squared error is clip noise + α² / (3·4^M); the clip value that minimises it
has a closed form for the Laplace distribution and takes a few Newton steps for the Gaussian. M may be any real
number.

No closed form may be trusted blindly: a histogram shows what a range costs on the values themselves, whatever their
distribution, and the best range can be searched on it.

A clip rule is a class, at the end of this file or anywhere else: see ClipRule.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.calibrate.statistics import ChannelHistogram, ChannelStatistics
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.solve.rules import Rule

HEADROOM = 2.0 ** (1.0 / 3.0)  # times what was seen: a third of a bit
MOST_HEADROOM = 2.0 ** (2.0 / 3.0)
_MORE_SAMPLES = 8.0  # times those of calibration, whose largest value is extrapolated
PERCENTILE = 99.9  # of a channel's values, zeros included, that the rule "percentile" keeps
_EDGES = 128  # limits that a search tries between the ends of a histogram
_ROWS = 16  # channels whose ranges are compared at a time


def lambert_w(x: Tensor) -> Tensor:
    """Return W(x) for x >= 0, the solution of W e^W = x, in float64 (Halley's iteration)."""
    x = x.double()
    w = torch.log1p(x)  # above the solution and close to it
    for _ in range(20):
        e = torch.exp(w)
        f = w * e - x
        w = w - f / (e * (w + 1) - (w + 2) * f / (2 * w + 2))
    return w


def laplace_clip(bits: Tensor) -> Tensor:
    """Return α / b for a Laplace density of scale b: W(3·4^M).

    It is the root of the derivative of 2 b² e^(-α/b) + α² / (3·4^M).

    Args:
        bits: M, any real numbers.
    """
    return lambert_w(3.0 * torch.exp2(2.0 * bits.double()))


def gaussian_clip(bits: Tensor) -> Tensor:
    """Return α / σ for a Gaussian density of standard deviation σ.

    It is the root of the derivative of (1 + α²) erfc(α/√2) - α √(2/π) e^(-α²/2) + α² / (3·4^M), found by Newton's
    method. The derivative is concave and negative at 0, so the steps from there rise to the root without passing it.

    Args:
        bits: M, any real numbers.
    """
    rounding = 2.0 / (3.0 * torch.exp2(2.0 * bits.double()))
    alpha = torch.zeros_like(rounding)
    for _ in range(50):
        tail = 2.0 * torch.special.erfc(alpha / math.sqrt(2.0))
        slope = alpha * tail - 2.0 * math.sqrt(2.0 / math.pi) * torch.exp(-alpha.square() / 2.0) + alpha * rounding
        alpha = alpha - slope / (tail + rounding)
    return alpha


def clip_range(
    statistics: ChannelStatistics, alpha: Tensor, activation: Activation = IDENTITY
) -> tuple[Tensor, Tensor]:
    """Return the range of activation(x), from the statistics of x ("fused ReLU"), that α about the mean leaves of it.

    Where the activation has a kink, at zero, the limits are min(mean, 0) - α and max(mean, 0) + α before it.

    Args:
        statistics: of x, BEFORE the activation.
        alpha: α, [C].
        activation: what follows x.

    Returns:
        Low and high, float64 [C], never outside of the values that were seen.
    """
    centre = statistics.mean
    if activation.negative_slope < 1.0:
        low, high = centre.clamp_max(0.0) - alpha, centre.clamp_min(0.0) + alpha
    else:
        low, high = centre - alpha, centre + alpha
    seen_low, seen_high = activation(statistics.min), activation(statistics.max)
    return torch.maximum(seen_low, activation(low)), torch.minimum(seen_high, activation(high))


def effective_bits(bits: float, activation: Activation) -> Tensor:
    """Return the M for which α is to be taken, float64 [1].

    A ReLU keeps half of the range 2α, so the same rounding noise is reached with one bit less: α is that of M + 1
    bits. An activation that keeps another part of it gets log2 of that part.
    """
    kept = (1.0 + activation.negative_slope) / 2.0
    return torch.tensor([bits - math.log2(kept)], dtype=torch.float64, device="cpu")


def with_headroom(extremes: Tensor) -> Tensor:
    """Return how far values may go of which each sample's largest, or smallest, is known, [C].

    A third of a bit further than in any of the samples, which no statistics could tell: all images may have been
    taken in one light. Where the samples differ, as far as the largest of many more samples will go. What exceeds the
    k-th largest of them is taken to be exponential, so that the largest grows by the mean excess times the logarithm
    of the number of samples. That is at most two thirds of a bit.

    Args:
        extremes: [n, C], of each sample.
    """
    reach = extremes.double().abs()
    top = max(1, len(reach) // 8)
    largest = reach.topk(min(top + 1, len(reach)), dim=0).values
    excess = largest[:top].mean(0) - largest[-1]
    furthest = largest[0] + excess * math.log(_MORE_SAMPLES)
    return torch.minimum(furthest, largest[0] * MOST_HEADROOM).maximum(largest[0] * HEADROOM)


# --- on a histogram -------------------------------------------------------------------------------------------


def clip_error(histogram: ChannelHistogram, low: Tensor, high: Tensor, bits: int, exponent: float = 2.0) -> Tensor:
    """Return E|x̂ - x|^exponent of each channel, float64 [C], quantized over [low, high]."""
    codes = torch.full_like(low, bits, dtype=torch.uint8)
    values = histogram.values.float()
    quantizer = QuantParams.from_range(low, high, codes, axis=0, constant=histogram.mean)
    error = (quantizer.fake_quantize(values) - values).abs()
    return (histogram.density * error.pow(exponent)).sum(1)


def search_clip(histogram: ChannelHistogram, bits: int, exponent: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return the range with the least clip noise plus rounding noise, float64 [C] each.

    The paper's sum for a measured density and for any power k of the error: Σ p |x - limit|^k beyond the limits and
    P(inside) · (step / 2)^k / (k + 1) between them. Both limits are searched together.
    """
    bins = histogram.density.shape[1]
    edges, above, below, under = _beyond_edges(histogram, exponent)
    lower = edges[: below.shape[1]]
    step = (edges[None, :] - lower[:, None]).clamp_min(0.0) / (2.0**bits - 1.0)
    rounding = (step / 2.0).pow(exponent)

    def noise(rows: slice) -> Tensor:
        inside = under[rows, None, :] - under[rows, : len(lower), None]
        return (below[rows, :, None] + above[rows, None, :]).add_(inside.mul_(rounding).div_(exponent + 1.0))

    # A few channels at a time, whose tables of all ranges stay in the cache.
    parts = [slice(first, first + _ROWS) for first in range(0, len(under), _ROWS)]
    best = torch.cat([noise(rows).flatten(1).argmin(1) for rows in parts])
    width = (histogram.high - histogram.low) / bins
    low = histogram.low + lower[best // len(edges)] * width
    high = histogram.low + edges[best % len(edges)] * width
    return low.clamp_max(0.0), high.clamp_min(0.0)


@functools.lru_cache(maxsize=1)  # of one histogram ranges are searched for one number of bits after the other
def _beyond_edges(histogram: ChannelHistogram, exponent: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return limits, in bins, and of each channel what clipping above and below costs and the share of values under.

    A limit on the wrong side of zero, which a range has to contain, costs infinitely much. Where no value is negative
    there is one lower limit alone.
    """
    density = histogram.density
    bins = density.shape[1]
    edges = torch.linspace(0.0, bins, _EDGES + 1, dtype=torch.float64, device=density.device)
    zero = -histogram.low / (histogram.high - histogram.low).clamp_min(torch.finfo(torch.float32).tiny) * bins
    middles = torch.arange(bins, dtype=torch.float64, device=density.device) + 0.5
    distance = middles[:, None] - edges  # the same for all channels
    above = density @ distance.clamp_min(0.0).pow(exponent)
    below = density @ distance.neg().clamp_min(0.0).pow(exponent)
    above = torch.where(edges >= zero[:, None], above, torch.inf)
    below = torch.where(edges <= zero[:, None], below, torch.inf)
    if bool((histogram.low >= 0).all()):
        below = below[:, :1]
    return edges, above, below, density @ (distance < 0).double()


def percentile_clip(histogram: ChannelHistogram, percentile: float = PERCENTILE) -> tuple[Tensor, Tensor]:
    """Return the range that leaves out (100 - percentile) / 2 percent of the values on either side."""
    density = histogram.density
    bins = density.shape[1]
    outside = (100.0 - percentile) / 200.0
    width = (histogram.high - histogram.low) / bins
    first = (density.cumsum(1) <= outside).sum(1)
    last = bins - (density.flip(1).cumsum(1) <= outside).sum(1)
    low, high = histogram.low + first * width, histogram.low + last * width
    return low.clamp_max(0.0), high.clamp_min(0.0)


def kld_clip(histogram: ChannelHistogram, bits: int) -> tuple[Tensor, Tensor]:
    """Return the range whose quantized distribution has the least Kullback-Leibler divergence from the clipped one.

    The calibration of TensorRT (Migacz 2017), which the paper compares with: for each threshold the values beyond it
    move to the outermost bins (P), all bins of one code share its probability (Q), and Σ P log(P / Q) is compared.
    """
    density, values = histogram.density, histogram.values
    bins = density.shape[1]
    columns = torch.arange(bins, device=density.device)
    least = torch.full_like(histogram.low, torch.inf)
    best = torch.ones_like(least)
    for part in range(8, _EDGES + 1):
        share = part / _EDGES
        low, high = histogram.low * share, histogram.high * share
        quantizer = QuantParams.from_range(low, high, torch.full_like(low, bits, dtype=torch.uint8), axis=0)
        codes = quantizer.quantize(values.float()).long()
        inside = (values >= low[:, None]) & (values <= high[:, None])
        first = inside.long().argmax(1)
        last = (inside * columns).argmax(1)
        nearest = torch.minimum(torch.maximum(columns, first[:, None]), last[:, None])
        p = torch.zeros_like(density).scatter_add_(1, nearest, density)
        # Q is made of the values inside alone; empty bins stay empty.
        kept = density * inside
        filled = (kept > 0).double()
        levels = 2**bits
        mass = torch.zeros(len(p), levels, dtype=p.dtype, device=p.device)
        size = mass.scatter_add(1, codes, filled)
        mass = mass.scatter_add(1, codes, kept)
        q = (mass / size.clamp_min(1.0)).gather(1, codes) * filled
        p, q = (t / t.sum(1, keepdim=True).clamp_min(1e-30) for t in (p, q))
        divergence = torch.where(p > 0, p * torch.log(p / q.clamp_min(1e-12)), 0.0).sum(1)
        better = divergence < least
        least = torch.where(better, divergence, least)
        best = torch.where(better, share, best)
    return histogram.low * best, histogram.high * best


# --- rules ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TensorProfile:
    """What the fit of a quantizer looks at.

    Attributes:
        statistics: moments of each channel in float, before the activation where there is one.
        activation: made the tensor of what the statistics are of.
        known: False for values that are never negative and come from no known activation.
        histogram: of the tensor as the quantized network delivers it; None where no rule asks for it.
        importance: float64 [C], what a squared error of each channel costs.
        exponent: k of the error E|x̂ - x|^k that counts.
        extremes: measures the smallest and the largest value of each channel in each sample, [n, C] both, of the
            tensor in float, after its activation.
    """

    statistics: ChannelStatistics
    activation: Activation
    known: bool
    histogram: ChannelHistogram | None
    importance: Tensor
    exponent: float
    extremes: Callable[[], tuple[Tensor, Tensor]]


class ClipRule(Rule):
    """How the range of an activation tensor is chosen.

    Attributes:
        needs_histogram: whether it looks at the histogram of a profile.
        looks_before: whether it looks at how a tensor is distributed before its activation; if not, the statistics
            may be of what came after, and absdev of each batch about its own mean.
        needs_extremes: whether it looks at the extremes. Where a rule needs neither, and weights are not fitted
            either, calibration holds no tensors of the network for more than a batch.
        at_eight_bits: name of the rule for tensors of 8 bits, which need no clipping.
        foresees: whether ranges of 8 bits go beyond the values of a channel where these are few.
    """

    needs_histogram: ClassVar[bool] = True
    looks_before: ClassVar[bool] = True
    needs_extremes: ClassVar[bool] = True
    at_eight_bits: ClassVar[str] = "minmax"
    foresees: ClassVar[bool] = False

    @abstractmethod
    def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
        """Return the range of each channel, float64 [C] each, when all have so many bits, 0 to 8."""

    def candidates(self, profile: TensorProfile) -> Sequence[ClipRule]:
        """Return the rules of which the one with the least error on the histogram is used."""
        return (self,)

    def spread(self, statistics: ChannelStatistics) -> Tensor:
        """Return the scale of each channel's distribution, by which bits are allocated."""
        return statistics.absdev


class MinMax(ClipRule):
    """The whole range."""

    name = "minmax"
    looks_before = False
    needs_histogram = needs_extremes = False

    def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
        """Return the least and the largest value."""
        if profile.histogram is not None:
            return profile.histogram.low, profile.histogram.high
        return profile.activation(profile.statistics.min), profile.activation(profile.statistics.max)


class Headroom(ClipRule):
    """More than the whole range: new samples go further than those of calibration did."""

    name = "headroom"
    foresees = True
    looks_before = False
    needs_histogram = False

    def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
        """Extrapolate from the extremes of the samples, within what the activation lets through."""
        low, high = profile.extremes()
        return -with_headroom(low.clamp_max(0.0)), profile.activation(with_headroom(high.clamp_min(0.0)))


class _ClosedForm(ClipRule):
    """The optimal clip of a distribution, where the tensor may have it."""

    needs_histogram = needs_extremes = False

    def candidates(self, profile: TensorProfile) -> Sequence[ClipRule]:
        # It is to be spread symmetrically about the mean.
        return (self,) if profile.known else ()


class Laplace(_ClosedForm):
    """The optimal clip of a Laplace distribution (ACIQ)."""

    name = "laplace"

    def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
        """Clip at α = b · W(3·4^M)."""
        ratio = laplace_clip(effective_bits(bits, profile.activation)).to(profile.statistics.mean.device)
        return clip_range(profile.statistics, profile.statistics.absdev * ratio, profile.activation)


class Gaussian(_ClosedForm):
    """The optimal clip of a Gaussian distribution."""

    name = "gaussian"

    def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
        """Clip at a multiple of σ."""
        ratio = gaussian_clip(effective_bits(bits, profile.activation)).to(profile.statistics.mean.device)
        return clip_range(profile.statistics, profile.statistics.std * ratio, profile.activation)

    def spread(self, statistics: ChannelStatistics) -> Tensor:
        """Return σ."""
        return statistics.std


class Mse(ClipRule):
    """The range with the least error, searched on the histogram."""

    name = "mse"
    looks_before = False
    at_eight_bits = "headroom"
    foresees = True

    def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
        """Search both limits together."""
        assert profile.histogram is not None
        return search_clip(profile.histogram, bits, profile.exponent)


class Percentile(ClipRule):
    """All but a share of the values."""

    name = "percentile"
    looks_before = False

    def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
        """Leave out as many on either side."""
        assert profile.histogram is not None
        return percentile_clip(profile.histogram)


class Kld(ClipRule):
    """The range with the least Kullback-Leibler divergence (TensorRT)."""

    name = "kld"
    looks_before = False

    def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
        """Compare thresholds."""
        assert profile.histogram is not None
        return kld_clip(profile.histogram, bits)


class _BestOf(ClipRule):
    """The best of several rules as measured, tensor by tensor."""

    rules: ClassVar[tuple[str, ...]]

    def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
        """Not called: a candidate is chosen first."""
        raise NotImplementedError

    def candidates(self, profile: TensorProfile) -> Sequence[ClipRule]:
        return [c for name in self.rules for c in ClipRule.named(name).candidates(profile)]


class Mix(_BestOf):
    """The better one of the two closed forms."""

    name = "mix"
    rules = ("laplace", "gaussian")


class Auto(_BestOf):
    """The best one of all but kld."""

    name = "auto"
    at_eight_bits = "headroom"
    foresees = True
    rules = ("laplace", "gaussian", "percentile", "mse", "minmax")
