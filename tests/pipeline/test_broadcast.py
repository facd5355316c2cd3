"""Sums in which one of both is broadcast over the other: a context of the whole image, a gate, a mask, a number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from graph.test_patched import sqnr
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.calibrate.by_graph import _summand
from ptq4cuda.nn import QuantTensor


class Net(nn.Module):
    """Layers of several sizes and a sum of two of them, which torch.fx can trace or cannot."""

    def __init__(self, forward: Callable[..., Tensor], walk: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.point, self.single = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 1, 1)
        self.linear, self.head = nn.Linear(12, 12), nn.Linear(12, 5)
        self.written, self.walk = forward, walk

    def forward(self, x: Tensor) -> Tensor:
        if self.walk == "modules" and x.sum() < -1e9:
            return x
        x = self.written(self, F.relu(self.stem(x)))
        return self.head(F.relu(x).mean((2, 3)))


def context(m: Any, x: Tensor) -> Tensor:
    return x + m.point(x.mean((2, 3), keepdim=True))


def context_first(m: Any, x: Tensor) -> Tensor:
    return m.point(F.adaptive_avg_pool2d(x, 1)) + m.conv(x)


def squeezed(m: Any, x: Tensor) -> Tensor:
    return x + m.linear(x.mean((2, 3)))[:, :, None, None]


def gate(m: Any, x: Tensor) -> Tensor:
    return torch.add(x, m.single(x))


def gate_of_a_row(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + m.point(x.mean(3, keepdim=True))


def over_the_batch(m: Any, x: Tensor) -> Tensor:
    return x + m.conv(x[:1])


def without_a_batch(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + x.mean((0, 2, 3))[:, None, None]


def a_mask(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + (x > 0.5)


def a_number(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + x.mean() + m.point(x)


def tokens(m: Any, x: Tensor) -> Tensor:
    y = x.flatten(2).transpose(1, 2)
    y = y + m.linear(y.mean(1, keepdim=True))
    return y.transpose(1, 2).unflatten(2, (8, 8))


FORWARDS = [context, context_first, squeezed, gate, gate_of_a_row, over_the_batch, without_a_batch, a_mask, a_number]
FORWARDS += [tokens]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# A walk by modules has both streams in one batch, which some of these would mix.
BY_MODULES = [f for f in FORWARDS if f not in (over_the_batch, without_a_batch, a_number)]


@pytest.mark.parametrize(
    ("walk", "forward"), [*(("graph", f) for f in FORWARDS), *(("modules", f) for f in BY_MODULES)]
)
def test_broadcast_sums(forward: Callable[..., Tensor], walk: str, images: Tensor, tmp_path: Path) -> None:
    net = Net(forward, walk).eval()
    fresh = 0.7 * images.flip(3)
    networks = {}
    for execution in ("simulate", "integer"):
        config = QuantConfig(execution=execution)
        networks[execution] = quantize(net, list(images.split(12)), config, progress=False)
        assert record_of(networks[execution]).walked_by == walk
        assert sqnr(net, networks[execution], fresh) > 15.0
    assert sqnr(networks["simulate"], networks["integer"], fresh) > 100.0
    called = [layer for layer in record_of(networks["integer"]).layers if layer.reason != "never called as a module"]
    assert len(called) >= 3 and all(layer.execution == "integer" for layer in called)
    ptq4cuda.save(networks["integer"], tmp_path / "net.ptq4")
    assert torch.equal(ptq4cuda.load(tmp_path / "net.ptq4", net)(fresh), networks["integer"](fresh))
    marks = [m for m in networks["integer"].modules() if isinstance(m, QuantTensor) and m.scale.numel()]
    assert len(marks) == (walk == "graph" and forward is a_number)  # what is broadcast travels as values


@pytest.mark.parametrize("execution", ["simulate", "integer"])
def test_images_of_one_pixel_may_grow(execution: str) -> None:
    """That shapes agree on the calibration data is chance where one of both is pooled."""
    net = Net(lambda m, x: m.point(x.mean((2, 3), keepdim=True)) + m.conv(x), "graph").eval()
    torch.manual_seed(0)
    network = quantize(net, [torch.randn(48, 3, 1, 1)], QuantConfig(execution=execution), progress=False)
    assert not any(m.scale.numel() for m in network.modules() if isinstance(m, QuantTensor))
    for size in (1, 4):
        x = torch.randn(5, 3, size, size)
        assert network(x).shape == net(x).shape
        assert sqnr(net, network, x) > 10.0


def test_the_target_of_what_is_broadcast_is_the_mean() -> None:
    """The error of a sum is least where the output makes up for the mean of the errors that it meets."""
    torch.manual_seed(0)
    for shape, like in (
        ((4, 3, 5, 6), (4, 3, 1, 1)),
        ((4, 3, 5, 6), (4, 1, 5, 6)),
        ((4, 3, 5, 6), (1, 3, 5, 6)),
        ((4, 7, 3), (4, 1, 3)),
        ((2, 4, 3), (4, 3)),
    ):
        error, y = torch.randn(shape), torch.zeros(like, requires_grad=True)
        ((error + y).square().sum()).backward()
        assert y.grad is not None
        best = -y.grad * y.numel() / error.numel() / 2
        torch.testing.assert_close(-(_summand(error, y) + torch.zeros(like)), best)
    for shape in ((4, 3, 1, 1), (3, 1, 1), (1,), (4, 3, 5, 6)):
        x = torch.randn(shape)
        assert _summand(x, torch.zeros(4, 3, 5, 6)) is x
