"""One layer: a bias is matched where the other samples do not lose by it; inputs go further than they did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda import QuantConfig, quantize
from ptq4cuda.metrics import Noise
from ptq4cuda.pipeline import solve_layer


def decibels(expected: Tensor, found: Tensor) -> float:
    noise = Noise()
    noise.add(expected, found)
    assert noise.sqnr is not None
    return noise.sqnr


# --- bias -------------------------------------------------------------------------------------------------------


class Peaks(nn.Module):
    """Says yes to few samples: a sigmoid is blind to how far the others are below zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 40)
        with torch.no_grad():
            self.fc.weight.mul_(120)
            self.fc.bias.fill_(-15.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(torch.relu(self.conv(x)).amax((2, 3))))


def rare(n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 6, 6, generator=g)
    return x * torch.rand(n, 1, 1, 1, generator=g) ** 6 * 3


def test_a_bias_is_matched_where_it_does_good() -> None:
    """Matched for its own sake it costs this network 1.7 dB: peaks that are clipped move the mean of all values."""
    net, test = Peaks().eval().requires_grad_(False), rare(256, 1)
    found = {
        correction: quantize(
            net,
            [rare(96, 0)],
            QuantConfig.fast(first_last_bits=2, bias_correction=correction),  # type: ignore[arg-type]
            progress=False,
        )(test)
        for correction in ("none", "output")
    }
    none, output = (decibels(net(test), found[c]) for c in ("none", "output"))
    assert output > none - 0.2


class Following(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(3 if i == 0 else 4, 4, 1) for i in range(3))
        self.d, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(F.relu(self.a(x), inplace=True)), 2)
        x = self.b(x)
        x = self.d(torch.sigmoid(self.c(x)) + x)
        return F.softmax(self.fc(torch.tanh(x).flatten(1)), 1)


def test_what_follows_a_layer_is_what_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    readers: dict[str, Callable[[Tensor], Tensor]] = {}

    def spied(call, config):  # type: ignore[no-untyped-def]
        y = torch.linspace(-2.0, 2.0, call.outputs[0].numel()).view_as(call.outputs[0])
        kept = y.clone()
        readers[call.name] = (y, call.read(y))  # type: ignore[assignment]
        assert torch.equal(y, kept)
        return solve_layer(call, config)

    monkeypatch.setattr("ptq4cuda.pipeline.solve_layer", spied)
    quantize(Following().eval(), [torch.randn(2, 3, 4, 4)], QuantConfig.fast(), progress=False)
    expected: dict[str, Callable[[Tensor], Tensor]] = {
        "a": lambda y: F.max_pool2d(F.silu(F.relu(y)), 2),
        "b": lambda y: y,  # two read it
        "c": torch.sigmoid,  # up to the sum
        "d": lambda y: torch.tanh(y).flatten(1),
        "fc": lambda y: F.softmax(y, 1),
    }
    assert readers.keys() == expected.keys()
    for name, made in expected.items():
        y, read = readers[name]  # type: ignore[misc]
        torch.testing.assert_close(read, made(y), msg=name)


def test_what_a_solver_says_its_layer_gives_is_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def spied(call, config):  # type: ignore[no-untyped-def]
        solution = solve_layer(call, config)
        for y, x in zip(solution.outputs, call.signal.quantized, strict=True):
            assert torch.equal(y, solution.module(x))
        told.append(call.name)
        return solution

    monkeypatch.setattr("ptq4cuda.pipeline.solve_layer", spied)
    quantize(Following().eval(), torch.randn(6, 3, 4, 4).split(4), QuantConfig.fast(), progress=False)
    assert told == ["a", "b", "c", "d", "fc"]


# --- headroom ---------------------------------------------------------------------------------------------------


class Plain(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = F.leaky_relu(self.c(F.silu(self.b(x))) + x, 0.1)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("kind", [Plain, Residual])
def test_images_brighter_and_darker_than_those_of_calibration(kind: type[nn.Module], granularity: str) -> None:
    net = kind().eval()
    config = QuantConfig(weight_bits=8, activation_bits=8, activation_granularity=granularity)  # type: ignore[arg-type]
    network = quantize(net, [torch.rand(32, 3, 12, 12)], config, progress=False)
    x = torch.rand(16, 3, 12, 12)
    for gain in (1.0, 0.8, 1.1, 1.25):  # 30 dB for the last one where ranges are those of calibration
        with torch.no_grad():
            assert decibels(net(gain * x), network(gain * x)) > 48, gain
