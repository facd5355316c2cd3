"""Weights that reproduce a float layer's output from the quantized input.

Ridge regression towards the float weights W: with the moments H = cov(u, u) and B = cov(t, u),

    W* = (B + λ W D) (H + λ D)⁻¹     minimises     E|t - W* u|² + λ tr((W* - W) D (W* - W)ᵀ)

with D = diag(H): the result does not depend on the units of the inputs, which folded scales make very different.

A few hundred images tell less about a wide layer than about a narrow one. λ is therefore not a constant: two halves
of the samples choose it, each judging what was fitted on the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4cuda.moments import Moments

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # λ, a share of the variance of each input
_ROUNDING_RIDGE = 0.1


@dataclass(frozen=True, eq=False)
class Target:
    """What to round.

    Attributes:
        weight: W*, float64 [G, R, d].
        covariance: the metric of rounding errors, H and a tenth of λ D, float64 [G, d, d]. (All of λ D is the metric
            of the regression itself; a tenth of it measured best.)
    """

    weight: Tensor
    covariance: Tensor


def fit_weights(weight: Tensor, halves: tuple[Moments, Moments]) -> Target:
    """Return the weights that best reproduce the target from the quantized input.

    Args:
        weight: the float weights, [G, R, d].
        halves: moments of two disjoint sets of samples.
    """
    weight = weight.double()
    a, b = halves
    ridge = RIDGES[-1]
    if a is not b:
        errors = [_error(b, _solve(a, weight, r)) + _error(a, _solve(b, weight, r)) for r in RIDGES]
        ridge = min(zip(errors, RIDGES, strict=True))[1]
    total = a + b
    covariance = total.covariance
    metric = covariance + torch.diag_embed(_ROUNDING_RIDGE * ridge * _variances(covariance))
    return Target(_solve(total, weight, ridge), metric)


def _variances(covariance: Tensor) -> Tensor:
    """Return the variance of each input [G, d], a little more than none for those that never vary."""
    variances = covariance.diagonal(dim1=1, dim2=2)
    return variances + 1e-3 * variances.mean(1, keepdim=True)


def _solve(moments: Moments, weight: Tensor, ridge: float) -> Tensor:
    covariance = moments.covariance
    # Where all inputs are constant any weights do; a ridge above the rounding of the sums returns the float ones.
    floor = 1e-9 * (moments.uu.diagonal(dim1=1, dim2=2) / moments.count).mean(1, keepdim=True)
    damping = torch.maximum(ridge * _variances(covariance), floor).clamp_min(torch.finfo(torch.float32).tiny)
    right = moments.cross + damping[:, None, :] * weight
    return torch.cholesky_solve(right.mT, torch.linalg.cholesky(covariance + torch.diag_embed(damping))).mT


def _error(moments: Moments, weight: Tensor) -> float:
    """E|t - W u|² of centred t and u, but for the part that does not depend on W."""
    return float((((weight @ moments.covariance) - 2.0 * moments.cross) * weight).sum())
