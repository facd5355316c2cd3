"""quantize() end to end, on a small network of every structure; real networks are in test_real_networks.py."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, QuantConv2d, QuantConvTranspose2d, QuantLinear, quantize
from ptq4cuda.artifact.record import LayerRecord, record_of
from ptq4cuda.calibrate.by_modules import _ModuleWalk, walk_modules
from ptq4cuda.calibrate.inputs import Inputs
from ptq4cuda.pipeline import fingerprint
from ptq4cuda.solve.layer import solve_layer

PRESETS = {
    "default": QuantConfig(),
    "paper": QuantConfig.paper(),
    "paper w8a4": QuantConfig.w8a4(),
    "paper w4a8": QuantConfig.w4a8(),
    "naive": QuantConfig.naive(),
    "naive w8a4": QuantConfig.naive(8, 4),
    "naive w4a8": QuantConfig.naive(4, 8),
    "fast": QuantConfig.fast(),
    "gaussian": QuantConfig(clipping="gaussian"),
    "percentile": QuantConfig(clipping="percentile"),
    "kld": QuantConfig(clipping="kld"),
    "mix": QuantConfig(clipping="mix"),
    "auto": QuantConfig(clipping="auto"),
    "per tensor": QuantConfig(activation_granularity="per_tensor"),
}


def sqnr(expected: Tensor, found: Tensor) -> float:
    return 10 * math.log10(float(expected.double().square().sum() / (expected - found).double().square().sum()))


def layers(network: nn.Module) -> dict[str, LayerRecord]:
    return {layer.name: layer for layer in record_of(network).layers}


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_preset_stays_close_to_float(model: nn.Module, images: Tensor, config: QuantConfig) -> None:
    network = quantize(model, [images], config, progress=False)
    with torch.no_grad():
        assert sqnr(model(images), network(images)) > 8.0
    bits = layers(network)
    assert {bits["stem"].weight_bits, bits["stem"].activation_bits, bits["fc"].weight_bits} == {8.0}
    others = ["pointwise", "grouped"]
    if config.depthwise_bits is None:
        others.append("depthwise")
    else:
        assert bits["depthwise"].weight_bits == bits["depthwise"].activation_bits == config.depthwise_bits
    weights = {"pointwise": 64, "grouped": 576, "depthwise": 72}
    if config.layer_allocation == "uniform":
        for name in others:
            assert 0.8 * config.weight_bits <= bits[name].weight_bits <= config.weight_bits
            assert 0.8 * config.activation_bits <= bits[name].activation_bits <= config.activation_bits
    # All of them read as many values.
    used = sum(bits[name].weight_bits * weights[name] for name in others) / sum(weights[name] for name in others)
    assert 0.8 * config.weight_bits <= used <= config.weight_bits
    used = sum(bits[name].activation_bits for name in others) / len(others)
    assert 0.8 * config.activation_bits <= used <= config.activation_bits


def test_eight_bits_everywhere_are_nearly_exact(model: nn.Module, images: Tensor) -> None:
    network = quantize(model, [images], QuantConfig.naive(8, 8), progress=False)
    with torch.no_grad():
        assert sqnr(model(images), network(images)) > 30.0


def test_the_model_is_left_as_it_was(model: nn.Module, images: Tensor) -> None:
    before, expected = copy.deepcopy(model.state_dict()), model(images)
    quantize(model, [images], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(images), expected)


class Counting(nn.Module):
    """Counts its calls, keeps a mean, and gates channels by a vector that has no batch dimension."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.gate = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.calls += 1
        self.mean = x.mean((0, 2, 3))
        return x * self.gate(self.mean.relu()).sigmoid()[:, None, None]


def test_what_a_model_counts_is_left_as_it_was(images: Tensor) -> None:
    model = Counting()
    with torch.inference_mode():
        model.conv = nn.Conv2d(3, 8, 3)
    buffers = dict(model.named_buffers())
    network = quantize(model.eval(), [images], QuantConfig.fast(), progress=False)
    assert all(buffer is buffers[name] and not buffer.any() for name, buffer in model.named_buffers())
    with torch.no_grad():
        expected = model(images)
        assert (network(images) - expected).norm() < 0.1 * expected.norm()


def test_result_is_deterministic(model: nn.Module, images: Tensor) -> None:
    a, b = (quantize(model, [images], progress=False).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_batches_may_be_cut_in_any_way(model: nn.Module, images: Tensor) -> None:
    whole = quantize(model, [images], progress=False)
    pieces = quantize(model, list(images.split((1, 17, 30))), progress=False)
    pairs = [(b, torch.zeros(len(b))) for b in images.split(16)]
    with_targets = quantize(model, pairs, progress=False)
    for other in (pieces, with_targets):
        torch.testing.assert_close(other(images), whole(images), rtol=1e-3, atol=1e-3)


def test_batches_as_dicts(model: nn.Module, images: Tensor) -> None:
    network = quantize(model, [{"x": images, "label": torch.zeros(len(images))}], progress=False)
    assert torch.equal(network(images), quantize(model, [images], progress=False)(images))


def test_one_quantizer_per_tensor() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b, self.last = (nn.Conv2d(4, 4, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return self.last(self.a(x) + self.b(x))

    torch.manual_seed(0)
    network = quantize(Fork().eval(), [torch.randn(8, 4, 5, 5)], progress=False)
    for name in ("activation_scale", "activation_zero_point", "activation_bits"):
        assert torch.equal(getattr(network.a, name), getattr(network.b, name))


def test_statistics_are_taken_before_a_fused_relu(model: nn.Module, images: Tensor) -> None:
    """The clip of the depthwise layer, whose input is maxpool(relu(bn(stem))), from the tensor before the ReLU."""
    config = QuantConfig(clipping="laplace", activation_allocation="uniform", depthwise_bits=None)
    network = quantize(model, [images], config, progress=False)
    with torch.no_grad():
        before = F.max_pool2d(model.bn(model.stem(images)), 2).double().transpose(0, 1).flatten(1)
    mean = before.mean(1)
    absdev = (before - mean[:, None]).abs().mean(1)
    high = torch.minimum(mean.clamp_min(0) + 6.2048 * absdev, before.amax(1).clamp_min(0))
    found = network.depthwise.activation_scale.double() * 15
    torch.testing.assert_close(found[high > 0], high[high > 0], rtol=2e-4, atol=1e-6)
    assert not network.depthwise.activation_zero_point.any()


def test_unclipped_tensors_without_a_known_distribution(model: nn.Module, images: Tensor) -> None:
    config = QuantConfig(clipping="laplace", depthwise_bits=None)
    records = layers(quantize(model, [images], config, progress=False))
    assert records["stem"].clip == "minmax"  # 8 bits
    assert records["depthwise"].clip == "laplace"
    assert records["fc"].clip == "minmax"


def test_closed_forms_need_a_known_distribution() -> None:
    """After a sigmoid nothing is known of the distribution, and its values are never negative."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(8, 3, 12, 12)
    for clipping in ("laplace", "gaussian", "mix"):
        assert layers(quantize(model, [x], QuantConfig(clipping=clipping), progress=False))["2"].clip == "minmax"
    measured = layers(quantize(model, [x], QuantConfig(clipping="auto"), progress=False))["2"].clip
    assert measured in ("mse", "percentile", "minmax")


def test_sqnr_in_the_record_is_that_of_the_output(model: nn.Module, images: Tensor) -> None:
    network = quantize(model, [images], progress=False)
    with torch.no_grad():
        assert record_of(network).sqnr == pytest.approx(sqnr(model(images), network(images)), abs=0.01)
    assert layers(network)["fc"].sqnr == pytest.approx(record_of(network).sqnr, abs=0.01)


def test_result_is_a_good_citizen(model: nn.Module, images: Tensor) -> None:
    network = quantize(model, [images], QuantConfig(execution="simulate"), progress=False)
    expected = network(images)
    copied = copy.deepcopy(network)
    assert torch.equal(copied(images), expected)
    assert str(ptq4cuda.report(copied)) == str(ptq4cuda.report(network))
    copied.load_state_dict(network.state_dict())
    assert torch.equal(network(images[:3]), expected[:3]) or torch.allclose(
        network(images[:3]), expected[:3], atol=1e-5
    )
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(last), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sqnr(expected, network(images).float()) > 15


def test_compiled_network(model: nn.Module, images: Tensor) -> None:
    network = quantize(model, [images], progress=False)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (images, images[:5]):
            torch.testing.assert_close(compiled(batch), network(batch), rtol=1e-3, atol=1e-3)


# --- models that are not plain --------------------------------------------------------------------------------


class Untraceable(nn.Module):
    """Control flow on tensor values; a shared layer; an activation before each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.shared, self.unused = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(1, 1, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        for _ in range(2 if float(x.sum()) > 0 else 1):
            x = self.relu(self.shared(x))
        return self.fc(self.up(x).mean((2, 3)))


class OwnAttributes(Untraceable):
    """Reads an attribute of a layer that a quantized one does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.shared.transposed)


def test_untraceable_model_is_walked_by_its_modules(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Untraceable().eval()
    network = quantize(model, list(images.split(16)), QuantConfig.paper(), progress=False)
    assert isinstance(network, Untraceable)
    assert isinstance(network.shared, QuantConv2d)
    assert isinstance(network.fc, QuantLinear)
    records = layers(network)
    assert records["shared"].clip == "laplace"  # the ReLU module before it was seen
    assert records["unused"].reason == "never called as a module"
    assert records["shared"].reason == "called 2 times, its input quantized for the first"
    assert isinstance(network.up, QuantConvTranspose2d)
    assert records["first"].weight_bits == records["fc"].weight_bits == 8.0
    report = str(ptq4cuda.report(network))
    assert "Walked by its modules, BatchNorm not folded: torch.fx cannot trace it" in report
    with torch.no_grad():
        assert sqnr(model(images), network(images)) > 8.0
    assert not any(m._forward_hooks for m in network.modules())


W8A8 = replace(QuantConfig.fast(), weight_bits=8, activation_bits=8)


class Branches(nn.Module):
    """A model that torch.fx cannot trace, with a step between its layers."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.step = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), step

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.step(self.first(x if x.sum() > -1e9 else -x)))


@pytest.mark.parametrize("step", [lambda x: x * 2, lambda x: x.flip(0), lambda x: x - x.mean(0)])
def test_samples_that_depend_on_each_other(images: Tensor, step: Callable[[Tensor], Tensor]) -> None:
    """The streams are run by themselves, batch by batch, as the model is in use."""
    torch.manual_seed(0)
    model = Branches(step).eval()
    network = quantize(model, list(images.split(16)), QuantConfig(), progress=False)
    with torch.no_grad():
        assert sqnr(model(images[:16]), network(images[:16])) > 25.0


@pytest.mark.usefixtures("only_tensors_count")
def test_a_pass_for_each_layer_is_what_memory_makes_of_it(images: Tensor) -> None:
    torch.manual_seed(0)
    model, batches = Untraceable().eval(), list(images.split(20))
    expected = quantize(model, batches, QuantConfig(), progress=False)
    found = quantize(model, batches, QuantConfig(), progress=False, memory_limit=20_000)
    assert record_of(found).spilled_bytes > 0 == record_of(expected).spilled_bytes
    assert record_of(found).frontier_bytes <= 20_000
    assert torch.equal(found(images), expected(images))
    assert record_of(found).sqnr == record_of(expected).sqnr


@pytest.mark.usefixtures("only_tensors_count")
def test_what_memory_holds_of_the_layers_is_not_computed_again(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x if x.sum() > -1e9 else -x)
            return x

    torch.manual_seed(0)
    model, batches, forward = Deep().eval(), list(images.split(4)), _ModuleWalk._float
    all_outputs = 6 * 2 * 4 * 4 * images[:, 0].numel()  # bytes: layers, streams, channels
    calls: Counter[float] = Counter()

    def counted(self: _ModuleWalk, module: nn.Module, x: Tensor) -> Tensor:
        calls[share] += 1
        return forward(self, module, x)

    monkeypatch.setattr(_ModuleWalk, "_float", counted)
    for share in (0.0, 0.3, 3.0):
        quantize(model, batches, W8A8, progress=False, memory_limit=int(2 * share * all_outputs))
    saved = {share: calls[0.0] - n for share, n in calls.items()}
    assert saved[0.3] > 0.3 * saved[3.0] > 0


def test_autocast_around_it_changes_nothing(model: nn.Module, images: Tensor) -> None:
    expected = quantize(model, [images], progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantize(model, [images], progress=False)
    assert fingerprint(found) == fingerprint(expected)


def test_random_numbers_are_the_same_in_both_streams(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Branches(lambda x: x + 5.0 * torch.randn_like(x)).eval()
    network = quantize(model, list(images.split(16)), W8A8, progress=False)
    assert record_of(network).sqnr is not None and record_of(network).sqnr > 25.0


def test_layers_that_only_later_batches_call(images: Tensor) -> None:
    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = (nn.Conv2d(c, 4, 3) for c in (3, 4, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.head(self.a(y) if float(x.mean()) > 0 else self.b(y))

    torch.manual_seed(0)
    model = Forks().eval()
    batches = [images - images.mean() + 1.0, images - images.mean() - 1.0]
    network = quantize(model, batches, W8A8, progress=False)
    assert {name: record.execution for name, record in layers(network).items()} == dict.fromkeys(
        ("stem", "a", "b", "head"), "integer"
    )
    with torch.no_grad():
        for batch in batches:
            assert sqnr(model(batch), network(batch)) > 30.0


def test_batches_of_several_sizes(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Untraceable().eval()
    batches = [images[:24], images[24:, :, :10, :8]]
    network = quantize(model, batches, W8A8, progress=False)
    with torch.no_grad():
        for batch in batches:
            assert sqnr(model(batch), network(batch)) > 25.0


def test_modules_and_graph_agree(images: Tensor) -> None:
    """Without BatchNorm both walks see the same statistics and make the same network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 3), nn.Flatten()
    ).eval()
    inputs = Inputs([((images,), {})])
    # The gain of a bit is weighed with the whole network behind it, which only the graph shows.
    config = QuantConfig(activation_allocation="analytic")
    by_graph = quantize(model, [images], config, progress=False)
    by_modules = copy.deepcopy(model)

    walk_modules(by_modules, inputs, lambda call: solve_layer(call, config), lambda name: "", progress="")
    for name, tensor in by_modules.state_dict().items():
        torch.testing.assert_close(by_graph.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


class Odd(nn.Module):
    """What stays in float, each with its reason, beside what does not: a function and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose3d(4, 4, (1, 2, 2), (1, 2, 2))
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)))
        x = F.conv2d(self.up(x[:, :, None])[:, :, 0], self.weight)
        return F.conv2d(x, self.weight * x.mean()).flatten(2) @ x.flatten(2).transpose(1, 2)


def test_layers_kept_in_float_are_reported(images: Tensor) -> None:
    torch.manual_seed(0)
    network = quantize(Odd().eval(), [images], progress=False)
    records = layers(network)
    assert {name: r.reason for name, r in records.items() if r.execution == "float"} == {
        "up": "ConvTranspose3d is not supported",
        "conv2d_1": "a call of conv2d with weights that are not constant",
        "matmul": "a call of matmul is not supported",
    }
    assert [name for name, r in records.items() if r.execution != "float"] == [
        "first",
        "twice",
        "twice_call2",
        "conv2d",
    ]
    for record in records.values():
        assert record.reason in str(ptq4cuda.report(network))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, left: Tensor, right: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        y = torch.cat([self.a(left), self.b(right)], 1)
        return {"sum": y * scale, "list": y[:, :1]}


def test_several_inputs_and_outputs(images: Tensor) -> None:
    network = quantize(TwoInputs().eval(), [{"left": images, "right": images * 2}], progress=False)
    out = network(images, images * 2)
    assert set(out) == {"sum", "list"}
    assert record_of(network).sqnr > 10


def test_output_of_a_dataclass(images: Tensor) -> None:
    @dataclass
    class Output:
        values: Tensor

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Output:
            return Output(self.last(F.relu(self.first(x))))

    model = Wraps().eval()
    network = quantize(model, [images], progress=False)
    with torch.no_grad():
        assert record_of(network).sqnr == pytest.approx(sqnr(model(images).values, network(images).values), abs=0.1)


def test_dead_and_constant_channels(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)).eval()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0.0, -1.0  # always zero after the ReLU
        model[0].weight[1], model[0].bias[1] = 0.0, 0.7  # always 0.7
        model[2].weight[3] = 0.0  # an output channel without weights
    for config in (QuantConfig(), QuantConfig.paper(), QuantConfig.naive()):
        network = quantize(model, [images], config, progress=False)
        with torch.no_grad():
            assert sqnr(model(images), network(images)) > 10


def test_half_precision_model(model: nn.Module, images: Tensor) -> None:
    network = quantize(copy.deepcopy(model).bfloat16(), [images.bfloat16()], progress=False)
    assert network(images.bfloat16()).dtype == torch.bfloat16
    assert network.stem.weight_scale.dtype == torch.float32


# --- bad input ------------------------------------------------------------------------------------------------


def broken(model: nn.Module, name: str, value: float) -> nn.Module:
    model = copy.deepcopy(model)
    model.get_parameter(name).data.flatten()[0] = value
    return model


BAD = {
    "training mode": (lambda m, x: (m.train(), [x]), ValueError, "must be in evaluation mode, but it is in training"),
    "part in training": (lambda m, x: ((m.bn.train(), m)[1], [x]), ValueError, "its module 'bn' is in training mode"),
    "no module": (lambda m, x: (m.forward, [x]), TypeError, "must be a torch.nn.Module, got method"),
    "no convolution": (lambda m, x: (nn.Linear(3, 3).eval(), [x]), ValueError, "no convolution to quantize"),
    "NaN weight": (
        lambda m, x: (broken(m, "pointwise.weight", math.nan), [x]),
        ValueError,
        "'pointwise.weight' contains NaN or Inf",
    ),
    "Inf bias": (lambda m, x: (broken(m, "fc.bias", math.inf), [x]), ValueError, "'fc.bias' contains NaN or Inf"),
    "float64": (lambda m, x: (m.double(), [x.double()]), ValueError, r"'stem.weight' is torch\.float64, not float32"),
    "no values": (lambda m, x: (m.to("meta"), [x]), ValueError, "'stem.weight' is on the meta device"),
    "no values in a part": (lambda m, x: ((m.fc.to("meta"), m)[1], [x]), ValueError, "'fc.weight' is on the meta"),
    "no shape yet": (lambda m, x: (nn.LazyConv2d(3, 3).eval(), [x]), ValueError, "'weight' has no shape yet"),
    "a script": (lambda m, x: (torch.jit.ScriptModule(), [x]), TypeError, r"is a torch\.jit\.ScriptModule"),
    "batch without values": (lambda m, x: (m, [x.to("meta")]), ValueError, "batch 0 is on the meta device"),
    "one image": (lambda m, x: (nn.Conv2d(3, 4, 1).eval(), [x[0]]), ValueError, "a single image.*and no batch"),
    "one image, not traced": (
        lambda m, x: (Branches(lambda x: x).eval(), [x[0]]),
        ValueError,
        r"layer 'first' returns a single image, \[4, 12, 12\], and no batch",
    ),
    "no batches": (lambda m, x: (m, []), ValueError, "batches is empty"),
    "one tensor": (lambda m, x: (m, x), TypeError, "got one Tensor: put it in a list"),
    "one dict": (lambda m, x: (m, {"x": x}), TypeError, "got one dict"),
    "a number": (lambda m, x: (m, 3), TypeError, "an iterable of batches, got one int$"),
    "batch of strings": (lambda m, x: (m, ["cat"]), TypeError, "batch 0 must be a tensor.*got str"),
    "wrong keys": (lambda m, x: (m, [{"image": x}]), TypeError, r"keys \['image'\].*forward \(x\)"),
    "a number for an image": (
        lambda m, x: (TwoInputs().eval(), [{"left": x, "right": 2.0}]),
        ValueError,
        "the model fails on the first calibration batch .*conv2d.*got .float",
    ),
    "no tensor": (lambda m, x: (m, [{"x": 2.0}]), TypeError, r"keys \['x'\]; none is a tensor"),
    "other arguments": (
        lambda m, x: (TwoInputs().eval(), [{"left": x, "right": x}, {"left": x}]),
        ValueError,
        "batch 1 has other arguments .* than batch 0: left instead of left, right",
    ),
    "attributes of a layer": (
        lambda m, x: (OwnAttributes().eval(), [x]),
        ValueError,
        "own code reads what a quantized layer does not have .*'transposed'.*: leave that layer in float",
    ),
    "empty batch": (lambda m, x: (m, [x, x[:0]]), ValueError, "batch 1 has the shape"),
    "NaN batch": (lambda m, x: (m, [x, x * math.nan]), ValueError, "batch 1 contains NaN or Inf"),
    "Inf batch": (lambda m, x: (m, [x / 0]), ValueError, "batch 0 contains NaN or Inf"),
}


@pytest.mark.parametrize(("case", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_sentence(
    model: nn.Module, images: Tensor, case: object, error: type[Exception], message: str
) -> None:
    bad_model, batches = case(copy.deepcopy(model), images)  # type: ignore[operator]
    with pytest.raises(error, match=message):
        quantize(bad_model, batches, progress=False)


def test_overflow_inside_the_network_names_the_layer(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    model[0].weight.data.fill_(3e38)
    with pytest.raises(ValueError, match="layer '1': its input contains NaN or Inf"):
        quantize(model, [images], progress=False)


def test_quantizing_twice(model: nn.Module, images: Tensor) -> None:
    network = quantize(model, [images], progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(network, [images], progress=False)


@pytest.mark.parametrize("execution", ["integer", "simulate"])
def test_result_is_in_evaluation_mode(model: nn.Module, images: Tensor, execution: str) -> None:
    network = quantize(model, [images], QuantConfig(execution=execution), progress=False)
    assert not any(module.training for module in network.modules())


def test_config_of_another_kind(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(TypeError, match="config must be a QuantConfig, got str"):
        quantize(model, [images], "paper", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_bits", 0),
        ("weight_bits", 9),
        ("activation_bits", 4.5),
        ("first_last_bits", True),
        ("clipping", "best"),
        ("bias_correction", True),
        ("activation_granularity", "per_group"),
        ("execution", "fast"),
        ("depthwise_bits", 9),
        ("activation_allocation", "even"),
        ("weight_allocation", "greedy"),
        ("target", "logits"),
        ("rounding", "up"),
        ("clip_exponent", 0.5),
        ("target_sqnr", "high"),
        ("target_sqnr", math.nan),
        ("target_sqnr", True),
        ("size_budget", 2.0),
    ],
)
def test_config_refuses(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*{value}"):
        replace(QuantConfig(), **{field: value})


@pytest.mark.parametrize("preset", ["paper", "naive", "fast", "w4a8", "w8a4"])
def test_presets_take_fields(preset: str) -> None:
    made, given = getattr(QuantConfig, preset)(), {"size_budget": 0.2, "clipping": "kld"}
    assert getattr(QuantConfig, preset)(**given) == replace(made, **given)
    with pytest.raises(ValueError, match="size_budget must be"):
        getattr(QuantConfig, preset)(size_budget=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'budget'"):
        getattr(QuantConfig, preset)(budget=0.2)


def test_result_of_tracing_is_a_graph(model: nn.Module, images: Tensor) -> None:
    network = quantize(model, [images], progress=False)
    assert isinstance(network, fx.GraphModule)
    assert sum(isinstance(m, (QuantConv2d, QuantLinear)) for m in network.modules()) == 5
    assert record_of(network).folded == 2


def test_too_few_samples_for_the_width_of_a_layer_are_said() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.wide, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.wide(F.relu(self.conv(x)).flatten(1))))

    images = torch.randn(160, 3, 8, 8)
    with pytest.warns(UserWarning, match="16 calibration samples are few for 'wide', .*; 144 would be enough"):
        network = quantize(Wide().eval(), [images[:16]], progress=False)
    assert "16 calibration samples are few for 'wide'" in str(ptq4cuda.report(network))
    for few, config in (
        (images[:144], QuantConfig()),  # enough
        (images[:16], QuantConfig.fast()),  # nothing is fitted
        (images[:16], QuantConfig(overrides={"wide": {"weight_bits": 8}})),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network = quantize(Wide().eval(), [few], config, progress=False)
        assert "are few for" not in str(ptq4cuda.report(network))
