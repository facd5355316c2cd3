"""Shares a budget of bits out among the layers of a network.

Four bits in each tensor are too many for some and too few for others: the last stage of a residual network has a
seventh of the values that layers read, and they do half of the damage. What the noise of each layer's weights and of
each input does at the outputs is measured, each alone, and is taken to fall fourfold with each bit; bits are divided
so that the least of it is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ptq4cuda.config import FLOAT, QuantConfig
from ptq4cuda.solve.raising import Kind, Overrides, Part

MOST_BITS = 7  # of what has a part in it
_UNITS = 1 << 14
# Of calibration, that damage is measured on, as many as have so many values; as many others judge what is made of it.
SAMPLES, FEWEST_SAMPLES, VALUES = 64, 8, 1 << 21
# Bits below and above the mean. Weights of fewer do more damage than the rule of four says, and more gain little.
_AROUND: dict[Kind, tuple[int, int]] = {"weight_bits": (1, 2), "activation_bits": (2, 4)}


@dataclass(frozen=True)
class Shares:
    """What a trial tells.

    Attributes:
        bits: of each layer; none where all have the same.
        parts: of the network, and what each does at the outputs.
        left_out: by the field of each step of the configuration that was left out what is done without it.
    """

    bits: Overrides = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def shares_bits(config: QuantConfig) -> bool:
    """Tell whether layers share out bits."""
    return bool(_means(config))


def trial_config(config: QuantConfig) -> QuantConfig:
    """Return how to quantize a network, quickly, to measure where bits are needed.

    Layers that have no part in it have eight bits there.
    """
    return replace(
        config,
        first_last_bits=8,
        depthwise_bits=None if config.depthwise_bits is None else 8,
        overrides={pattern: FLOAT for pattern, override in config.overrides.items() if override == FLOAT},
        target="weights",
        rounding="nearest" if config.rounding == "nearest" else "compensated",
        layer_allocation="uniform",
        target_sqnr=None,
        size_budget=None,
    )


def share_out(parts: Sequence[Part], config: QuantConfig) -> Overrides:
    """Return the bits of each layer.

    Args:
        parts: of the network, quantized as trial_config says.
        config: whose bits are the means.
    """
    shares: Overrides = {}
    for kind, mean in _means(config).items():
        own = [part for part in parts if part.kind == kind and part.bits <= MOST_BITS]
        prices = [part.weights or part.values for part in own]
        below, above = _AROUND[kind]
        fewest, most = max(1, mean - below), min(8, mean + above)
        for part, bits in zip(own, _divide([p.damage for p in own], prices, mean, fewest, most), strict=True):
            for name in part.layers:
                shares.setdefault(name, {})[kind] = bits
    return shares


def _means(config: QuantConfig) -> dict[Kind, int]:
    """Return the bits that layers share out; an input whose channels all have the same has those of all inputs."""
    means: dict[Kind, int] = {"weight_bits": config.weight_bits}
    if config.activation_granularity == "per_channel" and config.activation_allocation != "uniform":
        means["activation_bits"] = config.activation_bits
    if config.layer_allocation == "uniform":
        return {}
    return {kind: mean for kind, mean in means.items() if 1 < mean < 8}


def _divide(damage: Sequence[float], prices: Sequence[int], mean: int, fewest: int, most: int) -> list[int]:
    """Return the bits with the least damage whose mean, weighted with the prices, is no more than the given one.

    A knapsack, filled part by part: exact where the prices are multiples of a unit of which the budget has no more
    than _UNITS; else they are rounded up.

    Args:
        damage: of each part at the mean.
        prices: of a bit of each.
        mean: of the bits.
        fewest: of a part.
        most: of a part.
    """
    if not all(math.isfinite(d) for d in damage) or not all(prices):
        return [mean] * len(damage)
    budget = (mean - fewest) * sum(prices)
    unit = max(math.gcd(*prices), math.ceil(budget / _UNITS), 1)
    room = budget // unit
    least = torch.zeros(room + 1, dtype=torch.float64, device="cpu")  # of the parts so far, for at most so much
    chosen = []
    for noise, price in zip(damage, prices, strict=True):
        options = torch.full((most - fewest + 1, room + 1), torch.inf, dtype=torch.float64, device="cpu")
        for more in range(len(options)):
            cost = more * math.ceil(price / unit)
            if cost <= room:
                options[more, cost:] = least[: room + 1 - cost] + noise * 4.0 ** (mean - fewest - more)
        least, choice = options.min(0)
        chosen.append(choice)
    bits = []
    for price, choice in zip(reversed(prices), reversed(chosen), strict=True):
        more = int(choice[room])
        room -= more * math.ceil(price / unit)
        bits.append(fewest + more)
    return bits[::-1]
