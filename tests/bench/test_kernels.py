"""The benchmark measures what it says; no time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq4cuda import ops
from ptq4cuda.bench import kernels


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHAPES", {"a": (2, 6, 5, 5), "b": (1, 3, 4, 4)})
    monkeypatch.setattr(kernels, "QUICK", ("a",))
    convolutions = {"a 3x3": (8, 6, 5, 3, 1, 1), "a depthwise": (8, 8, 5, 3, 2, 8), "b 1x1": (8, 6, 5, 1, 1, 1)}
    monkeypatch.setattr(kernels, "CONVOLUTIONS", convolutions)
    monkeypatch.setattr(kernels, "_ROTATE_CPU", 2000)


def test_every_case_once(small: None, tmp_path: Path) -> None:
    texts: list[str] = []
    timings = kernels.run(
        "cpu",
        quick=True,
        compiled=False,
        json_file=tmp_path / "t.json",
        plot=tmp_path / "t.png",
        echo=texts.append,
        progress=False,
    )
    assert len(timings) == len(kernels.OPS) * len(kernels.DTYPES) * len(kernels.LAYOUTS) + 4
    assert all(t.ms > 0 and t.floor > 0 and t.eager > 0 and t.compiled is None for t in timings)
    assert all((t.torch is not None) == (t.op == "fake_quantize" and t.dtype == "float32") for t in timings)
    stored = json.loads((tmp_path / "t.json").read_text())
    assert [t["op"] for t in stored["timings"]] == [t.op for t in timings]
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    assert sum(line.startswith("fake_quantize") for line in "\n".join(texts).splitlines()) == 6 + 1  # and of medians


def test_only_some_cases(small: None) -> None:
    assert set(kernels.cases(only="float16 quantize")) == {
        ("quantize", layer, "float16", layout) for layer in kernels.SHAPES for layout in kernels.LAYOUTS
    }


def test_layers_that_are_timed() -> None:
    found = [(op, layer) for op, layer, *_ in kernels.cases(only="conv2d_integer")]
    assert found == [("conv2d_integer", layer) for layer in kernels.CONVOLUTIONS]
    quick = {layer for op, layer, *_ in kernels.cases(quick=True) if op in kernels.LAYER_OPS}
    assert quick == {layer for layer in kernels.CONVOLUTIONS if layer.rpartition(" ")[0] in kernels.QUICK}
    assert {layer.rpartition(" ")[0] for layer in kernels.CONVOLUTIONS} <= set(kernels.SHAPES)


@pytest.mark.parametrize(
    ("op", "layer"), [(op, "a 3x3") for op in kernels.LAYER_OPS] + [("conv2d_integer", "a depthwise")]
)
def test_layers_compute_what_their_peers_do(small: None, op: str, layer: str) -> None:
    if op == "conv2d_integer":
        x, values, ours, peer, moved = kernels._convolution(layer, "cpu")
        channels, outputs, _, kernel, _, groups = kernels.CONVOLUTIONS[layer]
        products = kernel * kernel * channels // groups
        weights = products * outputs
    else:
        x, values, ours, peer, moved = kernels._rows(op, layer, "cpu")
        products = weights = 0
    result, expected = (call(kernels._LayerInput(x, values, x, x)) for call in (ours, peer))
    assert isinstance(result, Tensor) and isinstance(expected, Tensor)
    assert torch.equal(result, ops.quantize(expected, float(products), 0, 4) if products else expected)
    assert result.unique().numel() > 2
    assert moved == x.numel() + result.numel() + weights


def test_a_peer_that_does_not_compile_is_named(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    timing = kernels.measure("quantize", "a", "float32", "contiguous", "cpu")
    assert timing.compiled == "no compiler"
    assert "no compiler" in kernels.timings_table([timing])


@pytest.mark.parametrize("op", ["fake_quantize", "conv2d_integer"])
def test_a_peer_that_does_not_run_is_named(small: None, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    def refuse(*args: object, **options: object) -> Tensor:
        raise RuntimeError("not here\nfor reasons")

    monkeypatch.setattr(torch, "fake_quantize_per_channel_affine", refuse)
    monkeypatch.setattr(kernels.reference, "fake_quantize", refuse)
    monkeypatch.setattr(kernels.F, "conv2d", refuse)
    timing = kernels.measure(op, "a 3x3" if op in kernels.LAYER_OPS else "a", "float32", "contiguous", "cpu")
    assert timing.eager == "not here"
    assert timing.torch == (None if op in kernels.LAYER_OPS else "not here")
    assert timing.ms > 0
    assert "not here" in kernels.timings_table([timing])
    kernels.losses([timing])


def test_an_operator_that_does_not_run_stops_no_other(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: object, **options: object) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(kernels.ops, "quantize", refuse)
    options = {"quick": True, "compiled": False, "progress": False, "json_file": tmp_path / "t.json"}
    with pytest.raises(
        RuntimeError, match="1 of 6 cases did not run:\nquantize a float16 contiguous: no such kernel"
    ):
        kernels.run("cpu", only="a float16 contiguous", echo=lambda text: None, **options)  # type: ignore[arg-type]
    stored = json.loads((tmp_path / "t.json").read_text())
    assert len(stored["timings"]) == 5
    assert stored["failures"] == ["quantize a float16 contiguous: no such kernel"]


def test_what_was_timed_before_an_interrupt_is_printed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels.ops, "channel_statistics", interrupt)
    texts: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        kernels.run("cpu", only="a float32 contiguous", compiled=False, echo=texts.append, progress=False)
    words = "\n".join(texts[:-1]).split()  # the last tells where a peer is faster
    assert [words.count(op) for op in kernels.OPS] == [2, 2, 2, 2, 0, 0]  # in the table and in the medians


def test_a_quick_run_reads_fewer_images_on_a_cpu(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHAPES", {"a": (16, 6, 5, 5)})
    quick, whole = (
        kernels.measure("quantize", "a", "float32", "contiguous", "cpu", quick=q, compiled=False)
        for q in (True, False)
    )
    assert (quick.shape, whole.shape) == ((2, 6, 5, 5), (16, 6, 5, 5))


def test_zero_points_of_torchs_own_are_not_read_on_the_host(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.dtype] = []
    theirs = torch.fake_quantize_per_channel_affine

    def noted(x: Tensor, scale: Tensor, zero_point: Tensor, *rest: int) -> Tensor:
        given.append(zero_point.dtype)
        return theirs(x, scale, zero_point, *rest)

    monkeypatch.setattr(torch, "fake_quantize_per_channel_affine", noted)
    timing = kernels.measure("fake_quantize", "a", "float32", "contiguous", "cpu", compiled=False)
    assert isinstance(timing.torch, float)
    assert set(given) == {torch.float32}


def test_losing_cases_are_listed(small: None) -> None:
    timing = kernels.measure("quantize", "a", "float32", "contiguous", "cpu", compiled=False)
    won, lost = replace(timing, eager=2.0, compiled=None), replace(timing, eager=2.0, compiled=0.5)
    text = kernels.losses([won, lost])
    assert text.splitlines() == [
        "A peer is faster in 1 of 2 cases.",
        "  quantize a float32 contiguous: 0.50 x compiled",
    ]


@pytest.mark.parametrize("op", kernels.OPS)
def test_both_sides_compute_the_same(small: None, op: str) -> None:
    """A speed-up over a peer means something only if the peer does the same work."""
    inputs = kernels._inputs(kernels.SHAPES["a"], torch.float32, torch.channels_last, "cpu")
    assert len(inputs) > 1
    ours, peer, _ = kernels._calls(op)
    result, expected = ours(inputs[1]), peer(inputs[1])
    assert isinstance(result, Tensor)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(result, expected)


def test_compiled_once_for_all_inputs(small: None) -> None:
    """Past a number of recompilations torch.compile falls back to eager, and would be timed as such."""
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    inputs = kernels._inputs(kernels.SHAPES["a"], torch.float32, torch.contiguous_format, "cpu")
    compiled = torch.compile(kernels._calls("quantize")[1], dynamic=False, backend=backend)
    for i in inputs:
        compiled(i)
    assert len(inputs) > 1
    assert len(graphs) == 1


def test_bytes_moved() -> None:
    x = torch.zeros(2, 8, 5, 5, dtype=torch.bfloat16)
    assert kernels._bytes_moved("fake_quantize", x) == 800 + 800
    assert kernels._bytes_moved("quantize_pack", x) == 800 + ops.quantize_pack(x, 1.0, 8).numel()
    assert kernels._bytes_moved("unpack_dequantize", x) == 200 + 800
    assert kernels._bytes_moved("channel_statistics", x) == 800
    assert kernels._bytes_moved("channel_histogram", x) == 800
