"""Second moments of a layer: what the solvers of weights know about the data.

With u the layer's input as the quantized network delivers it (a patch of a convolution's input, in code units where
the scale is folded into the weights) and t the output to reproduce, the squared error of weights W is, once the bias
has matched the means,

    E|t - W u|² = const - 2 tr(W Bᵀ) + tr(W H Wᵀ),    H = cov(u, u),  B = cov(t, u).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ptq4cuda.nn import QuantModule
from ptq4cuda.solve.blocks import BLOCK, WIDEST

MAX_SAMPLES = 65536  # positions of output maps that are looked at; neighbours tell much the same
MIN_SAMPLES = 32768
SAMPLES_PER_INPUT = 256
_CHUNK = 8192  # rows of a float32 product before it is added in float64
_KEPT = 1 << 26  # values of a wide layer's samples


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of G groups of d inputs and R outputs each, float64; sums over n samples add up.

    Attributes:
        count: n.
        uu: Σ u uᵀ [G, d, d].
        tu: Σ t uᵀ [G, R, d].
        u: Σ u [G, d].
        t: Σ t [G, R].
    """

    count: int
    uu: Tensor
    tu: Tensor
    u: Tensor
    t: Tensor

    @classmethod
    def of(cls, u: Tensor, t: Tensor) -> Moments:
        """Sum up samples u float32 [G, n, d] and t float32 [G, n, R].

        Products of float32 are summed about the mean: of values far from zero little else would be left.
        """
        n = u.shape[1]
        mean_u, mean_t = u.mean(1, keepdim=True), t.mean(1, keepdim=True)
        u, t = u - mean_u, t - mean_t
        mu, mt = mean_u.double(), mean_t.double()
        su, st = u.sum(1, keepdim=True, dtype=torch.float64), t.sum(1, keepdim=True, dtype=torch.float64)
        return cls(
            n,
            (u.mT @ u).double() + mu.mT @ su + su.mT @ mu + n * (mu.mT @ mu),
            (t.mT @ u).double() + mt.mT @ su + st.mT @ mu + n * (mt.mT @ mu),
            (su + n * mu).squeeze(1),
            (st + n * mt).squeeze(1),
        )

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples."""
        return Moments(
            self.count + other.count, self.uu + other.uu, self.tu + other.tu, self.u + other.u, self.t + other.t
        )

    @property
    def mean_u(self) -> Tensor:
        """E u [G, d]."""
        return self.u / self.count

    @property
    def mean_t(self) -> Tensor:
        """E t [G, R]."""
        return self.t / self.count

    @cached_property
    def covariance(self) -> Tensor:
        """H = cov(u, u) [G, d, d]."""
        mean = self.mean_u
        return (self.uu / self.count).sub_(mean[:, :, None] * mean[:, None, :])

    @cached_property
    def cross(self) -> Tensor:
        """B = cov(t, u) [G, R, d]."""
        return self.tu / self.count - self.mean_t[:, :, None] * self.mean_u[:, None, :]

    def bias(self, weight: Tensor) -> Tensor:
        """Return the bias [G, R] with which weights [G, R, d] match the mean of t."""
        return self.mean_t - (weight.double() @ self.mean_u[:, :, None]).squeeze(2)


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a wide layer, whose moments of d x d would take too much memory and time.

    Attributes:
        u: float32 [G, n, d].
        t: float32 [G, n, R].
        odd: bool [n], the number of whose sample is odd.
    """

    u: Tensor
    t: Tensor
    odd: Tensor

    def halves(self, u: Tensor, t: Tensor) -> tuple[Moments, Moments]:
        """Return the moments of some inputs and outputs over the samples of even and of odd number."""
        a, b = (_sum(u[:, half], t[:, half]) for half in (~self.odd, self.odd))
        assert a is not None
        return a, b if b is not None else a  # a single sample cannot be halved


def _sum(u: Tensor, t: Tensor) -> Moments | None:
    total: Moments | None = None
    for some_u, some_t in zip(u.split(_CHUNK, 1), t.split(_CHUNK, 1), strict=True):
        if some_u.shape[1]:
            moments = Moments.of(some_u, some_t)
            total = moments if total is None else total + moments
    return total


def layer_moments(
    module: QuantModule, inputs: Iterable[Tensor], targets: Iterable[Tensor], positions: int
) -> tuple[Moments, Moments] | Samples:
    """Measure a layer over all chunks, once for the samples of even and once for those of odd number.

    Two halves of different samples let a solver judge on one what it fitted on the other. Of a layer of more than
    WIDEST inputs the samples are returned, as many as 256 MiB hold.

    Args:
        module: quantizes the input, and has the layer's geometry.
        inputs: the input of each chunk, on any device.
        targets: the output to reproduce, [N, O, H, W] or [..., O] for each chunk.
        positions: of the output, in all chunks.
    """
    outputs, width = module.weight_shape[0], module.weight_shape[1:].numel()
    count = min(positions, MAX_SAMPLES, max(MIN_SAMPLES, SAMPLES_PER_INPUT * width))
    if width <= WIDEST:
        halves: list[Moments | None] = [None, None]
        for half, u, t in _samples(module, inputs, targets, positions, count):
            moments, previous = Moments.of(u, t), halves[half]
            halves[half] = moments if previous is None else previous + moments
        a, b = halves
        assert a is not None
        return a, b if b is not None else a  # a single sample cannot be halved
    count = min(count, max(BLOCK, _KEPT // (width + outputs)))
    groups, device = module.groups, module.weight_scale.device
    u, t = (torch.empty(groups, count, size, device=device) for size in (width, outputs // groups))
    odd = torch.empty(count, dtype=torch.bool, device=device)
    first = 0
    for half, some_u, some_t in _samples(module, inputs, targets, positions, count):
        here = slice(first, first + some_u.shape[1])
        u[:, here], t[:, here], odd[here] = some_u, some_t, half == 1
        first = here.stop
    return Samples(u, t, odd)


def _samples(
    module: QuantModule, inputs: Iterable[Tensor], targets: Iterable[Tensor], positions: int, count: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield which half they belong to and samples u float32 [G, n, d] and t float32 [G, n, R], `count` in all."""
    groups, device = module.groups, module.weight_scale.device
    picked = torch.arange(positions, device="cpu")
    if positions > count:  # one of each of equal parts, wherever the chunks are cut
        generator = torch.Generator().manual_seed(0)
        jitter = torch.rand(count, dtype=torch.float64, generator=generator, device="cpu")
        picked = ((torch.arange(count, device="cpu") + jitter) * (positions / count)).long()
    first = first_sample = 0
    for x, target in zip(inputs, targets, strict=True):
        u = module.quantized_input(x.to(device))
        t = target.to(device)
        if module.spec.is_single(u):
            u, t = u.unsqueeze(0), t.unsqueeze(0)
        t = t.movedim(module.spec.axis, -1)
        rows = t[..., 0].numel()
        low, high = torch.searchsorted(picked, torch.tensor([first, first + rows], device="cpu")).tolist()
        here = picked[low:high] - first
        # By the sample, so that no image is in both halves.
        odd = (first_sample + here // max(1, rows // len(t))) % 2 == 1
        first, first_sample = first + rows, first_sample + len(t)
        for half, part in enumerate((here[~odd], here[odd])):
            for some in part.split(_CHUNK):
                if len(some):
                    yield half, *_samples_at(module, u, t, some.to(u.device), groups)


def _samples_at(module: QuantModule, u: Tensor, t: Tensor, rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return what the outputs at some positions of t [*, O] read of u, and these outputs."""
    at = torch.unravel_index(rows, t.shape[:-1])
    n, channels = len(rows), u.shape[module.spec.axis] // groups
    inputs = module.spec.windows(module, u)[at]  # [n, *kernel, C]
    inputs = inputs.reshape(n, -1, groups, channels).permute(2, 0, 1, 3).reshape(groups, n, -1)
    outputs = t[at].view(n, groups, -1).permute(1, 0, 2)
    return inputs.float(), outputs.float()
