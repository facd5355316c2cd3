"""What a quantized network has beside its forward: the names, attributes and methods of its model."""

from __future__ import annotations

import copy
import gc
import io
import linecache
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, QuantConv2d, quantize
from ptq4cuda.artifact.record import record_of

CONFIG = QuantConfig.naive(8, 8, fold_activation_scale=True)


class Classifier(nn.Module):
    """Offers what models offer."""

    stride = 4
    kind = "classifier"

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn, self.body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head, self.softmax = nn.Linear(8, 3), nn.Softmax(-1)
        self.register_buffer("shift", torch.tensor([[0.5], [0.25], [0.125]])[:, :, None])
        self.names, self.code, self.calls = ["cat", "dog", "owl"], "ResNet", 0
        self.layers = [self.stem, self.body]
        if not branches:  # pickle refuses models with such attributes
            self.embed = lambda x: self.body(self.stem(x))
        self.branches = branches
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() < -1e9:
            x = -x
        return self.head(F.relu(self.body(F.relu(self.bn(self.stem(x - self.shift))))).mean((2, 3)))

    def predict(self, x: Tensor) -> list[str]:
        self.calls += 1
        return [self.label(i) for i in self.probabilities(x).argmax(1).tolist()]

    def probabilities(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.softmax(self.eval()(x))

    def label(self, i: int) -> str:
        return f"{self.code}: {self.names[i]}"

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.stem(x - self.shift)))

    def normalized(self, x: Tensor) -> Tensor:
        return x - self.shift

    def each(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def width(self) -> int:
        return self.stem.out_channels

    @staticmethod
    def tops(y: Tensor) -> Tensor:
        return y.argmax(1)

    @classmethod
    def small(cls) -> str:
        return cls.__name__


class Sub(Classifier):
    def label(self, i: int) -> str:
        return super().label(i).upper()


def copies(network: nn.Module, model: nn.Module, folder: Path) -> dict[str, nn.Module]:
    """Return a network and what is made of it."""
    held = io.BytesIO()
    torch.save(network, held)
    held.seek(0)
    ptq4cuda.save(network, folder / "net.ptq4")
    return {
        "itself": network,
        "copy": copy.deepcopy(network),
        "pickled": torch.load(held, weights_only=False),
        "loaded": ptq4cuda.load(folder / "net.ptq4", model),
    }


@pytest.mark.parametrize("execution", ["integer", "simulate"])
@pytest.mark.parametrize("kind", [Classifier, Sub])
def test_attributes_and_methods(images: Tensor, kind: type[Classifier], execution: str, tmp_path: Path) -> None:
    model = kind()
    quantized = quantize(model, [images], QuantConfig.fast(execution=execution), progress=False)
    for name, network in copies(quantized, model, tmp_path).items():
        y = network(images)
        assert torch.equal(y, quantized(images)), name
        assert record_of(network).walked_by == "graph"
        assert str(ptq4cuda.report(network)).split("total")[0] == str(ptq4cuda.report(quantized)).split("total")[0]
        assert (network.names, network.stride, network.kind) == (["cat", "dog", "owl"], 4, "classifier")
        assert (network.classes, network.small()) == (3, kind.__name__)
        assert torch.equal(network.tops(y), y.argmax(1))
        assert torch.equal(network.probabilities(images), torch.softmax(y, -1))
        assert network.predict(images) == [model.label(i) for i in y.argmax(1)]
        assert network.calls == 1
        assert torch.equal(network.normalized(images), images - model.shift)
        network.names = ["a", "b", "c"]
        assert network.predict(images)[0].lower().startswith("resnet: ")
        assert network.predict(images)[0][-1].lower() in "abc"
        assert network.calls == 3
    assert (model.names, model.calls) == (["cat", "dog", "owl"], 0)


def test_what_needs_float_layers_says_so(images: Tensor) -> None:
    network = quantize(Classifier(), [images], QuantConfig.fast(), progress=False)
    assert hasattr(network, "features")
    with pytest.raises(AttributeError, match=r"a method of Classifier reads '(stem|bn)', .* BatchNorm is folded"):
        network.features(images)
    with pytest.raises(AttributeError, match="a method of Classifier reads layers and parameters"):
        network.each(images)
    with pytest.raises(AttributeError, match="a method of Classifier reads 'stem'"):
        _ = network.width
    for name in ("layers", "embed"):
        with pytest.raises(AttributeError, match=f"'{name}' of the model holds float layers"):
            getattr(network, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = network.nonsense


def test_a_network_walked_by_its_modules_keeps_everything(images: Tensor, tmp_path: Path) -> None:
    model = Classifier(branches=True)
    quantized = quantize(model, [images], CONFIG, progress=False)
    for network in copies(quantized, model, tmp_path).values():
        assert record_of(network).walked_by == "modules"
        assert isinstance(network.stem, QuantConv2d)
        assert network.code == "ResNet"
        assert torch.equal(network.features(images), F.relu(network.bn(network.stem(images - model.shift))))
        assert network.predict(images) == [model.label(i) for i in network(images).argmax(1)]


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_train_leaves_it_in_evaluation(images: Tensor, tmp_path: Path, branches: bool, mode: bool) -> None:
    model = Classifier(branches)
    quantized = quantize(model, [images], CONFIG, progress=False)
    for name, network in copies(quantized, model, tmp_path).items():
        if mode:
            with pytest.warns(UserWarning, match="stays in evaluation mode") as caught:
                assert network.train() is network
            assert caught[0].filename == __file__
        else:
            assert network.eval() is network
        assert not any(module.training for module in network.modules()), name
        assert torch.equal(network(images), quantized(images))


# --- names ----------------------------------------------------------------------------------------------------

NAMES = [
    "meta",
    "graph",
    "code",
    "names",
    "module",
    "recompile",
    "_graph",
    "add_submodule",
    "print_readable",
    "_code",
]


class Named(nn.Module):
    """Has a part of some name, of some kind."""

    def __init__(self, name: str, form: str, branches: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.name, self.branches = nn.Conv2d(3, 8, 3), name, branches
        parts: dict[str, Any] = {
            "layer": nn.Conv2d(8, 8, 3),
            "block": nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            "function": nn.ReLU(),
            "weight": nn.Parameter(0.1 * torch.randn(8, 8, 3, 3)),
            "constant": nn.Parameter(torch.rand(8, 1, 1)),
            "attribute": torch.rand(8, 1, 1),
        }
        self.form = form
        if form == "buffer":
            self.register_buffer(name, torch.rand(8, 1, 1))
        else:
            setattr(self, name, parts[form])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() < -1e9:
            x = -x
        x, part = self.conv(x), getattr(self, self.name)
        if self.form == "weight":
            return F.conv2d(x, part)
        return part(x) if isinstance(part, nn.Module) else x + part


FORMS = ["layer", "block", "function", "weight", "constant", "attribute", "buffer"]


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_parts_may_have_any_name(images: Tensor, form: str, branches: bool, tmp_path: Path) -> None:
    for name in NAMES:
        model = Named(name, form, branches)
        for execution in ("integer", "simulate"):
            config = QuantConfig.naive(8, 8, fold_activation_scale=True, execution=execution)
            network = quantize(model, [images], config, progress=False)
            record = record_of(network)
            assert record.walked_by == ("modules" if branches else "graph"), record.reason
            assert record.sqnr > 30
            if not branches:
                assert network.meta["ptq4cuda"] is record
            ptq4cuda.save(network, tmp_path / "net.ptq4")
            loaded = ptq4cuda.load(tmp_path / "net.ptq4", model)
            assert torch.equal(loaded(images), network(images))
            assert torch.equal(copy.deepcopy(network)(images), network(images))
            assert record_of(copy.deepcopy(network)).layers == record.layers


class Sums(nn.Module):
    """Has the names that ptq4cuda gives to what it adds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.add_residual, self.x_codes = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(3, 3, 1),
        )
        self.ptq4cuda_meta = {"a": 1}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.x_codes(x + self.conv(self.add_residual(x)))


@pytest.mark.parametrize("execution", ["integer", "simulate"])
def test_names_of_what_is_added(images: Tensor, execution: str, tmp_path: Path) -> None:
    model = Sums()
    config = QuantConfig.naive(8, 8, fold_activation_scale=True, execution=execution)
    network = quantize(model, [images], config, progress=False)
    assert record_of(network).sqnr > 30
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    assert torch.equal(ptq4cuda.load(tmp_path / "net.ptq4", model)(images), network(images))


def test_a_plain_attribute_of_the_name_of_the_record(images: Tensor) -> None:
    for value in ({"size": 12}, "a text", nn.ReLU().eval()):
        for branches in (False, True):
            model = Classifier(branches)
            model.meta = value
            network = quantize(model, [images], CONFIG, progress=False)
            assert record_of(network).layers
            assert "ptq4cuda" not in str(model.meta)
            if branches and isinstance(value, str):
                assert network.meta == value


def test_the_code_of_a_network_goes_with_it(images: Tensor, tmp_path: Path) -> None:
    """A process that loads one network after the other does not keep what torch.fx wrote for each."""

    def written() -> set[str]:
        return {name for name in linecache.cache if name.startswith("<eval_with_key>")}

    gc.collect()
    before, model = written(), Classifier()
    network = quantize(model, [images], CONFIG, progress=False)
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    loaded = ptq4cuda.load(tmp_path / "net.ptq4", model)
    code = type(loaded).forward.__code__.co_filename
    assert any("return" in line for line in linecache.getlines(code))  # as tracebacks show it
    copied = copy.deepcopy(loaded)
    del network, loaded
    gc.collect()
    assert code not in written()
    assert linecache.getlines(type(copied).forward.__code__.co_filename)
    del copied
    gc.collect()
    assert written() <= before


class Unread(nn.Sequential):
    """Has tensors that its forward does not read; `graph` is a name that torch.fx uses itself."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("mean", torch.arange(3.0))
        self.register_buffer("graph", torch.ones(1))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("missing", None)

    def normalized(self, x: Tensor) -> Tensor:
        return self(x - self.mean[:, None, None])


def test_tensors_that_its_forward_does_not_read(images: Tensor, tmp_path: Path) -> None:
    images, model = images[:8], Unread().eval()
    network = quantize(model, [images], CONFIG, progress=False)
    ptq4cuda.save(network, tmp_path / "network")
    model.mean += 1  # of the network loaded: that of the file
    loaded = ptq4cuda.load(tmp_path / "network", model)
    for own in (network, loaded, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(own.normalized(images), network(images - torch.arange(3.0)[:, None, None]))
        assert {name for name in own.state_dict() if name in ("scale", "mean", "graph_", "passing")} == {
            "scale",
            "mean",
            "graph_",
        }
        assert own.passing.tolist() == [1, 1] and own.missing is None and isinstance(own.scale, nn.Parameter)
    assert network.to(torch.float16).mean.dtype is torch.float16
