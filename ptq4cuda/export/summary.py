"""What became of a network in a file for another runtime, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from ptq4cuda.artifact.report import table


@dataclass(frozen=True)
class LayerExport:
    """What a quantized layer became.

    Attributes:
        name: of the layer.
        bits: of a weight in the file.
        integers: whether a runtime that fuses convolutions of uint8 has all that it takes to compute it in integers.
        reason: why not.
    """

    name: str
    bits: int
    integers: bool
    reason: str = ""


@dataclass(frozen=True)
class OnnxExport:
    """What became of a network; print it for a table.

    Attributes:
        layers: one entry for each quantized layer, in order.
        floats: what stays in floating point, each by its name and the reason, "" where it has no weights.
        bytes: of the file.
    """

    layers: tuple[LayerExport, ...]
    floats: tuple[tuple[str, str], ...]
    bytes: int

    def __str__(self) -> str:
        rows = [
            (row.name, str(row.bits), "integers" if row.integers else f"floating point: {row.reason}")
            for row in self.layers
        ]
        rows += [(name, "32", f"floating point: {reason}") for name, reason in self.floats if reason]
        count = sum(row.integers for row in self.layers)
        last = f"{count} of {len(self.layers)} quantized layers can be fused to integers, {self.bytes:,} bytes"
        return f"{table(('layer', 'weight bits', 'computed in'), rows)}\n\n{last}"
