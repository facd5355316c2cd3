"""Parameters as a model's code uses them: read by other code than a layer's own, shared, changed in their size."""

from __future__ import annotations

import weakref
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
from ptq4cuda.artifact.record import LayerRecord, record_of
from ptq4cuda.nn import QuantConv2d, QuantLinear, QuantModule
from ptq4cuda.quantizer import QuantParams
from small_networks import calibrate_batch_norm


class Net(nn.Module):
    """A forward around a few layers, which torch.fx can trace or cannot."""

    def __init__(self, forward: Callable[..., Tensor], walk: str = "graph") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.embedding = nn.Embedding(7, 12)
        self.head = nn.Linear(12, 5)
        self.written, self.walk = forward, walk

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        if self.walk == "modules" and x.sum() < -1e9:
            return x
        return self.written(self, x)


def made(forward: Callable[..., Tensor], images: Tensor, walk: str = "graph") -> Net:
    torch.manual_seed(0)
    return calibrate_batch_norm(Net(forward, walk), images)  # type: ignore[return-value]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def layers(network: nn.Module) -> dict[str, LayerRecord]:
    return {layer.name: layer for layer in record_of(network).layers}


def checked(net: nn.Module, images: Tensor, folder: Path, least: float = 15.0, **config: Any) -> nn.Module:
    """Quantize, save and load a network; return the quantized one."""
    network = quantize(net, [images], QuantConfig(**config), progress=False)
    fresh = 0.7 * images.flip(3)
    assert sqnr(net, network, fresh) > least
    ptq4cuda.save(network, folder / "net.ptq4")
    assert torch.equal(ptq4cuda.load(folder / "net.ptq4", net)(fresh), network(fresh))
    return network


def plain(m: Any, x: Tensor) -> Tensor:
    return m.head(m.features(x).mean((2, 3)))


def dtype(m: Any, x: Tensor) -> Tensor:
    return m.head(m.features(x.to(m.conv1.weight.dtype)).mean((2, 3)))


def device(m: Any, x: Tensor) -> Tensor:
    return m.head(m.features(x.to(device=m.conv2.weight.data.device)).mean((2, 3)))


def shape(m: Any, x: Tensor) -> Tensor:
    y = m.features(x).view(x.shape[0], m.conv2.weight.shape[0], -1)
    return m.head(y.mean(2)) * m.conv2.weight.dim() / m.conv2.weight.size(0) + m.conv2.in_channels


def dtype_of_a_bias(m: Any, x: Tensor) -> Tensor:
    return m.head(m.features(x).to(dtype=m.conv1.bias.detach().dtype, device=m.head.weight.device).mean((2, 3)))


@pytest.mark.parametrize("execution", ["simulate", "integer"])
@pytest.mark.parametrize("walk", ["graph", "modules"])
@pytest.mark.parametrize("forward", [dtype, device, shape, dtype_of_a_bias])
def test_questions_about_parameters_do_not_matter(
    forward: Callable[..., Tensor], walk: str, execution: str, images: Tensor, tmp_path: Path
) -> None:
    network = checked(made(forward, images, walk), images, tmp_path, execution=execution)
    assert record_of(network).walked_by == walk
    if forward is device and walk == "modules":  # what .data is used for does not show there
        return
    if not (forward is dtype_of_a_bias and walk == "modules"):
        assert all(isinstance(network.get_submodule(name), QuantModule) for name in ("conv1", "conv2", "head"))
    if walk == "graph":
        assert record_of(network).folded == 2
    half = network.half()(images.half())
    assert half.dtype == torch.float16


def bias(m: Any, x: Tensor) -> Tensor:
    return m.head(m.features(x).mean((2, 3))) + 3.0 * m.conv2.bias.sum()


def tied(m: Any, x: Tensor) -> Tensor:
    return F.conv_transpose2d(m.features(x), m.conv2.weight, padding=1)


def regularized(m: Any, x: Tensor) -> Tensor:
    return m.head(m.features(x).mean((2, 3))) * m.conv2.weight.data.square().mean()


@pytest.mark.parametrize("execution", ["simulate", "integer"])
@pytest.mark.parametrize(
    ("walk", "forward"),
    [*(("graph", f) for f in (bias, regularized)), *(("modules", f) for f in (bias, tied, regularized))],
)
def test_a_layer_whose_values_are_read_stays_in_float(
    forward: Callable[..., Tensor], walk: str, execution: str, images: Tensor, tmp_path: Path
) -> None:
    network = checked(made(forward, images, walk), images, tmp_path, execution=execution)
    found = layers(network)
    assert found["conv2"].execution == "float" and type(network.get_submodule("conv2")) is nn.Conv2d
    assert found["conv1"].execution == execution
    if walk == "graph":
        name = "bias" if forward is bias else "weight"
        assert found["conv2"].reason == f"the model reads its {name} elsewhere"
        assert found["bn2"].reason == f"layer 'conv2' before it stays as it is: the model reads its {name} elsewhere"
        assert record_of(network).folded == 1
    else:
        assert found["conv2"].reason == "other code than its own reads its parameters"


def convolved_again(m: Any, x: Tensor) -> Tensor:
    x = F.conv2d(m.features(x), m.conv2.weight, m.conv2.bias, padding=1)
    return m.head(x.mean((2, 3)))


def embedding(m: Any, x: Tensor) -> Tensor:
    return F.linear(m.features(x).mean((2, 3)), m.embedding.weight) + m.embedding(x[:, 0, 0, 0].long() % 7).mean()


@pytest.mark.parametrize("walk", ["graph", "modules"])
@pytest.mark.parametrize("forward", [convolved_again, tied, embedding])
def test_a_weight_that_layers_of_two_places_use(
    forward: Callable[..., Tensor], walk: str, images: Tensor, tmp_path: Path
) -> None:
    network = checked(made(forward, images, walk), images, tmp_path, 14.0, execution="integer")
    found = layers(network)
    function = {convolved_again: "conv2d", tied: "conv_transpose2d", embedding: "linear"}[forward]
    if walk == "graph":
        assert {found[name].execution for name in ("conv1", "conv2", function)} == {"integer"}
        assert record_of(network).folded == 2
    else:
        assert f"a call of {function}" in found[function].reason
        assert (found["conv2"].execution == "float") == (forward is not embedding)


class Holding(nn.Module):
    """Has no layer of its own, reaches another's, and torch.fx cannot trace it."""

    def __init__(self, conv: nn.Conv2d, how: str) -> None:
        super().__init__()
        self.how = how
        self.held = {"a list": [conv], "a reference": weakref.ref(conv), "a dict": {0: conv}}.get(how)
        if how == "an attribute":
            object.__setattr__(self, "held", conv)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < -1e9:
            return x
        held: Any = self.held
        conv = held if self.how == "an attribute" else held() if self.how == "a reference" else held[0]
        return x * (1.0 + conv.weight.square().mean()) + conv(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["a list", "a dict", "an attribute"])
def test_layers_that_other_modules_hold_stay_in_float(how: str, images: Tensor, tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.holding(m.features(x)).mean((2, 3)))  # type: ignore[no-any-return]

    net = made(plain, images)
    net.holding, net.written = Holding(net.conv2, how).eval(), forward
    network = checked(net, images, tmp_path, execution="integer")
    assert record_of(network).walked_by == "graph"
    assert layers(network)["conv2"].reason == "Holding holds it, too"
    assert record_of(network).folded == 1


@pytest.mark.parametrize("walk", ["graph", "modules"])
def test_parameters_that_two_layers_share(walk: str, images: Tensor, tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.other(m.features(x))).mean((2, 3)))  # type: ignore[no-any-return]

    net = made(plain, images, walk)
    net.other = nn.Conv2d(12, 12, 3, padding=1).eval()
    net.other.weight, net.written = net.conv2.weight, forward
    network = checked(net, images, tmp_path, execution="integer")
    assert {layers(network)[name].execution for name in ("conv1", "conv2", "other", "head")} == {"integer"}


def test_a_layer_under_two_names_walked_by_modules(images: Tensor, tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.again(m.features(x))).mean((2, 3)))  # type: ignore[no-any-return]

    net = made(plain, images, "modules")
    net.again, net.written = net.conv2, forward
    network = checked(net, images, tmp_path, 12.0, execution="integer")
    assert network.get_submodule("again") is network.get_submodule("conv2")
    assert "called 2 times" in layers(network)["conv2"].reason


def test_a_model_that_asks_its_first_parameter_is_refused_where_none_is_left(images: Tensor) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.to(next(self.parameters()).dtype) if x.sum() > -1e9 else x)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="the model's own code reads what a quantized layer does not have"):
        quantize(Asking().eval(), [images], progress=False)


# --- the weight of a quantized layer --------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["simulate", "integer"])
def test_weight_of_quantized_layers(model: nn.Module, images: Tensor, execution: str) -> None:
    network = quantize(model, [images], QuantConfig(weight_bits=8, execution=execution), progress=False)
    traced, _ = ptq4cuda.graph.trace(model)
    assert traced is not None
    ptq4cuda.graph.fold_batch_norm(traced)
    for name, layer in network.named_modules():
        if isinstance(layer, QuantModule):
            assert torch.equal(layer.weight, layer.dequantized_weight())
            torch.testing.assert_close(layer.weight, traced.get_submodule(name).weight, rtol=0.1, atol=0.1)
    assert not any(name.endswith(".weight") for name in network.state_dict())
    assert not list(network.parameters())


@pytest.mark.parametrize("layer", [QuantConv2d(3, 4, 3), QuantLinear(5, 4)])
@pytest.mark.parametrize("value", [torch.zeros(4, 3, 3, 3), nn.Parameter(torch.zeros(4, 5)), None])
def test_the_weight_cannot_be_set(layer: QuantModule, value: object) -> None:
    with pytest.raises(AttributeError, match="the weight of a quantized layer is packed, it cannot be set"):
        layer.weight = value  # type: ignore[misc]


def test_the_weight_has_the_dtype_of_the_float_layer() -> None:
    layer = QuantConv2d.from_float(nn.Conv2d(3, 4, 3).bfloat16())
    assert layer.weight.dtype == torch.bfloat16
    assert layer.half().weight.dtype == torch.float16
    assert layer.float().weight.dtype == torch.float32


# --- sizes and geometry that changed after construction --------------------------------------------------------


def dilated(net: Net) -> None:
    net.conv2.dilation = net.conv2.padding = (2, 2)


def strided_with_numbers(net: Net) -> None:
    net.conv2.stride, net.conv2.padding = 2, [1, 0]  # type: ignore[assignment]
    net.conv2.dilation = (1,)  # type: ignore[assignment]


def same(net: Net) -> None:
    net.conv2.padding, net.conv2.dilation = "same", (2, 1)


def tiled(net: Net) -> None:
    net.conv2.padding_mode = "circular"


def tiled_with_another_padding(net: Net) -> None:
    net.conv2.padding_mode = "circular"
    net.conv2.padding = (4, 4)  # which PyTorch does not read


def grayscale(net: Net) -> None:
    net.conv1.weight = nn.Parameter(net.conv1.weight.sum(1, keepdim=True))


def pruned(net: Net) -> None:
    """Cut four channels out, as tools for structured pruning do."""
    kept = [0, 2, 3, 5, 6, 8, 9, 11]
    for name in ("weight", "bias"):
        for module in (net.conv1, net.bn1):
            getattr(module, name).data = getattr(module, name).data[kept]
    net.bn1.running_mean, net.bn1.running_var = net.bn1.running_mean[kept], net.bn1.running_var[kept]  # type: ignore
    net.conv2.weight.data = net.conv2.weight.data[:, kept]
    net.head.weight.data, net.head.bias.data = net.head.weight.data[:3], net.head.bias.data[:3]


def in_groups(net: Net) -> None:
    net.conv2.weight.data = net.conv2.weight.data[:, :3].clone() * 2.0
    net.conv2.groups = 4


def without_affine(net: Net) -> None:
    net.bn1.weight = net.bn1.bias = None  # type: ignore[assignment]
    net.bn2.eps = 0.5


CHANGES = [
    dilated,
    strided_with_numbers,
    same,
    tiled,
    tiled_with_another_padding,
    grayscale,
    pruned,
    in_groups,
    without_affine,
]


@pytest.mark.parametrize("walk", ["graph", "modules"])
@pytest.mark.parametrize("change", CHANGES)
def test_layers_are_read_as_they_compute(
    change: Callable[[Net], None], walk: str, images: Tensor, tmp_path: Path
) -> None:
    net = made(plain, images, walk)
    before = net(images)
    change(net)
    if change is grayscale:
        images = images[:, :1]
    after = net(images)
    assert after.shape != before.shape or not torch.allclose(after, before)
    network = checked(net, images, tmp_path, weight_bits=8, activation_bits=8, least=30.0)
    found = layers(network)
    tiles = change in (tiled, tiled_with_another_padding)
    assert {found[n].execution for n in ("conv1", "head")} == {"integer"}
    assert found["conv2"].execution == ("simulate" if tiles else "integer")
    assert record_of(network).folded == (2 if walk == "graph" else 0)


def test_from_float_reads_the_weight() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3)
    conv.weight.data, conv.bias.data = conv.weight.data[:5, :4], conv.bias.data[:5]  # type: ignore[union-attr]
    conv.padding = 1  # type: ignore[assignment]
    x = torch.rand(2, 4, 7, 7)
    activation = QuantParams.from_range(
        torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([8], dtype=torch.uint8)
    )
    layer = QuantConv2d.from_float(conv, activation, weight_bits=8)
    torch.testing.assert_close(layer(x), conv(x), rtol=0.1, atol=0.02)
    assert (layer.in_channels, layer.out_channels, layer.padding) == (4, 5, (1, 1))
