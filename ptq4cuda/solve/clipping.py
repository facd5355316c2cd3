"""Clip values: in closed form (Banner, Nahshan, Soudry 2019, section 2), and searched on a histogram.

A tensor clipped to [-α, α] and quantized to M bits loses the tails and rounds the rest. For a density that is
symmetric about its mean the expected squared error is clip noise + α² / (3·4^M); the clip value that minimises it
has a closed form for the Laplace distribution and takes a few Newton steps for the Gaussian. M may be any real
number.

No closed form may be trusted blindly: a histogram shows what a range costs on the values themselves, whatever their
distribution, and the best range can be searched on it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.calibrate.statistics import ChannelHistogram, ChannelStatistics
from ptq4cuda.quantizer import QuantParams

ClosedForm = Literal["laplace", "gaussian", "minmax"]
ClipRule = Literal["laplace", "gaussian", "minmax", "mse", "percentile", "kld", "mix", "auto"]
CLIP_RULES = get_args(ClipRule)
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
    statistics: ChannelStatistics, bits: Tensor, rule: ClosedForm, activation: Activation = IDENTITY
) -> tuple[Tensor, Tensor]:
    """Return the range to quantize of activation(x), from the statistics of x ("fused ReLU").

    A ReLU keeps half of the range 2α, so the same rounding noise is reached with one bit less: α is that of M + 1
    bits, clipped at max(mean, 0) + α. An activation that keeps another part of it gets log2 of that part.

    Args:
        statistics: of x, BEFORE the activation.
        bits: [C] or [1] bits of each channel.
        rule: "laplace" or "gaussian" clip to α; "minmax" keeps the whole range.
        activation: what follows x.

    Returns:
        Low and high, float64 [C], never outside of the values that were seen.
    """
    low, high = activation(statistics.min), activation(statistics.max)
    if rule == "minmax":
        return low, high
    slope = activation.negative_slope
    effective = bits.double() - math.log2((1.0 + slope) / 2.0)
    if rule == "laplace":
        alpha = statistics.absdev * laplace_clip(effective)
    else:
        alpha = statistics.std * gaussian_clip(effective)
    centre = statistics.mean
    if slope < 1.0:  # the kink is at zero
        clip_low, clip_high = centre.clamp_max(0.0) - alpha, centre.clamp_min(0.0) + alpha
    else:
        clip_low, clip_high = centre - alpha, centre + alpha
    return torch.maximum(low, activation(clip_low)), torch.minimum(high, activation(clip_high))


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
    density = histogram.density
    bins = density.shape[1]
    edges = torch.linspace(0.0, bins, _EDGES + 1, dtype=torch.float64, device=density.device)
    zero = -histogram.low / (histogram.high - histogram.low).clamp_min(torch.finfo(torch.float32).tiny) * bins
    middles = torch.arange(bins, dtype=torch.float64, device=density.device) + 0.5
    distance = middles[:, None] - edges  # in bins, the same for all channels
    # Noise that clipping at each edge makes; a range has to contain zero.
    above = density @ distance.clamp_min(0.0).pow(exponent)
    below = density @ distance.neg().clamp_min(0.0).pow(exponent)
    above = torch.where(edges >= zero[:, None], above, torch.inf)
    below = torch.where(edges <= zero[:, None], below, torch.inf)
    if bool((histogram.low >= 0).all()):
        below, lower = below[:, :1], edges[:1]
    else:
        lower = edges
    under = density @ (distance < 0).double()  # share of values under each edge
    step = (edges[None, :] - lower[:, None]).clamp_min(0.0) / (2.0**bits - 1.0)
    rounding = (step / 2.0).pow(exponent)

    def noise(rows: slice) -> Tensor:
        inside = under[rows, None, :] - under[rows, : len(lower), None]
        return (below[rows, :, None] + above[rows, None, :]).add_(inside.mul_(rounding).div_(exponent + 1.0))

    # A few channels at a time, whose tables of all ranges stay in the cache.
    parts = [slice(first, first + _ROWS) for first in range(0, len(density), _ROWS)]
    best = torch.cat([noise(rows).flatten(1).argmin(1) for rows in parts])
    width = (histogram.high - histogram.low) / bins
    low = histogram.low + lower[best // len(edges)] * width
    high = histogram.low + edges[best % len(edges)] * width
    return low.clamp_max(0.0), high.clamp_min(0.0)


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
