"""Ranges of activations: beyond what was seen where that is little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptq4cuda import QuantConfig, quantize
from ptq4cuda.calibrate.statistics import ChannelStatistics
from ptq4cuda.metrics import Noise
from ptq4cuda.solve.ranges import beyond_few_values


def ranges(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return how far the ranges [C] of values [n, C] go beyond their own, below and above."""
    low, high = values.amin(0).double(), values.amax(0).double()
    found = beyond_few_values(low, high, torch.full_like(low, bits, dtype=torch.uint8), ChannelStatistics.of(values))
    return low - found[0], found[1] - high


def test_ranges_of_few_values_go_beyond_them() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(1000, 64).exponential_(generator=generator)
    values[:, 0] *= 20.0  # the range of all is no limit for the others
    below, above = ranges(values[:10], 8)
    assert bool((below <= values[:10].amin(0)).all())
    assert float(above[0]) == 0.0  # its range is that of all
    assert float(above[1:].min()) > 3.0
    assert float(ranges(values[:100], 8)[1][1:].mean()) < 0.8 * float(above[1:].mean())
    assert float(ranges(values[:10], 4)[1][1:].mean()) < 0.5 * float(above[1:].mean())


def test_the_range_of_one_value_is_that_of_all_channels() -> None:
    values = torch.tensor([[0.5, 1.0, 3.0]])
    below, above = ranges(values, 8)
    assert above.tolist() == [2.5, 2.0, 0.0]
    assert below.tolist() == [0.0, 0.5, 2.5]


@pytest.mark.parametrize("images", [1, 4, 24])
def test_features_of_few_images(images: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    given, others = torch.randn(images, 3, 8, 8), torch.randn(64, 3, 8, 8)

    def sqnr(granularity: str) -> float:
        config = QuantConfig.fast(weight_bits=8, activation_bits=8, activation_granularity=granularity)
        noise = Noise()
        with torch.no_grad():
            noise.add(net(others), quantize(net, [given], config, progress=False)(others))
        assert noise.sqnr is not None
        return noise.sqnr

    assert sqnr("per_channel") > sqnr("per_tensor") - 3.0
