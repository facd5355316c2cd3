"""Per-channel bit allocation: analytic (Banner, Nahshan, Soudry 2019, eq. 10-11) and by measured gain.

An allocation rule is a class, at the end of this file or anywhere else: see AllocationRule.
"""

from __future__ import annotations

import heapq
import itertools
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ptq4cuda.solve.rules import Rule


def allocate_bits(spread: Tensor, mean_bits: float, low: int = 0, high: int = 8) -> Tensor:
    """Divide a budget of quantization bins among channels so that the total squared error is least.

    Channel i gets B_i = B · r_i^(2/3) / Σ r_j^(2/3) bins and round(log2 B_i) bits. The budget B is the largest for
    which the mean of the bits, once rounded and limited, does not exceed the target.

    Args:
        spread: r, [C] >= 0, the scale of each channel's distribution (Laplace b or Gaussian σ).
        mean_bits: the target.
        low: least bits of a channel.
        high: most bits of a channel.

    Returns:
        uint8 [C].

    Raises:
        ValueError: spread is negative or not finite, or no allocation can meet the target.
    """
    spread = spread.double()
    if not bool(torch.isfinite(spread).all()) or bool((spread < 0).any()):
        raise ValueError("spread must be finite and not negative")
    _check_mean(mean_bits, low, high, most=8)
    demand = 2.0 / 3.0 * torch.log2(spread)  # -inf for a constant channel

    def bits(log_budget: float) -> Tensor:
        return torch.round(demand + log_budget).clamp(low, high)

    alive = demand[torch.isfinite(demand)]
    if not len(alive):
        return torch.full_like(spread, low, dtype=torch.uint8)
    # The mean rises with the budget: bisect between everyone at `low` and everyone at `high`.
    below, above = float(low - alive.max()) - 1.0, float(high - alive.min()) + 1.0
    if float(bits(above).mean()) <= mean_bits:
        return bits(above).to(torch.uint8)
    for _ in range(60):
        middle = (below + above) / 2.0
        if float(bits(middle).mean()) <= mean_bits:
            below = middle
        else:
            above = middle
    return bits(below).to(torch.uint8)


def allocate_by_gain(errors: Tensor, mean_bits: float, low: int, high: int) -> Tensor:
    """Give bit after bit to the channel whose error it reduces most, until the mean is the target.

    Args:
        errors: [C, 9], the error of each channel with 0 to 8 bits, in units in which channels compare.
        mean_bits: the target; all of floor(mean_bits * C) bits are given out.
        low: least bits of a channel.
        high: most bits of a channel.

    Returns:
        uint8 [C].
    """
    _check_mean(mean_bits, low, high, most=high)
    table = [_convex(row, low, high) for row in errors.tolist()]
    bits = [low] * len(table)

    def offer(channel: int) -> tuple[float, int]:
        b = bits[channel]
        return table[channel][b + 1] - table[channel][b], channel

    offers = [offer(channel) for channel in range(len(table))] if low < high else []
    heapq.heapify(offers)
    for _ in range(int(mean_bits * len(table)) - low * len(table)):
        channel = offers[0][1]
        bits[channel] += 1
        if bits[channel] < high:
            heapq.heapreplace(offers, offer(channel))
        else:
            heapq.heappop(offers)
    return torch.tensor(bits, dtype=torch.uint8, device=errors.device)


def _check_mean(mean_bits: float, low: int, high: int, most: int) -> None:
    if not 0 <= low <= high <= 8 or not low <= mean_bits <= most:
        raise ValueError(f"a mean of {mean_bits} bits cannot be met with {low} to {high} bits a channel")


def _convex(errors: list[float], low: int, high: int) -> list[float]:
    """Return the largest convex table below a table of errors.

    A bit that gains little, or loses, as measured ones may, must not hide the gain of the bits after it.
    """
    hull: list[int] = []
    for b in range(low, high + 1):
        while len(hull) > 1:
            a, middle = hull[-2:]
            if (errors[middle] - errors[a]) * (b - a) < (errors[b] - errors[a]) * (middle - a):
                break
            hull.pop()
        hull.append(b)
    table = list(errors)
    for a, b in itertools.pairwise(hull):
        for middle in range(a + 1, b):
            table[middle] = errors[a] + (errors[b] - errors[a]) * (middle - a) / (b - a)
    return table


# --- rules ------------------------------------------------------------------------------------------------------


class AllocationRule(Rule):
    """How bits are divided among the channels of a tensor.

    Attributes:
        needs_errors: whether it looks at measured errors, which weights have none of.
        needs_spread: whether it looks at the scale of the distributions, which of weights takes a pass to find.
    """

    needs_errors: ClassVar[bool] = False
    needs_spread: ClassVar[bool] = True

    def check(self, mean_bits: int, fewest: int, most: int) -> None:
        """Raise ValueError where these limits allow no such mean."""

    @abstractmethod
    def bits(self, spread: Tensor, errors: Tensor | None, mean_bits: int, fewest: int, most: int) -> Tensor:
        """Return the bits of each channel, uint8 [C].

        Args:
            spread: [C], the scale of each channel's distribution, where it is needed.
            errors: [C, 9], what the error of each channel with 0 to 8 bits costs, where it is needed.
            mean_bits: the mean over the channels, at most.
            fewest: bits of a channel.
            most: bits of a channel.
        """


class Uniform(AllocationRule):
    """The same bits for all."""

    name = "uniform"
    needs_spread = False

    def bits(self, spread: Tensor, errors: Tensor | None, mean_bits: int, fewest: int, most: int) -> Tensor:
        """Return the mean."""
        return torch.full_like(spread, mean_bits, dtype=torch.uint8)


class Analytic(AllocationRule):
    """By the scale of each channel's distribution (eq. 10-11)."""

    name = "analytic"

    def check(self, mean_bits: int, fewest: int, most: int) -> None:
        """Raise ValueError where the mean is below the fewest bits."""
        _check_mean(mean_bits, fewest, most, most=8)

    def bits(self, spread: Tensor, errors: Tensor | None, mean_bits: int, fewest: int, most: int) -> Tensor:
        """Divide a budget of bins."""
        return allocate_bits(spread, mean_bits, fewest, most)


class Greedy(AllocationRule):
    """By measured gain, weighted with what an error costs at the output."""

    name = "greedy"
    needs_errors = True
    needs_spread = False

    def check(self, mean_bits: int, fewest: int, most: int) -> None:
        """Raise ValueError where the mean is not between the limits."""
        _check_mean(mean_bits, fewest, most, most=most)

    def bits(self, spread: Tensor, errors: Tensor | None, mean_bits: int, fewest: int, most: int) -> Tensor:
        """Give bit after bit to the channel that gains most."""
        assert errors is not None
        return allocate_by_gain(errors, mean_bits, fewest, most)
