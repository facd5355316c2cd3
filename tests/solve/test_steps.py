"""Steps of a recipe are left out where other samples clearly say so, and never because of a little."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4cuda import QuantConfig, quantize, report
from ptq4cuda.artifact.record import record_of
from ptq4cuda.metrics import Noise
from ptq4cuda.solve.steps import steps_left_out, steps_of

ALL = {
    "activation_allocation": "uniform",
    "clipping": "minmax",
    "bias_correction": "none",
}


def test_steps_are_those_that_a_configuration_takes() -> None:
    assert steps_of(QuantConfig()) == steps_of(QuantConfig.fast()) == ALL
    assert steps_of(QuantConfig.paper()) == steps_of(QuantConfig.naive()) == {}
    assert steps_of(QuantConfig(weight_bits=8, activation_bits=8)) == {}
    assert steps_of(QuantConfig.fast(clipping="kld")) == {}
    some = QuantConfig(clipping="auto", bias_correction="none")
    assert steps_of(some) == {"activation_allocation": "uniform"}


def left_out(plainest: float, **without: float | tuple[float, float]) -> tuple[dict[str, str], int]:
    """Return what is left out where the noise is 1, times a factor without each step, and how often it was asked.

    A step may have a factor for each half of the samples.
    """
    asked = set()

    def noise(config: QuantConfig, fitted: int) -> float:
        asked.add((str(config), fitted))
        if not config.fold_activation_scale:
            return plainest
        found = 1.0
        for field, way in ALL.items():
            factor = without.get(field, 1.0) if getattr(config, field) == way else 1.0
            found *= factor if isinstance(factor, float) else factor[fitted]
        return found

    return steps_left_out(QuantConfig.fast(), noise), len(asked)


def test_steps_are_tried_where_the_plainest_network_is_nearly_as_good() -> None:
    assert left_out(2.1, clipping=0.1) == ({}, 2)
    assert left_out(1.9, clipping=0.1) == ({"clipping": "minmax"}, 9)
    assert left_out(0.5, clipping=0.5, bias_correction=0.3)[0] == {"clipping": "minmax", "bias_correction": "none"}
    assert left_out(0.5, clipping=0.9, bias_correction=2.0)[0] == {}
    # One half alone does not decide.
    assert left_out(0.5, clipping=(0.6, 1.2), bias_correction=(0.6, 0.8))[0] == {"bias_correction": "none"}


class Scaled(nn.Module):
    """Its outputs count very differently, which no weight tells: the first one reads a channel by small weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.d = nn.Conv2d(16, 16, 1)
        with torch.no_grad():
            self.b.weight[0] = self.b.weight[:, 0] = 0.0
            self.b.weight[0, 0], self.b.bias[0] = 0.01, 0.0
        self.register_buffer("scale", torch.tensor([500.0] + [0.01] * 15).view(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.c(torch.tanh(self.b(torch.relu(self.a(x)))) * self.scale)))


def test_a_network_that_bits_of_channels_harm_has_the_same_for_all() -> None:
    net = Scaled().eval()
    g = torch.Generator().manual_seed(1)
    x, test = torch.randn(32, 3, 8, 8, generator=g), torch.randn(32, 3, 8, 8, generator=g)

    def sqnr(config: QuantConfig) -> float:
        noise = Noise()
        noise.add(net(test), quantize(net, [x], config, progress=False)(test))
        assert noise.sqnr is not None
        return noise.sqnr

    with torch.no_grad():
        assert sqnr(QuantConfig.fast()) > sqnr(QuantConfig.naive())
    network = quantize(net, [x], QuantConfig.fast(), progress=False)
    assert record_of(network).config.activation_allocation == "uniform"
    assert "quantized with activation_allocation 'uniform'" in report(network)
