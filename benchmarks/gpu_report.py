"""Makes a page of what benchmarks/gpu_check.sh found: python benchmarks/gpu_report.py RESULT.JSON ...

A page is written beside its file, as RESULT.md. Whatever stage is missing or broken, the page shows the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def page(record: Mapping[str, Any]) -> str:
    """Return the page of a result.json, Markdown."""
    stages: Mapping[str, Mapping[str, Any]] = record.get("stages", {})
    figures = {name: stage.get("figures") or {} for name, stage in stages.items()}
    machine = record.get("machine", {})
    gpu, device = machine.get("gpu", {}), figures.get("device", {})
    lines = [f"# {device.get('name') or gpu.get('name', 'No GPU')}", ""]
    lines += [
        f"- {key}: {record[key]}" for key in ("status", "commit", "sources", "started", "seconds") if key in record
    ]
    facts = {**{key: value for key, value in machine.items() if key != "gpu"}, **gpu, **device}
    lines += [f"- {key}: {value}" for key, value in facts.items() if key != "name"]
    lines += ["", "## Stages", ""]
    lines += table(
        ("stage", "result", "s", "", "SM clock after", "memory clock after"),
        (
            (
                name,
                stage["status"],
                stage.get("seconds", ""),
                stage.get("note", ""),
                stage.get("gpu", {}).get("clocks.sm", ""),
                stage.get("gpu", {}).get("clocks.mem", ""),
            )
            for name, stage in stages.items()
        ),
    )
    networks = [figures.get(name, {}) for name in ("networks", "compiled")]
    lines += section(
        "Networks",
        {"model": "model", "batch": "batch", "way": "as", "runs_as": "runs as", "ms": "ms"}
        | {"images_per_second": "images/s", "over_float32": "× float32", "over_best": "× best other"}
        | {"held_bytes": "bytes held", "peak_bytes": "bytes of activations"},
        [row for found in networks for row in found.get("models", ())],
    )
    lines += section(
        "Layers",
        {"model": "model", "layer": "layer", "inputs": "in", "outputs": "out", "kernel": "kernel"}
        | {"float_ms": "float16 ms", "ms": "ours ms"},
        [row for found in networks for row in found.get("layers", ())],
    )
    operators = figures.get("operators", {})
    lines += section(
        "Operators",
        {"op": "op", "layer": "layer", "shape": "shape", "dtype": "dtype", "layout": "layout", "ms": "ms"}
        | {"gbps": "GB/s", "floor": "× floor", "eager": "× eager", "torch": "× torch"},
        operators.get("timings", ()),
    )
    lines += [f"- did not run: {failure}" for failure in operators.get("failures", ())]
    for name, stage in stages.items():
        if stage.get("tail"):
            lines += ["", f"## The end of {name}", "", "```", *stage["tail"], "```"]
    return "\n".join(lines) + "\n"


def section(title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a titled table of the rows' columns, nothing if there are no rows."""
    if not rows:
        return []
    return ["", f"## {title}", "", *table(columns.values(), ([row.get(key) for key in columns] for row in rows))]


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    header = list(header)
    return [line(header), line("---" for _ in header), *(line(map(cell, row)) for row in rows)]


def line(cells: Iterable[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cell(value: Any) -> str:
    """Return a value as text: four digits of a number, a shape with crosses."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "x".join(map(str, value))
    return str(value).replace("|", "\\|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.JSON")
    for result in parser.parse_args().results:
        result.with_suffix(".md").write_text(page(json.loads(result.read_text())))
        print(f"Wrote {result.with_suffix('.md')}")
