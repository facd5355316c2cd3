"""Scales that are folded into weights: what a channel's scale costs its input and the weights of its readers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ptq4cuda.calibrate.signals import Reader
from ptq4cuda.graph import quantized_spec
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.solve.folding import scales_for_weights


def raised(layer: Any, spread: float, weight_bits: int = 4) -> tuple[QuantParams, QuantParams, float]:
    """Return quantizers of an input before and after, and the noise of the second as a share of that of the first.

    Args:
        layer: of 16 inputs.
        spread: times the others, the last channel.
        weight_bits: of the rows.
    """
    x = torch.randn((64, 16, 6, 6)[: 2 if isinstance(layer, nn.Linear) else 4], generator=torch.manual_seed(0))
    x[:, -1] *= spread
    spec = quantized_spec(layer)
    assert spec is not None and spec.quantized is not None
    channels = x.transpose(0, 1).flatten(1)
    low, high = channels.aminmax(dim=1)
    before = QuantParams.from_range(low, high, torch.full((16,), 4, dtype=torch.uint8), spec.axis)
    power = channels.double().var(1, correction=0)
    after = scales_for_weights(before, power, [Reader(spec, layer)], weight_bits, 1.0)
    noises = []
    with torch.no_grad():
        for quantizer in (before, after):
            quantized = spec.quantized.from_float(layer, quantizer, weight_bits=weight_bits, folded=True)
            noises.append(float((quantized(x) - layer(x)).var()))
    return before, after, noises[1] / noises[0]


@pytest.mark.parametrize("kind", ["conv", "groups", "transposed", "linear"])
def test_small_scales_are_raised_for_the_sake_of_the_weights(kind: str) -> None:
    torch.manual_seed(1)
    layer = {
        "conv": lambda: nn.Conv2d(16, 12, 3, stride=2),
        "groups": lambda: nn.Conv2d(16, 12, 3, groups=2),
        "transposed": lambda: nn.ConvTranspose2d(16, 12, 2, stride=2),
        "linear": lambda: nn.Linear(16, 12),
    }[kind]()
    before, after, share = raised(layer, 20.0)
    assert bool((after.scale >= before.scale).all()) and float(after.scale[0] / before.scale[0]) > 1.5
    assert torch.equal(after.bits, before.bits)
    assert share < 0.85


@pytest.mark.parametrize(("groups", "weight_bits"), [(16, 4), (1, 8)], ids=["one scale a row", "8 bits"])
def test_scales_stay_where_weights_gain_little(groups: int, weight_bits: int) -> None:
    torch.manual_seed(1)
    before, after, share = raised(nn.Conv2d(16, 16, 3, groups=groups), 20.0, weight_bits)
    assert float((after.scale / before.scale).max()) < 1.5
    assert share < 1.1
