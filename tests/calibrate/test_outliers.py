"""Broken calibration images do not rule the network; what is rare and true stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.calibrate.outliers import find_outliers
from ptq4cuda.metrics import Noise
from small_networks import Residual, calibrate_batch_norm

ONES = torch.ones(3)


def test_one_value_is_clipped_to_what_all_others_reach(images: Tensor) -> None:
    broken = images.clone()
    broken[5, 1, 2, 3] = -1e5
    found = find_outliers(list(broken.split(20)), 1, ONES)
    assert found is not None
    clipped = found.clip(broken)
    others = torch.cat([images[:5], images[6:]])
    assert clipped[5, 1, 2, 3] == others[:, 1].min()
    clipped[5, 1, 2, 3] = broken[5, 1, 2, 3]
    assert torch.equal(clipped[:, [0, 2]], broken[:, [0, 2]])
    assert "reaches 1e+05 in 1 of 48 samples" in found.remark
    assert find_outliers([images], 1, ONES) is None


def test_channels_last_and_tokens() -> None:
    x = torch.randn(12, 7, 3, generator=torch.Generator().manual_seed(0))
    x[4, 6, 2] = 300.0
    found = find_outliers([x], -1, ONES)
    assert found is not None and found.high.isinf().tolist() == [True, True, False]
    assert float(found.clip(x)[4, 6, 2]) == x[torch.arange(12) != 4][..., 2].max()


@pytest.mark.parametrize("gain", [10.0, 50.0])
def test_what_samples_confirm_stays(images: Tensor, gain: float) -> None:
    rare = images.clone()
    rare[[3, 17, 30, 41], :, 4:7, 4:7] *= gain  # an object in one of twelve images
    assert find_outliers([rare], 1, ONES) is None


def test_a_channel_that_one_sample_excites_as_far_as_others_are_stays(images: Tensor) -> None:
    quiet = images.clone()
    quiet[:, 2] *= 1e-3
    quiet[7, 2] *= 1e3
    assert find_outliers([quiet], 1, ONES) is None
    assert find_outliers([quiet], 1, torch.tensor([1.0, 1.0, 1e6])) is not None  # where it counts as much as they do


def test_a_single_image_is_compared_by_its_parts(images: Tensor) -> None:
    broken = images[:1].clone()
    assert find_outliers([broken], 1, ONES) is None
    broken[0, 0, 6, 6] = 1e4
    found = find_outliers([broken], 1, ONES)
    assert found is not None and found.clip(broken).abs().max() < 10.0
    assert "parts of the samples" in found.remark


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(images: Tensor, value: float) -> None:
    images[0, 0, 0, 0] = value
    assert find_outliers([images], 1, ONES) is None


class Untraceable(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.isnan().any()) else super().forward(x)


def pixel(x: Tensor) -> None:
    x[0, 0, 0, 0] = 1e5


def pixels(x: Tensor) -> None:
    x[2, 0, 0, 0], x[7, 1, 5, 5], x[30, 0, 7, 7] = 1e4, -1e4, 1e3


def overexposed(x: Tensor) -> None:
    x[3] = 255.0


W8A8 = replace(QuantConfig.fast(), weight_bits=8, activation_bits=8)


@pytest.mark.parametrize("damage", [pixel, pixels, overexposed])
@pytest.mark.parametrize("config", [QuantConfig(), W8A8], ids=["W4A4", "W8A8"])
@pytest.mark.parametrize("kind", [Residual, Untraceable])
def test_broken_images_do_not_rule_the_network(
    images: Tensor, damage: Callable[[Tensor], None], config: QuantConfig, kind: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    model = calibrate_batch_norm(kind(), images)
    config = replace(config, execution="simulate")
    test = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    broken = images.clone()
    damage(broken)
    networks = [quantize(model, list(x.split(12)), config, progress=False) for x in (images, broken)]
    with torch.no_grad():
        clean, found = (_sqnr(model(test), network(test)) for network in networks)
    assert found > clean - 3.0
    assert "all others: clipped there" in str(ptq4cuda.report(networks[1]))
    assert "clipped" not in str(ptq4cuda.report(networks[0]))
    record = record_of(networks[1])
    assert record.worst_sqnr is not None and record.median_sqnr is not None
    assert record.worst_sqnr < record.median_sqnr - 5.0  # the broken image itself
    assert record.median_sqnr > clean - 6.0
    assert f"(median {record.median_sqnr:.1f}, worst {record.worst_sqnr:.1f})" in str(ptq4cuda.report(networks[1]))


def test_a_hidden_tensor(images: Tensor) -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu() / (x.abs().amax((1, 2, 3), keepdim=True) + 1e-4))

    torch.manual_seed(0)
    model = Divides().eval()
    dark = images.clone()
    dark[9] = 0.0
    network = quantize(model, [dark], replace(QuantConfig.fast(), execution="simulate"), progress=False)
    assert [bool(layer.reason) for layer in record_of(network).layers] == [False, True]
    with torch.no_grad():
        expected = quantize(model, [images], replace(QuantConfig.fast(), execution="simulate"), progress=False)
        assert _sqnr(model(images), network(images)) > _sqnr(model(images), expected(images)) - 3.0


def _sqnr(expected: Tensor, found: Tensor) -> float:
    noise = Noise()
    noise.add(expected, found)
    assert noise.sqnr is not None
    return noise.sqnr


def test_noise_of_each_sample() -> None:
    noise = Noise()
    noise.add(
        {"y": torch.ones(3, 2), "loss": torch.tensor(5.0)},
        {"y": torch.tensor([[1.1] * 2, [1.0] * 2, [0.0] * 2]), "loss": torch.tensor(0.0)},
        3,
    )
    noise.add(
        {"y": torch.zeros(1, 2), "loss": torch.tensor(0.0)}, {"y": torch.ones(1, 2), "loss": torch.tensor(0.0)}, 1
    )
    assert noise.worst_sqnr == pytest.approx(0.0)  # a sample without signal has no ratio
    assert noise.median_sqnr == pytest.approx(20.0, abs=1e-4)
    assert noise.sqnr == pytest.approx(10.0 * math.log10((6 + 25) / (2 * 0.01 + 2 + 25 + 2)), abs=1e-4)
    alone = Noise()
    alone.add(torch.ones(3), torch.ones(3))
    assert alone.worst_sqnr is None and alone.median_sqnr is None


def test_results_that_are_no_numbers_are_the_worst_noise() -> None:
    for broken in (torch.inf, torch.nan):
        noise = Noise()
        found = torch.ones(3, 4)
        found[1, 2] = broken
        noise.add(torch.ones(3, 4) * 1.5, found, samples=3)
        assert noise.sqnr == noise.worst_sqnr == -torch.inf
        assert noise.median_sqnr == pytest.approx(10.0 * math.log10(9.0))
    noise = Noise()
    noise.add(torch.tensor([torch.inf, 1.0]), torch.tensor([torch.nan, 2.0]))  # nor is it a number in float
    assert noise.sqnr == 0.0
