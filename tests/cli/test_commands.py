"""The commands for models of one's own, from a folder of images to a file and back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import ptq4cuda
from ptq4cuda.cli.app import app
from ptq4cuda.cli.images import Folder, Preprocessing
from ptq4cuda.cli.layers import compare_layers
from ptq4cuda.metrics import compare


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    ).eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two classes, and a module with a model."""
    module = ModuleType("small_model")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "small_model", module)
    generator = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / ("ape", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def quantized(folder: Path, *arguments: object) -> Path:
    file = folder / "net.ptq4"
    calibration = ("--calibration", folder / "images", "--size", 16, "--batch", 5)
    result = run("quantize", "small_model:build", *calibration, "-o", file, *arguments)
    assert result.exit_code == 0, result.output
    assert "centre 16 x 16" in result.output
    assert f"{folder / 'images'}: 12 images, 2 classes" in result.output
    assert "3 of 3 layers quantized" in result.output
    assert ("preset: default" in result.output) is ("--preset" not in arguments)
    assert f"Wrote {file}: {file.stat().st_size:,} bytes." in result.output
    return file


def read(folder: Path, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What the commands read."""
    return Folder.read(folder / "images").batches(Preprocessing((16, 16), 18), batch, torch.device("cpu"), "read")


def test_the_file_is_that_of_quantize(folder: Path) -> None:
    file = quantized(folder, "--preset", "fast", "--set", "first_last_bits=6")
    config = ptq4cuda.QuantConfig.fast(first_last_bits=6)
    expected = ptq4cuda.quantize(build(), (x for x, _ in read(folder, 5)), config, progress=False)
    ptq4cuda.save(expected, folder / "expected.ptq4")
    assert file.read_bytes() == (folder / "expected.ptq4").read_bytes()


def test_evaluate(folder: Path) -> None:
    file = quantized(folder)
    result = run("evaluate", "small_model:build", file, folder / "images", "--size", 16)
    assert result.exit_code == 0, result.output
    row = next(line.split() for line in result.output.splitlines() if line.startswith("net.ptq4"))
    found = compare(build(), ptq4cuda.load(file, build()), read(folder, 32))
    assert row[1:] == [f"{found.top1:.2f}", f"{found.agreement:.2f}", f"{found.sqnr:.1f}"]


def test_compare_names_each_layer(folder: Path) -> None:
    file = quantized(folder)
    result = run("compare", "small_model:build", file, folder / "images", "--size", 16)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0] in ("0", "3", "7", "output")}
    assert rows.keys() == {"0", "3", "7", "output"}
    for row in rows.values():  # the same images as in calibration
        assert float(row[-1]) == pytest.approx(float(row[-2]), abs=0.11), row


def test_compare_sees_what_is_wrong(folder: Path) -> None:
    """Other weights than those that were quantized: no layer is as when it was calibrated."""
    file = quantized(folder)
    images = [
        x for x, _ in Folder.read(folder / "images").batches(Preprocessing((16, 16), 18), 4, torch.device("cpu"), "")
    ]
    other = build()
    with torch.no_grad():
        other[3].weight.neg_()
    rows = {row.name: row for row in compare_layers(other, file, images)}
    assert rows["0"].sqnr == pytest.approx(rows["0"].calibrated, abs=0.2)
    assert rows["3"].sqnr < 0.0 < 15.0 < rows["3"].calibrated


@pytest.mark.parametrize("by_file", [False, True])
def test_benchmark(folder: Path, by_file: bool) -> None:
    file = [quantized(folder)] if by_file else []
    arguments = ("--size", 16, "--batches", "1,3", "--threads", 1, "--seconds", 0, "--json", folder / "times.json")
    result = run("benchmark", "small_model:build", *file, *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "times.json").read_text())
    ways = [(row["batch"], row["way"]) for row in found["rows"]]
    assert ways == [(batch, way) for batch in (1, 3) for way in ("float", "simulate", "integer")]
    assert f"{found['machine']}, medians" in result.output
    assert ("Quantized by QuantConfig.fast() on the example." in result.output) == (not by_file)


def test_benchmark_takes_numbers_of_images(folder: Path) -> None:
    for batches in ("1,x", "0", ""):
        result = run("benchmark", "small_model:build", "--batches", batches)
        assert result.exit_code == 2
        assert f"--batches must be numbers of images, as 1,8, got {batches!r}" in result.stderr


def test_export(folder: Path) -> None:
    file = quantized(folder)
    result = run("export", "small_model:build", file, "-o", folder / "net.onnx", "--size", 16)
    assert result.exit_code == 0, result.output
    network = ptq4cuda.load(file, build())
    summary = ptq4cuda.export_onnx(network, folder / "expected.onnx", torch.zeros(1, 3, 16, 16))
    assert str(summary) in result.output
    assert (folder / "net.onnx").read_bytes() == (folder / "expected.onnx").read_bytes()


def test_inspect_and_report(folder: Path) -> None:
    file = quantized(folder, "--set", "overrides={'3': {'weight_bits': 6}}")
    text = run("inspect", file).output
    parts = ("format 4", "overrides={'3': {'weight_bits': 6}}", "12 samples, walked by graph", "2 Conv2d, 1 Linear")
    for part in parts:
        assert part in text, text
    result = run("report", file, "-o", folder / "report.json", "-o", folder / "report.html")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert next(line for line in lines if line[:1] == ["3"])[2] == "6"
    layers = json.loads((folder / "report.json").read_text())["layers"]
    assert [layer["name"] for layer in layers] == ["0", "3", "7"]
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert run("report", file, "-o", folder / "report.txt").exit_code == 2


def test_quantize_until_the_users_images_are_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The top-1 on labelled images decides, as with quantize(evaluate=...); they are read once."""
    once, images = Preprocessing.pixels, []
    monkeypatch.setattr(Preprocessing, "pixels", lambda self, path: images.append(path) or once(self, path))

    def top1(network: nn.Module) -> float:
        return 100.0 * sum(int((network(x).argmax(1) == y).sum()) for x, y in read(folder, 5)) / 12

    arguments = ("--preset", "naive", "--set", "weight_bits=2", "--set", "activation_bits=2")
    file = quantized(folder, *arguments, "--evaluate", folder / "images", "--max-drop", 8)
    assert len(images) == 2 * 12  # of calibration, and of the measure
    config = ptq4cuda.QuantConfig.naive(weight_bits=2, activation_bits=2)
    batches = (x for x, _ in read(folder, 5))
    expected = ptq4cuda.quantize(build(), batches, config, evaluate=top1, max_drop=8.0, progress=False)
    ptq4cuda.save(expected, folder / "expected.ptq4")
    assert file.read_bytes() == (folder / "expected.ptq4").read_bytes()
    record = ptq4cuda.report(ptq4cuda.load(file, build())).record
    assert (record.float_value, record.max_drop) == (top1(build()), 8.0)


def test_completion(folder: Path) -> None:
    """What a shell asks for: commands, and the values of an option."""
    for words, wanted in (("ptq4cuda qu", "quantize"), ("ptq4cuda quantize --preset w", "w4a8")):
        asked = {"_PTQ4CUDA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        result = CliRunner().invoke(app, [], env=asked, prog_name="ptq4cuda")
        assert wanted in result.output.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("quantize small_model:build --calibration nowhere -o net.ptq4", "there is no folder 'nowhere'"),
        (
            "quantize small_model:build --calibration images -o nowhere/net.ptq4",
            "/nowhere' to save 'net.ptq4' in",
        ),
        (
            "quantize_images --preset best",
            "--preset must be one of default, fast",
        ),
        ("quantize_images --set weight_bit=4", "got 'weight_bit=4'; close to it: weight_bits"),
        ("quantize_images --set 4", "--set takes FIELD=VALUE, got '4'; those of QuantConfig are act"),
        (
            "quantize_images --set weight_bits=9",
            "weight_bits must be an int from 1",
        ),
        ("quantize_images --max-drop 1", "--max-drop is how much of the top-1 on --evaluate may be lost"),
        ("quantize_images --evaluate images/ape", "has images that are in no folder of a class"),
        ("quantize_images --evaluate many --size 16", "the images are of 3 classes or more, the network has 2"),
        ("quantize_images -o images", "ptq4cuda: 'images' cannot be written: it is a folder"),
        ("quantize_images --size 12,12", "--size must be pixels"),
        ("quantize_images --mean a", "--mean must be numbers"),
        ("quantize_images --weights w.pt", "there is no file 'w.pt'"),
        ("export small_model:build net.ptq4 -o x", "a network is exported as .onnx, got 'x'"),
        ("quantize_images --device tpu", "--device must be cpu or cuda"),
        ("evaluate small_model:build none.ptq4 images", "there is no file 'none.ptq4'"),
        ("inspect none.ptq4", "there is no file 'none.ptq4'"),
        ("report images", "is a folder or a device, not a file"),
    ],
)
def test_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str) -> None:
    monkeypatch.chdir(folder)
    for name in ("0", "2"):
        (folder / "many" / name).mkdir(parents=True)
        (folder / "many" / name / "a.png").write_bytes((folder / "images" / "ape" / "0.png").read_bytes())
    mine = "quantize small_model:build --calibration images -o x"
    result = run(*arguments.replace("quantize_images", mine).split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "x").exists()


def test_weights_of_16_bits_are_taken_as_32(folder: Path) -> None:
    sys.modules["small_model"].half = lambda: build().half()  # type: ignore[attr-defined]
    options = ("--calibration", folder / "images", "--size", 16, "--preset", "fast")
    result = run("quantize", "small_model:half", *options, "-o", folder / "net.ptq4")
    assert result.exit_code == 0, result.output
    assert "model: small_model:half, 842 parameters (float16, taken as float32), on cpu" in result.output
    result = run("evaluate", "small_model:half", folder / "net.ptq4", folder / "images", "--size", 16)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_images_that_the_model_fails_on(folder: Path, command: str) -> None:
    grey = ("--mean", 0.5, "--std", 0.5)
    file = quantized(folder, "--preset", "fast")
    result = run(command, "small_model:build", file, folder / "images", "--size", 16, *grey)
    assert result.exit_code == 2
    assert re.fullmatch(r"ptq4cuda: the float model fails on a batch \[12, 1, 16, 16\] .*\n", result.stderr)


def test_what_is_no_classifier_has_no_top1() -> None:
    net, x = nn.Conv2d(3, 2, 1), torch.zeros(4, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"^the float model is no classifier, .*: it returns a tensor \[4, 2, 8, 8\]$"
    ):
        compare(net, net, [(x, torch.zeros(4, dtype=torch.int64))])


def test_an_interrupted_quantize_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ptq4cuda, "quantize", interrupted)
    result = run(
        "quantize", "small_model:build", "--calibration", folder / "images", "-o", folder / "x", "--size", 16
    )
    assert (result.exit_code, result.stderr) == (130, "\nptq4cuda: interrupted\n")
    assert not (folder / "x").exists()


def heed_interrupts() -> None:
    """Let a process start as from a terminal; in the background shells let it ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("module", "returncode"), [("ptq4cuda", 130), ("another", 1)])
def test_an_interrupt_while_torch_is_imported(tmp_path: Path, module: str, returncode: int) -> None:
    """A command says so in a line; a program that imports the package gets KeyboardInterrupt, as of any other."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    (tmp_path / "another.py").write_text(
        "try:\n    import ptq4cuda\nexcept KeyboardInterrupt:\n    raise SystemExit(1)"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(ptq4cuda.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-m", module, "info"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        preexec_fn=heed_interrupts,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (returncode, "")
    assert run.stderr == ("\nptq4cuda: interrupted\n" if returncode == 130 else "")


def test_an_image_that_does_not_fit_into_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise MemoryError  # as pillow does, without a word

    monkeypatch.setattr(Preprocessing, "pixels", full)
    result = run("quantize", "small_model:build", "--calibration", folder / "images", "-o", folder / "x")
    assert (result.exit_code, result.stderr) == (2, "ptq4cuda: out of memory\n")
