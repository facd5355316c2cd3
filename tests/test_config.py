"""QuantConfig: which fields go together, rules that others add, its groups, and configurations of other versions."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact import file
from ptq4cuda.artifact.record import record_of
from ptq4cuda.config import VERSION
from ptq4cuda.solve.bits import AllocationRule
from ptq4cuda.solve.clipping import ClipRule, TensorProfile

FIELDS: dict[str, list[Any]] = {
    "clipping": [rule.name for rule in ClipRule.all()],
    "activation_granularity": ["per_channel", "per_tensor"],
    "activation_allocation": ["uniform", "analytic", "greedy"],
    "weight_allocation": ["uniform", "analytic"],
    "channel_bits": [(0, 8), (1, 8), (0, 3), (4, 4)],
    "fold_activation_scale": [True, False],
    "target": ["weights", "output", "block"],
    "rounding": ["nearest", "compensated", "descent"],
    "bias_correction": ["none", "mean", "mean+variance", "output"],
    "depthwise_bits": [None, 8, 2],
    "first_last_bits": [8, 4, 1],
    "weight_bits": [1, 4, 8],
    "activation_bits": [1, 4, 8],
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.b = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.d = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = x + self.c(torch.relu(self.b(x)))
        return self.d(torch.relu(x).mean((2, 3)))


@pytest.fixture
def small() -> nn.Module:
    return Small().eval()


BATCHES = [torch.linspace(-1.0, 2.0, 6 * 3 * 25).sin().view(6, 3, 5, 5)]


def test_what_a_configuration_accepts_can_be_quantized(small: nn.Module) -> None:
    draw = random.Random(0)
    accepted = 0
    while accepted < 40:
        given = {name: draw.choice(values) for name, values in FIELDS.items()}
        try:
            config = QuantConfig(**given, execution="simulate")
        except ValueError:
            continue
        accepted += 1
        output = quantize(small, BATCHES, config, progress=False)(BATCHES[0])
        assert bool(torch.isfinite(output).all()), given


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weights of no bits, fitted": (
        {"weight_allocation": "analytic", "channel_bits": (0, 8)},
        r"weights may have no bits.*rounding 'nearest' and target 'weights' only: give channel_bits \(1, 8\)",
    ),
    "weights of no bits, searched": (
        {"weight_allocation": "analytic", "channel_bits": (0, 8), "rounding": "nearest"},
        "weights may have no bits",
    ),
    "too many bits a channel": (
        {"channel_bits": (5, 8)},
        "channel_bits do not go with activation_allocation 'greedy': a mean of 4 bits cannot be met with 5 to 8",
    ),
    "too few": ({"channel_bits": (1, 3)}, "'greedy': a mean of 4 bits cannot be met with 1 to 3 bits a channel"),
    "too many for weights": (
        {"channel_bits": (5, 8), "activation_bits": 6, "weight_allocation": "analytic"},
        "channel_bits do not go with weight_allocation 'analytic': a mean of 4 bits",
    ),
    "first and last": ({"channel_bits": (3, 8), "first_last_bits": 2}, "a mean of 2 bits cannot be met with 3 to 8"),
    "depthwise": ({"channel_bits": (3, 8), "depthwise_bits": 2}, "a mean of 2 bits cannot be met with 3 to 8"),
    "overrides": (
        {"channel_bits": (3, 8), "overrides": {"a": {"activation_bits": 2}}},
        "a mean of 2 bits cannot be met with 3 to 8",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_fields_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**given)


def test_what_no_allocation_divides_is_not_limited() -> None:
    QuantConfig(channel_bits=(5, 8), activation_allocation="uniform")
    QuantConfig(channel_bits=(5, 8), activation_granularity="per_tensor")
    QuantConfig(channel_bits=(8, 8), activation_bits=8, weight_bits=8)
    QuantConfig.w8a4(rounding="descent")  # no weights of less than 8 bits


def test_groups_are_views_of_the_fields() -> None:
    config = QuantConfig.paper(3, 5, clip_exponent=3.0)
    a, w = config.activations, config.weights
    assert (a.bits, a.clipping, a.clip_exponent, a.granularity) == (5, "laplace", 3.0, "per_channel")
    assert (a.allocation, a.channel_bits, w.channel_bits) == ("analytic", (0, 8), (0, 8))
    assert (w.bits, w.allocation, w.target, w.rounding) == (3, "analytic", "weights", "nearest")
    assert (w.bias_correction, w.fold_activation_scale) == ("mean+variance", False)


# --- rules ------------------------------------------------------------------------------------------------------


@pytest.fixture
def half() -> Iterator[str]:
    """Define a clip rule, as a user's code would."""

    class Half(ClipRule):
        name = "half"
        needs_histogram = False

        def limits(self, profile: TensorProfile, bits: int) -> tuple[Tensor, Tensor]:
            return profile.statistics.min / 2.0, profile.statistics.max / 2.0

    yield "half"
    del ClipRule._rules["half"]


@pytest.fixture
def alternating() -> Iterator[str]:
    class Alternating(AllocationRule):
        name = "alternating"

        def bits(self, spread: Tensor, errors: Tensor | None, mean_bits: int, fewest: int, most: int) -> Tensor:
            bits = torch.full_like(spread, mean_bits, dtype=torch.uint8)
            bits[::2] += 1
            bits[1::2] -= 1
            return bits

    yield "alternating"
    del AllocationRule._rules["alternating"]


def test_a_rule_is_one_class(small: nn.Module, half: str, alternating: str) -> None:
    config = QuantConfig.fast(clipping=half, activation_allocation=alternating, weight_allocation=alternating)
    network = quantize(small, BATCHES, config, progress=False)
    c = next(layer for layer in record_of(network).layers if layer.name == "c")
    assert (c.clip, c.weight_bits, c.activation_bits) == ("half", 4.0, 4.0)
    module = network.get_submodule("c")
    assert module.activation_bits.tolist() == module.weight_bits.tolist() == [5, 3] * 3


def test_unknown_rules_are_refused_with_those_that_are_known(half: str) -> None:
    with pytest.raises(ValueError, match=r"clipping must be one of \[.*'mse'.*'half'\], got 'third'"):
        QuantConfig(clipping="third")
    with pytest.raises(ValueError, match=r"weight_allocation must be one of \['uniform', 'analytic'\], got 'greedy'"):
        QuantConfig(weight_allocation="greedy")


def test_rules_are_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "rules.md").read_text()
    for rule in itertools.chain(ClipRule.all(), AllocationRule.all()):
        assert f"| `{rule.name}` |" in text


# --- versions ---------------------------------------------------------------------------------------------------


def test_dicts_make_the_same_configuration() -> None:
    config = QuantConfig.paper(overrides={"a": "float", "b": {"weight_bits": 8}}, target_sqnr=20.0)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["version"] == VERSION
    assert QuantConfig.from_dict(values) == QuantConfig(**values) == config
    del values["version"]  # as before there were any
    assert QuantConfig.from_dict(values) == config


def test_a_later_configuration() -> None:
    values = {**QuantConfig().to_dict(), "version": VERSION + 1}
    assert QuantConfig.from_dict(values) == QuantConfig()
    with pytest.raises(ValueError, match=f"of version {VERSION + 1} and has lattice, which this .* upgrade ptq4cuda"):
        QuantConfig.from_dict({**values, "lattice": "E8"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'lattice'"):
        QuantConfig.from_dict({**values, "version": VERSION, "lattice": "E8"})
    with pytest.raises(ValueError, match="version must be"):
        QuantConfig(version=VERSION + 1)


def test_a_file_with_a_later_configuration(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "later.ptq4"
    ptq4cuda.save(quantize(small, BATCHES, QuantConfig.fast(), progress=False), path)
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["ptq4cuda"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    header["record"]["config"] |= {"version": VERSION + 1, "lattice": "E8"}
    del header["sha256"]
    header["sha256"] = file._checksum(header, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"ptq4cuda": json.dumps(header)}))
    with pytest.raises(ValueError, match=r"later\.ptq4' was written by a later ptq4cuda: its QuantConfig .*lattice"):
        ptq4cuda.load(path, small)
