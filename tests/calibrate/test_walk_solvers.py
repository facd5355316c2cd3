"""What solvers are told about the network behind a layer, and how bits of layers are overridden."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, graph, quantize
from ptq4cuda.artifact.record import LayerRecord, record_of
from ptq4cuda.calibrate.importance import output_importance
from ptq4cuda.calibrate.inputs import Inputs
from ptq4cuda.metrics import Noise, compare
from small_networks import Deep, Writes

# --- importance -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A linear network of one kind of structure; `first` makes the tensor whose errors are weighed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Conv2d(3, 4, 1)
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False)
        self.strided = nn.Conv2d(4, 6, 2, stride=2, bias=False)
        self.wide, self.narrow = nn.Conv2d(4, 256, 1, bias=False), nn.Conv2d(256, 256, 1, bias=False)
        self.joined = nn.Conv2d(12, 5, 1, bias=False)
        self.fc = nn.Linear(4 * 36, 7, bias=False)
        self.pooled, self.single = nn.Linear(4, 7, bias=False), nn.Conv2d(4, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return getattr(self, f"_{self.kind}")(x)

    def _chain(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x))  # of many channels, so that what is not independent averages out

    def _grouped(self, x: Tensor) -> Tensor:
        return self.grouped(x)

    def _strided(self, x: Tensor) -> Tensor:
        return self.strided(x)

    def _residual(self, x: Tensor) -> Tensor:
        return self.a(x) + x

    def _concatenation(self, x: Tensor) -> Tensor:
        return self.joined(torch.cat([x, self.a(x), x], 1))

    def _flattened(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))

    def _average(self, x: Tensor) -> Tensor:
        return self.pooled(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def _mean(self, x: Tensor) -> Tensor:
        return self.pooled(x.mean((2, 3)))

    def _last(self, x: Tensor) -> Tensor:
        return self.pooled(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _average_of_four(self, x: Tensor) -> Tensor:
        return self.a(F.avg_pool2d(x, 2))

    def _broadcast(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True) + torch.ones(1, 4, 16, 16)

    def _channel_over_channels(self, x: Tensor) -> Tensor:
        return torch.ones(1, 4, 16, 16) + self.single(x)


KINDS = ["chain", "grouped", "strided", "flattened", "average", "mean", "last", "average_of_four"]
KINDS += ["broadcast", "channel_over_channels"]


def jacobian_energy(net: Net, x: Tensor) -> Tensor:
    """Return Σ (d output / d value)² for each channel of the tensor that `first` makes, a mean over its positions."""
    with torch.no_grad():
        z = net.first(x)[:1]
    jacobian = torch.autograd.functional.jacobian(getattr(net, f"_{net.kind}"), z)  # type: ignore[no-untyped-call]
    energy = jacobian.double().square().flatten(0, -5).sum(0)[0]  # [C, H, W]
    return energy.mean((1, 2))


def importance(net: nn.Module, x: Tensor) -> Tensor:
    """Return what an error of each channel of the tensor that `first` makes costs."""
    traced, reason = graph.trace(net.eval())
    assert traced is not None, reason
    costs = output_importance(traced, Inputs([((x,), {})]))
    return next(cost for node, cost in costs.items() if node.target == "first")


@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_the_energy_of_the_jacobian(kind: str) -> None:
    """Squared errors that are independent add up along paths that do not meet: exact but for the edges of images."""
    side = 6 if kind == "flattened" else 2 if kind == "chain" else 16
    net, x = Net(kind), torch.randn(2, 3, side, side)
    found, expected = importance(net, x), jacobian_energy(net, x)
    edges = {"chain": 0.3, "grouped": 0.1, "average_of_four": 0.25}.get(kind)
    # A padded kernel reads the values at the edge less often.
    torch.testing.assert_close(found, expected, rtol=edges or 1e-4, atol=0.0)
    torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=0.7 * (edges or 1e-4), atol=0.0)


def test_importance_of_sums_and_joins_adds_up() -> None:
    """Every reader counts; that paths of one error may cancel is not known."""
    x = torch.randn(2, 3, 6, 6)
    residual = Net("residual")
    energy = residual.a.weight.detach().double().square().sum((0, 2, 3))
    torch.testing.assert_close(importance(residual, x), energy + 1.0)
    joined = Net("concatenation")
    weights = joined.joined.weight.detach().double().square().sum((0, 2, 3))
    through = torch.einsum("o,oc->c", weights[4:8], joined.a.weight.detach().double().square().sum((2, 3)))
    torch.testing.assert_close(importance(joined, x), weights[:4] + weights[8:] + through)


class Maxima(nn.Module):
    """A maximum of four values, by a module or a function, or an average that is called a maximum."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.a = kind, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.maximum, self.max_of_mean = nn.MaxPool2d(2), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.kind == "module":
            return self.a(self.maximum(x))
        if self.kind == "function":
            return self.a(F.max_pool2d(x, 2))
        return self.a(self.max_of_mean(x) if self.kind == "average" else F.avg_pool2d(x, 2))


def test_importance_tells_maxima_from_averages_by_what_is_called() -> None:
    x = torch.randn(2, 3, 8, 8)
    found = {kind: importance(Maxima(kind), x) for kind in ("module", "function", "average", "averages")}
    energy = Maxima("").a.weight.detach().double().square().sum((0, 2, 3))
    for kind, values in found.items():  # of four values one counts, or each of them a quarter
        torch.testing.assert_close(values, energy / (4 if kind in ("module", "function") else 16), msg=kind)


def test_importance_counts_the_slope_of_activations() -> None:
    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.leaky_relu(self.first(x), 0.5))

    net, x = Activated().eval(), torch.randn(8, 3, 6, 6)
    with torch.no_grad():
        positive = (net.first(x) > 0).double().mean((0, 2, 3))
    energy = net.second.weight.detach().double().square().sum((0, 2, 3))
    found = importance(net, x)  # type: ignore[arg-type]
    torch.testing.assert_close(found, energy * (positive + 0.25 * (1 - positive)))


def test_importance_does_not_depend_on_the_batches(model: nn.Module, images: Tensor) -> None:
    traced, _ = graph.trace(model)
    assert traced is not None
    whole = output_importance(traced, Inputs([((images,), {})]))
    pieces = output_importance(traced, Inputs([((batch,), {}) for batch in images.split((1, 20, 27))]))
    assert whole.keys() == pieces.keys()
    for node, cost in whole.items():
        torch.testing.assert_close(pieces[node], cost, msg=str(node))


# --- order ------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """A residual network whose shortcuts are convolutions, written after the branches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.b1, self.s1 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.a2, self.b2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b1(F.relu(self.a1(x))) + self.s1(x))
        y = self.b2(F.relu(self.a2(x)))
        y = F.relu(y + F.hardtanh(x, 0.0, 2.0))
        return self.fc(y.mean((2, 3)))


def test_shortcuts_first_keeps_the_function_and_a_topological_order(images: Tensor) -> None:
    net = Blocks().eval()
    traced, _ = graph.trace(net)
    assert traced is not None
    nodes = [node.name for node in traced.graph.nodes]
    graph.shortcuts_first(traced)
    traced.recompile()
    assert torch.equal(traced(images), net(images))
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    assert sorted(node.name for node in order) == sorted(nodes)
    for node, i in order.items():
        assert all(order[used] < i for used in node.all_input_nodes)
    names = [node.name for node in order]
    # What waits for no layer goes first; the shortcut that is a layer itself stays where it is.
    assert names.index("hardtanh") < names.index("b2")
    assert names.index("b1") < names.index("s1")


def test_the_target_of_a_block_makes_up_for_the_shortcut(images: Tensor) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(F.relu(self.stem(x)))  # four bits, so that there is something to make up for
            return self.last(self.second(F.relu(x)) + x)

    model = Block().eval()

    def sums(net: nn.Module) -> Tensor:
        found: list[Tensor] = []
        hook = net.get_submodule("last").register_forward_pre_hook(lambda module, args: found.append(args[0]))
        with torch.no_grad():
            net(images)
        hook.remove()
        return found[0]

    sqnr: dict[str, float] = {}
    for target in ("output", "block"):
        network = quantize(model, [images], QuantConfig(target=target, execution="simulate"), progress=False)
        noise = Noise()
        noise.add(sums(model), sums(network))
        assert noise.sqnr is not None
        sqnr[target] = noise.sqnr
    assert sqnr["block"] > sqnr["output"] + 0.3


# --- overrides --------------------------------------------------------------------------------------------------


def layers(network: nn.Module) -> dict[str, LayerRecord]:
    return {layer.name: layer for layer in record_of(network).layers}


def bits(network: nn.Module) -> dict[str, tuple[float | None, float | None]]:
    return {name: (r.weight_bits, r.activation_bits) for name, r in layers(network).items()}


def test_overrides_set_bits_and_leave_layers_in_float(images: Tensor) -> None:
    model = Deep(bad=None).eval()
    config = QuantConfig(
        overrides={
            "layers.*": {"weight_bits": 5},
            "layers.2": "float",
            "layers.[34]": {"weight_bits": 6, "activation_bits": 3},
            "layers.4": {"activation_bits": 8},
        },
        activation_allocation="uniform",
    )
    network = quantize(model, [images], config, progress=False)
    assert bits(network) == {
        "layers.0": (5.0, 8.0),  # the first layer's input keeps its 8 bits
        "layers.1": (5.0, 4.0),
        "layers.2": (None, None),
        "layers.3": (6.0, 3.0),
        "layers.4": (4.0, 8.0),  # the last pattern that fits counts, and only it
        "layers.5": (5.0, 4.0),
        "fc": (8.0, 8.0),
    }
    assert isinstance(network.get_submodule("layers.2"), nn.Conv2d)
    assert not isinstance(network.get_submodule("layers.2"), ptq4cuda.QuantConv2d)
    rows = {line.split()[0]: line.split() for line in str(ptq4cuda.report(network)).split("\n")[2:9]}
    assert rows["layers.3"][2:4] == ["6", "3"]
    assert "kept in float by overrides" in " ".join(rows["layers.2"])


def test_the_ends_are_those_of_the_layers_that_are_quantized(images: Tensor) -> None:
    network = quantize(Deep(bad=None).eval(), [images], QuantConfig(overrides={"layers.0": "float"}), progress=False)
    found = bits(network)
    assert found["layers.0"] == (None, None)
    assert found["layers.1"] == (8.0, 8.0)


def test_float_everywhere_is_the_network(images: Tensor) -> None:
    model = Deep(bad=None).eval()
    network = quantize(model, [images], QuantConfig(overrides={"*": "float"}), progress=False)
    with torch.no_grad():
        torch.testing.assert_close(network(images), model(images))


def test_overrides_survive_a_file(images: Tensor, tmp_path: Path) -> None:
    config = QuantConfig(overrides={"layers.1": {"weight_bits": 8}, "layers.2": "float"})
    network = quantize(Deep(bad=None).eval(), [images], config, progress=False)
    ptq4cuda.save(network, tmp_path / "net")
    loaded = ptq4cuda.load(tmp_path / "net", Deep(bad=None))
    assert record_of(loaded).config == config
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))


def test_a_pattern_that_fits_nothing(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"no layer is called 'layer\.\*'; the layers are layers\.0, layers\.1"):
        quantize(Deep().eval(), [images], QuantConfig(overrides={"layer.*": "float"}), progress=False)


@pytest.mark.parametrize(
    "override", ["int8", {}, {"bits": 4}, {"weight_bits": 0}, {"weight_bits": 4.0}, {"activation_bits": 9}, 8]
)
def test_overrides_that_are_refused(override: object) -> None:
    with pytest.raises(ValueError, match=r"overrides\['conv'\]"):
        QuantConfig(overrides={"conv": override})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="got the pattern 0"):
        QuantConfig(overrides={0: "float"})  # type: ignore[dict-item]


def test_networks_that_write_into_images_are_compared_on_the_same() -> None:
    images, net = torch.rand(4, 3, 12, 12), Writes().eval()
    comparison = compare(
        nn.Sequential(net, nn.Flatten()), nn.Sequential(net, nn.Flatten()), [(images, torch.zeros(4))]
    )
    assert comparison.agreement == 100.0 and comparison.sqnr == math.inf
