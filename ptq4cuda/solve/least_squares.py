"""Weights that reproduce a float layer's output from the quantized input.

Ridge regression towards weights V: with the moments H = cov(u, u) and B = cov(t, u),

    W* = V + (B - V H) (H + λ D)⁻¹     minimises     E|t - W* u|² + λ tr((W* - V) D (W* - V)ᵀ)

with D = diag(H): the result does not depend on the units of the inputs, which folded scales make very different.

V are the float weights W times a gain g for each input: a noisy input deserves less trust than the float one, and a
gain is known from few samples, as all outputs have a say in it. It minimises

    E|t - W diag(g) u|² + Σ_j (g_j - 1)² D_j |W_j|²:     (WᵀW ∘ (H + D)) (g - 1) = diag(Wᵀ (B - W H)).

A few hundred images tell less about a wide layer than about a narrow one. λ is therefore not a constant: two halves
of the samples choose it, each judging what was fitted on the other, and whether there are gains at all. A choice
among nine is made in float32, what was chosen is then solved in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

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


@dataclass(frozen=True, eq=False)
class _Problem:
    """How to change weights, given moments of samples; all that is small is computed with numbers that are small.

    Attributes:
        covariance: H [G, d, d].
        missing: B - V H of the weights V as they are [G, R, d].
        least: damping [G, 1]. Where all inputs are constant any weights do; a ridge above the rounding of the sums
            returns those given.
        towards: the change that a ridge holds on to [G, R, d], None for no change.
    """

    covariance: Tensor
    missing: Tensor
    least: Tensor
    towards: Tensor | None = None

    @classmethod
    def of(cls, moments: Moments, weight: Tensor) -> _Problem:
        """Return that of some samples."""
        least = 1e-9 * (moments.uu.diagonal(dim1=1, dim2=2) / moments.count).mean(1, keepdim=True)
        return cls(moments.covariance, moments.cross - weight @ moments.covariance, least)

    def single(self) -> _Problem:
        """Return it in float32."""
        return _Problem(self.covariance.float(), self.missing.float(), self.least.float())

    def gains(self, weight: Tensor) -> Tensor:
        """Return the change of the weights by the gain of each input."""
        products = weight.mT @ weight
        # In float32 the product of two small numbers may be zero, as of an input without weights.
        energy = products.diagonal(dim1=1, dim2=2)
        damping = (self._damping(_GAIN_RIDGE) * energy).clamp_min(torch.finfo(torch.float32).tiny)
        lower = _factor(_with_diagonal(products.mul_(self.covariance), damping))
        missing = (self.missing * weight).sum(1)
        return weight * torch.cholesky_solve(missing[:, :, None], lower).mT

    def ridge(self, ridge: float) -> Tensor:
        """Return the change by ridge regression."""
        lower = _factor(_with_diagonal(self.covariance, self._damping(ridge)))
        change = torch.cholesky_solve(self._left.mT, lower).mT
        return change if self.towards is None else change.add_(self.towards)

    @cached_property
    def _left(self) -> Tensor:
        return self.missing if self.towards is None else self.missing - self.towards @ self.covariance

    def _damping(self, ridge: float) -> Tensor:
        found = torch.maximum(ridge * _variances(self.covariance), self.least)
        return found.clamp_min(torch.finfo(torch.float32).tiny)

    def error(self, change: Tensor) -> float:
        """Return by how much E|t - W u|² of centred t and u rises with a change of the weights."""
        return float(((change @ self.covariance).sub_(2.0 * self.missing).mul_(change)).sum(dtype=torch.float64))


def _factor(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor; where float32 rounds too much for one, that of float64."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.cholesky(matrix.double()).to(matrix.dtype) if bool(failed.any()) else lower


def fit_weights(weight: Tensor, halves: tuple[Moments, Moments]) -> Target:
    """Return the weights that best reproduce the target from the quantized input.

    Args:
        weight: the float weights, [G, R, d].
        halves: moments of two disjoint sets of samples.
    """
    near = weight.double()
    total = _Problem.of(halves[0] + halves[1], near)
    ridge = RIDGES[-1]
    if halves[0] is not halves[1]:
        a, b = (_Problem.of(half, near).single() for half in halves)
        with_a, with_b = a.gains(near.float()), b.gains(near.float())
        if b.error(with_a) + a.error(with_b) < 0.0:
            a, b = replace(a, towards=with_a), replace(b, towards=with_b)
            total = replace(total, towards=total.gains(near))

        @cache
        def error(index: int) -> float:
            return b.error(a.ridge(RIDGES[index])) + a.error(b.ridge(RIDGES[index]))

        # It falls to the best ridge and rises from there: halve what is left.
        first, last = 0, len(RIDGES) - 1
        while first < last:
            middle = (first + last) // 2
            first, last = (middle + 1, last) if error(middle + 1) < error(middle) else (first, middle)
        ridge = RIDGES[first]
    metric = _with_diagonal(total.covariance, _ROUNDING_RIDGE * ridge * _variances(total.covariance))
    return Target(near + total.ridge(ridge), metric)


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


def _with_diagonal(matrix: Tensor, added: Tensor) -> Tensor:
    """Return matrices [G, d, d] with [G, d] added to their diagonals."""
    result = matrix.clone()
    result.diagonal(dim1=1, dim2=2).add_(added)
    return result
