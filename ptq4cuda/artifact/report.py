"""report(): what quantization did to each layer, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ptq4cuda.artifact.record import LayerRecord, QuantRecord, record_of, tensor_bytes
from ptq4cuda.nn import QuantModule

DASH = "–"


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


def report(network: nn.Module) -> str:
    """Describe a quantized network layer by layer.

    Columns: mean bits of weights and input (W, A), clip rule of the input, SQNR of the output on the calibration data
    with all layers before it quantized, bytes before and after, execution, the kernel in integers ("span" is how many
    pairs of products are added up in 16 bits before they are widened), and why a layer stayed in float.

    Raises:
        TypeError: the network was not made by quantize() or load().
    """
    engines = {name: m.engine for name, m in network.named_modules() if isinstance(m, QuantModule)}
    kernels = {name: engine.kernel for name, engine in engines.items() if engine is not None}
    return describe(record_of(network), tensor_bytes(network), kernels)


def describe(record: QuantRecord, size: int | None = None, kernels: Mapping[str, str] | None = None) -> str:
    """Return the report of what a record tells.

    Args:
        record: of a network.
        size: bytes of its tensors now. Default: what the record says.
        kernels: by the names of layers in integers.
    """
    size, kernels = record.bytes if size is None else size, kernels or {}
    header = ["layer", "kind", "W", "A", "clip", "SQNR dB", "bytes fp32", "bytes", "ratio", "runs as"]
    header += ["kernel", "reason"]  # where there are any
    rows = [_row(layer, kernels.get(layer.name, "")) for layer in record.layers]
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    quantized = sum(layer.execution != "float" for layer in record.layers)
    total = (
        f"total: {quantized} of {len(record.layers)} layers quantized, {record.float_bytes:,} bytes in float32, "
        f"{size:,} now ({size / max(record.float_bytes, 1):.3f}), output SQNR {_number(record.sqnr, 1)} dB on "
        f"{record.images} calibration samples"
    )
    if record.worst_sqnr is not None:
        total += f" (median {_number(record.median_sqnr, 1)}, worst {_number(record.worst_sqnr, 1)})"
    if record.seconds:
        total += f", {record.seconds:.1f} s"
    lines = [table([header[i] for i in shown], [[row[i] for i in shown] for row in rows]), "", total]
    lines += _trade(record)
    spilled = f", {record.spilled_bytes:,} bytes went to files" if record.spilled_bytes else ""
    held = f"Tensors between layers held at a time: {record.frontier_bytes:,} bytes{spilled}."
    if record.walked_by == "graph":
        lines.append(f"BatchNorm: {record.folded} folded. {held}")
    else:
        lines.append(f"Walked by its modules, BatchNorm not folded: {record.reason}. {held}")
    return "\n".join(lines)


def _trade(record: QuantRecord) -> list[str]:
    """Tell what raising layers to 8 bits cost and bought."""
    steps = [
        f"  {len(step.raised)} layers at 8 bits: {_number(step.sqnr, 1)} dB, {step.bytes:,} bytes"
        for step in record.trade
    ]
    if not steps:
        return []
    lines = ["Raised to 8 bits, worst first:", *steps]
    raised = record.trade[-1].raised
    if raised:
        lines.append(f"  {', '.join(raised)}")
    target = record.config.target_sqnr
    if target is not None and record.sqnr is not None and record.sqnr < target:
        lines.append(f"  {target:g} dB was not reached.")
    budget = record.config.size_budget
    if budget is not None and record.bytes > budget * record.float_bytes:
        lines.append(f"  The budget of {budget * record.float_bytes:,.0f} bytes is too small for this configuration.")
    return lines


def _row(layer: LayerRecord, kernel: str) -> tuple[str, ...]:
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
        kernel,
        layer.reason,
    )


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return DASH
    return f"{value:.{digits}f}" if digits is not None else f"{round(value, 2):g}"
