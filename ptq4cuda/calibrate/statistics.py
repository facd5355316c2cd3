"""Statistics of a tensor's channels that merge over batches, workers and machines: moments and histograms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4cuda import ops


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Moments of each channel, float64 [C] each.

    Attributes:
        count: number of values.
        min: smallest value.
        max: largest value.
        mean: mean value.
        m2: sum of squared deviations from the mean.
        absdev: mean absolute deviation E|x - mean|, the b of a Laplace distribution.
        positive: fraction of values > 0.
    """

    count: Tensor
    min: Tensor
    max: Tensor
    mean: Tensor
    m2: Tensor
    absdev: Tensor
    positive: Tensor

    @classmethod
    def of(cls, x: Tensor, axis: int | None = 1, centre: Tensor | None = None) -> ChannelStatistics:
        """Measure one tensor along its channel axis, or as a single channel where axis is None."""
        if axis is None:
            x, axis = x.unsqueeze(0), 0
        return cls(*ops.channel_statistics(x, axis, centre).unbind(1))

    @classmethod
    def over(cls, batches: Callable[[], Iterable[Tensor]], axis: int | None = 1) -> ChannelStatistics:
        """Measure several batches, each read twice: absdev needs the mean of all before it can be summed."""
        moments: ChannelStatistics | None = None
        count = 0
        for x in batches():
            moments = cls.of(x, axis) if moments is None else moments.merge(cls.of(x, axis))
            count += 1
        if moments is None:
            raise ValueError("there are no batches to measure")
        if count == 1:
            return moments
        about_mean = None
        for x in batches():
            part = cls.of(x, axis, moments.mean)
            about_mean = part if about_mean is None else about_mean.merge(part)
        assert about_mean is not None
        return about_mean

    @property
    def std(self) -> Tensor:
        """Standard deviation (of the values seen: divided by count)."""
        return (self.m2 / self.count.clamp_min(1)).sqrt()

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Return the statistics of both sets of values (Chan, Golub, LeVeque 1979).

        All but absdev are exact. absdev is the average of the two, exact where both were taken about one centre
        and otherwise off by no more than the distance of the means from the merged mean.
        """
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        delta = torch.where((self.count > 0) & (other.count > 0), other.mean - self.mean, 0.0)
        mean = torch.where(self.count > 0, self.mean + delta * share, other.mean)
        return ChannelStatistics(
            count=count,
            min=torch.minimum(self.min, other.min),
            max=torch.maximum(self.max, other.max),
            mean=mean,
            m2=self.m2 + other.m2 + delta.square() * self.count * share,
            absdev=self.absdev * (1 - share) + other.absdev * share,
            positive=self.positive * (1 - share) + other.positive * share,
        )


@dataclass(frozen=True, eq=False)
class ChannelHistogram:
    """How often each channel has which values, exact zeros apart: every quantizer represents these exactly.

    Attributes:
        low: float64 [C], lower limit, <= 0.
        high: float64 [C], upper limit, >= 0.
        density: float64 [C, bins], share of all values of the channel; with the zeros it adds up to 1.
    """

    low: Tensor
    high: Tensor
    density: Tensor

    @classmethod
    def over(cls, batches: Callable[[], Iterable[Tensor]], axis: int | None = 1, bins: int = 512) -> ChannelHistogram:
        """Count the values of several batches, each read twice: first for the limits.

        Raises:
            ValueError: there are no batches, or they hold NaN or Inf.
        """

        def by_channel() -> Iterable[tuple[Tensor, int]]:
            return ((x, axis) if axis is not None else (x.unsqueeze(0), 0) for x in batches())

        total: ChannelStatistics | None = None
        for x, channel_axis in by_channel():
            part = ChannelStatistics.of(x, channel_axis)
            total = part if total is None else total.merge(part)
        if total is None:
            raise ValueError("there are no batches to count")
        if not bool(torch.isfinite(total.mean).all()):
            raise ValueError("its input contains NaN or Inf on the calibration data")
        low, high = total.min.clamp_max(0.0), total.max.clamp_min(0.0)
        counts = torch.zeros(len(low), bins, dtype=torch.float64, device=low.device)
        zeros = torch.zeros_like(low)
        for x, channel_axis in by_channel():
            counts += ops.channel_histogram(x, low.float(), high.float(), bins, channel_axis)
            others = [d for d in range(x.dim()) if d != channel_axis % x.dim()]
            zeros += (x == 0).sum(others, dtype=torch.float64)
        width = ((high - low) / bins).clamp_min(torch.finfo(torch.float32).tiny)
        bin_of_zero = (-low / width).long().clamp_max(bins - 1)[:, None]
        counts.scatter_add_(1, bin_of_zero, -zeros[:, None])
        return cls(low, high, counts.clamp_min(0.0) / total.count.clamp_min(1)[:, None])

    @property
    def values(self) -> Tensor:
        """The middle of each bin, float64 [C, bins]."""
        bins = self.density.shape[1]
        middles = (torch.arange(bins, dtype=torch.float64, device=self.low.device) + 0.5) / bins
        return self.low[:, None] + middles * (self.high - self.low)[:, None]

    @property
    def mean(self) -> Tensor:
        """Mean value, to the width of a bin, float64 [C]."""
        return (self.density * self.values).sum(1)
