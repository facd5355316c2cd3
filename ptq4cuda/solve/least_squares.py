"""Weights that reproduce a float layer's output from the quantized input.

Ridge regression towards weights V: with the moments H = cov(u, u) and B = cov(t, u),

    W* = (B + λ V D) (H + λ D)⁻¹     minimises     E|t - W* u|² + λ tr((W* - V) D (W* - V)ᵀ)

with D = diag(H): the result does not depend on the units of the inputs, which folded scales make very different.

V are the float weights W times a gain g for each input: a noisy input deserves less trust than the float one, and a
gain is known from few samples, as all outputs have a say in it. It minimises

    E|t - W diag(g) u|² + Σ_j (g_j - 1)² D_j |W_j|²:     (WᵀW ∘ (H + D)) (g - 1) = diag(Wᵀ (B - W H)).

A few hundred images tell less about a wide layer than about a narrow one. λ is therefore not a constant: two halves
of the samples choose it, each judging what was fitted on the other, and whether there are gains at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ptq4cuda.calibrate.moments import Moments, Samples
from ptq4cuda.solve.blocks import block_count, from_blocks, to_blocks

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # λ, a share of the variance of each input
_GAIN_RIDGE = 1.0
_ROUNDING_RIDGE = 0.1


@dataclass(frozen=True, eq=False)
class Target:
    """What to round.

    Attributes:
        weight: W*, float64 [G, R, d].
        covariance: the metric of rounding errors, H and a tenth of λ D, float64 [G, d, d]. (All of λ D is the metric
            of the regression itself; a tenth of it measured best.) Of a wide layer its blocks,
            [G * blocks, d / blocks, d / blocks].
    """

    weight: Tensor
    covariance: Tensor


def fit_weights(weight: Tensor, halves: tuple[Moments, Moments]) -> Target:
    """Return the weights that best reproduce the target from the quantized input.

    Args:
        weight: the float weights, [G, R, d].
        halves: moments of two disjoint sets of samples.
    """
    near_a = near_b = near = weight.double()
    a, b = halves
    total = a + b
    ridge = RIDGES[-1]
    if a is not b:
        with_a, with_b = _with_gains(a, near), _with_gains(b, near)
        if _error(b, with_a) + _error(a, with_b) < _error(b, near) + _error(a, near):
            near_a, near_b, near = with_a, with_b, _with_gains(total, near)

        @cache
        def error(index: int) -> float:
            ridge = RIDGES[index]
            return _error(b, _solve(a, near_a, ridge)) + _error(a, _solve(b, near_b, ridge))

        # It falls to the best ridge and rises from there: halve what is left.
        first, last = 0, len(RIDGES) - 1
        while first < last:
            middle = (first + last) // 2
            first, last = (middle + 1, last) if error(middle + 1) < error(middle) else (first, middle)
        ridge = RIDGES[first]
    covariance = total.covariance
    metric = _with_diagonal(covariance, _ROUNDING_RIDGE * ridge * _variances(covariance))
    return Target(_solve(total, near, ridge), metric)


def fit_blocks(weight: Tensor, samples: Samples, *, fit: bool) -> Target:
    """Return the same for a wide layer, fitted block by block to what the blocks before it leave to do.

    Time grows with the number of inputs, memory is that of the weights, of the samples and of one block.

    Args:
        weight: the float weights, [G, R, d].
        samples: of the layer.
        fit: False to measure the metric alone, of the weights as they are.
    """
    blocks = block_count(weight.shape[-1])
    inputs, parts = to_blocks(samples.u, blocks), to_blocks(weight, blocks)
    width = parts.shape[-1]
    metric = torch.empty(len(parts), width, width, dtype=torch.float64, device=parts.device)
    fitted = parts.float()
    missing = samples.t - samples.u @ weight.float().mT
    for block in range(blocks):
        of_block = slice(block, None, blocks)
        u, w = inputs[of_block], fitted[of_block]
        wanted = missing + u @ w.mT
        halves = samples.halves(u, wanted)
        if not fit:
            metric[of_block] = (halves[0] + halves[1]).covariance
            continue
        target = fit_weights(w, halves)
        metric[of_block], fitted[of_block] = target.covariance, target.weight.float()
        missing = wanted - u @ fitted[of_block].mT
        missing -= missing.mean(1, keepdim=True)  # for the bias
    return Target(from_blocks(fitted, blocks, weight.shape[-1]), metric)


def _variances(covariance: Tensor) -> Tensor:
    """Return the variance of each input [G, d], a little more than none for those that never vary."""
    variances = covariance.diagonal(dim1=1, dim2=2)
    return variances + 1e-3 * variances.mean(1, keepdim=True)


def _damping(moments: Moments, covariance: Tensor, ridge: float) -> Tensor:
    # Where all inputs are constant any weights do; a ridge above the rounding of the sums returns those given.
    floor = 1e-9 * (moments.uu.diagonal(dim1=1, dim2=2) / moments.count).mean(1, keepdim=True)
    return torch.maximum(ridge * _variances(covariance), floor).clamp_min(torch.finfo(torch.float32).tiny)


def _with_diagonal(matrix: Tensor, added: Tensor) -> Tensor:
    """Return matrices [G, d, d] with [G, d] added to their diagonals."""
    result = matrix.clone()
    result.diagonal(dim1=1, dim2=2).add_(added)
    return result


def _with_gains(moments: Moments, weight: Tensor) -> Tensor:
    """Return the float weights times the gain of each input."""
    covariance = moments.covariance
    products = weight.mT @ weight
    energy = products.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float32).tiny)
    damping = _damping(moments, covariance, _GAIN_RIDGE) * energy
    lower = torch.linalg.cholesky(_with_diagonal(products * covariance, damping))
    missing = ((moments.cross - weight @ covariance) * weight).sum(1)
    return weight * (1.0 + torch.cholesky_solve(missing[:, :, None], lower).mT)


def _solve(moments: Moments, near: Tensor, ridge: float) -> Tensor:
    """Return the weights of ridge regression towards those that are given."""
    covariance = moments.covariance
    damping = _damping(moments, covariance, ridge)
    right = moments.cross + damping[:, None, :] * near
    return torch.cholesky_solve(right.mT, torch.linalg.cholesky(_with_diagonal(covariance, damping))).mT


def _error(moments: Moments, weight: Tensor) -> float:
    """E|t - W u|² of centred t and u, but for the part that does not depend on W."""
    return float((((weight @ moments.covariance) - 2.0 * moments.cross) * weight).sum())
