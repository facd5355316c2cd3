"""Per-channel bit allocation (Banner, Nahshan, Soudry 2019, eq. 10-11)."""

from __future__ import annotations

import torch
from torch import Tensor


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
    if not 0 <= low <= mean_bits or high > 8 or low > high:
        raise ValueError(f"a mean of {mean_bits} bits cannot be met with {low} to {high} bits a channel")
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
