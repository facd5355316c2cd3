"""What the benchmarks of networks say beside times and accuracy."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import accuracy
import pytest
import torch
from PIL import Image
from torch import nn

from ptq4cuda import _native
from ptq4cuda.bench import architectures, models


@torch.no_grad()
def test_peak_of_activations() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    assert models.peak_bytes(net, torch.zeros(2, 3, 4, 4)) == 2 * (
        2 * 8 * 16 * 4
    )  # of the ReLU; flattening is a view
    assert models.peak_bytes(nn.ReLU(inplace=True), torch.zeros(2, 3)) == 0


def test_models_and_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    narrow = partial(architectures.build_mobilenet_v2, width=0.5)
    monkeypatch.setitem(architectures.ARCHITECTURES, "mobilenet_v2", narrow)
    texts: list[str] = []
    models.run(
        "cpu",
        models=["mobilenet_v2"],
        batches=[1],
        size=64,
        repeats=1,
        layers=True,
        half=False,
        compiled=False,
        json_file=tmp_path / "models.json",
        echo=texts.append,
        progress=False,
    )
    figures = json.loads((tmp_path / "models.json").read_text())
    float32, ours = figures["models"]
    assert (float32["way"], float32["runs_as"], float32["over_best"]) == ("float32", "float", None)
    assert (ours["way"], ours["runs_as"]) == (models.OURS, "integer")
    assert ours["over_best"] == ours["over_float32"] == pytest.approx(float32["ms"] / ours["ms"])
    assert ours["peak_bytes"] < float32["peak_bytes"] / 3
    assert float32["held_bytes"] / 4 < ours["held_bytes"] < float32["held_bytes"] / 2
    first, second, *_ = layers = figures["layers"]
    assert len(layers) == 53
    sums = "8-bit codes" if _native.narrow_sums else "32-bit sums"
    assert (first["inputs"], first["kernel"]) == ([1, 3, 64, 64], f"3x3/2, {sums}")
    assert second["kernel"] == "3x3, depthwise"
    assert any("2 outputs" in layer["kernel"] for layer in layers)
    lost = "is faster in 1 of 1 cases" if ours["over_best"] < 1 else "is faster in 0 of 1 cases"
    assert any(lost in text for text in texts)


def test_figures_are_written_network_by_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = partial(architectures.build_mobilenet_v2, width=0.25)
    monkeypatch.setitem(architectures.ARCHITECTURES, "mobilenet_v2", build)
    monkeypatch.setitem(architectures.ARCHITECTURES, "resnet18", lambda: 1 / 0)
    options = {"batches": [1], "size": 32, "repeats": 1, "half": False, "compiled": False, "progress": False}
    with pytest.raises(ZeroDivisionError):
        models.run(
            "cpu",
            models=["mobilenet_v2", "resnet18"],
            json_file=tmp_path / "models.json",
            echo=lambda text: None,
            **options,  # type: ignore[arg-type]
        )
    assert {row["model"] for row in json.loads((tmp_path / "models.json").read_text())["models"]} == {"mobilenet_v2"}


@pytest.mark.parametrize(
    ("half", "ways"),
    [
        (None, ["float32", "float32 compiled"]),
        (torch.bfloat16, ["float32", "bfloat16", "float32 compiled", "bfloat16 compiled"]),
        (torch.float16, ["float32", "float16", "float16 compiled"]),  # of a GPU
    ],
)
def test_what_is_compiled(half: torch.dtype | None, ways: list[str]) -> None:
    net = nn.Conv2d(1, 1, 1)
    assert list(models.variants(net, net, half, compiled=True)) == [*ways, models.OURS]


def test_an_architecture_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="there is no architecture resnet51; there are resnet18, resnet50"):
        models.run("cpu", models=["resnet51"], progress=False)


def test_no_method_is_measured_twice() -> None:
    methods = [*accuracy.paper(8), *accuracy.ladder(8)]
    assert len({(method.setting, method.name) for method in methods}) == len(methods)
    configs = [method.config for method in methods if method.setting != "ladder"]
    assert all(configs.count(config) == 1 for config in configs)


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model.py").write_text("from torch import nn\ndef net(): return nn.Conv2d(3, 4, 3)\n")
    for i in range(8):
        Image.new("RGB", (40, 30 + i)).save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    subject = accuracy.own_subject("own_model:net", tmp_path, 16)
    assert not subject.model.training
    assert subject.calibration.shape == (6, 3, 16, 16)
    for source in ("own_model", "own_model:other", "nowhere:net", ":net"):
        with pytest.raises(SystemExit, match=f"--model '{source}' does not name a module"):
            accuracy.own_subject(source, tmp_path, 16)
