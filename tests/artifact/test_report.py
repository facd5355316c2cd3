"""report() lists every layer with its bits, bytes and kernel: in a table that lines up, as data, and as a page."""

from __future__ import annotations

import json
import pickle
import re
import sys
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig, _native, quantize
from ptq4cuda.artifact.record import record_of, tensor_bytes
from ptq4cuda.artifact.report import Report, table
from ptq4cuda.execute.engines import IntegerConv2d
from ptq4cuda.solve.raising import Part, note_damage


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
    lines = str(ptq4cuda.report(network)).split("\n")
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
    lines = str(ptq4cuda.report(network)).split("\n")
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
    assert "kernel" not in str(ptq4cuda.report(simulated)).split("\n")[0]


def test_weight_only_rows_do_not_break(model: nn.Module, images: Tensor) -> None:
    class WithUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose3d(4, 2, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.conv(x)[:, :, None])

    torch.manual_seed(0)
    text = str(ptq4cuda.report(quantize(WithUp().eval(), [images], progress=False)))
    line = next(line for line in text.split("\n") if line.startswith("up"))
    assert "float" in line
    assert "ConvTranspose3d is not supported" in line
    assert "reason" in text.split("\n")[0]


def named(names: list[str]) -> Report:
    """The report of a network of three layers whose names are these."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()
    torch.manual_seed(0)
    config = QuantConfig.fast(overrides={"4": "float"})
    network = quantize(net, [torch.randn(8, 3, 8, 8)], config, progress=False)
    record = record_of(network)
    for layer, name in zip(record.layers, names, strict=True):
        layer.name = name
    return Report.of(record, tensor_bytes(network), {names[0]: "3x3"})


@pytest.fixture(scope="module")
def report() -> Report:
    return named(["first", "<b>second</b>", "head"])


def test_the_report_is_data(report: Report) -> None:
    assert [layer.name for layer in report.layers] == ["first", "<b>second</b>", "head"]
    assert [layer.kernel for layer in report.layers] == ["3x3", "", ""]
    shares = [layer.noise_share for layer in report.layers]
    assert shares[2] is None and sum(s for s in shares if s is not None) == pytest.approx(1.0)
    louder = min(report.layers[:2], key=lambda layer: layer.own_sqnr or 0.0)
    assert louder.noise_share == max(s for s in shares if s is not None)
    report.layers[2].sqnr = -float("inf")
    fields = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert fields["layers"][2].pop("sqnr") is None
    expected = json.loads(json.dumps(report.to_dict()))
    del expected["layers"][2]["sqnr"]
    assert fields == expected
    assert fields["bytes"] == report.bytes < fields["float_bytes"]
    assert repr(report) == str(report)


def test_layers_are_in_the_order_of_what_they_do_to_the_outputs(report: Report) -> None:
    """Where that was measured: as measured with four bits, here with two bits more and less."""
    layers = [replace(layer, weight_bits=6.0, activation_bits=2.0) for layer in report.record.layers[:2]]
    record = replace(report.record, layers=[*layers, report.record.layers[2]])
    assert not record.noise_at_outputs and "measured at their own outputs" in Report.of(record)._repr_html_()
    first, second = (layer.name for layer in layers)
    note_damage(record, [Part("weight_bits", (first,), 4, 16.0, 1, 1), Part("weight_bits", (second,), 4, 48.0, 1, 1)])
    note_damage(
        record,
        [Part("activation_bits", (first, second), 4, 0.25, 0, 1), Part("weight_bits", ("gone",), 4, 1.0, 1, 1)],
    )
    assert [(layer.weight_damage, layer.input_damage) for layer in layers] == [(1.0, 2.0), (3.0, 2.0)]
    found = Report.of(record)
    assert [layer.noise_share for layer in found.layers] == [3 / 8, 5 / 8, None]
    text = found._repr_html_()
    assert "share of the noise at the network's outputs" in text
    assert "62.5 % of all layers&#x27;, 60 % of it by the weights" in text
    assert text.index(escape(second)) < text.index("37.5 % of")


def test_pandas_is_asked_for_when_it_is_needed(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^to_pandas\(\) needs pandas: run `pip install pandas`$"):
        report.to_pandas()
    module: Any = ModuleType("pandas")
    module.DataFrame = lambda rows, columns: SimpleNamespace(set_index=lambda name: (rows, columns, name))
    monkeypatch.setitem(sys.modules, "pandas", module)
    rows, columns, index = report.to_pandas()
    assert index == "name" and not [c for c in columns if "histogram" in c]
    assert [row["bytes"] for row in rows] == [layer.bytes for layer in report.layers]
    assert all(list(row) == columns for row in rows)


class Outline(HTMLParser):
    """The tags that are open at the end, what is linked, and texts by the class of their tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.linked: list[str] = []
        self.names: list[str] = []
        self.in_name = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "path"):
            self.open.append(tag)
        self.linked += [value or "" for name, value in attrs if name in ("src", "href")]
        self.in_name = ("class", "name") in attrs

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.in_name:
            self.names.append(data.strip())
            self.in_name = False


def test_the_page_needs_nothing_but_itself(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    outline = Outline()
    outline.feed(text)
    assert not outline.open and not outline.linked
    assert not re.search(r"https?:|@import|url\(", text)
    worst_first = sorted(report.layers[:2], key=lambda layer: -(layer.noise_share or 0.0))
    assert outline.names == [layer.name for layer in worst_first]  # what looks like a tag is text
    assert "prefers-color-scheme: dark" in text
    assert text.index("Cost: ") < text.index("those that hurt most first") < text.index("stayed in float, and why")
    assert "kept in float by overrides" in text
    assert text.count("<figure>") == 4  # input and weights of both
    assert report._repr_html_() in text


def test_what_is_saved_is_said_by_the_name(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.JSON")
    assert (tmp_path / "report.JSON").read_text() == report.to_json()
    with pytest.raises(ValueError, match=r"^a report is saved as \.html or \.json, got '.*report\.txt'$"):
        report.save(tmp_path / "report.txt")


def test_a_network_of_an_earlier_version_has_no_histograms(report: Report) -> None:
    layers = [
        replace(layer, own_sqnr=None, input_histogram=None, weight_histogram=None) for layer in report.record.layers
    ]
    earlier = Report.of(replace(report.record, layers=layers))
    text = earlier._repr_html_()
    assert "<figure>" not in text and "SQNR from layer to layer" in text
    assert [layer.noise_share for layer in earlier.layers] == [None] * 3


def test_a_report_is_its_text_and_knows_the_noise_at_the_outputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    told = ptq4cuda.report(ptq4cuda.quantize(model, [torch.randn(2, 3, 8, 8)], progress=False))
    assert isinstance(told, str) and "total: " in told and told.split("\n") == str(told).splitlines()
    copied = pickle.loads(pickle.dumps(told))
    assert (copied, copied.layers, copied.bytes) == (told, told.layers, told.bytes)
    assert told.record.noise_at_outputs and all(layer.noise_share for layer in told.layers)
