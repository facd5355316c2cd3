"""saturation(): shares of codes at the ends of ranges, of the worst sample, the same in both executions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, quantize

FAST = QuantConfig.fast(weight_bits=8, activation_bits=8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = F.leaky_relu(self.c(F.max_pool2d(torch.relu(self.b(x)), 3, 1, 1)) + x, 0.1)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def simulated() -> nn.Module:
    return quantize(
        Net().eval(), [torch.rand(16, 3, 8, 8) - 0.3], replace(FAST, execution="simulate"), progress=False
    )


def images(gain: float) -> Tensor:
    x = torch.linspace(-0.3, 0.7, 6 * 3 * 64).view(64, 3, 6).permute(2, 1, 0).reshape(6, 3, 8, 8).clone()
    x[4] *= gain
    return x


def test_shares_are_those_of_values_beyond_the_range(simulated: nn.Module) -> None:
    x = images(2.0)
    found = {s.layer: s for s in ptq4cuda.saturation(simulated, [x[:3], x[3:]])}
    assert list(found) == ["a", "b", "c", "fc"]
    quantizer = simulated.get_submodule("a").activation
    assert quantizer is not None
    exact = x / quantizer.scale.view(1, 3, 1, 1) + quantizer.zero_point.view(1, 3, 1, 1)  # type: ignore[union-attr]
    beyond = ((exact > 254.5) | (exact < 0.5)).flatten(1).double().mean(1)
    assert beyond[4] > 0.2
    assert (found["a"].sample, found["a"].bits) == (4, 8.0)
    assert found["a"].worst == pytest.approx(float(beyond[4]))
    assert found["a"].share == pytest.approx(float(beyond.mean()))
    assert "a: " in str(found["a"]) and "in sample 4" in str(found["a"])


def test_images_like_those_of_calibration_do_not_saturate(simulated: nn.Module) -> None:
    assert all(s.share < 1e-3 for s in ptq4cuda.saturation(simulated, [images(1.0)]))


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_say_the_same(bits: int) -> None:
    config = replace(FAST, activation_bits=bits)
    by_execution = [
        quantize(
            Net().eval(), [torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.3],
            replace(config, execution=execution), progress=False,
        )
        for execution in ("simulate", "integer")
    ]  # fmt: skip
    a, b = (ptq4cuda.saturation(network, [images(3.0)]) for network in by_execution)
    assert a == b
    assert a[0].share > 0.0
    again = [s for n in by_execution for m in n.modules() for s in m._forward_pre_hooks.values()]
    assert not again


def test_what_was_not_quantized() -> None:
    with pytest.raises(TypeError, match="was not made by"):
        ptq4cuda.saturation(Net(), [images(1.0)])
