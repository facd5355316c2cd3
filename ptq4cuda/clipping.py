"""Optimal clip values (Banner, Nahshan, Soudry 2019, section 2).

A tensor clipped to [-α, α] and quantized to M bits loses the tails and rounds the rest. For a density that is
symmetric about its mean the expected squared error is clip noise + α² / (3·4^M); the clip value that minimises it
has a closed form for the Laplace distribution and takes a few Newton steps for the Gaussian. M may be any real
number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ptq4cuda.statistics import ChannelStatistics

ClipRule = Literal["laplace", "gaussian", "minmax"]
CLIP_RULES = get_args(ClipRule)


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


@dataclass(frozen=True)
class Activation:
    """A piecewise linear activation that the next layer reads: min(x if x > 0 else negative_slope * x, upper).

    ReLU is (0, inf), ReLU6 (0, 6), no activation (1, inf).
    """

    negative_slope: float = 0.0
    upper: float = math.inf

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        return torch.where(x > 0, x, self.negative_slope * x).clamp_max(self.upper)


IDENTITY = Activation(negative_slope=1.0)


def clip_range(
    statistics: ChannelStatistics, bits: Tensor, rule: ClipRule, activation: Activation = IDENTITY
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
