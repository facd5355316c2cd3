"""Allocation of bits among channels: never more than the target, by the two-thirds power, the error falls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq4cuda.solve.bits import allocate_bits

spreads = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=64)


@given(spreads, st.integers(1, 8))
def test_mean_never_exceeds_the_target(values: list[float], target: int) -> None:
    bits = allocate_bits(torch.tensor(values, dtype=torch.float64), target)
    assert bits.dtype == torch.uint8
    assert bits.float().mean().item() <= target
    assert int(bits.max()) <= 8


@given(spreads, st.integers(1, 8))
def test_wider_channels_get_no_fewer_bits(values: list[float], target: int) -> None:
    spread = torch.tensor(values, dtype=torch.float64)
    bits = allocate_bits(spread, target)[spread.argsort()].int()
    assert bool((bits.diff() >= 0).all())


def test_bins_follow_the_two_thirds_power() -> None:
    # r = 1, 8, 64: bins in the ratio 1 : 4 : 16, so two bits from one channel to the next
    assert allocate_bits(torch.tensor([1.0, 8.0, 64.0]), 4).tolist() == [2, 4, 6]


def test_equal_channels_get_the_target() -> None:
    assert allocate_bits(torch.full((7,), 0.3), 4).tolist() == [4] * 7


def test_dead_channels_give_their_bits_away() -> None:
    bits = allocate_bits(torch.tensor([0.0, 1.0, 1.0]), 4)
    assert bits.tolist() == [0, 6, 6]


def test_all_dead() -> None:
    assert allocate_bits(torch.zeros(3), 4).tolist() == [0, 0, 0]


def test_limits() -> None:
    bits = allocate_bits(torch.logspace(-8, 8, 40), 4, low=1, high=6)
    assert int(bits.min()) == 1
    assert int(bits.max()) == 6


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [1.0, float("inf")], [1.0, -1.0]])
def test_bad_spread(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="spread"):
        allocate_bits(torch.tensor(bad), 4)


def test_impossible_target() -> None:
    with pytest.raises(ValueError, match="mean of 1 bits"):
        allocate_bits(torch.ones(3), 1, low=2)


def test_allocation_lowers_the_error_of_gaussian_channels() -> None:
    """What eq. 11 is for: the summed squared error falls against the same bits everywhere."""
    from ptq4cuda import QuantParams

    spread = torch.logspace(-1.5, 1.0, 24)
    x = torch.randn(1, 24, 60, 60, generator=torch.Generator().manual_seed(0)) * spread.view(1, -1, 1, 1)
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    errors = []
    for bits in (allocate_bits(spread, 4), torch.full((24,), 4, dtype=torch.uint8)):
        q = QuantParams.from_range(low, high, bits, constant=x.mean((0, 2, 3)))
        errors.append((q.fake_quantize(x) - x).square().mean().item())
    assert errors[0] < 0.5 * errors[1]
