"""Bits that layers share out: what is divided, by what, and that other samples decide."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq4cuda.pipeline
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import LayerRecord, record_of
from ptq4cuda.bench import architectures
from ptq4cuda.calibrate.inputs import collect_inputs, some_samples
from ptq4cuda.solve.budget import share_out, shares_bits
from ptq4cuda.solve.raising import Part

SMALL = [f"small.{i}.0" for i in range(4)]
CONFIG = QuantConfig(execution="simulate")


class Pyramid(nn.Module):
    """Layers that read a large image, whose errors are averaged away, and small ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.large = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.small = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)))
        self.last = nn.Linear(128, 6)
        for layer in (self.stem, self.large, *(block[0] for block in self.small)):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.large(torch.relu(self.stem(x))))
        result: Tensor = self.last(self.small(nn.functional.avg_pool2d(x, 4)).flatten(1))
        return result


def pictures(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def bits(network: nn.Module) -> dict[str, LayerRecord]:
    return {layer.name: layer for layer in record_of(network).layers}


def parts(kind: Any, damage: Sequence[float], sizes: Sequence[int]) -> list[Part]:
    return [
        Part(
            kind, (f"layer{i}",), 4, d, n if kind == "weight_bits" else 0, 100, n if kind == "activation_bits" else 0
        )
        for i, (d, n) in enumerate(zip(damage, sizes, strict=True))
    ]


@pytest.mark.parametrize(("kind", "fewest", "most"), [("weight_bits", 3, 6), ("activation_bits", 2, 8)])
def test_what_is_shared_out_is_what_there_is(kind: Any, fewest: int, most: int) -> None:
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.choice((16, 64, 96, 576, 4096)) for _ in range(12)]
        found = parts(kind, [10.0 ** rng.uniform(-6, -2) for _ in sizes], sizes)
        shares = {name: own[kind] for name, own in share_out(found, CONFIG).items()}
        assert len(shares) == 12 and all(fewest <= b <= most for b in shares.values())
        used = sum(b * n for b, n in zip(shares.values(), sizes, strict=True))
        assert used <= 4 * sum(sizes)
        left = 4 * sum(sizes) - used  # less than any part that could have more would take
        assert all(n > left for b, n in zip(shares.values(), sizes, strict=True) if b < most)


@pytest.mark.parametrize("sizes", [(64, 64, 64, 256), (16, 400, 7, 77), (2048, 128, 128, 128)])
def test_no_other_division_leaves_less_noise(sizes: tuple[int, ...]) -> None:
    rng = random.Random(0)
    for _ in range(5):
        damage = [10.0 ** rng.uniform(-5, -2) for _ in sizes]
        found = [
            own["activation_bits"] for own in share_out(parts("activation_bits", damage, sizes), CONFIG).values()
        ]

        def left(bits: Sequence[int], damage: list[float] = damage) -> float:
            return sum(d * 4.0 ** (4 - b) for d, b in zip(damage, bits, strict=True))

        fitting = [
            bits
            for bits in itertools.product(range(2, 9), repeat=len(sizes))
            if sum(b * n for b, n in zip(bits, sizes, strict=True)) <= 4 * sum(sizes)
        ]
        assert left(found) == pytest.approx(min(map(left, fitting)))


@pytest.mark.parametrize("damage", [float("inf"), float("nan")])
def test_what_cannot_be_measured_is_not_shared_out(damage: float) -> None:
    found = share_out(parts("weight_bits", [damage, 1e-3, 1e-5], [64, 64, 64]), CONFIG)
    assert {own["weight_bits"] for own in found.values()} == {4}


def test_what_has_no_part_in_it() -> None:
    assert not any(map(shares_bits, (QuantConfig.fast(), QuantConfig.naive())))
    assert not shares_bits(QuantConfig(weight_bits=8, activation_bits=8))
    found = [*parts("weight_bits", [1e-3, 1e-5], [64, 64]), *parts("activation_bits", [1e-3, 1e-5], [64, 64])]
    for config in (replace(CONFIG, activation_granularity="per_tensor"), replace(CONFIG, activation_bits=8)):
        assert all(own.keys() == {"weight_bits"} for own in share_out(found, config).values())


def test_layers_share_out_the_bits_of_a_network() -> None:
    images, others = architectures.images(32, 32), architectures.images(16, 32, seed=7)
    model = architectures.calibrate_batch_norm(architectures.ARCHITECTURES["resnet18"](width=0.0625), images)
    fast = QuantConfig.fast(execution="simulate")
    networks = [
        quantize(model, [images], config, progress=False)
        for config in (fast, replace(fast, layer_allocation="measured"))
    ]
    with torch.no_grad():
        uniform, measured = (float((network(others) - model(others)).square().sum()) for network in networks)
    assert measured < 0.7 * uniform
    alike, shared = map(bits, networks)
    own = [name for name, layer in alike.items() if layer.weight_bits < 8]
    assert len(own) > 10 and {shared[name].weight_bits for name in own} > {4.0}
    weights = {name: alike[name].float_bytes for name in own}
    assert sum(shared[name].weight_bits * n for name, n in weights.items()) <= 4 * sum(weights.values())
    for name in alike.keys() - set(own):
        assert shared[name].weight_bits == shared[name].activation_bits == 8.0


def test_overrides_change_nothing_in_what_other_layers_have() -> None:
    model, images = Pyramid().eval(), pictures(64, 1)
    before = bits(quantize(model, [images], CONFIG, progress=False))
    config = replace(CONFIG, overrides={"small.1.0": {"activation_bits": 8}})
    after = bits(quantize(model, [images], config, progress=False))
    assert after["small.1.0"].activation_bits == 8.0
    assert after["small.1.0"].weight_bits == before["small.1.0"].weight_bits
    for name in before.keys() - {"small.1.0"}:
        own = before[name].weight_bits, before[name].activation_bits
        assert (after[name].weight_bits, after[name].activation_bits) == own


def test_other_samples_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"large": {"weight_bits": 5, "activation_bits": 4}, SMALL[1]: {"weight_bits": 3, "activation_bits": 2}}
    monkeypatch.setattr(ptq4cuda.pipeline, "share_out", lambda parts, config: bad)
    found = bits(quantize(Pyramid().eval(), [pictures(64, 1)], CONFIG, progress=False))
    for name in ("large", *SMALL):
        assert (found[name].weight_bits, found[name].activation_bits) == (4.0, 4.0)


def test_some_samples_of_batches() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * scale

    x = torch.arange(20.0)[:, None]
    batches = [{"x": part, "scale": torch.tensor(2.0)} for part in x.split(8)]
    inputs = collect_inputs(Scaled(), batches)
    for first, end in ((0, 5), (5, 10), (7, 8), (0, 20), (16, 40)):
        found = some_samples(Scaled(), inputs, first, end)
        assert torch.cat([kwargs["x"] for _, kwargs in found]).flatten().tolist() == list(range(20))[first:end]
        assert all(kwargs["scale"].dim() == 0 for _, kwargs in found)

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(8, 1)

    found = some_samples(Whole(), collect_inputs(Whole(), list(x[:16].split(8))), 2, 5)
    assert [len(args[0]) for args, _ in found] == [8]
