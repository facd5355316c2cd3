"""benchmark(): what is timed is the user's network in each of its forms, in turns; no time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig
from ptq4cuda.bench import network
from ptq4cuda.bench.network import Benchmark

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def build(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    ).eval()


def quantized(**options: Any) -> nn.Module:
    return ptq4cuda.quantize(build(), [X], QuantConfig.fast(**options), progress=False)


class Seen(list[dict[str, Any]]):
    """What the calls that are timed return, with one set of calls for each batch."""

    def take_turns(
        self, calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float
    ) -> dict[str, list[float]]:
        self.threads = torch.get_num_threads()
        self.append({way: call() for way, call in calls.items()})
        return {way: [3.0, 1.0 + i, 1.0 + i] for i, way in enumerate(calls)}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    monkeypatch.setattr(network, "take_turns", found.take_turns)
    return found


def test_a_float_network_in_each_of_its_forms(seen: Seen) -> None:
    net = build()
    found = ptq4cuda.benchmark(net, X, batches=(1, 7))
    assert [(row.batch, row.way) for row in found.rows] == [
        (batch, way) for batch in (1, 7) for way in ("float", "simulate", "integer")
    ]
    for outputs, x in zip(seen, (X[:1], torch.cat([X, X, X])[:7]), strict=True):
        assert torch.equal(outputs["float"], net(x))
        assert torch.equal(outputs["simulate"], quantized(execution="simulate")(x))
        assert torch.equal(outputs["integer"], quantized()(x))
        torch.testing.assert_close(outputs["integer"], outputs["simulate"])
    assert "quantized by QuantConfig.fast() on the example" in found.remarks


def test_figures_are_medians(seen: Seen) -> None:
    found = ptq4cuda.benchmark(build(), X, batches=[4])
    assert [row.ms for row in found.rows] == [1000.0, 2000.0, 3000.0]
    assert [row.samples_per_second for row in found.rows] == [4.0, 2.0, pytest.approx(4 / 3)]
    assert [row.over_float for row in found.rows] == [1.0, 0.5, pytest.approx(1 / 3)]
    stored = json.loads(json.dumps(found.to_dict()))
    assert stored["rows"][1] == {
        "batch": 4, "way": "simulate", "ms": 2000.0, "samples_per_second": 2.0, "over_float": 0.5
    }  # fmt: skip
    assert stored["machine"] == found.machine
    lines = str(found).splitlines()
    assert lines[0] == f"{found.machine}, medians"
    assert [line.split() for line in lines if line.startswith("4 ")] == [
        ["4", "float", "1000", "4.0", "1.00"],
        ["4", "simulate", "2000", "2.0", "0.50"],
        ["4", "integer", "3000", "1.3", "0.33"],
    ]
    assert lines[-1] == "Quantized by QuantConfig.fast() on the example."


def test_a_quantized_network_beside_its_float_one(seen: Seen) -> None:
    net, qnet = build(), quantized(first_last_bits=4)
    found = ptq4cuda.benchmark(qnet, X, (2,), float_net=net)
    assert [row.way for row in found.rows] == ["float", "simulate", "integer"]
    assert torch.equal(seen[0]["float"], net(X[:2]))
    assert torch.equal(seen[0]["integer"], qnet(X[:2]))
    torch.testing.assert_close(seen[0]["simulate"], qnet(X[:2]))
    assert not torch.equal(qnet(X[:2]), quantized()(X[:2]))  # it is the one that was given
    assert found.remarks == ()


def test_a_quantized_network_alone(seen: Seen) -> None:
    found = ptq4cuda.benchmark(quantized(), X, (1,))
    assert [(row.way, row.over_float) for row in found.rows] == [("integer", None)]
    assert "float and simulate are not measured: they need the float network, float_net=..." in found.remarks


def test_a_network_that_is_simulated(seen: Seen) -> None:
    net, qnet = build(), quantized(execution="simulate")
    assert [row.way for row in ptq4cuda.benchmark(qnet, X, (1,)).rows] == ["simulate"]
    found = ptq4cuda.benchmark(qnet, X, (1,), float_net=net)
    assert [row.way for row in found.rows] == ["float", "simulate"]
    assert "no layer computes in integers: report() says why" in found.remarks


def test_layers_that_were_put_together_by_hand(seen: Seen) -> None:
    four = torch.tensor([4], dtype=torch.uint8)
    limits = ptq4cuda.QuantParams.from_range(torch.tensor([-4.0]), torch.tensor([4.0]), four)
    layer = ptq4cuda.QuantConv2d.from_float(nn.Conv2d(3, 8, 3), limits, bias_correction="none")
    assert [row.way for row in ptq4cuda.benchmark(layer, X, (1,)).rows] == ["simulate"]
    assert ptq4cuda.lower_layers(layer) == {}
    assert [row.way for row in ptq4cuda.benchmark(layer, X, (1,)).rows] == ["integer"]
    torch.testing.assert_close(seen[1]["integer"], seen[0]["simulate"])


def test_layers_that_stay_simulated_are_counted(seen: Seen) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)).eval()
    qnet = ptq4cuda.quantize(net, [X], QuantConfig.fast(fold_activation_scale=False), progress=False)
    found = ptq4cuda.benchmark(qnet, X, (1,), float_net=net)
    assert [row.way for row in found.rows] == ["float", "simulate", "integer"]
    assert found.remarks == ("in integers 1 of 2 quantized layers stay simulated: see report()",)


def test_threads_are_those_asked_for_and_come_back(seen: Seen) -> None:
    before = torch.get_num_threads()
    found = ptq4cuda.benchmark(build(), X, (1,), before + 1)
    assert (seen.threads, torch.get_num_threads()) == (before + 1, before)
    assert f"{before + 1} threads" in found.machine
    with pytest.raises(ValueError, match=r"the float network fails on a batch of 2 \(RuntimeError: "):
        ptq4cuda.benchmark(OfThree().eval(), X, (3, 2), before + 1)
    assert torch.get_num_threads() == before


class OfThree(nn.Module):
    """Takes batches of three alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("gains", torch.ones(3, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.gains


class Masked(nn.Module):
    """A network of two arguments, one of them of each sample, and of weights of its own length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image: Tensor, mask: Tensor, gains: Tensor) -> Tensor:
        assert mask.shape == (len(image), 1, 1, 1)
        return self.conv(image) * mask + gains.sum()


def test_arguments_of_any_number_of_samples(seen: Seen) -> None:
    mask = torch.tensor([0.0, 1.0, 0.5])[:, None, None, None]
    example = {"image": X, "mask": mask, "gains": torch.ones(5)}
    ptq4cuda.benchmark(Masked().eval(), example, (2, 5))
    for outputs, count in zip(seen, (2, 5), strict=True):
        for y in outputs.values():
            assert y.shape == (count, 4, 8, 8)
            assert torch.equal(y[::3], torch.full_like(y[::3], 5.0))  # where the mask is 0


def test_the_memory_format_of_the_example_is_kept() -> None:
    x = X.contiguous(memory_format=torch.channels_last)
    for count in (2, 8):
        (filled,), _ = network.resized(((x,), {}), count)
        assert filled.shape == (count, 3, 8, 8)
        assert filled.is_contiguous(memory_format=torch.channels_last)
        assert filled.data_ptr() != x.data_ptr()


def test_clocks_are_read() -> None:
    found = ptq4cuda.benchmark(build(), X, (1,), seconds=0.0)
    assert isinstance(found, Benchmark)
    assert all(row.ms > 0 and row.samples_per_second == pytest.approx(1e3 / row.ms) for row in found.rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": "net"}, "net must be a torch.nn.Module, got str"),
        ({"float_net": 3}, "float_net must be a torch.nn.Module, got int"),
        ({"float_net": build()}, "float_net goes with a quantized net, but net is a float network itself"),
        ({"net": build().train()}, "the model must be in evaluation mode"),
        ({"net": quantized(), "float_net": build().train()}, "the model must be in evaluation mode"),
        (
            {"net": quantized(), "float_net": build(16)},
            "float_net is no network of net's architecture: net does not",
        ),
        ({"net": quantized(), "float_net": nn.Conv2d(3, 2, 1).eval()}, "float_net is no network of .*: net belongs"),
        ({"net": nn.ReLU().eval()}, "the model has no convolution to quantize"),
        ({"batches": 8}, r"batches must be numbers of samples, from 1, as \(1, 8\), got 8"),
        ({"batches": ()}, r"batches must be .* got \(\)"),
        ({"batches": (1, 0)}, "batches must be"),
        ({"batches": "1,8"}, "batches must be"),
        ({"threads": 0}, "threads must be a number from 1 to 1024, got 0"),
        ({"threads": 999_999}, "threads must be a number from 1 to 1024, got 999999"),
        ({"seconds": -1.0}, "seconds must be a number from 0, got -1.0"),
        ({"example": X.numpy()}, "the example must be a tensor, .* got ndarray: torch.from_numpy makes a tensor"),
        ({"example": X[:0]}, r"the example has the shape \[0, 3, 8, 8\], without samples"),
        ({"example": torch.full((1, 3, 8, 8), torch.nan)}, "the example contains NaN or Inf"),
        ({"example": X[:, :2]}, r"the float network fails on a batch of 3 \(RuntimeError: .*channels"),
        ({"net": quantized(), "example": X[:, :2]}, "the quantized network fails on a batch of 1 .*channels"),
    ],
)
def test_what_cannot_be_timed_is_told_in_a_sentence(seen: Seen, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"net": build(), "example": X, "batches": (1,), **change}
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        ptq4cuda.benchmark(**given)
    assert "\n" not in str(raised.value)
    assert "/tmp" not in str(raised.value)
