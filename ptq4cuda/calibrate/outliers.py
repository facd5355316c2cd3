"""Finds values that a vanishing share of the calibration samples alone holds: a broken pixel, an overexposed image.

Eight bits cannot hold such a value and those of all other samples, and no average survives it. What else is large and
rare is left alone: values that several samples confirm, and channels that few samples excite as far as others are
excited anyway.

A channel's extremes, one for each sample, are compared where they count: times the square root of what a squared
error of the channel costs. Extremes stand out by their ratio to the next one, and no less than to what is typical of
the tensor's channels. Keeping them costs all samples resolution: the rounding noise of 8 bits over a range `ratio`
times the usual one is ratio · 6 / (255 · √12) of values that are a sixth of that range. Clipping them costs the share
p of the samples all. They are clipped where the ratio is larger than p · 255 · √12 / 6, and beyond all that networks
make of clean images; where samples confirm each other, beyond what 8 bits can live with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4cuda.processes import ALONE, Processes

_PER_SHARE = 255.0 * math.sqrt(12.0) / 6.0
_LEAST_RATIO = 8.0  # networks on clean images: up to 6, up to 11 where fewer than eight samples are compared
_LEAST_OF_FEW, _FEW = 16.0, 8
_LEAST_CONFIRMED = 64.0
_SUSPECTED, _MOST_SUSPECTED = 3, 64  # samples at most, or one in 64 up to so many: those of each channel are held
_STRIPES = 16  # a sample that has no other beside it is compared by parts


@dataclass(frozen=True, eq=False)
class Outliers:
    """Outliers of a tensor.

    Attributes:
        low: float32 [C], the least of all other values; -inf for channels without outliers.
        high: float32 [C], the largest of all other values; inf for channels without outliers.
        axis: the channel axis.
        remark: what was found.
    """

    low: Tensor
    high: Tensor
    axis: int
    remark: str

    def clip(self, x: Tensor) -> Tensor:
        """Return the tensor without its outliers."""
        shape = [-1 if d == self.axis % x.dim() else 1 for d in range(x.dim())]
        low, high = (t.to(x.device, x.dtype).view(shape) for t in (self.low, self.high))
        return torch.minimum(torch.maximum(x, low), high)


def find_outliers(
    chunks: Sequence[Tensor], axis: int, importance: Tensor, processes: Processes = ALONE
) -> Outliers | None:
    """Return the outliers of a tensor, None where there are none.

    Args:
        chunks: [N, ...] each.
        axis: of the channels.
        importance: [C], what a squared error of each channel costs.
        processes: whose chunks follow each other.
    """
    shapes = processes.gather([tuple(x.shape) for x in chunks])
    if any(math.prod(shape) == 0 for shape in shapes):
        return None
    samples = sum(shape[0] for shape in shapes)
    parts = 1 if samples > 2 else _STRIPES
    most = suspected(samples * parts)
    own = [Extremes.of(x, axis, importance, most, parts) for x in chunks]
    every = functools.reduce(Extremes.merge, processes.gather(own[:1] and [functools.reduce(Extremes.merge, own)]))
    return every.outliers(axis, samples)


def suspected(samples: int) -> int:
    """Return how many of so many samples may be outliers, at most."""
    return max(1, min(samples // 8, max(_SUSPECTED, min(samples // 64, _MOST_SUSPECTED))))


@dataclass(frozen=True, eq=False)
class Extremes:
    """The extremes of samples: of each channel those of the few that reach farthest, and the limits of all others.

    Attributes:
        samples: or parts of samples, how many.
        finite: whether all are.
        most: how many may be outliers, or more.
        reach: float32 [most + 1, C] at most, how far they reach, where it counts.
        low: the same, their least values.
        high: the same, their largest values.
        number: the same, which samples they are of.
        rest_low: float32 [C], the least of all others.
        rest_high: float32 [C], the largest of all others.
    """

    samples: int
    finite: bool
    most: int
    reach: Tensor
    low: Tensor
    high: Tensor
    number: Tensor
    rest_low: Tensor
    rest_high: Tensor

    @classmethod
    def of(cls, x: Tensor, axis: int, importance: Tensor, most: int, parts: int = 1) -> Extremes:
        """Return those of a chunk [N, ...], each sample in parts."""
        low, high = (extremes.float() for extremes in sample_extremes(x, axis, parts))
        reach = torch.maximum(-low, high) * importance.to(low).sqrt()
        number = torch.arange(len(low), device=low.device)[:, None].expand(low.shape)
        finite = bool((torch.isfinite(low) & torch.isfinite(high)).all())
        none = torch.full_like(low[0], torch.inf)
        return cls(len(low), finite, most, reach, low, high, number, none, -none)._cut()

    def merge(self, other: Extremes) -> Extremes:
        """Return those of both, the other's samples after these."""
        return Extremes(
            self.samples + other.samples,
            self.finite and other.finite,
            self.most,
            torch.cat([self.reach, other.reach]),
            torch.cat([self.low, other.low]),
            torch.cat([self.high, other.high]),
            torch.cat([self.number, other.number + self.samples]),
            torch.minimum(self.rest_low, other.rest_low),
            torch.maximum(self.rest_high, other.rest_high),
        )._cut()

    def _cut(self) -> Extremes:
        if len(self.reach) <= self.most + 1:
            return self
        first = self.reach.topk(self.most + 1, dim=0).indices
        reach, low, high, number = (t.gather(0, first) for t in (self.reach, self.low, self.high, self.number))
        rest_low = torch.minimum(self.rest_low, self.low.scatter(0, first, torch.inf).amin(0))
        rest_high = torch.maximum(self.rest_high, self.high.scatter(0, first, -torch.inf).amax(0))
        return Extremes(self.samples, self.finite, self.most, reach, low, high, number, rest_low, rest_high)

    def outliers(self, axis: int, samples: int) -> Outliers | None:
        """Return what stands out, None where nothing does.

        Args:
            axis: of the channels.
            samples: how many there are, whole.
        """
        n, most = self.samples, min(suspected(self.samples), len(self.reach) - 1)
        if n < 3 or not self.finite:
            return None
        largest, order = self.reach.sort(dim=0, descending=True)
        low, high, number = (t.gather(0, order) for t in (self.low, self.high, self.number))
        largest = largest[: most + 1]
        typical = largest[-1].square().mean().sqrt().clamp_min(torch.finfo(low.dtype).tiny)
        ratio = largest[:-1] / torch.maximum(largest[1:], typical)
        how_many = torch.arange(1, most + 1, device=low.device)[:, None]
        least = torch.where(how_many > 1, _LEAST_CONFIRMED, _LEAST_RATIO if samples >= _FEW else _LEAST_OF_FEW)
        found = ratio > torch.maximum(_PER_SHARE * how_many / n, least)
        if not bool(found.any()):
            return None
        # The j largest go where the j-th stands out from the next one.
        count = (found * how_many).amax(0)
        outside = torch.arange(len(low), device=low.device)[:, None] < count
        trusted_low = torch.minimum(low.masked_fill(outside, torch.inf).amin(0), self.rest_low)
        trusted_high = torch.maximum(high.masked_fill(outside, -torch.inf).amax(0), self.rest_high)
        worst = int((ratio[0] * (count > 0)).argmax())
        extreme = max(high[:, worst].max().item(), -low[:, worst].min().item())
        others = max(trusted_high[worst].item(), -trusted_low[worst].item())
        kind = "samples" if n == samples else "parts of the samples"
        return Outliers(
            torch.where(count > 0, trusted_low, -torch.inf),
            torch.where(count > 0, trusted_high, torch.inf),
            axis,
            f"its input reaches {extreme:.3g} in {len(number[outside].unique())} of {n} {kind}, {others:.3g} in all "
            "others: clipped there",
        )


def sample_extremes(x: Tensor, axis: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each channel in each part of each sample, [N * parts, C] both."""
    if x.dim() <= 2:  # a single sample, for a linear layer, may have channels alone
        return x.view(-1, x.shape[-1]), x.view(-1, x.shape[-1])
    if parts == 1:
        others = [d for d in range(1, x.dim()) if d != axis % x.dim()]
        return x.amin(others), x.amax(others)
    positions = x.movedim(axis, -1).flatten(1, -2)
    stripes = positions.tensor_split(min(parts, positions.shape[1]), 1)
    return torch.cat([s.amin(1) for s in stripes]), torch.cat([s.amax(1) for s in stripes])
