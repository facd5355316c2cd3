"""Statistics of batches merge to those of all samples, in any order."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ptq4cuda.calibrate import statistics
from ptq4cuda.calibrate.statistics import ChannelHistogram, ChannelStatistics

FIELDS = ("count", "min", "max", "mean", "m2", "absdev", "positive")


def assert_same(a: ChannelStatistics, b: ChannelStatistics) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-10, msg=name)


def test_batches_give_what_one_tensor_gives() -> None:
    x = torch.randn(31, 5, 7, 6) * torch.tensor([1.0, 10.0, 0.1, 3.0, 0.0]).view(1, 5, 1, 1) + 4.0
    batches = list(x.split((1, 12, 18)))
    assert_same(ChannelStatistics.over(lambda: batches), ChannelStatistics.of(x))


def test_merge_in_any_order() -> None:
    parts = [
        ChannelStatistics.of(torch.randn(n, 3, 4), centre=torch.zeros(3, dtype=torch.float64)) for n in (1, 5, 9)
    ]
    a, b, c = parts
    assert_same(a.merge(b).merge(c), c.merge(a.merge(b)))


def test_merge_with_nothing() -> None:
    x = ChannelStatistics.of(torch.randn(4, 3, 2, 2))
    nothing = ChannelStatistics.of(torch.zeros(0, 3, 2, 2))
    assert_same(x.merge(nothing), x)
    assert_same(nothing.merge(x), x)


def test_absdev_of_merged_parts_is_within_its_bound() -> None:
    a, b = torch.randn(50, 2, 3), torch.randn(70, 2, 3) + 0.5
    merged = ChannelStatistics.of(a).merge(ChannelStatistics.of(b))
    exact = ChannelStatistics.of(torch.cat([a, b]))
    bound = torch.maximum(
        (ChannelStatistics.of(a).mean - exact.mean).abs(), (ChannelStatistics.of(b).mean - exact.mean).abs()
    )
    assert bool(((merged.absdev - exact.absdev).abs() <= bound).all())
    torch.testing.assert_close(merged.std, torch.cat([a, b]).double().transpose(0, 1).flatten(1).std(1, correction=0))


def test_whole_tensor_as_one_channel() -> None:
    x = torch.randn(3, 4, 5)
    s = ChannelStatistics.of(x, axis=None)
    assert s.count.tolist() == [60]
    assert s.mean.item() == pytest.approx(x.double().mean().item())


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="no batches"):
        ChannelStatistics.over(list)


def test_distribution_of_many_samples_is_told_by_some_and_its_limits_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_COUNTED", 1000)
    torch.manual_seed(0)
    x = torch.randn(256, 3, 8, 8).relu()
    x[7, 1, 0, 0] = 50.0  # not among those that are counted
    whole, *others = (ChannelHistogram.over(partial(x.split, n), bins=64) for n in (256, 100, 7))
    assert whole.high[1] == 50.0
    for other in others:
        assert torch.equal(whole.density, other.density)
    zeros = (x[::4] == 0).double().mean((0, 2, 3))
    torch.testing.assert_close(1.0 - whole.density.sum(1), zeros)
