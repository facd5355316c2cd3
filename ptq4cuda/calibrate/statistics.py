"""Statistics of a tensor's channels that merge over batches, workers and machines: moments and histograms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4cuda import ops
from ptq4cuda.processes import ALONE, Processes

_COUNTED, _COUNTED_SAMPLES = 1 << 19, 64  # values of a channel and samples that tell enough of a distribution


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
        return cls(*_table(x, axis, centre).unbind(1))

    @classmethod
    def over(
        cls,
        batches: Callable[[], Iterable[Tensor]],
        axis: int | None = 1,
        processes: Processes = ALONE,
        absdev: bool = True,
    ) -> ChannelStatistics:
        """Measure several batches.

        Args:
            batches: yields them.
            axis: of the channels.
            processes: whose batches follow each other.
            absdev: read all twice, as absdev needs the mean of all before it can be summed. Without it is that about
                the mean of each batch.
        """
        parts = cls._of_each(batches(), axis, None, processes)
        if absdev and len(parts) > 1:
            parts = cls._of_each(batches(), axis, cls.merged(parts).mean, processes)
        return cls.merged(parts)

    @classmethod
    def _of_each(
        cls, batches: Iterable[Tensor], axis: int | None, centre: Tensor | None, processes: Processes
    ) -> list[ChannelStatistics]:
        """Measure each batch of all processes."""
        tables = processes.gather([_table(x, axis, centre) for x in batches])
        return [cls(*table.unbind(1)) for table in tables]

    @classmethod
    def merged(cls, parts: Sequence[ChannelStatistics]) -> ChannelStatistics:
        """Return the statistics of all parts, merged one by one.

        Raises:
            ValueError: there are none.
        """
        if not parts:
            raise ValueError("there are no batches to measure")
        return functools.reduce(cls.merge, parts)

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


def positives(x: Tensor, axis: int) -> Tensor:
    """Return how many values of each channel are positive, float64 [C]."""
    count, positive = ops.channel_statistics(x, axis)[:, [0, 6]].unbind(1)
    return (count * positive).round()


def _table(x: Tensor, axis: int | None, centre: Tensor | None) -> Tensor:
    """Return the statistics of a tensor as float64 [C, 7]."""
    if axis is None:
        x, axis = x.unsqueeze(0), 0
    return ops.channel_statistics(x, axis, centre)


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
    def over(
        cls,
        batches: Callable[[], Iterable[Tensor]],
        axis: int | None = 1,
        bins: int = 512,
        processes: Processes = ALONE,
    ) -> ChannelHistogram:
        """Count the values of several batches, each read twice: first for the limits, which are those of all values.

        Where there are many, those of every so many samples are counted.

        Args:
            batches: yields them.
            axis: of the channels.
            bins: how many.
            processes: whose batches are counted together.

        Raises:
            ValueError: there are no batches, or they hold NaN or Inf.
        """
        total = ChannelStatistics.merged(ChannelStatistics._of_each(batches(), axis, None, processes))
        if not bool(torch.isfinite(total.mean).all()):
            raise ValueError("its input contains NaN or Inf on the calibration data")
        low, high = total.min.clamp_max(0.0), total.max.clamp_min(0.0)
        counts = torch.zeros(len(low), bins, dtype=torch.float64, device=low.device)
        zeros = torch.zeros_like(low)
        sizes, chunk = processes.placed([len(x) if axis is None or axis % x.dim() else 1 for x in batches()])
        step = max(1, min(int(total.count.max()) // _COUNTED, sum(sizes) // _COUNTED_SAMPLES))
        first, counted = sum(sizes[:chunk]), torch.zeros_like(low)
        for x, size in zip(batches(), sizes[chunk:], strict=False):
            x = x[-first % step :: step] if size > 1 else x
            first += size
            x, channel_axis = (x, axis) if axis is not None else (x.unsqueeze(0), 0)
            counts += ops.channel_histogram(x, low.float(), high.float(), bins, channel_axis)
            own = x.numel() // len(low)
            counted += own
            zeros += own - positives(x, channel_axis)
            if bool((low < 0).any()):
                zeros -= positives(-x, channel_axis)
        counts, zeros, counted = processes.total([counts, zeros, counted])  # whole numbers
        width = ((high - low) / bins).clamp_min(torch.finfo(torch.float32).tiny)
        bin_of_zero = (-low / width).long().clamp_max(bins - 1)[:, None]
        counts.scatter_add_(1, bin_of_zero, -zeros[:, None])
        return cls(low, high, counts.clamp_min(0.0) / counted.clamp_min(1)[:, None])

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

    @property
    def mean_square(self) -> Tensor:
        """Mean of the squared values, to the width of a bin, float64 [C]."""
        return (self.density * self.values.square()).sum(1)
