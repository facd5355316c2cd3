"""report() lists every layer with its bits, bytes and kernel, in a table that lines up."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig, _native, quantize
from ptq4cuda.artifact.record import tensor_bytes
from ptq4cuda.artifact.report import table
from ptq4cuda.execute.engines import IntegerConv2d


def test_table_aligns() -> None:
    text = table(("name", "n", "why"), [("a", "1.5", "x"), ("long", "10.25", "because")])
    assert text.split("\n") == [
        "name      n  why",
        "────  ─────  ───────",
        "a       1.5  x",
        "long  10.25  because",
    ]


def test_report_lists_every_layer_and_the_total(model: nn.Module, images: Tensor) -> None:
    network = quantize(model, [images], QuantConfig.paper(), progress=False)
    lines = ptq4cuda.report(network).split("\n")
    rows = {line.split()[0]: line.split() for line in lines[2:7]}
    assert list(rows) == ["stem", "depthwise", "pointwise", "grouped", "fc"]
    assert rows["stem"][1:5] == ["Conv2d", "8", "8", "minmax"]
    assert rows["fc"][1] == "Linear"
    for name, row in rows.items():
        module = network.get_submodule(name)
        assert int(row[7].replace(",", "")) == tensor_bytes(module)
    total = next(line for line in lines if line.startswith("total"))
    numbers = re.match(r"total: 5 of 5 layers quantized, ([\d,]+) bytes in float32, ([\d,]+) now", total)
    assert numbers is not None
    assert int(numbers[1].replace(",", "")) == tensor_bytes(model)
    assert int(numbers[2].replace(",", "")) == tensor_bytes(network)
    assert "48 calibration samples" in total
    assert any(line.startswith("BatchNorm: 2 folded. Tensors between layers held at a time: ") for line in lines)


@pytest.mark.parametrize("narrow", [False, True])
def test_kernels_are_named(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, narrow: bool) -> None:
    monkeypatch.setattr(_native, "narrow_sums", narrow)
    config = replace(QuantConfig.fast(), execution="integer")
    network = quantize(model, [images], config, progress=False)
    lines = ptq4cuda.report(network).split("\n")
    assert re.search(r"runs as +kernel$", lines[0])
    kernels = {line.split()[0]: re.split("  +", line)[-1] for line in lines[2:7]}
    stem = network.get_submodule("stem").engine
    assert isinstance(stem, IntegerConv2d) and stem.span < 0
    assert kernels["depthwise"] == "3x3, depthwise"
    assert kernels["stem"] == (f"3x3, {'8-bit codes' if narrow else '32-bit sums'}, 2 outputs")
    sums = r"span \d+" if narrow else "32-bit sums"
    assert re.fullmatch(f"1x1, {sums}, residual", kernels["pointwise"])
    assert re.fullmatch(f"3x3/2, 2 groups, {sums}", kernels["grouped"])
    simulated = quantize(model, [images], replace(config, execution="simulate"), progress=False)
    assert "kernel" not in ptq4cuda.report(simulated).split("\n")[0]


def test_weight_only_rows_do_not_break(model: nn.Module, images: Tensor) -> None:
    class WithUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose3d(4, 2, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.conv(x)[:, :, None])

    torch.manual_seed(0)
    text = ptq4cuda.report(quantize(WithUp().eval(), [images], progress=False))
    line = next(line for line in text.split("\n") if line.startswith("up"))
    assert "float" in line
    assert "ConvTranspose3d is not supported" in line
    assert "reason" in text.split("\n")[0]
