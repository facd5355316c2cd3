"""Models written in every way become one kind of graph that computes the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from ptq4cuda import graph


class Written(nn.Module):
    """A forward around a few layers, so that a test shows what it is about."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 4)
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        with torch.no_grad():
            for tensor in (self.bn.weight, self.bn.bias, self.bn.running_mean):
                tensor.uniform_(0.5, 2.0)
        self.written = forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


def x4() -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3))


def traced(forward: Callable[..., Any]) -> tuple[fx.GraphModule, nn.Module]:
    """Trace and fold a model, and compare it with what the model computes."""
    model = Written(forward).eval()
    network, reason = graph.trace(model)
    assert network is not None, reason
    graph.fold_batch_norm(network)
    with torch.no_grad():
        torch.testing.assert_close(network(x4()), model(x4()), rtol=1e-5, atol=1e-5)
    return network, model


def kinds(network: nn.Module) -> list[str]:
    return [type(m).__name__ for m in network.modules() if not any(m.children())]


# --- in place -------------------------------------------------------------------------------------------------


def residual(m: Any, x: Tensor) -> Tensor:
    shortcut = y = m.conv(x)
    y += m.other(x)
    return m.relu(y) + shortcut  # of one memory: both are what the ReLU left


def changed_before_it_is_read(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.relu(y)  # an in-place module: y changes too
    return m.other(y) - z.abs_() * 2 + z


def by_name(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    F.relu(inplace=True, input=y)
    z = y * 1.0
    m.relu(input=z)
    F.leaky_relu_(z, 0.1)
    return y + z


def a_sum_of_many(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    for _ in range(700):  # deeper than Python may recurse
        y = y * 0.5 + x
        y += x
    return y


def by_position(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    F.relu(y, True)
    F.leaky_relu(y, 0.1, True)
    torch.relu_(y)
    y.mul_(2.0).add_(x, alpha=3)
    return y


def items(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, 0] = y[:, 1] * 2
    y[:, 2:] += 1.0
    y[:, 1, :2] = 0.0
    return y


def pieces(m: Any, x: Tensor) -> Tensor:
    a, b = m.conv(x).chunk(2, 1)
    a += b
    b.clamp_(0, 1)
    return torch.cat([b, a], 1)


def assigned(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = y * 1.0
    z.copy_(x)
    y.fill_(3.0)
    y += z
    z.zero_()
    return y + z


def sizes(m: Any, x: Tensor) -> Tensor:
    n = before = x.size(0)
    n += 1
    return m.conv(x).view(before, -1) * n + before


def after_a_copy(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    rows = y[[0, 1]]  # a list as index copies
    rows += 1.0
    return rows + y


def a_view_read_before(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = y.flatten(1).sum(1)
    y *= 2.0
    return y.mean((1, 2, 3)) + z


def the_input(m: Any, x: Tensor) -> Tensor:
    x -= 0.5
    x.div_(0.25)
    return m.conv(x)


INPLACE = [
    residual,
    changed_before_it_is_read,
    by_name,
    a_sum_of_many,
    by_position,
    items,
    pieces,
    assigned,
    sizes,
    after_a_copy,
    a_view_read_before,
    the_input,
]


@pytest.mark.parametrize("forward", INPLACE, ids=lambda f: f.__name__)
def test_inplace_operations_are_rewritten(forward: Callable[..., Any]) -> None:
    network, _ = traced(forward)
    x = x4()
    values = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n] = (result, result.clone()) if isinstance(result, Tensor) else (0, 0)
            return result

    with torch.no_grad():
        Recorder(network, garbage_collect_values=False).run(x)
    for node, (value, before) in values.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before), f"{node} changed after it was computed"
    assert torch.equal(x, x4())


def view_changed(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.flatten(1).mul_(2.0)
    return y


def base_changed(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    flat = y.view(2, -1)
    y += 1.0
    return flat


def same_piece(m: Any, x: Tensor) -> Tensor:
    parts = m.conv(x).chunk(2, 1)
    parts[0].relu_()
    return parts[0] + parts[1]


def overlapping(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    a, b = y[:, :3], y[:, 2:]
    a *= 2.0
    return b


def piece_and_whole(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    a, _ = y.split(2, 1)
    a.neg_()
    return y


def same_piece_from_the_end(m: Any, x: Tensor) -> Tensor:
    parts = m.conv(x).chunk(2, 1)
    parts[-1].relu_()
    return parts[0] + parts[1]


def state(m: Any, x: Tensor) -> Tensor:
    m.weight.flatten(1).mul_(x.mean())
    return m.conv(x)


def random(m: Any, x: Tensor) -> Tensor:
    return m.conv(x).bernoulli_(0.5)


def into_out(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    torch.add(y, 1.0, out=y)
    return y


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (view_changed, "it changes 'conv' or a view of it in place"),
        (base_changed, "it changes 'conv' or a view of it in place"),
        (same_piece, "it changes 'getitem' or a view of it in place"),
        (overlapping, "it changes 'conv' or a view of it in place"),
        (piece_and_whole, "it changes 'conv' or a view of it in place"),
        (same_piece_from_the_end, "it changes 'getitem' or a view of it in place"),
        (state, "it changes 'weight' in its forward"),
        (random, "calls bernoulli_()"),
        (into_out, "writes into its argument out=conv"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_what_cannot_be_rewritten_is_refused(forward: Callable[..., Any], words: str) -> None:
    network, reason = graph.trace(Written(forward).eval())
    assert network is None
    assert words in reason


# --- functions ------------------------------------------------------------------------------------------------


def functional(m: Any, x: Tensor) -> Tensor:
    y = F.conv2d(x, m.weight, m.bias)
    y = F.batch_norm(y, m.mean, m.var, m.bias.exp(), m.bias)
    y = F.conv2d(F.relu(y), weight=m.weight - m.weight.mean((1, 2, 3), keepdim=True), padding=1, groups=1)
    y = F.dropout(F.conv2d(y, m.weight[:, :1], stride=(2, 1), groups=4), 0.5, m.training)
    return F.linear(y.mean((2, 3)), m.weight[:, :, 0, 0], m.bias)


def test_functions_become_modules() -> None:
    network, _ = traced(functional)
    assert kinds(network) == ["Conv2d", "Conv2d", "Conv2d", "Linear"]  # the batch_norm is folded
    first = network.get_submodule("conv2d")
    assert first.bias is not None
    assert network.get_submodule("conv2d_2").stride == (2, 1)
    assert set(network.state_dict()) == {
        f"{name}.{kind}"
        for name, kinds_ in {
            "conv2d": ("weight", "bias"),
            "conv2d_1": ("weight",),
            "conv2d_2": ("weight",),
            "linear": ("weight", "bias"),
        }.items()
        for kind in kinds_
    }


def test_weights_that_depend_on_the_input_stay() -> None:
    network, _ = traced(lambda m, x: F.conv2d(x, m.weight * x.mean()) + F.conv2d(x, m.weight, stride=1))
    reasons = [graph.why_float_call(node, network) for node in network.graph.nodes]
    assert reasons.count("") == 1
    assert "a call of conv2d with weights that are not constant" in reasons


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(F.pad(x, (1, 0, 1, 0)), weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def test_layers_of_ones_own_keep_their_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardized(4, 4, 3), nn.ReLU(), nn.Sequential(Standardized(4, 8, 3))).eval()
    network, reason = graph.trace(model)
    assert network is not None, reason
    assert type(network.get_submodule("0")) is nn.Conv2d
    assert type(network.get_submodule("2.0")) is nn.Conv2d
    assert set(network.state_dict()) == {"0.weight", "0.bias", "2.0.weight", "2.0.bias"}
    with torch.no_grad():
        torch.testing.assert_close(network(x4()), model(x4()))


def test_shared_layers_of_ones_own() -> None:
    torch.manual_seed(0)
    layer = Standardized(4, 4, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    network, reason = graph.trace(model)
    assert network is not None, reason
    assert [str(n.target) for n in network.graph.nodes if n.op == "call_module"] == ["0", "1", "0_call2"]
    with torch.no_grad():
        torch.testing.assert_close(network(x4()), model(x4()))


def test_each_call_is_a_layer() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = m.bn(m.conv(x))
        return m.relu(x)

    network, _ = traced(forward)
    assert sorted(kinds(network)) == ["Conv2d", "Conv2d", "Conv2d", "ReLU"]  # and all three are folded
    assert len({n.target for n in network.graph.nodes if n.op == "call_module"}) == 4


def test_what_does_nothing_goes() -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 1), nn.Dropout2d(0.3), nn.BatchNorm2d(4), nn.AlphaDropout())
    network, _ = graph.trace(model.eval())
    assert network is not None
    assert graph.fold_batch_norm(network) == 1  # there was a Dropout between them
    assert kinds(network) == ["Conv2d"]


def test_a_layer_whose_output_is_not_used_goes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.other(x)
        return m.conv(x)

    assert kinds(traced(forward)[0]) == ["Conv2d"]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "old weight_norm", "pruned"])
def test_computed_weights_become_plain(kind: str) -> None:
    torch.manual_seed(0)
    conv: nn.Module = nn.Conv2d(4, 4, 3)
    if kind == "weight_norm":
        conv = parametrizations.weight_norm(conv)
        conv.parametrizations.weight.original0.data.mul_(1.7)
    elif kind == "spectral_norm":
        conv = parametrizations.spectral_norm(conv)
    elif kind == "pruned":
        prune.random_unstructured(conv, "weight", 0.5)
    else:
        with pytest.warns(FutureWarning):
            conv = torch.nn.utils.weight_norm(conv)
        conv.weight_g.data.mul_(1.7)
    model = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        expected = model(x4())
    keys = list(model.state_dict())
    network, reason = graph.trace(model)
    assert network is not None, reason
    assert graph.fold_batch_norm(network) == 1
    assert set(network.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(network(x4()), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model(x4()), expected)  # the model is as it was


def test_pieces_are_counted() -> None:
    """As YOLO's blocks are written."""

    def forward(m: Any, x: Tensor) -> Tensor:
        pieces = list(m.conv(x).chunk(2, 1))
        pieces.extend(p.relu() for p in torch.split(x, [1, 3], dim=1))
        assert len(x.chunk(4, 1)) == 4
        return torch.cat(pieces, 1)

    traced(forward)


def test_flags_of_forward_take_their_defaults() -> None:
    class Flags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
            x = self.conv(x)
            if mask is not None:
                x = x * mask
            return x * 2 if double else x

    model = Flags().eval()
    network, reason = graph.trace(model)
    assert network is not None, reason
    torch.testing.assert_close(network(x4()), model(x4()))
    with pytest.raises(ValueError, match="quantized with double=False, and is called with True"):
        network(x4(), double=True)  # it was traced without, and must not pass over it
    assert graph.why_different(model, network, (x4(),), {"mask": x4()}) != ""


# --- folding --------------------------------------------------------------------------------------------------


def test_written_out_batch_norm_is_folded() -> None:
    """As detection backbones freeze it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        scale = (m.bias * (m.var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        y = m.other(x) * scale + (m.bias - m.mean * scale.flatten()).reshape(1, -1, 1, 1)
        return m.linear((0.5 * y.mean((2, 3))) - 1.0) / 3.0 - m.bias

    network, _ = traced(forward)
    functions = [getattr(n.target, "__name__", n.target) for n in network.graph.nodes if n.op.startswith("call_")]
    assert functions == ["other", "mean", "linear"]
    tensors = {"other.weight", "other.bias", "linear.weight", "linear.bias"}
    assert set(network.state_dict()) == tensors | {"weight", "var"}  # these the traced forward did not read


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.other(x) * x4()[:1],  # differs by pixel
        lambda m, x: m.other(x) + m.bias,  # along the width
        lambda m, x: 1.0 / m.other(x),
        lambda m, x: m.other(x) + m.other(x),
        lambda m, x: torch.add(m.other(x), m.weight.view(1, 4, 4, 1)[:, :, :1], alpha=2.0),
    ],
)
def test_other_arithmetic_is_not_folded(forward: Callable[..., Any]) -> None:
    model = Written(forward).eval()
    if "bias" in forward.__code__.co_names:
        model.bias = nn.Parameter(torch.randn(6))
    network, _ = graph.trace(model)
    assert network is not None
    before = len(network.graph.nodes)
    graph.fold_batch_norm(network)
    assert len(network.graph.nodes) == before
    with torch.no_grad():
        torch.testing.assert_close(network(x4()), model(x4()))


def test_alpha_of_an_addition() -> None:
    traced(lambda m, x: torch.add(m.other(x), m.conv(x), alpha=2.0))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batch_norm_is_folded_into_what_follows(groups: int) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.uniform_(tensor, -1.0, 2.0)
    convs = [
        nn.Conv2d(4, 8, 3, groups=groups),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect", groups=groups, bias=False),
        nn.Conv2d(4, 8, 3, padding=1, groups=groups),
        nn.Conv2d(4, 8, 1, padding="same", groups=groups),
    ]
    for conv, folded in zip(convs, (1, 1, 0, 1), strict=True):
        model = nn.Sequential(nn.AvgPool2d(1), norm, conv).eval()
        network, _ = graph.trace(model)
        assert network is not None
        assert graph.fold_batch_norm(network) == folded
        with torch.no_grad():
            torch.testing.assert_close(network(x4()), model(x4()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_after_a_transposed_convolution(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, groups=groups), nn.BatchNorm2d(6)).eval()
    nn.init.uniform_(model[1].weight, 0.3, 2.0)
    nn.init.uniform_(model[1].running_mean, 0.3, 2.0)
    network, _ = graph.trace(model)
    assert network is not None
    assert graph.fold_batch_norm(network) == 1
    with torch.no_grad():
        torch.testing.assert_close(network(x4()), model(x4()), rtol=1e-5, atol=1e-5)


def test_batch_norm_that_stays_says_why() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.bn(torch.cat([x[:, :2], x[:, 2:]], 1)), m.conv(x)
        return m.conv(m.bn(x)) + m.bn(b) + b + F.relu(a)

    network, _ = traced(forward)
    reasons = {graph.why_float_call(n, network) for n in network.graph.nodes if n.target == "bn"}
    assert reasons == {
        "between cat and relu there is no layer to fold it into",
        "the convolution after it pads with zeros, which a shift would move",
        "layer 'conv' before it has other readers",
    }


# --- activations ----------------------------------------------------------------------------------------------

RELU, RELU6, LEAKY = (0.0, math.inf), (0.0, 6.0), (0.1, math.inf)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: F.relu(x), RELU),
        (lambda m, x: torch.relu(x), RELU),
        (lambda m, x: x.relu(), RELU),
        (lambda m, x: (x * 1.0).relu_(), RELU),
        (lambda m, x: x.clamp(min=0), RELU),
        (lambda m, x: torch.clamp_min(x, 0.0), RELU),
        (lambda m, x: x.clamp(0, 6), RELU6),
        (lambda m, x: torch.clip(x, 0.0, max=6.0), RELU6),
        (lambda m, x: F.relu6(x, inplace=False), RELU6),
        (lambda m, x: F.hardtanh(x, 0.0, 6.0), RELU6),
        (lambda m, x: F.leaky_relu(x, 0.1), LEAKY),
        (lambda m, x: F.leaky_relu(x * 1.0, negative_slope=0.1, inplace=True), LEAKY),
        (nn.ReLU(), RELU),
        (nn.ReLU6(inplace=True), RELU6),
        (nn.Hardtanh(0.0, 6.0), RELU6),
        (nn.LeakyReLU(0.1), LEAKY),
        (nn.PReLU(init=0.1), LEAKY),
        (lambda m, x: x.clamp(max=6), None),
        (lambda m, x: x.clamp(-1, 6), None),
        (lambda m, x: torch.clamp(x, x.mean(), x.amax()), None),
        (lambda m, x: F.leaky_relu(x, -0.1), None),
        (lambda m, x: F.hardtanh(x), None),
        (nn.PReLU(4, init=0.1), None),
        (nn.LeakyReLU(1.5), None),
        (nn.SiLU(), None),
        (nn.GELU(), None),
        (lambda m, x: F.hardswish(x), None),
        (lambda m, x: torch.sigmoid(x), None),
    ],
)
def test_activations_in_every_form(forward: Any, expected: tuple[float, float] | None) -> None:
    model = forward if isinstance(forward, nn.Module) else Written(forward)
    network, reason = graph.trace(model.eval() if not isinstance(forward, nn.Module) else nn.Sequential(model).eval())
    assert network is not None, reason
    found = [a for n in network.graph.nodes if (a := graph.activation_of(n, network)) is not None]
    if expected is None:
        assert not found
        return
    (activation,) = found
    assert (activation.negative_slope, activation.upper) == pytest.approx(expected)
    x = x4() * 5
    with torch.no_grad():
        torch.testing.assert_close(activation(x), network(x))
