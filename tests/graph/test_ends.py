"""Which layers count as first and last ones, by graph and by modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.graph.ends import Step, find_ends, is_fixed

FAST = QuantConfig.fast()


class Net(nn.Module):
    """Layers by name, and a forward around them that torch.fx can trace or cannot."""

    def __init__(self, layers: dict[str, nn.Module], forward: Callable[..., Any], walk: str) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.written, self.walk = forward, walk

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        if self.walk == "modules" and x.sum() < -1e9:
            return x
        return self.written(self, x) if other is None else self.written(self, x, other)


def conv(inputs: int, outputs: int, size: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def eight_bits(layers: dict[str, nn.Module], forward: Callable[..., Any], walk: str, **inputs: Tensor) -> set[str]:
    """Return the layers that get 8 bits, in the walk that is asked for."""
    net = Net(layers, forward, walk).eval()
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = quantize(net, [{"x": x, **inputs}], FAST, progress=False)
    record = record_of(network)
    assert record.walked_by == walk
    quantized = [layer for layer in record.layers if layer.kind != "Embedding"]
    assert all(layer.execution != "float" for layer in quantized), ptq4cuda.report(network)
    bits = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in quantized}
    assert set(bits.values()) <= {(8.0, 8.0), (4.0, 4.0)}
    return {name for name, both in bits.items() if both == (8.0, 8.0)}


def heads(m: Any, x: Tensor) -> Any:
    """Boxes and classes, and an auxiliary head in the middle."""
    a = F.relu(m.a(x))
    b = F.relu(m.b(a))
    return {"box": m.box(b), "cls": m.cls2(F.relu(m.cls1(b))), "aux": m.aux(a.mean((2, 3)))}


def distribution(m: Any, x: Tensor) -> Any:
    """As YOLO's boxes: the expectation over bins is a convolution with fixed weights."""
    b = F.relu(m.b(F.relu(m.a(x))))
    box = m.box(b).view(len(b) if m.walk == "modules" else b.size(0), 4, 4, -1).transpose(1, 2).softmax(1)
    return m.dfl(box), m.cls(b)


def prepared(m: Any, x: Tensor) -> Any:
    """An image goes through steps that are no layers, to three of them."""
    x = (x - 0.4) / 0.2
    small = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2)
    a = F.relu(m.a(F.pixel_unshuffle(F.pad(x, (1, 1, 1, 1)), 2)) + m.b(torch.cat([small, small.abs()], 1)))
    return m.last(m.d(torch.cat([F.relu(m.c(a)), small], 1)))


def residual(m: Any, x: Tensor) -> Any:
    """What was an image and had something added to it is none."""
    x = x + m.a(x)
    return m.last(F.relu(m.b(x)))


def fixed_first(m: Any, x: Tensor) -> Any:
    return m.last(F.relu(m.b(F.relu(m.a(m.blur(x))))))


def two_images(m: Any, x: Tensor, other: Tensor) -> Any:
    return m.last(F.relu(m.c(F.relu(m.a(x)) + m.b(other[:, None]))))


def conditioned(m: Any, x: Tensor, other: Tensor) -> Any:
    """What is looked up in a table is no image."""
    return m.last(F.relu(m.a(x) + m.b(m.table(other.long())[:, :, None, None])))


def dfl() -> nn.Module:
    layer = nn.Conv2d(4, 1, 1, bias=False)
    layer.weight.data = torch.arange(4.0).view(1, 4, 1, 1)
    return layer


def blur() -> nn.Module:
    layer = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    layer.weight.data = torch.eye(3)[:, :, None, None] * torch.tensor([1.0, 2.0, 1.0]).outer(torch.ones(3)) / 12
    return layer


CASES: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, nn.Module]], set[str]]] = {
    "heads": (
        heads,
        lambda: {
            "a": conv(3, 8, 3),
            "b": conv(8, 8, 3),
            "box": conv(8, 4),
            "cls1": conv(8, 8),
            "cls2": conv(8, 5),
            "aux": nn.Linear(8, 5),
        },
        {"a", "box", "cls2", "aux"},
    ),
    "a distribution": (
        distribution,
        lambda: {"a": conv(3, 8, 3), "b": conv(8, 8, 3), "box": conv(8, 16), "cls": conv(8, 5), "dfl": dfl()},
        {"a", "box", "cls", "dfl"},
    ),
    "steps before": (
        prepared,
        lambda: {
            "a": conv(12, 8, 3),
            "b": conv(6, 8, 3),
            "c": conv(8, 8, 3),
            "d": conv(11, 8, 3),
            "last": conv(8, 5),
        },
        {"a", "b", "d", "last"},
    ),
    "a residual": (residual, lambda: {"a": conv(3, 3, 3), "b": conv(3, 8), "last": conv(8, 5)}, {"a", "last"}),
    "a fixed first": (
        fixed_first,
        lambda: {"blur": blur(), "a": conv(3, 8, 3), "b": conv(8, 8), "last": conv(8, 5)},
        {"blur", "a", "last"},
    ),
    "a table": (
        conditioned,
        lambda: {"table": nn.Embedding(5, 6), "a": conv(3, 8, 3), "b": conv(6, 8), "last": conv(8, 5)},
        {"a", "last"},
    ),
    "two images": (
        two_images,
        lambda: {"a": conv(3, 8, 3), "b": conv(1, 8, 3), "c": conv(8, 8), "last": conv(8, 5)},
        {"a", "b", "last"},
    ),
}


@pytest.mark.parametrize("walk", ["graph", "modules"])
@pytest.mark.parametrize("case", CASES)
def test_first_and_last_layers(case: str, walk: str) -> None:
    torch.manual_seed(0)
    forward, layers, expected = CASES[case]
    inputs = {two_images: {"other": torch.randn(6, 8, 8)}, conditioned: {"other": torch.arange(6) % 5}}.get(
        forward, {}
    )
    assert eight_bits(layers(), forward, walk, **inputs) == expected


def test_layers_in_float_are_passed() -> None:
    """Behind a first layer that stays in float comes another, before a last one too."""
    torch.manual_seed(0)
    net = nn.Sequential(*(conv(3, 3) for _ in range(5))).eval()
    config = QuantConfig.fast(overrides={"0": "float", "4": "float"})
    network = quantize(net, [torch.randn(6, 3, 8, 8)], config, progress=False)
    bits = {layer.name: layer.weight_bits for layer in record_of(network).layers}
    assert bits == {"0": None, "1": 8.0, "2": 4.0, "3": 8.0, "4": None}


def test_writes_in_place_are_followed_by_modules() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 8, 8, 8)
        y[:, :4] = m.a(x)
        y[:, 4:].copy_(m.b(x))
        y += m.a(x).repeat(1, 2, 1, 1)
        return m.last(F.relu(m.c(y)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    layers = {"a": conv(3, 4), "b": conv(3, 4), "c": conv(8, 8), "last": conv(8, 5)}
    assert eight_bits(layers, forward, "modules") == {"a", "b", "last"}


def test_nothing_but_fixed_layers_counts_all() -> None:
    image = Step(is_input=True)
    a = Step([image], layer="a")
    b = Step([a], layer="b")
    c = Step([b], layer="c")
    assert find_ends([image, a, b, c]) == find_ends([image, a, b, c], ["a", "b", "c"]) == {"a", "c"}
    assert find_ends([image, a, b, c], ["c"]) == {"a", "b", "c"}
    assert find_ends([image, a, b, c], ["a"]) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("weight", "fixed"),
    [
        (torch.arange(16.0).view(1, 16, 1, 1), True),
        (torch.full((8, 1, 3, 3), 1 / 9), True),
        (torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).view(1, 1, 3, 3) / 8, True),
        (torch.randn(1, 1, 5, 5).expand(4, 1, 5, 5), True),  # as a Gaussian
        (torch.randn(4, 4, 3, 3), False),
        (torch.randn(4, 4, 1, 1).half(), False),
        (torch.tensor([0.37]).view(1, 1, 1, 1), False),
        (torch.zeros(4, 4, 1, 1), False),
        (torch.tensor([0.3, 0.7]).view(1, 2, 1, 1), False),
    ],
)
def test_weights_that_nobody_trained(weight: Tensor, fixed: bool) -> None:
    layer = nn.Conv2d(1, 1, 1)
    layer.weight = nn.Parameter(weight)
    assert is_fixed(layer) == fixed
