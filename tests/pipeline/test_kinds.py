"""Networks of all kinds of layers, whole: both walks, in integers as in simulation, and from a file elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import LayerRecord, record_of
from ptq4cuda.bench import architectures
from ptq4cuda.execute import program as steps
from ptq4cuda.execute.lowering import lower_layers


class ByModules(nn.Module):
    """A model that torch.fx cannot trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if float(x.abs().sum()) >= 0 else x


class Upwards(nn.Module):
    """Transposed convolutions of several geometries, one with groups, one of stride 1, and a sum of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.skip = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.a = nn.ConvTranspose2d(8, 12, 4, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.b = nn.ConvTranspose2d(12, 8, 3, (2, 1), 1, (1, 0), groups=4)
        self.c, self.last = nn.ConvTranspose2d(8, 8, 3, 1, 2, dilation=2), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.leaky_relu(self.bn(self.a(x)), 0.1)))
        return self.last(F.relu(self.c(x) + self.skip(x)))


def upwards() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = architectures.images(8, 12)
    return architectures.calibrate_batch_norm(Upwards(), x), x


def unet() -> tuple[nn.Module, Tensor]:
    x = architectures.images(8, 16)
    return architectures.calibrate_batch_norm(architectures.randomize(architectures.UNet(4, [8, 16, 16])), x), x


def audio() -> tuple[nn.Module, Tensor]:
    x = architectures.waves(8, 2000)
    return architectures.calibrate_batch_norm(architectures.build_audio(5, 0.125), x), x


NETWORKS = {"upwards": (upwards, 20.0), "unet": (unet, 20.0), "audio": (audio, 18.0)}


def records(network: nn.Module) -> dict[str, LayerRecord]:
    return {layer.name: layer for layer in record_of(network).layers}


@pytest.mark.parametrize("walk", ["graph", "modules"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_whole_in_integers_as_in_simulation(name: str, walk: str, tmp_path: Path) -> None:
    make, least = NETWORKS[name]
    model, x = make()
    model = model if walk == "graph" else ByModules(model).eval()
    network = quantize(model, [x[:4], x[4:]], progress=False)
    record = record_of(network)
    assert record.walked_by == walk
    stay = {layer.kind for layer in record.layers if layer.execution != "integer"}
    assert stay <= (set() if walk == "graph" else {"BatchNorm1d", "BatchNorm2d"})
    assert record.sqnr is not None and record.sqnr > least
    simulated = quantize(model, [x[:4], x[4:]], QuantConfig(execution="simulate"), progress=False)
    assert torch.equal(network(x), simulated(x))
    assert all(torch.equal(t, simulated.state_dict()[key]) for key, t in network.state_dict().items())
    path = tmp_path / "net.ptq4"
    ptq4cuda.save(network, path)
    assert torch.equal(ptq4cuda.load(path, model)(x), network(x))


@torch.no_grad()
def test_codes_pass_from_layer_to_layer() -> None:
    for make, floats, residuals in ((unet, 1, 0), (audio, 3, 3)):  # an interpolation; what is behind the last layer
        model, x = make()
        program = ptq4cuda.program(quantize(model, [x], QuantConfig.fast(), progress=False))
        assert sum(isinstance(step, steps.Float) for step in program) == floats
        assert sum(isinstance(step, steps.Quantize) for step in program) == 2  # one of them is of the input
        assert sum(isinstance(step, steps.Layer) and step.residual is not None for step in program) == residuals
        if make is unet:
            assert "(down_2_1_2_codes): ConvTranspose2d 16 → 16, 2x2, blocks of 2, weights of 4 bits" in str(program)


@torch.no_grad()
def test_codes_travel_packed_around_transposed_convolutions() -> None:
    model, x = unet()
    simulated = quantize(model, [x], QuantConfig.fast(execution="simulate"), progress=False)
    expected = simulated(x)
    assert not lower_layers(simulated, pack=True)
    assert torch.equal(simulated(x), expected)


def test_a_file_loads_elsewhere(tmp_path: Path) -> None:
    code = (
        "import sys, torch, ptq4cuda\n"
        "from ptq4cuda.bench import architectures\n"
        "model, x = architectures.build_audio(5, 0.125).eval(), architectures.waves(2, 2000, seed=1)\n"
        "with torch.no_grad():\n"
        "    torch.save(ptq4cuda.load(sys.argv[1], model)(x), sys.argv[2])\n"
    )
    model, x = audio()
    network = quantize(model, [x], QuantConfig.fast(), progress=False)
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    command = [sys.executable, "-c", code, str(tmp_path / "net.ptq4"), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True, timeout=120)
    with torch.no_grad():
        expected = network(architectures.waves(2, 2000, seed=1))
    assert torch.equal(torch.load(tmp_path / "y.pt"), expected)


class Sized(nn.Module):
    """Transposed convolutions that are told the size of their output."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(F.relu(self.down(x)), output_size=x.shape[2:]))


@pytest.mark.parametrize("walk", ["graph", "modules"])
@torch.no_grad()
def test_calls_with_an_output_size_stay_in_float(walk: str) -> None:
    torch.manual_seed(0)
    x = architectures.images(4, 12)
    model: Any = Sized().eval() if walk == "graph" else ByModules(Sized()).eval()
    network = quantize(model, [x], QuantConfig.fast(weight_bits=8, activation_bits=8), progress=False)
    assert record_of(network).walked_by == walk
    by_name = {name.rpartition(".")[2]: record for name, record in records(network).items()}
    assert by_name["up"].reason == "it is called with an output_size"
    assert {name: record.execution for name, record in by_name.items()} == {
        "down": "integer",
        "up": "float",
        "last": "integer",
    }
    assert (network(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_convolutions_of_volumes_stay_in_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 2, 1)).eval()
    network = quantize(model, [architectures.images(2, 8)], progress=False)
    assert records(network)["2"].reason == "Conv3d is not supported"
    with pytest.raises(ValueError, match="no convolution to quantize"):
        quantize(nn.Sequential(nn.Conv3d(2, 2, 1)).eval(), [torch.ones(1, 2, 3, 3, 3)], progress=False)


def test_nothing_but_convolutions_with_a_forward_of_their_own() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight if x.sum() > 1e9 else self.weight - self.weight.mean()
            return self._conv_forward(x, weight, self.bias)

    model = nn.Sequential(Standardized(3, 4, 3), nn.ReLU(), Standardized(4, 4, 3)).eval()
    with pytest.raises(ValueError, match=r"no convolution .*: '0' stays, Standardized has a forward of its own"):
        quantize(model, [architectures.images(2, 8)], progress=False)


@torch.no_grad()
def test_functions_with_constant_weights_become_layers() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(6, 1, 5) * 0.4)
            self.up = nn.Parameter(torch.randn(6, 4, 4) * 0.4)
            self.last = nn.Parameter(torch.randn(3, 4, 1) * 0.4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.conv1d(x, self.first, stride=2))
            return F.conv1d(F.relu(F.conv_transpose1d(x, self.up, stride=2, padding=1)), self.last)

    torch.manual_seed(0)
    model, x = Functions().eval(), architectures.waves(4, 65)
    network = quantize(model, [x], QuantConfig.fast(weight_bits=8, activation_bits=8), progress=False)
    assert [layer.kind for layer in record_of(network).layers] == ["Conv1d", "ConvTranspose1d", "Conv1d"]
    assert all(layer.execution == "integer" for layer in record_of(network).layers)
    assert (network(x) - model(x)).norm() < 0.05 * model(x).norm()
