"""Weights that reproduce a float layer's output from the quantized input.

Ridge regression towards the float weights W: with the moments H = cov(u, u) and B = cov(t, u),

    W* = (B + λ W) (H + λ I)⁻¹     minimises     E|t - W* u|² + λ |W* - W|².

A few hundred images tell less about a wide layer than about a narrow one. λ is therefore not a constant: two halves of
the samples choose it, each judging what was fitted on the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4cuda.moments import Moments

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # λ in units of the mean of H's diagonal
_ROUNDING_RIDGE = 0.1


@dataclass(frozen=True, eq=False)
class Target:
    """What to round.

    Attributes:
        weight: W*, float64 [G, R, d].
        covariance: the metric of rounding errors, H and a part of λ I, float64 [G, d, d]: λ whole is the metric of the
            ridge regression itself, none of it was as good, a tenth was best.
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
    damping = _ROUNDING_RIDGE * ridge * _mean_diagonal(covariance)
    return Target(
        _solve(total, weight, ridge), covariance + torch.diag_embed(damping[:, None].expand(covariance.shape[:2]))
    )


def _mean_diagonal(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=1, dim2=2).mean(1)


def _solve(moments: Moments, weight: Tensor, ridge: float) -> Tensor:
    covariance = moments.covariance
    # Where all inputs are constant any weights do; the smallest of ridges then returns the float ones.
    damping = (ridge * _mean_diagonal(covariance)).clamp_min(torch.finfo(torch.float32).tiny)
    damped = covariance + torch.diag_embed(damping[:, None].expand(covariance.shape[:2]))
    right = moments.cross + damping[:, None, None] * weight
    return torch.cholesky_solve(right.mT, torch.linalg.cholesky(damped)).mT


def _error(moments: Moments, weight: Tensor) -> float:
    """E|t - W u|² of centred t and u, but for the part that does not depend on W."""
    return float((((weight @ moments.covariance) - 2.0 * moments.cross) * weight).sum())
