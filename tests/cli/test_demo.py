"""The demo and the command line, as a person runs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ptq4cuda
from ptq4cuda import demo
from ptq4cuda.cli import main
from ptq4cuda.metrics import Comparison


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


Command = Callable[..., Result]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return the command line, called in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["ptq4cuda", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_demo(tmp_path: Path) -> None:
    texts: list[str] = []
    rows = demo.run(tmp_path / "digits.ptq4", tmp_path / "plot.png", echo=texts.append, progress=False)
    by_name = {row.name: row for row in rows}
    assert list(by_name) == list(demo.CONFIGS)
    assert rows[0].result.float_top1 > 97
    for setting in ("W4A8", "W4A4"):  # at W8A4 the two are equally good on digits
        assert by_name[f"{setting} paper"].result.sqnr > by_name[f"{setting} naive"].result.sqnr
    assert by_name["W4A4 paper"].result.agreement > 97
    assert by_name["W4A4 default"].result.sqnr > by_name["W4A4 paper"].result.sqnr - 0.5
    assert by_name["W4A4 paper"].bytes < by_name["W8A4 paper"].bytes
    text = "\n".join(texts)
    header = next(line.split() for line in text.splitlines() if "SQNR" in line)
    assert header[:2] == ["SQNR", "dB"]
    assert "same outputs, bit for bit" in text
    assert "float32" in text
    assert (tmp_path / "digits.ptq4").stat().st_size == by_name["W4A4 default"].bytes
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("percent", "images", "margin"), [(50.0, 100, 9.6), (98.5, 597, 1.0), (100.0, 597, 0.32)])
def test_margin(percent: float, images: int, margin: float) -> None:
    assert demo.margin(percent, images) == pytest.approx(margin, abs=0.05)


def test_axes_begin_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(demo, "write_figure", lambda path, figure: figures.append(figure))
    result = Comparison(597, 98.5, 98.3, 99.2, 20.0)
    demo.draw([demo.Row(name, result, 1, 1.0) for name in demo.CONFIGS], tmp_path / "plot.png")
    first, second = figures[0].axes
    assert "SQNR" in first.get_ylabel() and "597 images" in second.get_ylabel()
    assert first.get_ylim()[0] == second.get_ylim()[0] == 0.0


def test_version(command: Command) -> None:
    assert command("--version").stdout == f"ptq4cuda {ptq4cuda.__version__}\n"
    assert "--version" in command("--help").stdout


def test_help_names_the_commands(command: Command) -> None:
    result = command("--help")
    assert result.code == 0
    for name in ("demo", "info"):
        assert name in result.stdout
    assert "--plot" in command("demo", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --file nowhere/net.ptq4", "/nowhere' to save 'net.ptq4' in"),
        ("demo --plot nowhere/plot.png", "/nowhere' to save 'plot.png' in"),
        ("bench --json nowhere/bench.json", "/nowhere' to save 'bench.json' in"),
        ("bench --device tpu", "--device must be cpu or cuda, got 'tpu'"),
        ("bench --device cpu --only nonsense", "there is no case of 'nonsense': the operators are"),
        ("bench-models --device tpu", "--device must be cpu or cuda"),
        ("bench-models --model alexnet", "there is no architecture alexnet; there are resnet18"),
        ("bench-models --batch 0", "Invalid value for '--batch'"),
        ("bench-models --repeats 0", "Invalid value for '--repeats'"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(command: Command, arguments: str, message: str) -> None:
    result = command(*arguments.split())
    assert result.code != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_info_as_a_module(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ptq4cuda", "info"],
        cwd=tmp_path,  # not the repository, whose folder ptq4cuda has no libraries
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for line in ("ptq4cuda", "torch", "CPU library", "SIMD level", "CUDA library", "CUDA architectures"):
        assert any(text.startswith(line) for text in result.stdout.splitlines()), line
    assert "RuntimeWarning" not in result.stderr


@pytest.mark.parametrize(("arguments", "code", "message"), [(["info"], 0, "torch"), (["demo"], 2, "ptq4cuda[cli]")])
def test_without_the_extra_cli(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    script = "import sys; sys.modules['typer'] = None; from ptq4cuda.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == code
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_demo_without_scikit_learn(tmp_path: Path) -> None:
    script = "import sys; sys.modules['sklearn'] = None; from ptq4cuda.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script, "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "ptq4cuda[demo]" in result.stderr
    assert "Traceback" not in result.stderr
