"""Models by name: timm's and torchvision's, and everybody's own; weights as people keep them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from ptq4cuda.cli.images import Preprocessing
from ptq4cuda.cli.models import find_model, load_weights, preprocessing_of_timm, preprocessing_of_torchvision


def net(num_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, num_classes))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("own_models")
    module.net, module.zoo, module.three, module.made = net, SimpleNamespace(net=net), 3, net(7)  # type: ignore[attr-defined]
    module.exits = lambda: sys.exit(2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_models", module)
    return module


def test_models_by_import(own: ModuleType) -> None:
    model, preprocessing = find_model("own_models:net", None, False, 5)
    assert not model.training
    assert model[3].out_features == 5
    assert preprocessing == Preprocessing()
    assert find_model("own_models:zoo.net", None, False, None)[0][3].out_features == 3
    assert find_model("own_models:made", None, False, None)[0] is own.made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_models:nett", "own_models has no 'nett'; close to it: net"),
        ("own_models:three", "own_models:three is no callable that returns a model, but int"),
        ("no_such_module:net", "no_such_module cannot be imported"),
        ("no_such_model", "there is no model 'no_such_model'"),
        ("hub/resnet50", "models come from timm or torchvision"),
        (
            "own_models.py:net",
            r"is package\.module:callable, named as in `import package\.module`, got 'own_models\.py:net'",
        ),
        (":net", r"is package\.module:callable"),
        ("./own_models:net", r"is package\.module:callable"),
        ("own_models:exits", r"own_models:exits cannot be called \(SystemExit: 2\)"),
    ],
)
def test_models_that_are_not_there(own: ModuleType, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_model(name, None, False, None)


def test_a_callable_that_fails(own: ModuleType) -> None:
    own.fails = lambda: nn.Conv2d(3, 5, 3, groups=2)  # type: ignore[attr-defined]
    own.text = lambda: "a model"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"own_models:fails cannot be called \(ValueError: in_channels"):
        find_model("own_models:fails", None, False, None)
    with pytest.raises(ValueError, match=r"own_models:text returns no torch\.nn\.Module, but str"):
        find_model("own_models:text", None, False, None)


def timm_with(**models: Any) -> ModuleType:
    def create_model(name: str, pretrained: bool, **given: Any) -> nn.Module:
        model = models[name](**given)
        model.pretrained_cfg = {"input_size": (3, 96, 64), "crop_pct": 0.8, "interpolation": "bicubic"}
        model.was_pretrained = pretrained
        return model

    module = ModuleType("timm")
    module.create_model, module.list_models = create_model, lambda: list(models)  # type: ignore[attr-defined]
    module.is_model = models.__contains__  # type: ignore[attr-defined]
    return module


def test_models_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", timm_with(tiny=net))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    model, preprocessing = find_model("tiny", None, True, 9)
    assert model.was_pretrained
    assert model[3].out_features == 9
    assert (preprocessing.size, preprocessing.resize, preprocessing.interpolation) == ((96, 64), 80, "bicubic")
    with pytest.raises(ValueError, match="tiny would have random weights: give --weights FILE, or --pretrained"):
        find_model("timm/tiny", None, False, None)
    with pytest.raises(ValueError, match=r"'tinny': torchvision cannot be imported.*; close to it: tiny"):
        find_model("tinny", None, True, None)


def test_preprocessing_of_metadata() -> None:
    assert preprocessing_of_timm({}).source == "of timm"
    grey = preprocessing_of_timm({"input_size": (1, 28, 28), "mean": (0.1,), "std": (0.3,), "crop_pct": 1.0})
    assert (grey.size, grey.resize, grey.mean, grey.std) == ((28, 28), 28, (0.1,), (0.3,))
    assert preprocessing_of_timm({"crop_mode": "squash"}).resize == 0
    sizes = {"crop_size": [224], "resize_size": [232], "interpolation": SimpleNamespace(value="bilinear")}
    transforms = SimpleNamespace(**sizes, mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0])
    found = preprocessing_of_torchvision(transforms)
    assert (found.size, found.resize, found.mean) == ((224, 224), 232, (0.1, 0.2, 0.3))
    assert preprocessing_of_torchvision(None) == Preprocessing()


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model."])
def test_weights_as_training_leaves_them(tmp_path: Path, wrapper: str, prefix: str) -> None:
    trained, model = net(), net()
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pt")
    load_weights(model, tmp_path / "weights.pt")
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_safetensors(tmp_path: Path) -> None:
    trained, model = net(), net()
    state = {name: value for name, value in trained.state_dict().items() if "num_batches" not in name}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    load_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model[0].weight, trained[0].weight)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for content, message in (
        (net(4).state_dict(), r"3\.weight is \[4, 4\] in the file, \[3, 4\] in the model"),
        ({"0.weight": torch.zeros(4, 3, 3, 3)}, r"the file lacks 0\.bias, 1\.weight, 1\.bias and 4 more"),
        ({**net().state_dict(), "head": torch.zeros(1)}, "the model lacks head"),
        ({"epoch": 3}, "holds no state_dict"),
        (net(), "holds more than tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_weights(net(), path)
    for garbage in (b"", b"nothing", b"\xff\xd8\xff\xe0"):
        path.write_bytes(garbage)
        with pytest.raises(ValueError, match=r"weights\.pt' cannot be read as weights: it is no file of torch\.save"):
            load_weights(net(), path)
    torch.jit.trace(net().eval(), torch.zeros(1, 3, 3, 3)).save(path)
    with pytest.raises(ValueError, match=r"weights\.pt' is a TorchScript archive: save model\.state_dict\(\)"):
        load_weights(net(), path)
    with pytest.raises(ValueError, match="there is no file"):
        load_weights(net(), tmp_path / "nowhere.pt")
    quantized = path.rename(tmp_path / "net.ptq4")
    with pytest.raises(ValueError, match=r"net\.ptq4' is a quantized network: --weights takes those of the float"):
        load_weights(net(), quantized)
