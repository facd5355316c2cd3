"""Real trained networks on real images: the paper's ladder must hold on them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import networks
import pytest
import torch
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import tensor_bytes
from ptq4cuda.metrics import Comparison, compare


class Float(nn.Module):
    """The trained network, which computes its scores of a batch once: all settings are compared with them."""

    scores: ClassVar[dict[tuple[str, bytes], Tensor]] = {}  # by network and images

    def __init__(self, subject: networks.Subject) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, x: Tensor) -> Tensor:
        key = self.subject.name, hashlib.sha256(x.contiguous().numpy()).digest()
        if key not in self.scores:
            self.scores[key] = self.subject.model(x)
        return self.scores[key]


def measure(subject: networks.Subject, config: QuantConfig) -> Comparison:
    network = quantize(subject.model, subject.calibration.split(64), config, progress=False)
    return compare(Float(subject), network, subject.test)


W8A4, W4A8, W4A4 = QuantConfig.naive(8, 4), QuantConfig.naive(4, 8), QuantConfig.naive()
LADDER = {
    "w8a4 naive": W8A4,
    "w8a4 aciq": replace(W8A4, clipping="laplace"),
    "w8a4 allocation": replace(W8A4, activation_allocation="analytic", channel_bits=(0, 8)),
    "w8a4 both": QuantConfig.w8a4(),
    "w4a8 naive": W4A8,
    "w4a8 correction": replace(W4A8, bias_correction="mean+variance"),
    "w4a8 allocation": replace(W4A8, weight_allocation="analytic", channel_bits=(0, 8)),
    "w4a8 both": QuantConfig.w4a8(),
    "w4a4 naive": W4A4,
    "w4a4 all": QuantConfig.paper(),
}


@pytest.fixture(scope="module")
def ladder(resnet20: networks.Subject) -> dict[str, Comparison]:
    return {name: measure(resnet20, config) for name, config in LADDER.items()}


def test_float_network_is_the_trained_one(ladder: dict[str, Comparison]) -> None:
    assert ladder["w4a4 all"].float_top1 == pytest.approx(80.85)
    assert ladder["w4a4 all"].images == 2000


@pytest.mark.parametrize(
    ("better", "naive"),
    [
        ("w8a4 aciq", "w8a4 naive"),
        ("w8a4 allocation", "w8a4 naive"),
        ("w8a4 both", "w8a4 naive"),
        ("w4a8 correction", "w4a8 naive"),
        ("w4a8 allocation", "w4a8 naive"),
        ("w4a8 both", "w4a8 naive"),
        ("w4a4 all", "w4a4 naive"),
    ],
)
def test_every_method_of_the_paper_improves_on_naive(ladder: dict[str, Comparison], better: str, naive: str) -> None:
    assert ladder[better].agreement > ladder[naive].agreement
    assert ladder[better].sqnr > ladder[naive].sqnr


@pytest.mark.parametrize(("name", "agreement"), [("w8a4 both", 92.5), ("w4a8 both", 93.0), ("w4a4 all", 90.5)])
def test_paper_reaches_its_level(ladder: dict[str, Comparison], name: str, agreement: float) -> None:
    assert ladder[name].agreement >= agreement


def test_naive_is_well_below(ladder: dict[str, Comparison]) -> None:
    for setting, all_of_it, gap in (("w8a4", "both", 2.0), ("w4a8", "both", 2.0), ("w4a4", "all", 3.0)):
        assert ladder[f"{setting} naive"].agreement <= ladder[f"{setting} {all_of_it}"].agreement - gap + 1e-9


def test_default_goes_past_the_paper(ladder: dict[str, Comparison], resnet20_512: networks.Subject) -> None:
    default = measure(resnet20_512, QuantConfig())
    assert default.agreement >= 93.5
    assert default.sqnr >= 18.2
    assert default.agreement > ladder["w4a4 all"].agreement
    assert default.sqnr > ladder["w4a4 all"].sqnr + 3.0


def test_file_of_uniform_four_bits(resnet20: networks.Subject, tmp_path: Path) -> None:
    config = replace(QuantConfig.fast(), first_last_bits=4, activation_allocation="uniform")
    network = quantize(resnet20.model, [resnet20.calibration[:32]], config, progress=False)
    path = tmp_path / "resnet20.ptq4"
    ptq4cuda.save(network, path)
    float_bytes = sum(4 * p.numel() for p in resnet20.model.parameters())
    weights = sum(b.numel() for name, b in network.named_buffers() if name.endswith("weight_packed"))
    assert weights <= 0.1251 * float_bytes
    # what is not weights is metadata: parameters of channels, names of tensors, the record
    quantizers = sum(
        tensor_bytes(m)
        for m in network.modules()
        if m is not network and {"scale", "zero_point"} <= m.state_dict().keys()
    )
    assert 0 < quantizers < 0.003 * float_bytes  # of the residual operands, which no layer reads
    assert tensor_bytes(network) - quantizers <= 0.14 * float_bytes
    loaded = ptq4cuda.load(path, networks.resnet20().model)
    with torch.no_grad():
        x = resnet20.test[0][0]
        assert torch.equal(loaded(x), network(x))


PRESETS = {
    "paper": QuantConfig.paper(),
    "paper w8a4": QuantConfig.w8a4(),
    "paper w4a8": QuantConfig.w4a8(),
    "naive": QuantConfig.naive(),
    "fast": QuantConfig.fast(),
    "auto": replace(QuantConfig.fast(), clipping="auto"),
    "kld": replace(QuantConfig.fast(), clipping="kld"),
    "per tensor": QuantConfig(activation_granularity="per_tensor"),
}


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_mobilenet_with_every_preset(mobilenet: networks.Subject, config: QuantConfig) -> None:
    """A depthwise LeakyReLU network: the closed forms cost it most of its accuracy, but it must run and be finite."""
    network = quantize(mobilenet.model, [mobilenet.calibration[:16]], config, progress=False)
    record = network.meta["ptq4cuda"]
    assert len(record.layers) == 28
    assert record.folded == 27
    assert all(layer.execution in ("simulate", "integer") for layer in record.layers)
    with torch.no_grad():
        assert bool(torch.isfinite(network(mobilenet.test[0][0][:8])).all())


@pytest.mark.parametrize(
    ("depthwise_bits", "agreement", "sqnr"), [(8, 70.0, 11.0), (None, 52.0, 7.0)], ids=["depthwise 8", "depthwise 4"]
)
def test_mobilenet_by_default(
    mobilenet_128: networks.Subject, depthwise_bits: int | None, agreement: float, sqnr: float
) -> None:
    result = measure(mobilenet_128, QuantConfig(depthwise_bits=depthwise_bits))
    assert result.images == 300
    assert result.agreement >= agreement
    assert result.sqnr >= sqnr


def test_mobilenet_at_eight_bits_is_the_network(mobilenet: networks.Subject) -> None:
    assert measure(mobilenet, QuantConfig.naive(8, 8)).agreement > 80


def test_bias_correction_rescues_mobilenet(mobilenet: networks.Subject) -> None:
    corrected, naive = (measure(mobilenet, replace(W4A8, bias_correction=c)) for c in ("mean+variance", "none"))
    assert corrected.agreement > naive.agreement + 15
