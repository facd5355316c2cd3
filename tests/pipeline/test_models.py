"""Models as they come: well-known architectures, and ways to write a model, through quantize()."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, QuantConv2d, graph, pipeline, quantize
from ptq4cuda.activation import IDENTITY
from ptq4cuda.artifact.record import LayerRecord, record_of
from ptq4cuda.bench import architectures
from ptq4cuda.calibrate.signals import LayerCall
from ptq4cuda.metrics import Noise
from ptq4cuda.nn import QuantModule
from ptq4cuda.solve.clipping import ClipRule

UNFOLDED = ("there is no layer to fold it into", "layer '0' before it has other readers")

# Architecture -> least SQNR at naive 8 bits, kinds of layers that stay in float.
EXPECTED: dict[str, tuple[float, dict[str, int]]] = {
    "resnet18": (25.0, {}),
    "resnet50": (25.0, {}),
    "preact_resnet18": (25.0, {"BatchNorm2d": 9}),
    "vgg16_bn": (18.0, {}),  # no shortcut past any of its sixteen layers
    "plain": (25.0, {}),
    "mobilenet_v2": (17.0, {}),  # fifty layers that amplify noise by 10 dB
    "efficientnet_b0": (17.0, {}),
    "shufflenet": (25.0, {}),
    "densenet": (25.0, {"BatchNorm2d": 14}),
    "inception": (25.0, {}),
    "unet": (25.0, {}),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    options = {"blocks": (2, 3, 3, 2)} if name == "densenet" else {}
    x = architectures.images(12, 64)
    net = architectures.ARCHITECTURES[name](num_classes=10, width=0.125, **options)
    return architectures.calibrate_batch_norm(net, x), x


def records(network: nn.Module) -> dict[str, LayerRecord]:
    return {layer.name: layer for layer in record_of(network).layers}


def sqnr(expected: Any, found: Any) -> float:
    noise = Noise()
    noise.add(expected, found)
    return float("inf") if noise.sqnr is None else noise.sqnr


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[LayerCall]:
    """Check what a solver is told about every layer's input, also before its activation, and list the calls."""
    for rule in ("minmax", "mse"):
        monkeypatch.setattr(ClipRule.named(rule), "looks_before", True)
    made: list[LayerCall] = []
    of = LayerCall.of

    def checked(*args: Any, **kwargs: Any) -> LayerCall:
        call = of(*args, **kwargs)
        signal = call.signal
        if signal.before is None:
            assert signal.activation == IDENTITY, call.name
        else:
            for before, (value, _) in zip(signal.before, signal.streams, strict=True):
                torch.testing.assert_close(signal.activation(before), value, rtol=0, atol=0, msg=call.name)
        made.append(copy.copy(call))
        made[-1].signal = copy.copy(signal)  # the walk lets go of what it was before
        return call

    monkeypatch.setattr(LayerCall, "of", checked)
    return made


def outputs_of_layers(network: nn.Module, names: list[str], *args: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: found.update({name: y.clone()}))
        for name in names
    ]
    with torch.no_grad():
        network(*args)
    for hook in hooks:
        hook.remove()
    return found


def assert_walk_saw_what_runs(model: nn.Module, network: nn.Module, *args: Any) -> None:
    """Every layer's noise in the record is that of the quantized network as it runs, against the float one."""
    by_name = {name: r for name, r in records(network).items() if r.execution != "float"}
    traced, reason = graph.trace(model)
    assert traced is not None, reason
    graph.fold_batch_norm(traced)
    expected = outputs_of_layers(traced, list(by_name), *args)
    found = outputs_of_layers(network, list(by_name), *args)
    for name, record in by_name.items():
        assert record.sqnr == pytest.approx(sqnr(expected[name], found[name]), abs=0.1), name
    with torch.no_grad():
        assert record_of(network).sqnr == pytest.approx(sqnr(model(*args), network(*args)), abs=0.1)


# --- architectures --------------------------------------------------------------------------------------------


def test_every_architecture_is_expected() -> None:
    assert EXPECTED.keys() == architectures.ARCHITECTURES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_architecture(name: str, calls: list[LayerCall]) -> None:
    model, x = build(name)
    least, stay = EXPECTED[name]
    before = copy.deepcopy(model.state_dict())
    inplace = [getattr(m, "inplace", None) for m in model.modules()]
    weighted = Counter(
        type(m).__name__ for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    )
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())

    network = quantize(model, [x[:8], x[8:]], QuantConfig.naive(8, 8), progress=False)
    record = record_of(network)
    assert record.walked_by == "graph", record.reason
    assert Counter(r.kind for r in record.layers if r.execution != "float") == weighted
    in_float = [r for r in record.layers if r.execution == "float"]
    assert Counter(r.kind for r in in_float) == stay
    assert record.folded == norms - stay.get("BatchNorm2d", 0)
    for r in in_float:
        assert r.reason.endswith(UNFOLDED)
    assert record.sqnr > least

    low = quantize(model, [x[:8], x[8:]], QuantConfig.paper(), progress=False)
    assert_walk_saw_what_runs(model, low, x)
    assert len(calls) == 2 * sum(weighted.values())

    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [getattr(m, "inplace", None) for m in model.modules()] == inplace
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        # What the inputs of layers are, by the activation that made them; "" is none.
        ("resnet18", {"": 2, "ReLU": 19}),
        ("mobilenet_v2", {"": 19, "ReLU6": 34}),
        ("densenet", {"": 2, "ReLU": 23}),
        ("inception", {"": 5, "ReLU": 3, "LeakyReLU": 12}),
        ("shufflenet", {"": 6, "ReLU": 10}),  # through the shuffle
        ("efficientnet_b0", {"": 82}),  # SiLU is not piecewise linear
    ],
)
def test_activations_before_layers_are_known(
    name: str, forms: dict[str, int], calls: list[LayerCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "can_walk_batches", lambda *_: False)  # which keeps statistics alone
    model, x = build(name)
    quantize(model, [x], QuantConfig.naive(), progress=False)
    kinds = {(0.0, float("inf")): "ReLU", (0.0, 6.0): "ReLU6", (0.1, float("inf")): "LeakyReLU"}
    found = Counter(
        kinds[c.signal.activation.negative_slope, c.signal.activation.upper] if c.signal.before is not None else ""
        for c in calls
    )
    assert found == forms


def test_half_precision_is_traced_too() -> None:
    """Folding rounds weights anew, which amplifies to percents in fifty layers: no reason to distrust the trace."""
    model, x = build("mobilenet_v2")
    network = quantize(model.bfloat16(), [x.bfloat16()], QuantConfig.paper(), progress=False)
    assert record_of(network).walked_by == "graph"
    assert network(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "unet", "preact_resnet18"])
def test_round_trip_through_a_file(name: str, tmp_path: Path) -> None:
    model, x = build(name)
    network = quantize(model, [x], QuantConfig.paper(), progress=False)
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    other = architectures.randomize(copy.deepcopy(model), seed=5)
    loaded = ptq4cuda.load(tmp_path / "net.ptq4", other)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))
    assert str(ptq4cuda.report(loaded)).split("total")[0] == str(ptq4cuda.report(network)).split("total")[0]


def test_images_are_as_described() -> None:
    x = architectures.images(16, 32)
    assert torch.equal(x, architectures.images(16, 32))
    assert not torch.equal(x, architectures.images(16, 32, seed=1))
    assert x.mean().abs() < 1e-5
    assert x.std() == pytest.approx(1.0, abs=0.01)
    assert (x[..., 1:] - x[..., :-1]).std() < 0.6  # smooth; white noise has 1.41


def test_channels_differ_widely() -> None:
    """Otherwise per-channel methods have nothing to show."""
    model, x = build("resnet18")
    y = outputs_of_layers(model, ["2.branch.0"], x)["2.branch.0"]
    largest = y.amax((0, 2, 3))
    assert largest.max() > 5 * largest.min()


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"unet"}))
def test_random_networks_are_no_more_chaotic_than_trained_ones(name: str) -> None:
    """A trained ResNet-20 amplifies noise by 11 dB; a network that did so by 20 dB would measure nothing else."""
    model, x = build(name)
    noise = Noise()
    with torch.no_grad():
        noise.add(model(x), model(x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))))
    assert noise.sqnr is not None
    assert noise.sqnr > 60.0 - 12.0


# --- ways to write a model --------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Activations, gates, sums, joins, shuffles and resizing, several inputs, a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.prelu, self.prelus = nn.PReLU(init=0.2), nn.PReLU(8)
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.shared, self.side = nn.Conv2d(8, 8, 1), nn.Conv2d(2, 8, 1)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, side: Tensor, scale: float = 0.5) -> dict[str, Any]:
        x = self.prelu(self.bn(self.stem(x)))
        y = F.silu(self.a(x))
        y += F.hardswish(self.b(self.prelus(x)))
        gate = self.excite(F.gelu(self.squeeze(F.adaptive_avg_pool2d(y, 1).flatten(1)))).sigmoid()
        y = torch.add(y * gate[:, :, None, None], x, alpha=0.5)
        n, c, h, w = y.shape
        left, right = torch.relu_(y).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, dim=1)
        y = torch.cat([right, left], 1)
        y = self.depthwise(y) + self.shared(y)
        small = F.relu(self.shared(F.interpolate(y, scale_factor=0.5, mode="nearest")))
        y = self.norm(self.c(y) + self.up(small) + self.side(side * scale))
        tokens = y.flatten(2).permute(0, 2, 1)
        logits = self.head(F.leaky_relu(tokens, 0.1)).mean(1)
        return {"logits": logits, "maps": (y, [small])}


def everything() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x, side = architectures.images(8, 16), torch.randn(8, 2, 16, 16)
    model = Everything()
    for module in (model.bn,):
        nn.init.uniform_(module.weight, 0.5, 2.0)
        nn.init.uniform_(module.running_mean, -0.2, 0.2)
    return model.eval(), x, side


def test_everything_in_one_model(calls: list[LayerCall], tmp_path: Path) -> None:
    model, x, side = everything()
    batches = [{"x": x[:5], "side": side[:5]}, {"x": x[5:], "side": side[5:]}]
    exact = quantize(model, batches, QuantConfig.naive(8, 8), progress=False)
    assert record_of(exact).walked_by == "graph", record_of(exact).reason
    assert record_of(exact).sqnr > 30
    network = quantize(model, batches, QuantConfig(execution="simulate"), progress=False)
    assert_walk_saw_what_runs(model, network, x, side)
    by_name = records(network)
    assert {n: r.reason for n, r in by_name.items() if r.execution == "float"} == {
        "norm": "GroupNorm is not supported"
    }
    assert {"shared", "shared_call2"} <= by_name.keys()
    activations = {c.name: c.signal.activation for c in calls if c.signal.before is not None}
    assert activations["a"].negative_slope == pytest.approx(0.2)
    assert activations["head"].negative_slope == pytest.approx(0.1)
    assert activations["depthwise"] == activations["shared"] == graph.layers.Activation()  # through the shuffle
    assert {"b", "c", "squeeze", "excite", "side", "stem", "shared_call2"}.isdisjoint(activations)

    ptq4cuda.save(network, tmp_path / "net.ptq4")
    loaded = ptq4cuda.load(tmp_path / "net.ptq4", model)
    with torch.no_grad():
        for a, b in zip(_tensors(loaded(x, side)), _tensors(network(x, side)), strict=True):
            assert torch.equal(a, b)


def _tensors(value: Any) -> list[Tensor]:
    leaves: list[Tensor] = torch.utils._pytree.tree_leaves(value)
    return leaves


def two_layers(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    y += m.skip(x)
    torch.relu_(y)
    return m.second(y)


def activation_then_sum(m: Any, x: Tensor) -> Tensor:
    shortcut = m.skip(x)
    y = m.relu(m.first(x))
    y += shortcut  # what the second layer reads is not a ReLU's output
    return m.second(y)


def before_is_changed(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    z = F.leaky_relu(y, 0.2)
    y.mul_(3.0)
    return m.second(z) + y


def shortcut_of_an_inplace_relu(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    z = m.second(m.relu(y))  # y is the ReLU's output from here on
    return m.third(F.relu(z, inplace=True)) + y + z


def changed_between_two_readers(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    z = m.second(y)
    y -= y.mean((1, 2, 3), keepdim=True)
    return m.third(y) + z


def only_the_quantized_stream_differs(m: Any, x: Tensor) -> Tensor:
    # x is one tensor in both streams; what is added to it is not.
    x += m.first(x)
    return m.second(x)


def items(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    y[:, 0] = 0.0
    y[:, 1:] *= 2.0
    return m.second(y)


PATTERNS = [
    two_layers,
    activation_then_sum,
    before_is_changed,
    shortcut_of_an_inplace_relu,
    changed_between_two_readers,
    only_the_quantized_stream_differs,
    items,
]


class Pattern(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third, self.skip = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.relu, self.written = nn.ReLU(inplace=True), forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


@pytest.mark.parametrize("forward", PATTERNS, ids=lambda f: f.__name__)
def test_changes_in_place(forward: Callable[..., Any], calls: list[LayerCall]) -> None:
    model, x = Pattern(forward).eval(), architectures.images(8, 16)
    network = quantize(model, [x[:5].clone(), x[5:].clone()], QuantConfig.naive(8, 8), progress=False)
    assert record_of(network).walked_by == "graph", record_of(network).reason
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, found = model(x.clone()), network(x.clone())
        torch.testing.assert_close(compiled(x), found, rtol=1e-3, atol=1e-3)
    assert sqnr(expected, found) > 30
    assert record_of(network).sqnr == pytest.approx(sqnr(expected, found), abs=0.1)


@pytest.mark.parametrize("forward", PATTERNS, ids=lambda f: f.__name__)
def test_changes_in_place_walked_by_modules(forward: Callable[..., Any], calls: list[LayerCall]) -> None:
    def untraceable(m: Any, x: Tensor) -> Tensor:
        return forward(m, x if float(x.sum()) > -1e9 else -x)

    model, x = Pattern(untraceable).eval(), architectures.images(8, 16)
    batches = [x[:5].clone(), x[5:].clone()]
    network = quantize(model, batches, QuantConfig.naive(8, 8), progress=False)
    assert record_of(network).walked_by == "modules"
    assert torch.equal(torch.cat(batches), x)  # a model may write into its input, but not into the caller's
    with torch.no_grad():
        expected, found = model(x.clone()), network(x.clone())
    assert sqnr(expected, found) > 30
    assert record_of(network).sqnr == pytest.approx(sqnr(expected, found), abs=0.1)


def test_a_change_that_cannot_be_followed_is_reported() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        y.flatten(1).mul_(2.0)
        return m.second(y)

    model, x = Pattern(forward).eval(), architectures.images(8, 16)
    network = quantize(model, [x], QuantConfig.naive(8, 8), progress=False)
    assert record_of(network).reason == "it changes 'first' or a view of it in place while the other is still used"
    assert record_of(network).reason in str(ptq4cuda.report(network))
    with torch.no_grad():
        assert sqnr(model(x), network(x)) > 30


# --- walked by modules ------------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    """Several inputs, arguments by name, a dict as output, functions, a transposed input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.named = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn, self.mixer, self.late = nn.BatchNorm2d(4), nn.Linear(8, 8), nn.Conv2d(4, 4, 1)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor, side: Tensor) -> dict[str, Any]:
        y = F.relu(self.bn(self.first(x))) + side
        if float(y.sum()) > -1e9:
            y = self.named(input=y)
        y = F.conv2d(y, self.kernel)
        y = self.late(y)
        across = self.mixer(y.mean(2).permute(1, 2, 0)[..., :8])  # dimension 0 is not the samples
        return {"maps": y, "across": across.sum()}


def test_untraceable_models_say_what_stays() -> None:
    model, x = Untraceable().eval(), architectures.images(8, 16)
    side = torch.randn(8, 4, 16, 16)
    network = quantize(model, [{"x": x, "side": side}], QuantConfig.naive(8, 8), progress=False)
    assert isinstance(network.named, QuantConv2d)
    assert isinstance(network.late, QuantConv2d)
    reasons = {name: r.reason for name, r in records(network).items() if r.execution == "float"}
    assert reasons == {
        "bn": "BatchNorm2d is folded in a traced graph only",
        "mixer": "its input does not keep the samples along dimension 0",
        "conv2d": "a call of conv2d; only modules are quantized where torch.fx cannot trace the model",
    }
    with torch.no_grad():
        assert sqnr(model(x, side)["maps"], network(x, side)["maps"]) > 30


def test_model_of_functions_only() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8, 8, 3, 3))
            self.c = nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.conv2d(F.relu(F.conv2d(x, self.a)), self.b))
            return F.linear(x.mean((2, 3)), self.c)

    model, x = Functions().eval(), architectures.images(8, 16)
    network = quantize(model, [x], progress=False)
    assert [type(m).__name__ for m in network.modules() if isinstance(m, QuantModule)] == [
        "QuantConv2d",
        "QuantConv2d",
        "QuantLinear",
    ]
    assert set(records(network)) == {"conv2d", "conv2d_1", "linear"}
    weights = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() * t.element_size() for t in network.state_dict().values()) < 2.5 * weights


def test_shared_head_gets_a_quantizer_for_each_level() -> None:
    """As in detection: one head on feature maps whose ranges differ, a BatchNorm of its own at each."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            levels = [F.avg_pool2d(self.stem(x), 2**i) * 10**i for i in range(3)]
            return [F.relu(norm(self.head(level))) for norm, level in zip(self.norms, levels, strict=True)]

    model, x = Pyramid().eval(), architectures.images(8, 16)
    network = quantize(model, [x], QuantConfig.naive(8, 8), progress=False)
    assert isinstance(network, fx.GraphModule)
    assert record_of(network).folded == 3
    heads = [network.get_submodule(name) for name in ("head", "head_call2", "head_call3")]
    scales = [float(head.activation_scale.mean()) for head in heads]
    assert scales[2] > 5 * scales[1] > 25 * scales[0]
    with torch.no_grad():
        assert all(sqnr(a, b) > 30 for a, b in zip(model(x), network(x), strict=True))


def test_models_that_fail_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1)).eval()
    with pytest.raises(ValueError, match=r"the model fails on the first calibration batch \(RuntimeError"):
        quantize(model, [torch.randn(2, 3, 5, 5)], progress=False)


def test_arguments_by_name() -> None:
    model, x = Pattern(lambda m, x: m.second(input=m.relu(m.first(input=x)))).eval(), architectures.images(8, 16)
    network = quantize(model, [x], QuantConfig.naive(8, 8), progress=False)
    assert record_of(network).walked_by == "graph"
    with torch.no_grad():
        assert sqnr(model(x), network(x)) > 30


def test_arguments_without_names() -> None:
    class Several(Pattern):
        def forward(self, *images: Tensor, **options: Any) -> Tensor:
            return self.second(self.relu(self.first(images[0])))

    model, x = Several(two_layers).eval(), architectures.images(8, 16)
    network = quantize(model, [x], QuantConfig.naive(8, 8), progress=False)
    with torch.no_grad():
        assert record_of(network).sqnr == pytest.approx(sqnr(model(x), network(x)), abs=0.1)


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_linear_layers_on_the_channels_of_images(size: tuple[int, int]) -> None:
    class ConvNext(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.depthwise = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
            self.plain = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            x = x + self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
            return self.plain(x.permute(0, 2, 3, 1)).mean((1, 2))

    model = ConvNext().eval()
    x = torch.randn(8, 3, *size, generator=torch.Generator().manual_seed(1))
    network = quantize(model, [x], progress=False)
    assert {name for name, record in records(network).items() if record.execution == "float"} == {"norm"}
    with torch.no_grad():
        assert sqnr(model(x), network(x)) > 15


def test_parts_of_torch_nn_are_reported_as_a_whole() -> None:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.patches = nn.Conv2d(3, 16, 8, 8)
            self.encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.encoder(x) @ x.transpose(1, 2)

    network = quantize(Hybrid().eval(), [architectures.images(8, 32)], progress=False)
    reasons = {name: r.reason for name, r in records(network).items() if r.reason}
    assert reasons == {
        "encoder": "TransformerEncoderLayer is not supported",
        "matmul": "a call of matmul is not supported",
    }
