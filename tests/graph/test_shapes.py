"""What reads only the shape of a tensor is no reader; BatchNorms fold past it, wherever channels are certain."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from execute import test_lowering
from graph import test_tracing
from pipeline import test_models
from ptq4cuda import QuantConfig, graph, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.bench import architectures
from ptq4cuda.graph.readers import readers
from ptq4cuda.graph.shapes import Size, infer_shapes
from ptq4cuda.graph.trace import trace
from ptq4cuda.nn import QuantModule

FAST = QuantConfig.fast()


class Values(fx.Interpreter):
    """Runs a network and keeps every value."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def check_shapes(network: fx.GraphModule, *batches: tuple[Tensor, ...]) -> int:
    """Compare what is inferred with what is computed; return how many tensors' shapes were inferred."""
    shapes = infer_shapes(network)
    for batch in batches:
        with torch.no_grad():
            (run := Values(network)).run(*batch)
        sizes: dict[Size, int] = {}
        found = [(node, shape, tuple(run.values[node].shape)) for node, shape in shapes.tensors.items()]
        found += [
            (node, n, tuple(run.values[node])) if isinstance(n, tuple) else (node, (n,), (run.values[node],))
            for node, n in shapes.numbers.items()
        ]
        for node, inferred, actual in found:
            assert len(inferred) == len(actual), node
            for size, value in zip(inferred, actual, strict=True):
                assert (sizes.setdefault(size, value) if isinstance(size, Size) else size) == value, node
    return len(shapes.tensors)


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_inferred_shapes_are_those_of_the_tensors(name: str) -> None:
    model, x = test_models.build(name)
    network, reason = trace(model)
    assert network is not None, reason
    known = check_shapes(network, (x[:2],), (F.pad(x[:3], (0, 32)),))
    assert known > 0.75 * sum(node.op.startswith("call") for node in network.graph.nodes)


def test_inferred_shapes_of_all_kinds_of_nodes() -> None:
    model, x, side = test_models.everything()
    network, reason = trace(model)
    assert network is not None, reason
    check_shapes(network, (x[:2], side[:2]), (x[:3, :, :8], side[:3, :, :8]))
    outer, _ = trace(test_tracing.Outer().eval())
    assert outer is not None
    check_shapes(outer, (torch.randn(2, 3, 6, 6),), (torch.randn(3, 3, 9, 5),))


def test_what_returns_several_tensors_has_no_shape_of_its_own() -> None:
    """A batch that is taken for the channels would be a number that is the same for all inputs."""

    def pooled(m: Any, x: Tensor) -> Any:
        y, indices = F.max_pool2d(m.conv(x), 2, return_indices=True)
        z, other = m.pool(m.conv(x))
        w, last = F.adaptive_max_pool2d(m.conv(x), (6, 6), True)
        rows = torch.where(x.mean((1, 2, 3)) > -9.0)[0]
        return m.last(y.reshape(y.size(0), y.shape[1], -1, 6)) + z.flatten(1).sum(), w, indices, other, last, rows

    model = Written(pooled).eval()
    model.pool = nn.MaxPool2d(2, return_indices=True)
    network, reason = trace(model)
    assert network is not None, reason
    check_shapes(network, (torch.randn(2, 3, 12, 12),), (torch.randn(8, 3, 12, 12),))


def test_shapes_of_powers_and_squares() -> None:
    def attention(m: Any, x: Tensor) -> Tensor:
        tokens = m.conv(x).flatten(2)
        weights = torch.matmul(tokens.transpose(1, 2), tokens)  # the same symbol twice
        return weights.flatten(1).sum(1)[:, None, None, None] + x.mean(1, keepdim=True) ** m.conv(x)

    network, reason = trace(Written(attention).eval())
    assert network is not None, reason
    check_shapes(network, (torch.rand(2, 3, 6, 6),), (torch.rand(3, 3, 5, 4),))


class Written(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.linear, self.bn1, self.fc = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)
        self.bn8, self.wide = nn.BatchNorm1d(8), nn.Linear(8 * 36, 6)
        self.narrow, self.narrower = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 3, 1)
        self.square, self.sequences = nn.Linear(8, 36), nn.BatchNorm1d(36)
        self.gamma = nn.Parameter(torch.rand(12) + 0.5)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 2.0)
        self.written = forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


def unpacked(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    n, c, h, w = y.shape
    return m.last(m.bn(y).relu()).view(n, c * h * w)


def asserted(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    torch._assert(y.ndim == 4, "4D input")
    torch._assert(y.shape[1] == 8, "channels")
    torch._assert(x.ndim == 4, "unknown before it has run")
    assert len(y.shape) == 4
    if y.shape[1] != 8:
        raise ValueError("channels")
    return m.last(m.bn(y).relu())


def of_all_kinds(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = torch.zeros_like(y) + y.new_ones(1).to(y.dtype) + x.mean(1, keepdim=True).expand_as(y) + x.sum().type_as(y)
    z = z.view(y.size(0), -1, *y.shape[2:]) * (y.dim() + y.numel() / y.numel())
    return m.last(F.relu(m.bn(y))) + z.to(y) + y.is_floating_point() * y.stride(3)


def after_flatten(m: Any, x: Tensor) -> Tensor:
    tokens = m.conv(x).flatten(2).transpose(1, 2)
    y = m.linear(tokens)
    return m.fc(m.bn1(y.flatten(0, 1)).reshape_as(y))


def after_transpose(m: Any, x: Tensor) -> Tensor:
    y = m.linear(m.conv(x).flatten(2).permute(0, 2, 1))
    return m.fc(m.bn1(y.transpose(1, 2)).transpose(1, 2))


def after_views(m: Any, x: Tensor) -> Tensor:
    y = m.linear(m.conv(x).permute(0, 2, 3, 1))
    n, h, w, c = y.shape
    return m.fc(m.bn1(y.reshape(n * h * w, c)).reshape(n, h, w, c))


def flat_convolution(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    n, c, h, w = y.shape
    return m.last(m.bn8(y.view(n, c, -1)).view(n, c, h, w))


def scaled_after_permute(m: Any, x: Tensor) -> Tensor:
    y = m.linear(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * m.gamma.view(1, -1, 1, 1)
    return m.fc(y.permute(0, 2, 3, 1))


def before_flatten(m: Any, x: Tensor) -> Tensor:
    return m.wide(m.bn(F.max_pool2d(m.conv(x), 2)).flatten(1))


def before_transpose(m: Any, x: Tensor) -> Tensor:
    return m.linear(m.bn(F.max_pool2d(m.conv(x), 2)).flatten(2).transpose(1, 2))


def joined(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x).relu()
    return m.linear(m.bn(torch.cat([m.narrow(y), m.narrower(y)], 1)).relu().mean((2, 3)))


def pooled(m: Any, x: Tensor) -> Tensor:
    y = F.interpolate(F.avg_pool2d(m.conv(x), 2), scale_factor=2.0, mode="bilinear")
    return m.last(m.bn(y).relu())


def before_the_classifier(m: Any, x: Tensor) -> Tensor:
    return m.linear(F.adaptive_avg_pool2d(m.bn(m.conv(x).tanh()), 1).flatten(1))


def before_a_mean(m: Any, x: Tensor) -> Tensor:
    return m.linear(m.bn(m.conv(x).tanh()).mean((-2, -1)))


FOLDED = [
    *(unpacked, asserted, of_all_kinds, after_flatten, after_transpose, after_views, flat_convolution),
    *(scaled_after_permute, before_flatten, before_transpose, joined, pooled, before_the_classifier, before_a_mean),
]


@pytest.mark.parametrize("forward", FOLDED, ids=lambda f: f.__name__)
def test_batch_norm_is_folded(forward: Callable[..., Any]) -> None:
    model, x = Written(forward).eval(), architectures.images(4, 12)
    network, reason = trace(model)
    assert network is not None, reason
    assert graph.fold_batch_norm(network) == (forward is not scaled_after_permute)  # that is no BatchNorm,
    if forward is scaled_after_permute:  # but gone as well
        assert all(node.target is not operator.mul for node in network.graph.nodes)
    for images in (x, architectures.images(3, 12, seed=1)):
        with torch.no_grad():
            torch.testing.assert_close(network(images), model(images), rtol=1e-4, atol=1e-4)
    if forward not in (before_flatten,):
        images = torch.randn(2, 3, 10, 16)
        with torch.no_grad():
            torch.testing.assert_close(network(images), model(images), rtol=1e-4, atol=1e-4)


def over_positions(m: Any, x: Tensor) -> Tensor:
    """BatchNorm1d normalizes the 36 positions, not the 36 features."""
    return m.sequences(m.square(F.max_pool2d(m.conv(x), 2).flatten(2).transpose(1, 2)))


def over_positions_turned(m: Any, x: Tensor) -> Tensor:
    y = m.square(F.max_pool2d(m.conv(x), 2).flatten(2).transpose(1, 2)).transpose(1, 2)
    return m.sequences(y.transpose(1, 2))


def mixed_by_reshape(m: Any, x: Tensor) -> Tensor:
    y = m.linear(m.conv(x).flatten(2).transpose(1, 2))
    return m.fc(m.bn1(y.reshape(-1, 12, y.shape[1])).reshape_as(y))


def averaged_away(m: Any, x: Tensor) -> Tensor:
    """As many positions as channels, of which only the positions are left."""
    y = m.linear(m.conv(x).permute(0, 2, 3, 1)).reshape(-1, 12, 12).transpose(1, 2)
    return m.bn1(y.mean(1))


def padded_average(m: Any, x: Tensor) -> Tensor:
    return m.last(m.bn(F.avg_pool2d(m.conv(x), 3, 2, 1)))


def joined_with_another_reader(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x).relu()
    z = m.narrow(y)
    return m.linear(m.bn(torch.cat([z, m.narrower(y)], 1)).relu().mean((2, 3))).sum() + z


def joined_images(m: Any, x: Tensor) -> Tensor:
    return m.last(m.bn(torch.cat([m.conv(x), m.last(x.repeat(1, 3, 1, 1)[:, :8])], 0)).relu())


def values_are_read(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.last(m.bn(y)) + y.new_tensor(2.0) * y


@pytest.mark.parametrize(
    "forward",
    [
        *(over_positions, over_positions_turned, mixed_by_reshape, values_are_read),
        *(averaged_away, padded_average, joined_with_another_reader, joined_images),
    ],
    ids=lambda f: f.__name__,
)
def test_batch_norm_stays_where_folding_would_be_wrong(forward: Callable[..., Any]) -> None:
    model, x = Written(forward).eval(), architectures.images(4, 12)
    network, reason = trace(model)
    assert network is not None, reason
    assert graph.fold_batch_norm(network) == 0
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)


def test_checks_that_always_hold_go() -> None:
    network, _ = trace(Written(asserted).eval())
    assert network is not None
    assert [node.target for node in network.graph.nodes].count(torch._assert) == 1  # of the input
    with pytest.raises((AssertionError, RuntimeError)):
        network(torch.randn(3, 12, 12))


def shortcut(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.bn(m.conv(x)))
    n, c, h, w = y.shape
    z = m.last(y)
    z = F.relu(z + y)
    return z.view(n, c, h * w).mean(2)


def shape_before_the_sum(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.conv(x))
    z = m.last(y)
    n, _, h, w = z.shape
    return F.relu(z + y).reshape(n, -1, h * w).mean(2)


def shortcut_of_the_shape(m: Any, x: Tensor) -> Tensor:
    """What is added is computed from the shape of what it is added to."""
    y = F.relu(m.conv(x))
    z = m.last(y)
    return F.relu(z + y.flatten(1).reshape(z.shape[0], 8, *z.shape[2:]))


def shape_of_codes(m: Any, x: Tensor) -> Tensor:
    y = F.max_pool2d(F.relu(m.conv(x)), 2)
    return F.interpolate(m.last(y), size=x.shape[2:]) + y.shape[1] + y.shape[3] + y.size()[0]


@pytest.mark.parametrize(
    "forward", [shortcut, shape_before_the_sum, shortcut_of_the_shape, shape_of_codes], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("pack", [False, True])
def test_shapes_are_read_of_codes(forward: Callable[..., Any], pack: bool) -> None:
    model, x = Written(forward).eval(), architectures.images(8, 12)
    simulated = quantize(model, [x], replace(FAST, execution="simulate"), progress=False)
    integer = quantize(model, [x], replace(FAST, execution="integer"), progress=False)
    lowered = test_lowering.lowered(simulated, pack)
    for images in (x, torch.randn(3, 3, 10, 16)):
        with torch.no_grad():
            assert torch.equal(integer(images), simulated(images))
            assert torch.equal(lowered(images), simulated(images))
    first = integer.get_submodule("conv")
    assert isinstance(first, QuantModule)
    if forward is not shortcut_of_the_shape:  # codes alone leave the first layer
        assert not first.engine.has_values  # type: ignore[union-attr]
    assert record_of(integer).folded == (forward is shortcut)
    compiled = torch.compile(integer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), integer(x))


def test_readers() -> None:
    network, _ = trace(Written(of_all_kinds).eval())
    assert network is not None
    conv = next(node for node in network.graph.nodes if node.target == "conv")
    assert [str(node.target) for node in readers(conv)] == ["bn"]
    assert len(conv.users) > 8
