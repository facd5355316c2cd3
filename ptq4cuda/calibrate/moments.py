"""Second moments of a layer: what the solvers of weights know about the data.

With u the layer's input as the quantized network delivers it (a patch of a convolution's input, in code units where
the scale is folded into the weights) and t the output to reproduce, the squared error of weights W is, once the bias
has matched the means,

    E|t - W u|² = const - 2 tr(W Bᵀ) + tr(W H Wᵀ),    H = cov(u, u),  B = cov(t, u).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ptq4cuda.nn import QuantModule
from ptq4cuda.processes import ALONE, Processes
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

    def on_grid(self, grid: Moments) -> Moments:
        """Round each sum to a grid on which sums of all of them are exact, in whatever order; see _grid_of."""
        return Moments(
            self.count,
            *(
                (own + far).sub_(far)
                for own, far in ((self.uu, grid.uu), (self.tu, grid.tu), (self.u, grid.u), (self.t, grid.t))
            ),
        )

    def total(self, processes: Processes) -> Moments:
        """Return the moments of the samples of all processes."""
        count = sum(processes.gather([self.count]))
        return Moments(count, *processes.total([self.uu, self.tu, self.u, self.t]))

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
        """H = cov(u, u) [G, d, d], and what rounding may have made of the variances of inputs that hardly vary."""
        mean, squares = self.mean_u, self.uu / self.count
        rounding = 1e-12 * squares.diagonal(dim1=1, dim2=2)
        found = squares.sub_(mean[:, :, None] * mean[:, None, :])
        found.diagonal(dim1=1, dim2=2).add_(rounding)
        return found

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


def _grid_of(u: Tensor, t: Tensor, count: int) -> Moments:
    """Return numbers that round sums to a grid when they are added and taken away again.

    1.5 · 2⁵² q added to p leaves no room for less than q: p comes back as a multiple of q. Here q is such that sums
    of `count` products are below 2⁵¹ q: sums of rounded ones are whole numbers of q and fit into the 53 bits of
    float64. They do not depend on the order in which they are added, nor on who adds what.

    Args:
        u: float64 [G, d], what no input exceeds.
        t: float64 [G, R], what no output exceeds.
        count: how many samples there are in all.
    """
    u, t = (torch.exp2(bound.log2().ceil()) for bound in (u, t))
    far = 1.5 * 2.0 ** (math.ceil(math.log2(max(1, count))) + 2)
    return Moments(0, far * u[:, :, None] * u[:, None, :], far * t[:, :, None] * u[:, None, :], far * u, far * t)


def layer_moments(
    module: QuantModule, inputs: Iterable[Tensor], targets: Iterable[Tensor], processes: Processes = ALONE
) -> tuple[Moments, Moments] | Samples:
    """Measure a layer over all chunks, once for the samples of even and once for those of odd number.

    Two halves of different samples let a solver judge on one what it fitted on the other. Of a layer of more than
    WIDEST inputs the samples are returned, as many as 256 MiB hold.

    Args:
        module: quantizes the input, and has the layer's geometry.
        inputs: the input of each chunk, on any device.
        targets: the output to reproduce, [N, O, H, W] or [..., O] for each chunk; read twice.
        processes: whose chunks follow each other.
    """
    outputs, width = module.weight_shape[0], module.weight_shape[1:].numel()
    groups, device = module.groups, module.weight_scale.device
    extents = [_extent(module, target) for target in targets]
    all_extents, chunks_before = processes.placed(extents)
    positions = sum(extent.positions for extent in all_extents)
    count = min(positions, MAX_SAMPLES, max(MIN_SAMPLES, SAMPLES_PER_INPUT * width))
    before = all_extents[:chunks_before]
    first, first_sample = sum(extent.positions for extent in before), sum(extent.samples for extent in before)
    if width <= WIDEST:
        reach = torch.stack([extent.reach for extent in all_extents]).amax(0)
        grid = _grid_of(_reach_of_input(module), reach.to(device).view(groups, -1), count)
        a, b = (Moments(0, *map(torch.zeros_like, (grid.uu, grid.tu, grid.u, grid.t))) for _ in range(2))
        halves = [a, b]
        for half, u, t in _samples(module, inputs, targets, positions, count, first, first_sample):
            halves[half] += Moments.of(u, t).on_grid(grid)
        a, b = (half.total(processes) for half in halves)
        return a, b if b.count else a  # a single sample cannot be halved
    count = min(count, max(BLOCK, _KEPT // (width + outputs)))
    low, high = torch.searchsorted(
        _picked(positions, count),
        torch.tensor([first, first + sum(extent.positions for extent in extents)], device="cpu"),
    ).tolist()
    u, t = (torch.empty(groups, high - low, size, device=device) for size in (width, outputs // groups))
    odd = torch.empty(high - low, dtype=torch.bool, device=device)
    filled = 0
    for half, some_u, some_t in _samples(module, inputs, targets, positions, count, first, first_sample):
        here = slice(filled, filled + some_u.shape[1])
        u[:, here], t[:, here], odd[here] = some_u, some_t, half == 1
        filled = here.stop
    if processes.count == 1:
        return Samples(u, t, odd)
    us, ts, odds = zip(*processes.gather([(u, t, odd)]), strict=True)
    return Samples(torch.cat(us, 1), torch.cat(ts, 1), torch.cat(odds))


class _Extent(NamedTuple):
    """A chunk of targets.

    Attributes:
        positions: of output maps.
        samples: how many.
        reach: float64 [O], the largest magnitude of each channel.
    """

    positions: int
    samples: int
    reach: Tensor


def _extent(module: QuantModule, target: Tensor) -> _Extent:
    rows = _channels_last(module, target)
    reach = rows.flatten(0, -2).abs().amax(0).double().cpu()
    return _Extent(rows[..., 0].numel(), len(rows), reach)


def _channels_last(module: QuantModule, target: Tensor) -> Tensor:
    """Return targets as [N, ..., O]."""
    target = target.unsqueeze(0) if module.spec.is_single(target) else target
    return target.movedim(module.spec.axis, -1)


def _reach_of_input(module: QuantModule) -> Tensor:
    """Return what no quantized input exceeds, float64 [G, d]."""
    kernel, channels = module.weight_shape[2:].numel(), module.weight_shape[1] * module.groups
    quantizer = module.activation
    assert quantizer is not None
    zero = quantizer.zero_point.double()
    reach = torch.maximum(zero.abs(), torch.exp2(quantizer.bits.double()) - 1.0 - zero)
    if not module.folded:
        reach = reach * quantizer.scale.double()
    reach = reach.expand(channels).view(module.groups, 1, -1)
    return reach.expand(-1, kernel, -1).reshape(module.groups, -1)


def _picked(positions: int, count: int) -> Tensor:
    """Return which positions are looked at, in order, int64 [count]."""
    if positions <= count:
        return torch.arange(positions, device="cpu")
    # One of each of equal parts, wherever the chunks are cut.
    generator = torch.Generator().manual_seed(0)
    jitter = torch.rand(count, dtype=torch.float64, generator=generator, device="cpu")
    return ((torch.arange(count, device="cpu") + jitter) * (positions / count)).long()


def _samples(
    module: QuantModule,
    inputs: Iterable[Tensor],
    targets: Iterable[Tensor],
    positions: int,
    count: int,
    first: int,
    first_sample: int,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield which half they belong to and samples u float32 [G, n, d] and t float32 [G, n, R], `count` in all.

    Args:
        module: quantizes the input, and has the layer's geometry.
        inputs: of this process, chunk by chunk.
        targets: the same.
        positions: of the output, in all processes.
        count: how many of these are looked at.
        first: how many positions come before those of this process.
        first_sample: the same of samples.
    """
    groups, device = module.groups, module.weight_scale.device
    picked = _picked(positions, count)
    for x, target in zip(inputs, targets, strict=True):
        u = module.quantized_input(x.to(device))
        u = u.unsqueeze(0) if module.spec.is_single(u) else u
        t = _channels_last(module, target.to(device))
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
