"""Models whose own code goes beyond their classes: hooks, and methods that were replaced on an instance."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import LayerRecord, record_of
from ptq4cuda.metrics import Noise
from small_networks import calibrate_batch_norm

EXECUTIONS = ["simulate", "integer"]


class Net(nn.Module):
    """Two blocks, and a head that may read what a hook has stored."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2, self.relu = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()
        self.head = nn.Conv2d(12, 5, 1)
        self.features: dict[str, Tensor] = {}

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(self.features.get("x", x)).mean((2, 3))


class Recorder:
    """Stores what passes in a model, and counts the calls."""

    def __init__(self, model: Net) -> None:
        self.model, self.calls = model, []  # type: ignore[var-annotated]

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls.append(tuple(output.shape))
        self.model.features["x"] = output

    def method(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self(module, args, output)


def closure(net: Net) -> Any:
    def store(module: nn.Module, args: Any, output: Tensor) -> None:
        net.features["x"] = output

    return store


def with_default(net: Net) -> Any:
    return lambda module, args, output, net=net: net.features.update(x=output)


STORING: dict[str, Callable[[Net], Any]] = {
    "a closure": closure,
    "a default": with_default,
    "an object": Recorder,
    "a method of an object": lambda net: Recorder(net).method,
    "a partial function": lambda net: partial(Recorder.__call__, Recorder(net)),
}


@pytest.fixture
def net(images: Tensor) -> Net:
    torch.manual_seed(0)
    return calibrate_batch_norm(Net(), images)  # type: ignore[return-value]


def sqnr(net: nn.Module, network: nn.Module, x: Tensor) -> float:
    noise = Noise()
    with torch.no_grad():
        noise.add(net(x), network(x))
    return noise.sqnr or 200.0


def layers(network: nn.Module) -> dict[str, LayerRecord]:
    return {layer.name: layer for layer in record_of(network).layers}


def checked(net: nn.Module, images: Tensor, execution: str, folder: Path, least: float = 15.0) -> nn.Module:
    """Quantize, save and load a network; return the quantized one."""
    network = quantize(net, [images], QuantConfig(execution=execution), progress=False)
    fresh = 0.7 * images.flip(3)
    assert sqnr(net, network, fresh) > least
    ptq4cuda.save(network, folder / "net.ptq4")
    assert torch.equal(ptq4cuda.load(folder / "net.ptq4", net)(fresh), network(fresh))
    return network


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("stores", "layer"), [*((stores, "conv2") for stores in STORING), ("a closure", "bn2"), ("an object", "relu")]
)
def test_features_that_hooks_store_are_those_of_the_call(
    net: Net, images: Tensor, stores: str, layer: str, execution: str, tmp_path: Path
) -> None:
    net.get_submodule(layer).register_forward_hook(STORING[stores](net))
    with torch.no_grad():
        net(images)
    held = net.features["x"].clone()
    network = checked(net, images, execution, tmp_path)
    assert record_of(network).walked_by == "modules"
    assert f"its module '{layer}' has hooks" in record_of(network).reason
    assert not torch.equal(network(images), network(-images))
    assert layers(network)["conv2"].execution == execution  # the quantized layer has the hooks
    net(images)
    assert torch.equal(net.features["x"], held)  # of the model, not of the network


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2.0 * output


def halved(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (0.5 * args[0] + 0.1,)


def halved_by_name(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
    return (0.5 * args[0],), kwargs


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(doubled),
    "pre": lambda m: m.register_forward_pre_hook(halved),
    "with kwargs": lambda m: m.register_forward_pre_hook(halved_by_name, with_kwargs=True),
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("hook", "module"),
    [(hook, module) for hook in HOOKS for module in ("", "conv2")]
    + [("forward", "conv1"), ("pre", "bn2"), ("forward", "relu"), ("pre", "head")],
)
def test_hooks_that_change_values(
    net: Net, images: Tensor, hook: str, module: str, execution: str, tmp_path: Path
) -> None:
    before = net(images)
    HOOKS[hook](net.get_submodule(module))
    assert not torch.allclose(net(images), before)
    checked(net, images, execution, tmp_path)


@pytest.mark.parametrize("module", ["", "conv2", "bn1", "relu"])
def test_hooks_that_record_see_the_network(net: Net, images: Tensor, module: str, tmp_path: Path) -> None:
    seen = []
    net.get_submodule(module).register_forward_hook(lambda m, args, output: seen.append(output.shape[0]))
    recorder = Recorder(Net())
    net.get_submodule(module).register_forward_hook(recorder.method)
    network = checked(net, images, "integer", tmp_path)
    seen.clear()
    recorder.calls.clear()
    network(images[:7])
    assert seen == [7]
    assert [shape[0] for shape in recorder.calls] == [7]


def test_hooks_on_gradients_stay(net: Net, images: Tensor) -> None:
    seen = []
    net.conv2.register_full_backward_hook(lambda module, before, after: seen.append(after[0].shape[0]))
    network = quantize(net, [images], QuantConfig(execution="simulate"), progress=False)
    network(images[:3].requires_grad_()).sum().backward()
    assert seen == [3]


def test_hooks_that_work_on_this_very_object(net: Net, images: Tensor) -> None:
    models = [net]  # which no copy can know of
    net.conv2.register_forward_hook(lambda module, args, output: models[0].features.update(x=output))
    net(images)
    with pytest.raises(
        ValueError, match="hooks or replaced methods that work on this very object: a copy of it comp"
    ):
        quantize(net, [images], progress=False)


def test_hooks_on_all_modules_are_refused(net: Net, images: Tensor) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(ValueError, match="torch has hooks on all modules"):
            quantize(net, [images], progress=False)
    finally:
        handle.remove()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_hooks_that_tell_a_layer_from_a_quantized_one(
    net: Net, images: Tensor, execution: str, tmp_path: Path
) -> None:
    def doubling(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return 2.0 * output if isinstance(module, nn.Conv2d) else None

    def scaling(module: nn.Module, args: Any) -> Any:
        return (args[0] * module.transposed + args[0],)

    def weighing(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + module.weight.mean()

    def writing(module: nn.Module, args: Any, output: Tensor) -> None:
        if type(module) is nn.Conv2d:
            output.mul_(3.0)

    net.conv1.register_forward_hook(doubling)
    net.bn1.register_forward_hook(writing)  # no layer
    net.conv2.register_forward_pre_hook(scaling)
    net.extra = nn.Conv2d(12, 12, 1).eval()
    net.head.register_forward_hook(writing)
    net.extra.register_forward_hook(weighing)
    net.free = nn.Conv2d(5, 5, 1).eval()
    net.forward = types.MethodType(  # type: ignore[method-assign]
        lambda self, x: self.free(self.head(self.extra(self.body(x)))).mean((2, 3)), net
    )
    network = quantize(net, [images], QuantConfig(execution=execution), progress=False)
    fresh = 0.7 * images.flip(3)
    assert sqnr(net, network, fresh) > 15.0
    found = {name: layer.reason for name, layer in layers(network).items() if layer.execution == "float"}
    told = "its hooks tell it from a quantized layer"
    assert all(found[name] == told for name in ("conv1", "conv2", "extra", "head"))
    assert "free" not in found


def test_nothing_but_patched_layers(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 2)).eval()
    net[0].forward = lambda x: F.max_pool2d(x, 3) if x.sum() > 0 else x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"no convolution to quantize \(Sequential\): '0' stays, its forward was"):
        quantize(net, [images], progress=False)


# --- replaced methods -----------------------------------------------------------------------------------------


def circular(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Tile images along their width, as users patch convolutions to do."""
    return F.conv2d(F.pad(x, (2, 0, 2, 0), mode="circular"), weight, bias, conv.stride, 0, conv.dilation, conv.groups)


def absolute(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda x: old(x).abs() * 2.0  # type: ignore[method-assign]


def squared(net: Net) -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        return self.head(self.body(x).square()).mean((2, 3))  # type: ignore[no-any-return]

    net.forward = types.MethodType(forward, net)  # type: ignore[method-assign]


REPLACED: dict[str, Callable[[Net], None]] = {
    "_conv_forward": lambda net: setattr(net.conv2, "_conv_forward", types.MethodType(circular, net.conv2)),
    "forward of a layer": lambda net: absolute(net.conv2),
    "forward of a BatchNorm": lambda net: absolute(net.bn1),
    "forward of an activation": lambda net: absolute(net.relu),
    "forward of the model, a method": squared,
    "forward of the model, a function": absolute,
    "a method": lambda net: setattr(net, "body", lambda x: net.relu(net.conv2(F.relu(net.conv1(x))))),
}


def branching(net: Net) -> None:
    """Let torch.fx fail."""
    old = net.body
    net.body = lambda x: old(x if x.sum() > -1e9 else -x)  # type: ignore[method-assign]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("walk", ["graph", "modules"])
@pytest.mark.parametrize("replaced", REPLACED)
def test_replaced_methods(net: Net, images: Tensor, replaced: str, walk: str, execution: str, tmp_path: Path) -> None:
    REPLACED[replaced](net)
    if walk == "modules":
        branching(net)
    network = checked(net, images, execution, tmp_path)
    untraceable = replaced == "forward of the model, a function"
    assert record_of(network).walked_by == ("modules" if untraceable else walk)
    if walk == "modules" and replaced == "_conv_forward":
        assert layers(network)["conv2"].reason == "its _conv_forward was replaced"


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_method_of_activations_that_was_replaced(
    execution: str, net: Net, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: old(self, x) + x)
    checked(net, images, execution, tmp_path)


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_a_method_of_convolutions_that_was_replaced(
    method: str, net: Net, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = quantize(net, [images], QuantConfig(execution="simulate"), progress=False)
    expected = network(images)
    old = getattr(nn.Conv2d, method)
    monkeypatch.setattr(nn.Conv2d, method, lambda self, *args: 2.0 * old(self, *args))
    assert torch.equal(network(images), expected)  # its layers are no convolutions
    with pytest.raises(ValueError, match=f"no convolution to quantize .*'conv1' stays, Conv2d.{method} was replaced"):
        quantize(net, [images], progress=False)


def test_code_that_is_traced_is_quantized(net: Net, images: Tensor, tmp_path: Path) -> None:
    REPLACED["_conv_forward"](net)
    network = checked(net, images, "integer", tmp_path)
    assert layers(network)["conv2"].execution == "integer"
    assert record_of(network).folded == 2
