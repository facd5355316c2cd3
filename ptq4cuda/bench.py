"""Times the operators beside a floor measured in the same run, and beside PyTorch.

The floor of an operator that reads and writes is `y.copy_(x)`, of one that only reads `x.sum()`, on the same input.
The peers are the reference in plain PyTorch, eager and through torch.compile, and where it computes the same thing
torch's own fake_quantize_per_channel_affine. Times are medians; inputs rotate through more memory than the last-level
cache holds. On a GPU a CUDA graph of several calls is timed with events, so that launches cost what they cost in use.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ptq4cuda import ops
from ptq4cuda.ops import reference
from ptq4cuda.report import DASH, table

SHAPES = {
    "ResNet-50 stem": (32, 64, 112, 112),
    "ResNet-50 layer1": (32, 256, 56, 56),
    "ResNet-50 layer2": (32, 512, 28, 28),
    "ResNet-50 layer3": (32, 1024, 14, 14),
    "ResNet-50 layer4": (32, 2048, 7, 7),
    "MobileNetV2 1": (32, 96, 112, 112),
    "MobileNetV2 2": (32, 144, 56, 56),
    "MobileNetV2 6": (32, 960, 7, 7),
    "VGG-16 1": (8, 64, 224, 224),
    "VGG-16 4": (8, 512, 28, 28),
}
QUICK = ("ResNet-50 layer1", "ResNet-50 layer4", "MobileNetV2 1")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OPS = ("fake_quantize", "quantize", "quantize_pack", "unpack_dequantize", "channel_statistics")

_ROTATE_CPU = 64 << 20  # bytes of input to rotate through, above the caches of most machines


@dataclass(frozen=True)
class Timing:
    """One operator on one input.

    Attributes:
        op: name.
        layer: where the shape is from.
        shape: of x.
        dtype: of x.
        layout: memory format of x.
        ms: median milliseconds.
        gbps: bytes that must be read and written, over the time, in GB/s.
        floor: time over the floor's; 1 is as fast as copying (or summing).
        eager: times faster than the reference in eager PyTorch.
        compiled: times faster than the reference under torch.compile, None where not measured.
        torch: times faster than torch.fake_quantize_per_channel_affine, None where it does not apply.
    """

    op: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    ms: float
    gbps: float
    floor: float
    eager: float
    compiled: float | None
    torch: float | None


class _Inputs:
    """As many copies of an operator's input, with its output, as exceed the cache."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, device: str) -> None:
        channels = shape[1]
        generator = torch.Generator().manual_seed(0)
        self.scale = (torch.rand(channels, generator=generator) * 0.2 + 0.05).to(device)
        self.zero_point = torch.full((channels,), 8, dtype=torch.int32, device=device)
        self.bits = torch.full((channels,), 4, dtype=torch.uint8, device=device)
        x = torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=layout)
        cache = _ROTATE_CPU
        if device != "cpu":
            cache = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        copies = max(1, -(-cache // (x.numel() * x.element_size())))
        self.x = [x.clone() for _ in range(copies)]
        self.y = [torch.empty_like(x) for _ in range(copies)]
        self.codes = [torch.empty_like(x, dtype=torch.uint8) for _ in range(copies)]
        self.packed = [ops.quantize_pack(x, self.scale, self.zero_point) for x in self.x]


# For each operator: our call, the reference, the floor, and the bytes moved for each element of x and its size.
Call = Callable[[_Inputs, int], object]


def _calls(op: str) -> tuple[Call, Call, Call]:
    def parameters(i: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return i.scale, i.zero_point, i.bits

    def copy(i: _Inputs, k: int) -> object:
        return i.y[k].copy_(i.x[k])

    calls: dict[str, tuple[Call, Call, Call]] = {
        "fake_quantize": (
            lambda i, k: ops.fake_quantize(i.x[k], *parameters(i), 1, out=i.y[k]),
            lambda i, k: reference.fake_quantize(i.x[k], *parameters(i), 1),
            copy,
        ),
        "quantize": (
            lambda i, k: ops.quantize(i.x[k], *parameters(i), 1, out=i.codes[k]),
            lambda i, k: reference.quantize(i.x[k], *parameters(i), 1),
            copy,
        ),
        "quantize_pack": (
            lambda i, k: ops.quantize_pack(i.x[k], i.scale, i.zero_point, 1, out=i.packed[k]),
            lambda i, k: reference.quantize_pack(i.x[k], i.scale, i.zero_point, 1),
            copy,
        ),
        "unpack_dequantize": (
            lambda i, k: ops.unpack_dequantize(i.packed[k], i.scale, i.zero_point, i.x[k].shape[1], 1, out=i.y[k]),
            lambda i, k: reference.unpack_dequantize(
                i.packed[k], i.scale, i.zero_point, 1, i.x[k].shape[1], i.x[k].dtype
            ),
            copy,
        ),
        "channel_statistics": (
            lambda i, k: ops.channel_statistics(i.x[k], 1),
            lambda i, k: reference.channel_statistics(i.x[k], 1),
            lambda i, k: i.x[k].sum(),
        ),
    }
    return calls[op]


def _bytes_moved(op: str, x: Tensor) -> float:
    """Return the least bytes that the operator reads and writes."""
    size = x.numel() * x.element_size()
    written = {"fake_quantize": size, "quantize": x.numel(), "quantize_pack": x.numel() / 2, "channel_statistics": 0}
    return x.numel() / 2 + size if op == "unpack_dequantize" else size + written[op]


def _time(call: Callable[[int], object], copies: int, device: str, repeats: int) -> float:
    """Return the median seconds of a call."""
    call(0)
    if device == "cpu":
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            call(i % copies)
            times.append(time.perf_counter() - start)
        return median(times)
    calls = max(4, copies)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return median(times)


def measure(
    op: str, layer: str, dtype: str, layout: str, device: str, *, repeats: int = 15, compiled: bool = True
) -> Timing:
    """Time one operator on one input."""
    inputs = _Inputs(SHAPES[layer], DTYPES[dtype], LAYOUTS[layout], device)
    copies = len(inputs.x)
    ours, peer, floor = _calls(op)

    def timed(call: Call) -> float:
        return _time(lambda k: call(inputs, k), copies, device, repeats)

    seconds = timed(ours)
    slow = max(3, repeats // 5)  # peers are slower by far, and need no better median
    eager = _time(lambda k: peer(inputs, k), copies, device, slow)
    times: dict[str, float | None] = {"compiled": None, "torch": None}
    if compiled:
        torch.compiler.reset()
        fused = torch.compile(peer, dynamic=False)
        times["compiled"] = _time(lambda k: fused(inputs, k), copies, device, slow) / seconds
    if op == "fake_quantize" and dtype == "float32":
        theirs = torch.fake_quantize_per_channel_affine
        call = lambda k: theirs(inputs.x[k], inputs.scale, inputs.zero_point, 1, 0, 15)  # noqa: E731
        times["torch"] = _time(call, copies, device, slow) / seconds
    x = inputs.x[0]
    return Timing(
        op,
        layer,
        tuple(x.shape),
        dtype,
        layout,
        ms=1e3 * seconds,
        gbps=_bytes_moved(op, x) / seconds / 1e9,
        floor=seconds / timed(floor),
        eager=eager / seconds,
        **times,
    )


def cases(quick: bool) -> Iterator[tuple[str, str, str, str]]:
    """Yield (op, layer, dtype, layout)."""
    for layer in QUICK if quick else SHAPES:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                for op in OPS:
                    yield op, layer, dtype, layout


def run(
    device: str,
    *,
    quick: bool = False,
    compiled: bool = True,
    json_file: Path | None = None,
    plot: Path | None = None,
    echo: Callable[[str], object] = print,
    progress: bool = True,
) -> list[Timing]:
    """Time every operator; print a table, write the figures and draw them.

    Args:
        device: "cpu" or "cuda".
        quick: three shapes instead of ten.
        compiled: time the reference under torch.compile, too, which takes seconds a case to compile.
        json_file: receives machine and figures.
        plot: an image file to draw the distance from the floor into.
        echo: prints a text.
        progress: show a progress bar.
    """
    timings = [
        measure(op, layer, dtype, layout, device, compiled=compiled)
        for op, layer, dtype, layout in tqdm(list(cases(quick)), unit="case", disable=not progress)
    ]
    echo(machine_line(device))
    echo(timings_table(timings))
    if json_file is not None:
        json_file.write_text(
            json.dumps({"machine": machine_line(device), "timings": [asdict(t) for t in timings]}, indent=1) + "\n"
        )
        echo(f"Wrote {json_file}.")
    if plot is not None:
        draw(timings, plot)
        echo(f"Drew {plot}.")
    return timings


def machine_line(device: str) -> str:
    """Name what the figures were measured on."""
    if device == "cpu":
        processor = platform.processor() or platform.machine()
        return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def timings_table(timings: Sequence[Timing]) -> str:
    """Return the timings as text."""

    def times(value: float | None) -> str:
        return DASH if value is None else f"{value:.1f}"

    header = ("op", "shape", "dtype", "layout", "ms", "GB/s", "x floor", "x eager", "x compiled", "x torch")
    rows: list[tuple[Any, ...]] = [
        (
            t.op,
            "x".join(map(str, t.shape)),
            t.dtype,
            t.layout,
            f"{t.ms:.3f}",
            f"{t.gbps:.1f}",
            f"{t.floor:.2f}",
            times(t.eager),
            times(t.compiled),
            times(t.torch),
        )
        for t in timings
    ]
    return table(header, rows)


def draw(timings: Sequence[Timing], path: Path) -> None:
    """Draw each operator's time over its floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    kinds = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
    for shift, (dtype, layout) in enumerate(kinds):
        values = [median(t.floor for t in timings if (t.op, t.dtype, t.layout) == (op, dtype, layout)) for op in OPS]
        positions = [i + 0.13 * (shift - (len(kinds) - 1) / 2) for i in range(len(OPS))]
        axes.bar(positions, values, 0.12, label=f"{dtype}, {layout}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(OPS)), OPS)
    axes.set_ylabel("time / floor (median over shapes)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Distance from a copy (statistics: from a sum), {len(timings)} cases", x=0.02, ha="left")
    figure.savefig(path, dpi=150)
