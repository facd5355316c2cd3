"""benchmarks/peers.py: contenders are processes that are asked what they execute; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers
import pytest


def test_a_case_from_its_files_to_the_table(tmp_path: Path) -> None:
    """With ours alone: the other runtimes are an extra."""
    figures = tmp_path / "peers.json"
    figures.write_text(json.dumps({"resnet18@224x1": {"machine": "another", "rows": {}}}))
    options = ["--starts", "1", "--rounds", "1", "--turn", "0", "--threads", "1", "--folder", tmp_path / "files"]
    command = [sys.executable, peers.__file__, "shufflenet@32x2", "--only", "ours", "--busy", *options]
    run = subprocess.run([*command, "--json", figures], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    stored = json.loads(figures.read_text())
    assert stored.keys() == {"resnet18@224x1", "shufflenet@32x2"}  # what was not measured anew stays
    row = stored["shufflenet@32x2"]["rows"]["ours"]
    assert row["integer"]
    assert "layers: 16 integer" in row["executes"]
    assert row["sqnr"] > 15.0
    assert all(row[key] > 0 for key in ("ms", "cpu_ms", "busy_ms", "busy_cpu_ms", "start", "rss"))
    assert "1 threads" in stored["shufflenet@32x2"]["machine"]
    assert f"| shufflenet | 32x2 | {row['ms']:.3g} | – |" in run.stdout


def test_a_contender_that_does_not_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("it ended with status 1")

    monkeypatch.setattr(peers, "Child", refuse)
    arguments = peers.argparse.Namespace(threads=1, rounds=2, turn=0.0, starts=1, busy=False)
    with open(tmp_path / "log", "w") as log:
        assert peers.measure(peers.Case("resnet18@32x1", tmp_path), ["ours"], arguments, log)["rows"] == {}


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "nncf" else 1)
    assert peers.OPENVINO.missing == ["nncf"]
    assert peers.OURS.missing == []


def test_cases() -> None:
    assert peers.chosen_cases([]) == list(peers.CASES)
    assert peers.chosen_cases(["mobilenet_v2@32", "resnet18"]) == [
        *("mobilenet_v2@32x1", "resnet18@224x1", "resnet18@224x8"),
    ]
    assert peers.chosen_cases(["densenet@64x3"]) == ["densenet@64x3"]
    assert peers.Case("densenet@64x3", Path()).parts == ("densenet", 64, 3)
    for word in ("resnet", "alexnet@224x1", "resnet18@0x1", "resnet18@224x"):
        with pytest.raises(SystemExit, match=f"'{word}' is no case: take one of resnet18@224x1"):
            peers.chosen_cases([word])


def test_tables_show_who_is_ahead_and_what_was_executed() -> None:
    def row(ms: float, **more: Any) -> dict[str, Any]:
        given = {
            "ms": ms,
            "cpu_ms": 2 * ms,
            "start": 1.25,
            "rss": 3e8,
            "sqnr": 20.0,
            "executes": "u8",
            "integer": True,
        }
        return {**given, "rounds_ms": [ms, 1.1 * ms, 0.9 * ms], **more}

    rows = {
        "ours": row(5.0, busy_ms=10.0, busy_cpu_ms=15.0),
        "openvino": row(7.5),
        "onnxruntime": row(4.0, integer=False, executes="53 Conv"),
        "eager": row(20.0, integer=False),
    }
    text = peers.tables({"resnet18@224x8": {"machine": "a machine", "others": 0.25, "rows": rows}})
    lines = text.splitlines()
    assert "| resnet18 | 224x8 | 5 | 7.5 | 4 | 20 | 0.80 |" in lines
    assert "| resnet18 | 224x8 | 2.00 (1.50) | – | – | – |" in lines
    assert "| resnet18 | 224x8 | 300, 1.2 s | 300, 1.2 s | 300, 1.2 s | 300, 1.2 s |" in lines
    assert "- resnet18@224x8, onnxruntime int8: 53 Conv; 20.0 dB; NOT ALL IN INTEGERS" in lines
    assert "- resnet18@224x8, float32: u8; 20.0 dB" in lines
    assert "Not quiet: other work took a share of the cores meanwhile (resnet18@224x8 25%)." in lines


def test_the_ratio_is_that_of_rounds() -> None:
    """A slow minute counts for both."""
    ours, theirs = {"ms": 3.0, "rounds_ms": [1.0, 3.0, 9.0]}, {"ms": 6.0, "rounds_ms": [2.0, 4.5, 18.0]}
    assert peers.ratio_to_int8({"ours": ours, "openvino": theirs}) == 2.0
    assert peers.ratio_to_int8({"ours": ours, "eager": theirs}) is None
