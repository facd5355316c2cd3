"""Histograms in the record say where values lie in the range of their channel, and how many are outside of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig
from ptq4cuda.artifact.record import Histogram, record_of
from ptq4cuda.calibrate.histograms import histogram, some_samples
from ptq4cuda.nn import spec_of


def counted(values: Tensor, lowest: list[float], step: list[float], bits: list[int]) -> Histogram:
    found = histogram([values], 1, torch.tensor(lowest), torch.tensor(step), torch.tensor(bits, dtype=torch.uint8))
    assert found is not None
    return found


def test_each_channel_has_its_own_range() -> None:
    """Codes 0 to 15 of two channels: two bins for each code, the same in both."""
    codes = torch.arange(16.0)
    values = torch.stack([codes * 0.5 + 1.0, codes * 2.0 - 40.0], 1)
    found = counted(values, [1.0, -40.0], [0.5, 2.0], [4, 4])
    assert found.counts[:8] == found.counts[40:] == [0] * 8
    assert [a + b for a, b in zip(found.counts[8:40:2], found.counts[9:40:2], strict=True)] == [62] * 16
    assert (found.low, found.high, found.clipped, found.zeros) == (-40.0, 8.5, 0.0, 0.0)


def test_zeros_are_apart_and_what_is_outside_is_clipped() -> None:
    values = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0], [15.4], [15.6], [99.0]])
    found = counted(values, [0.0], [1.0], [4])
    assert found.zeros == 50.0
    assert found.clipped == 25.0  # 15.6 and 99: half a step beyond the last code is rounded, not clipped
    assert sum(found.counts[40:]) == 500 and found.counts[-1] == 250
    assert sum(found.counts) == 1000


def test_channels_without_bits_do_not_count() -> None:
    values = torch.tensor([[1.0, 50.0], [2.0, 60.0]])
    assert counted(values, [0.0, 0.0], [1.0, 1.0], [4, 0]) == counted(values[:, :1], [0.0], [1.0], [4])
    nothing = torch.zeros(1, dtype=torch.uint8)
    assert histogram([values], 1, torch.zeros(1), torch.ones(1), nothing) is None


def test_samples_are_spread_over_all_and_do_not_depend_on_batches() -> None:
    spec = spec_of(nn.Conv2d(1, 1, 1))
    assert spec is not None
    x = torch.arange(64.0)[:, None, None, None].expand(64, 1, 256, 128)
    for size in (64, 16, 5):
        some = torch.cat(list(some_samples(spec, x.split(size))))
        assert some[:, 0, 0, 0].tolist() == [i * 16.0 for i in range(4)]


@pytest.mark.parametrize("by_modules", [False, True])
def test_the_record_of_a_layer(by_modules: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            if by_modules and x.sum() > 1e9:
                return x
            return self.second(x)

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(8, 3, 12, 12)
    network = ptq4cuda.quantize(net, [x], QuantConfig.fast(execution="simulate"), progress=False)
    record = record_of(network)
    assert record.walked_by == ("modules" if by_modules else "graph")
    first, second = record.layers
    with torch.no_grad():  # before the first layer both streams are one, and all of them were looked at
        expected, found = net.first(x), network.get_submodule("first")(x)
        ratio = expected.square().sum() / (expected - found).square().sum()
    assert first.own_sqnr == pytest.approx(10.0 * torch.log10(ratio).item(), abs=0.01)
    assert first.sqnr == pytest.approx(first.own_sqnr, abs=0.01)
    for layer in (first, second):
        assert layer.input_histogram is not None and layer.weight_histogram is not None
        assert sum(layer.weight_histogram.counts) == pytest.approx(1000, abs=24)
    assert second.input_histogram is not None and second.input_histogram.zeros > 30.0
    assert second.input_histogram.low == 0.0
