"""Activation: the piecewise linear function behind a layer, which its quantizer and its kernel take in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """A piecewise linear activation that the next layer reads: min(x if x > 0 else negative_slope * x, upper).

    ReLU is (0, inf), ReLU6 (0, 6), no activation (1, inf).
    """

    negative_slope: float = 0.0
    upper: float = math.inf

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        return torch.where(x > 0, x, self.negative_slope * x).clamp_max(self.upper)

    @property
    def applied(self) -> Activation:
        """What is left of it for values that it made: the upper limit."""
        return replace(self, negative_slope=1.0)


IDENTITY = Activation(negative_slope=1.0)
