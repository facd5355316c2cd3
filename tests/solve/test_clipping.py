"""Clip values against the paper's constants and against brute force on the densities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import Tensor

from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.calibrate.statistics import ChannelStatistics
from ptq4cuda.solve.clipping import (
    HEADROOM,
    MOST_HEADROOM,
    ClipRule,
    TensorProfile,
    gaussian_clip,
    lambert_w,
    laplace_clip,
    with_headroom,
)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_lambert_w_against_scipy() -> None:
    x = torch.logspace(-6, 12, 200, dtype=torch.float64)
    np.testing.assert_allclose(lambert_w(x).numpy(), special.lambertw(x.numpy()).real, rtol=1e-13)
    assert lambert_w(tensor(0.0)).item() == 0.0


@pytest.mark.parametrize(("bits", "ratio"), [(2, 2.8307), (3, 3.8972), (4, 5.0286)])
def test_laplace_constants_of_the_paper(bits: int, ratio: float) -> None:
    assert laplace_clip(tensor(bits)).item() == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 1.7106), (3, 2.1516), (4, 2.5591)])
def test_gaussian_constants_of_the_paper(bits: int, ratio: float) -> None:
    assert gaussian_clip(tensor(bits)).item() == pytest.approx(ratio, abs=5e-5)


def test_relu_constant_of_the_paper() -> None:
    # fused ReLU: alpha = W(12 * 4^4), which is the clip value of one bit more
    assert laplace_clip(tensor(5.0)).item() == pytest.approx(6.2048, abs=5e-5)


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.7, 4.0, 6.3, 8.0])
def test_clip_minimises_the_expected_error(bits: float) -> None:
    """The expected squared error, integrated numerically, is smallest at the clip value."""

    def error(alpha: float, density: object) -> float:
        clip_noise, _ = integrate.quad(lambda x: 2 * (x - alpha) ** 2 * density(x), alpha, alpha + 60)  # type: ignore[operator]
        return clip_noise + alpha**2 / (3 * 4**bits)

    for rule, density in (
        (laplace_clip, lambda x: 0.5 * math.exp(-abs(x))),
        (gaussian_clip, lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)),
    ):
        alpha = rule(tensor(bits)).item()
        best = error(alpha, density)
        assert best < error(alpha * 1.02, density)
        assert best < error(alpha * 0.98, density)


def statistics(x: Tensor) -> ChannelStatistics:
    return ChannelStatistics.of(x, axis=1)


def limits(s: ChannelStatistics, rule: str, activation: Activation = IDENTITY) -> tuple[Tensor, Tensor]:
    """Return the limits that a rule finds in statistics alone, for 4 bits."""
    profile = TensorProfile(
        s,
        activation,
        known=True,
        histogram=None,
        importance=torch.ones(1),
        exponent=2.0,
        extremes=lambda: (activation(s.min)[None], activation(s.max)[None]),
    )
    return ClipRule.named(rule).limits(profile, 4)


def test_relu_clip_is_at_mean_plus_alpha() -> None:
    x = torch.from_numpy(np.random.default_rng(0).laplace(0.5, 1.0, (1, 1, 400, 400))).float()
    s = statistics(x)
    low, high = limits(s, "laplace", Activation())
    assert low.item() == 0.0
    assert high.item() == pytest.approx(s.mean.item() + 6.2048 * s.absdev.item(), rel=1e-4)


def test_negative_mean_does_not_pull_the_relu_clip_below_alpha() -> None:
    x = torch.from_numpy(np.random.default_rng(0).laplace(-1.0, 1.0, (1, 1, 400, 400))).float()
    s = statistics(x)
    _, high = limits(s, "laplace", Activation())
    assert high.item() == pytest.approx(6.2048 * s.absdev.item(), rel=1e-4)


def test_clip_never_leaves_the_values_seen() -> None:
    x = torch.rand(4, 6, 9, 9) - 0.3  # bounded: alpha is far outside
    s = statistics(x)
    low, high = limits(s, "laplace")
    torch.testing.assert_close(low, s.min)
    torch.testing.assert_close(high, s.max)


def test_relu6_is_clipped_at_six() -> None:
    x = torch.randn(2, 1, 50, 50) * 30
    _, high = limits(statistics(x), "gaussian", Activation(upper=6.0))
    assert high.item() == 6.0


def test_leaky_relu_lies_between_relu_and_no_activation() -> None:
    x = torch.from_numpy(np.random.default_rng(0).laplace(0.0, 1.0, (1, 1, 500, 500))).float()
    s = statistics(x)
    (relu_low, relu), (leaky_low, leaky), (_, none) = (
        limits(s, "laplace", Activation(slope)) for slope in (0.0, 0.1, 1.0)
    )
    assert none.item() < leaky.item() < relu.item()
    assert relu_low.item() == 0.0
    assert leaky_low.item() == pytest.approx(-0.1 * leaky.item(), rel=0.02)


def test_clipping_beats_the_whole_range_on_a_laplace_tensor() -> None:
    from ptq4cuda import QuantParams

    x = torch.from_numpy(np.random.default_rng(3).laplace(0.0, 1.0, (1, 1, 300, 300))).float()
    s = statistics(x)
    errors = {}
    for rule in ("laplace", "minmax"):
        low, high = limits(s, rule)
        q = QuantParams.from_range(low, high, torch.tensor([4], dtype=torch.uint8))
        errors[rule] = (q.fake_quantize(x) - x).square().mean().item()
    # the paper's expected error at the optimum, of a tensor with b = 1
    alpha = 5.0286
    expected = 2 * math.exp(-alpha) + alpha**2 / (3 * 4**4)
    assert errors["laplace"] == pytest.approx(expected, rel=0.15)
    assert errors["laplace"] < 0.6 * errors["minmax"]


# --- headroom ---------------------------------------------------------------------------------------------------


def test_samples_in_one_light_have_a_third_of_a_bit_of_headroom() -> None:
    seen = torch.tensor([[1.0, -2.0, 0.0]]).repeat(64, 1)
    torch.testing.assert_close(with_headroom(seen), tensor(HEADROOM, 2.0 * HEADROOM, 0.0))
    torch.testing.assert_close(with_headroom(seen[:1]), tensor(HEADROOM, 2.0 * HEADROOM, 0.0))


def test_headroom_follows_what_the_samples_differ_by() -> None:
    """Of exponential extremes, far fewer of later samples go beyond it than go beyond those seen, in any unit."""
    rng = np.random.default_rng(0)
    seen, later = (torch.from_numpy(5.0 + rng.exponential(1.0, (n, 400))) for n in (64, 512))
    reach = with_headroom(seen)
    assert float((reach / seen.amax(0)).min()) >= HEADROOM - 1e-12
    assert float((reach / seen.amax(0)).max()) <= MOST_HEADROOM + 1e-12
    beyond, beyond_seen = ((later > limit).double().mean().item() for limit in (reach, seen.amax(0)))
    assert beyond < 0.2 * beyond_seen
    torch.testing.assert_close(with_headroom(-100.0 * seen), 100.0 * reach)
    few = torch.cat([torch.ones(60, 1), torch.full((4, 1), 10.0)])
    assert with_headroom(few).item() == pytest.approx(10.0 * MOST_HEADROOM)


def test_headroom_stays_within_what_an_activation_lets_through() -> None:
    x = torch.randn(4, 3, 20, 20) * 30
    low, high = limits(statistics(x), "headroom", Activation(upper=6.0))
    assert low.tolist() == [0.0] * 3
    assert high.tolist() == [6.0] * 3
    low, high = limits(statistics(x), "headroom", Activation(negative_slope=0.1))
    torch.testing.assert_close(high, HEADROOM * statistics(x).max)
    torch.testing.assert_close(low, 0.1 * HEADROOM * statistics(x).min)
