"""report(): what quantization did to each layer, as data, as a table for the terminal, and as a page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ptq4cuda.artifact.page import fragment, page
from ptq4cuda.artifact.record import LayerRecord, QuantRecord, Trade, record_of, tensor_bytes
from ptq4cuda.artifact.writing import write_whole
from ptq4cuda.nn import QuantModule

DASH = "–"
_PARTS = {"weight_bits": "weights", "activation_bits": "input"}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Align rows under a header: the first column to the left, numbers to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [
        column > 0 and any(row[column][:1].isdigit() or row[column][:1] == "-" for row in cells[1:])
        for column in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("─" * w for w in widths), *map(line, cells[1:])])


@dataclass
class LayerReport(LayerRecord):
    """What became of a layer.

    Attributes:
        kernel: that computes it in integers; "" where none does, or where a file is described and no network.
        noise_share: how much of the noise of all layers is this one's, 0 to 1, None where it is not known: of that at
            the network's outputs (weight_damage, input_damage) where it was measured, else of that which each adds by
            its own quantization, in terms of its own output (own_sqnr).
    """

    kernel: str = ""
    noise_share: float | None = None


@dataclass(frozen=True, repr=False, eq=False)
class Report(str):
    """What quantization did to a network; print it for a table.

    Attributes:
        layers: in order of execution, then those that stay in float.
        bytes: of the network's tensors.
        record: all else that is known of it.
    """

    layers: tuple[LayerReport, ...]
    bytes: int
    record: QuantRecord

    @classmethod
    def of(cls, record: QuantRecord, size: int | None = None, kernels: Mapping[str, str] | None = None) -> Report:
        """Return the report of what a record tells.

        Args:
            record: of a network.
            size: bytes of its tensors now. Default: what the record says.
            kernels: by the names of layers in integers.
        """
        noise = [_noise(layer, record.noise_at_outputs) for layer in record.layers]
        total = sum(own for own in noise if own is not None)
        layers = [
            LayerReport(
                **vars(layer),
                kernel=(kernels or {}).get(layer.name, ""),
                noise_share=None if own is None or not 0.0 < total < math.inf else own / total,
            )
            for layer, own in zip(record.layers, noise, strict=True)
        ]
        return cls(tuple(layers), record.bytes if size is None else size, record)

    def __new__(cls, layers: tuple[LayerReport, ...], bytes: int, record: QuantRecord) -> Report:
        """Write the table: a report is the text that it prints as."""
        return super().__new__(cls, _text(layers, bytes, record))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.layers, self.bytes, self.record

    def __repr__(self) -> str:
        """Show the table where a shell shows the value of a line."""
        return str(self)

    def _repr_html_(self) -> str:
        """Show the page in a notebook."""
        return fragment(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the fields of the record, "layers" as they are here, and "bytes" of the network."""
        record = {k: v for k, v in self.record.to_dict().items() if k != "structure"}
        return {**record, "bytes": self.bytes, "layers": [asdict(layer) for layer in self.layers]}

    def to_json(self) -> str:
        """Return the same as JSON, null for what is no finite number."""
        text = json.dumps(self.to_dict())
        return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1) + "\n"

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame with a row for each layer, by name, histograms left out.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise ImportError("to_pandas() needs pandas: run `pip install pandas`") from None
        columns = [field.name for field in fields(LayerReport) if not field.name.endswith("_histogram")]
        rows = [{name: getattr(layer, name) for name in columns} for layer in self.layers]
        return pandas.DataFrame(rows, columns=columns).set_index("name")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a page for a browser (.html), which needs no other file, or as JSON (.json).

        Raises:
            ValueError: the name ends in neither.
            OSError: the file cannot be written.
        """
        write = {".html": lambda: page(self), ".json": self.to_json}.get(Path(path).suffix.lower())
        if write is None:
            raise ValueError(f"a report is saved as .html or .json, got {os.fspath(path)!r}")
        write_whole(path, write().encode())


def report(network: nn.Module) -> Report:
    """Describe a quantized network layer by layer: print(report(network)), or save it as a page.

    Columns of the table: mean bits of weights and input (W, A), clip rule of the input, SQNR of the output on the
    calibration data with all layers before it quantized, bytes before and after, execution, the kernel in integers
    ("span" is how many pairs of products are added up in 16 bits before they are widened), and why a layer stayed in
    float.

    Raises:
        TypeError: the network was not made by quantize() or load().
    """
    engines = {name: m.engine for name, m in network.named_modules() if isinstance(m, QuantModule)}
    kernels = {name: engine.kernel for name, engine in engines.items() if engine is not None}
    return Report.of(record_of(network), tensor_bytes(network), kernels)


def _noise(layer: LayerRecord, at_outputs: bool) -> float | None:
    """Return noise over signal of a layer's quantization, at the network's outputs or at its own."""
    if at_outputs:
        return None if layer.weight_damage is None else layer.weight_damage + (layer.input_damage or 0.0)
    return None if layer.own_sqnr is None else 10.0 ** (-layer.own_sqnr / 10.0)


def _text(layers: tuple[LayerReport, ...], size: int, record: QuantRecord) -> str:
    header = ["layer", "kind", "W", "A", "clip", "SQNR dB", "bytes fp32", "bytes", "ratio", "runs as"]
    header += ["kernel", "reason"]  # where there are any
    rows = [_row(layer) for layer in layers]
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    quantized = sum(layer.execution != "float" for layer in record.layers)
    samples = f"{record.images} calibration samples"
    if record.held_out:
        samples = f"{record.held_out} samples held out, beside {record.images} of calibration"
    total = (
        f"total: {quantized} of {len(record.layers)} layers quantized, {record.float_bytes:,} bytes in float32, "
        f"{size:,} now ({size / max(record.float_bytes, 1):.3f}), output SQNR {_number(record.sqnr, 1)} dB on "
        f"{samples}"
    )
    if record.worst_sqnr is not None:
        total += f" (median {_number(record.median_sqnr, 1)}, worst {_number(record.worst_sqnr, 1)})"
    if record.seconds:
        total += f", {record.seconds:.1f} s"
    lines = [table([header[i] for i in shown], [[row[i] for i in shown] for row in rows]), "", total]
    lines += [*_outputs(record), *_trade(record)]
    lines += [f"{remark}." for remark in (record.left_out, record.few_samples) if remark]
    spilled = f", {record.spilled_bytes:,} bytes went to files" if record.spilled_bytes else ""
    held = f" Tensors between layers held at a time: {record.frontier_bytes:,} bytes{spilled}."
    held = held if record.seconds else ""  # a file does not know
    if record.walked_by == "graph":
        lines.append(f"BatchNorm: {record.folded} folded.{held}")
    else:
        lines.append(f"Walked by its modules, BatchNorm not folded: {record.reason}.{held}")
    return "\n".join(lines)


def _outputs(record: QuantRecord) -> list[str]:
    """Tell how close each of several outputs is."""
    found = [
        f"{output.name} {_number(output.sqnr, 1)}"
        + (f" (median {_number(output.median_sqnr, 1)})" if output.median_sqnr is not None else "")
        for output in record.outputs
    ]
    return [f"SQNR of each output in dB: {', '.join(found)}"] if found else []


def _trade(record: QuantRecord) -> list[str]:
    """Tell what raising layers to more bits cost and bought."""
    if not record.trade:
        return []
    first, last = record.trade[0], record.trade[-1]

    def described(step: Trade) -> str:
        several = f", worst output {_number(step.least_sqnr, 1)} dB" if record.outputs else ""
        value = f", measure {step.value:.6g}" if step.value is not None else ""
        work = f", {step.bit_operations / first.bit_operations:.2f} of the work" if first.bit_operations else ""
        return f"{_number(step.sqnr, 1)} dB{several}{value}, {step.bytes:,} bytes{work}"

    tried = "1 network" if record.tried == 1 else f"{record.tried} networks"
    title = f"Raised to 6 and 8 bits, worst first ({tried} tried"
    if record.float_value is not None:
        title += f"; the float model's measure is {record.float_value:.6g}, {record.max_drop:g} less will do"
    lines = [f"{title}):"]
    lines += [f"  {len(step.raised)} layers raised: {described(step)}" for step in record.trade]
    if last.raised:
        before = record.trade[-2]
        changed = [
            f"{name} " + " and ".join(f"{_PARTS.get(part, part)} {bits}" for part, bits in new.items())
            for name, now in last.bits.items()
            if (new := {p: b for p, b in now.items() if before.bits.get(name, {}).get(p) != b})
        ]
        bought = [f"{last.bytes - before.bytes:,} bytes more"]
        if last.sqnr is not None and before.sqnr is not None:
            bought.insert(0, f"{last.sqnr - before.sqnr:+.1f} dB")
        if last.value is not None and before.value is not None:
            bought.insert(0, f"{last.value - before.value:+.4g} of the measure")
        lines.append(f"  the last step, {', '.join(bought)}: {', '.join(changed)}")
    if record.shortfall:
        lines.append(f"  Not reached: {record.shortfall}.")
    budget = record.config.size_budget
    if budget is not None and record.bytes > budget * record.float_bytes:
        lines.append(f"  The budget of {budget * record.float_bytes:,.0f} bytes is too small for this configuration.")
    return lines


def _row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        layer.kind,
        _number(layer.weight_bits),
        _number(layer.activation_bits),
        layer.clip or DASH,
        _number(layer.sqnr, 1),
        f"{layer.float_bytes:,}",
        f"{layer.bytes:,}",
        f"{layer.bytes / layer.float_bytes:.3f}" if layer.float_bytes else DASH,
        layer.execution,
        layer.kernel,
        layer.reason,
    )


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return DASH
    return f"{value:.{digits}f}" if digits is not None else f"{round(value, 2):g}"
