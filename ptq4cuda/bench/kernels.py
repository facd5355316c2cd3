"""Times the operators beside a floor measured in the same run, and beside PyTorch.

The floor of an operator that reads and writes is `y.copy_(x)`, of one that only reads `x.sum()`, on the same input;
the two take turns. The peers are the reference in plain PyTorch, eager and through torch.compile, and torch's own
fake_quantize_per_channel_affine where it computes the same; a peer that cannot run leaves its reason instead of a
figure. The operators write into memory at hand (out=), the peers allocate theirs.

Convolutions of codes to codes stand beside F.conv2d in float32 (float16 on a GPU), which does not quantize; packing
their weights to 4 bits and unpacking them beside shifts and ors. The floor of these is a copy of as many bytes as
they have to move.

Times are medians; inputs rotate through more memory than the last-level cache holds. On a GPU a CUDA graph of several
calls is timed with events, so that launches cost what they cost in use.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ptq4cuda import ops
from ptq4cuda.artifact.report import DASH, table
from ptq4cuda.artifact.writing import write_figure
from ptq4cuda.bench.timing import captured, machine_line, write_figures
from ptq4cuda.execute.engines import IntegerConv2d, Packing
from ptq4cuda.nn.spec import Geometry
from ptq4cuda.ops import reference
from ptq4cuda.ops.nibbles import Nibbles
from ptq4cuda.quantizer import QuantParams

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
OPS = (
    "fake_quantize",
    "quantize",
    "quantize_pack",
    "unpack_dequantize",
    "channel_statistics",
    "channel_histogram",
)

CONVOLUTIONS = {  # channels, outputs, size, kernel, stride, groups
    "ResNet-50 layer1 1x1": (256, 64, 56, 1, 1, 1),
    "ResNet-50 layer1 3x3": (64, 64, 56, 3, 1, 1),
    "ResNet-50 layer2 1x1": (512, 128, 28, 1, 1, 1),
    "ResNet-50 layer2 3x3": (128, 128, 28, 3, 1, 1),
    "ResNet-50 layer3 1x1": (1024, 256, 14, 1, 1, 1),
    "ResNet-50 layer3 3x3": (256, 256, 14, 3, 1, 1),
    "ResNet-50 layer4 1x1": (2048, 512, 7, 1, 1, 1),
    "ResNet-50 layer4 3x3": (512, 512, 7, 3, 1, 1),
    "MobileNetV2 1 1x1": (16, 96, 112, 1, 1, 1),
    "MobileNetV2 1 depthwise": (96, 96, 112, 3, 2, 96),
    "MobileNetV2 2 1x1": (144, 24, 56, 1, 1, 1),
    "MobileNetV2 2 depthwise": (144, 144, 56, 3, 1, 144),
    "MobileNetV2 6 1x1": (960, 160, 7, 1, 1, 1),
    "MobileNetV2 6 depthwise": (960, 960, 7, 3, 1, 960),
    "VGG-16 1 3x3": (64, 64, 224, 3, 1, 1),
    "VGG-16 4 3x3": (512, 512, 28, 3, 1, 1),
}
LAYER_OPS = ("conv2d_integer", "pack_codes", "unpack_codes")

_BATCH = 8  # of convolutions
_BINS = 512
_REPEATS = 15
_PEER_REPEATS, _PEER_SECONDS = 3, 0.2  # peers are slower by far and need no better median
_QUICK_CPU = 8  # times fewer images
_ROTATE_CPU = 64 << 20  # bytes of input to rotate through, above the caches of most machines


@dataclass(frozen=True)
class Timing:
    """One operator on one input.

    Attributes:
        op: name.
        layer: where the shape is from.
        shape: of x; of the weights [O, kernel * C / groups] where these are packed.
        dtype: of x.
        layout: memory format of x.
        ms: median milliseconds.
        gbps: bytes that must be read and written, over the time, in GB/s.
        floor: time over the floor's; 1 is as fast as copying (or summing).
        eager: times faster than the reference in eager PyTorch; of LAYER_OPS, than their peers.
        compiled: times faster than the reference under torch.compile; None if not measured.
        torch: times faster than torch.fake_quantize_per_channel_affine, None where it does not apply.

    Instead of the last three there is a sentence where that peer does not run.
    """

    op: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    ms: float
    gbps: float
    floor: float
    eager: float | str
    compiled: float | str | None
    torch: float | str | None


@dataclass(frozen=True)
class _Input:
    """What an operator reads and writes."""

    x: Tensor
    y: Tensor
    codes: Tensor
    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: Tensor
    low: Tensor
    high: Tensor


def _cache_bytes(device: str) -> int:
    """Return the bytes of input to rotate through."""
    return _ROTATE_CPU if device == "cpu" else 4 * torch.cuda.get_device_properties(device).L2_cache_size


def _inputs(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, device: str) -> list[_Input]:
    """Return as many inputs as exceed the cache."""
    channels = shape[1]
    generator = torch.Generator(device).manual_seed(0)  # on a CPU the values of a GPU would take longer than all else
    scale = torch.rand(channels, generator=generator, device=device) * 0.2 + 0.05
    zero_point = torch.full((channels,), 8, dtype=torch.int32, device=device)
    bits = torch.full((channels,), 4, dtype=torch.uint8, device=device)
    low, high = (torch.full((channels,), limit, device=device) for limit in (-4.0, 4.0))
    x = torch.randn(shape, generator=generator, device=device).to(dtype).contiguous(memory_format=layout)
    codes, packed = torch.empty_like(x, dtype=torch.uint8), ops.quantize_pack(x, scale, zero_point)
    copies = max(1, -(-_cache_bytes(device) // (x.numel() * x.element_size())))
    return [
        _Input(x.clone(), torch.empty_like(x), codes.clone(), packed.clone(), scale, zero_point, bits, low, high)
        for _ in range(copies)
    ]


@dataclass(frozen=True)
class _LayerInput:
    """What an operator on a layer reads, and what a copy of as many bytes as it moves does."""

    x: Tensor
    values: Tensor
    source: Tensor
    target: Tensor


Call = Callable[[Any], object]


def _calls(op: str) -> tuple[Call, Call, Call]:
    """Return our call, the reference and the floor."""

    def copy(i: _Input) -> object:
        return i.y.copy_(i.x)

    def read(i: _Input) -> object:
        return i.x.sum()

    calls: dict[str, tuple[Call, Call, Call]] = {
        "fake_quantize": (
            lambda i: ops.fake_quantize(i.x, i.scale, i.zero_point, i.bits, 1, out=i.y),
            lambda i: reference.fake_quantize(i.x, i.scale, i.zero_point, i.bits, 1),
            copy,
        ),
        "quantize": (
            lambda i: ops.quantize(i.x, i.scale, i.zero_point, i.bits, 1, out=i.codes),
            lambda i: reference.quantize(i.x, i.scale, i.zero_point, i.bits, 1),
            copy,
        ),
        "quantize_pack": (
            lambda i: ops.quantize_pack(i.x, i.scale, i.zero_point, 1, out=i.packed),
            lambda i: reference.quantize_pack(i.x, i.scale, i.zero_point, 1),
            copy,
        ),
        "unpack_dequantize": (
            lambda i: ops.unpack_dequantize(i.packed, i.scale, i.zero_point, i.x.shape[1], 1, out=i.y),
            lambda i: reference.unpack_dequantize(i.packed, i.scale, i.zero_point, 1, i.x.shape[1], i.x.dtype),
            copy,
        ),
        "channel_statistics": (
            lambda i: ops.channel_statistics(i.x, 1),
            lambda i: reference.channel_statistics(i.x, 1),
            read,
        ),
        "channel_histogram": (
            lambda i: ops.channel_histogram(i.x, i.low, i.high, _BINS, 1),
            lambda i: reference.channel_histogram(i.x, i.low, i.high, _BINS, 1),
            read,
        ),
    }
    return calls[op]


def _convolution(layer: str, device: str) -> tuple[Tensor, Tensor, Call, Call, int]:
    """Return the codes that a convolution reads, their values, our call, F.conv2d and the bytes to be moved."""
    channels, outputs, size, kernel, stride, groups = CONVOLUTIONS[layer]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (outputs, kernel, kernel, channels // groups), generator=generator).to(device)

    def quantizer(length: int, scale: float) -> QuantParams:
        scales, zeros = torch.full((length,), scale), torch.zeros(length, dtype=torch.int32)
        return QuantParams(torch.full((length,), 4, dtype=torch.uint8), scales, zeros).to(torch.device(device))

    source, out = quantizer(channels, 1.0), quantizer(outputs, float(weight[0].numel()))
    packed = device != "cpu" and groups == 1
    geometry = Geometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    packing = Packing(packed, frozenset([0] if packed else []))
    scale = torch.ones_like(out.scale)
    ours = IntegerConv2d(weight.to(torch.int8), scale, None, source, geometry, outputs=[out], packing=packing)
    codes = torch.randint(0, 16, (_BATCH, channels, size, size), generator=generator, dtype=torch.uint8).to(device)
    codes = codes.contiguous(memory_format=torch.channels_last)
    x = Nibbles.of(source.bits).pack(codes) if packed else codes
    kernels = weight.movedim(-1, 1).to(torch.float32 if device == "cpu" else torch.float16)
    moved = x.numel() + weight.numel() + ours(x).numel()
    values = codes.to(kernels.dtype)
    window = (geometry.stride, geometry.padding, geometry.dilation, groups)
    return x, values, lambda i: ours(i.x), lambda i: F.conv2d(i.values, kernels, None, *window), moved


def _rows(op: str, layer: str, device: str) -> tuple[Tensor, Tensor, Call, Call, int]:
    """Return what is read to pack or unpack weights, the result, our call, PyTorch's and the bytes to be moved."""
    channels, outputs, _, kernel, _, groups = CONVOLUTIONS[layer]
    length = kernel * kernel * channels // groups
    codes = torch.randint(0, 16, (outputs, length), generator=torch.Generator().manual_seed(0)).to(
        device, torch.uint8
    )
    bits = torch.full((outputs,), 4, dtype=torch.uint8, device=device)
    offsets, total = ops.row_offsets(bits, length)
    moved = codes.numel() + total
    packed = ops.pack_codes(codes, bits)
    if op == "pack_codes":

        def pack(i: _LayerInput) -> Tensor:
            torch.ops.ptq4cuda.pack_codes.out(i.x, bits, offsets, out=packed)  # codes are not looked through first
            return packed

        return codes, packed, pack, lambda i: (i.x[:, ::2] | i.x[:, 1::2] << 4).flatten(), moved
    unpack = partial(ops.unpack_codes, bits=bits, length=length, offsets=offsets, out=codes)
    return (
        packed,
        codes,
        lambda i: unpack(i.x),
        lambda i: torch.stack([i.x & 15, i.x >> 4], 1).view(-1, length),
        moved,
    )


def _bytes_moved(op: str, x: Tensor) -> float:
    """Return the least bytes that the operator reads and writes."""
    size = x.numel() * x.element_size()
    written = {"fake_quantize": size, "quantize": x.numel(), "quantize_pack": x.numel() / 2}
    return x.numel() / 2 + size if op == "unpack_dequantize" else size + written.get(op, 0)


def _times(calls: Sequence[Call], inputs: Sequence[Any], repeats: int, enough: float = math.inf) -> list[float]:
    """Return the median seconds of each call. They take turns, so that all of them meet the same noise.

    Args:
        calls: each is called once before.
        inputs: are read in turns.
        repeats: rounds at most.
        enough: seconds after which no other round begins.
    """
    for call in calls:
        call(inputs[0])
    timed = [_on_gpu(call, inputs) if inputs[0].x.is_cuda else _on_cpu(call) for call in calls]
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while not rounds or (len(rounds) < repeats and time.perf_counter() - started < enough):
        rounds.append([once(inputs[len(rounds) % len(inputs)]) for once in timed])
    return [median(column) for column in zip(*rounds, strict=True)]


def _peer_seconds(peer: Call, inputs: Sequence[Any]) -> float:
    """Return the median seconds of a peer's call."""
    return _times([peer], inputs, _PEER_REPEATS, _PEER_SECONDS)[0]


def _on_cpu(call: Call) -> Callable[[Any], float]:
    def once(i: Any) -> float:
        start = time.perf_counter()
        call(i)
        return time.perf_counter() - start

    return once


def _on_gpu(call: Call, inputs: Sequence[Any]) -> Callable[[Any], float]:
    calls = max(4, len(inputs))
    turn = itertools.cycle(inputs)
    replay = captured(lambda: call(next(turn)), calls)
    replay()

    def once(_: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3 / calls

    return once


def measure(
    op: str, layer: str, dtype: str, layout: str, device: str, *, quick: bool = False, compiled: bool = True
) -> Timing:
    """Time one operator on one input, on a CPU of few images if `quick`; for the others see run()."""
    if op in LAYER_OPS:
        return _measure_on_layer(op, layer, device)
    images, *rest = SHAPES[layer]
    if quick and device == "cpu":
        images = max(1, images // _QUICK_CPU)
    inputs = _inputs((images, *rest), DTYPES[dtype], LAYOUTS[layout], device)
    ours, peer, floor = _calls(op)
    seconds, least = _times([ours, floor], inputs, _REPEATS)

    def speedup(prepare: Callable[[], Call]) -> float | str:
        return _attempt(lambda: _peer_seconds(prepare(), inputs) / seconds)

    def compile_peer() -> Call:
        torch.compiler.reset()
        return torch.compile(peer, dynamic=False)

    def torchs_own() -> Call:
        theirs = torch.fake_quantize_per_channel_affine
        # It reads zero points that are integers on the host, which no CUDA graph can capture.
        zero_point = inputs[0].zero_point.float()
        return lambda i: theirs(i.x, i.scale, zero_point, 1, 0, 15)

    faster = {
        "eager": speedup(lambda: peer),
        "compiled": speedup(compile_peer) if compiled else None,
        "torch": speedup(torchs_own) if op == "fake_quantize" and dtype == "float32" else None,
    }
    x = inputs[0].x
    return Timing(
        op,
        layer,
        tuple(x.shape),
        dtype,
        layout,
        ms=1e3 * seconds,
        gbps=_bytes_moved(op, x) / seconds / 1e9,
        floor=seconds / least,
        **faster,  # type: ignore[arg-type]
    )


def _attempt(measured: Callable[[], float]) -> float | str:
    """Return a figure, or why there is none: whatever a peer raises is what there is to report."""
    try:
        return measured()
    except Exception as error:
        return _sentence(error)


def _sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:60]


def _measure_on_layer(op: str, layer: str, device: str) -> Timing:
    """Time a convolution, or the packing of its weights."""
    convolution = op == "conv2d_integer"
    x, values, ours, peer, moved = _convolution(layer, device) if convolution else _rows(op, layer, device)
    half = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    count = max(1, -(-_cache_bytes(device) // x.numel()))
    inputs = [_LayerInput(x.clone(), values.clone(), half.clone(), half.clone()) for _ in range(count)]
    seconds, least = _times([ours, lambda i: i.target.copy_(i.source)], inputs, _REPEATS)
    layout = "channels_last" if convolution else "contiguous"
    figures = {
        "ms": 1e3 * seconds,
        "gbps": moved / seconds / 1e9,
        "floor": seconds / least,
    }
    eager = _attempt(lambda: _peer_seconds(peer, inputs) / seconds)
    return Timing(op, layer, tuple(x.shape), "uint8", layout, **figures, eager=eager, compiled=None, torch=None)


def cases(quick: bool = False, only: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (op, layer, dtype, layout); of all cases those that have every word of `only` in them."""
    for layer in QUICK if quick else SHAPES:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                for op in OPS:
                    if {*only.split()} <= {op, *layer.split(), dtype, layout}:
                        yield op, layer, dtype, layout
    for layer in CONVOLUTIONS:
        for op in LAYER_OPS if layer.endswith("3x3") else LAYER_OPS[:1]:
            wanted = not quick or layer.rpartition(" ")[0] in QUICK
            if wanted and {*only.split()} <= {op, *layer.split()}:
                yield op, layer, "uint8", ""


def run(
    device: str,
    *,
    quick: bool = False,
    only: str = "",
    compiled: bool = True,
    json_file: Path | None = None,
    plot: Path | None = None,
    echo: Callable[[str], object] = print,
    progress: bool = True,
) -> list[Timing]:
    """Time every operator; print a table, write the figures and draw them.

    Whatever ends it, the table of the cases until then is printed.

    Args:
        device: "cpu" or "cuda".
        quick: of three layers instead of all, on a CPU with fewer images.
        only: words that a case must have, of operator, layer, dtype and layout.
        compiled: time the reference under torch.compile, too, which takes seconds a case to compile.
        json_file: receives machine and figures, after every case.
        plot: an image file to draw the distance from the floor into.
        echo: prints a text.
        progress: show a progress bar.

    Raises:
        ValueError: no case has these words.
        RuntimeError: an operator did not run, after all others have been timed and written down.
    """
    chosen = list(cases(quick, only))
    if not chosen:
        raise ValueError(f"there is no case of {only!r}: the operators are {', '.join(OPS + LAYER_OPS)}")
    timings: list[Timing] = []
    failures: list[str] = []
    bar = tqdm(chosen, unit="case", disable=not progress)
    try:
        for op, layer, dtype, layout in bar:
            bar.set_description(layer)
            try:
                timings.append(measure(op, layer, dtype, layout, device, quick=quick, compiled=compiled))
            except Exception as error:  # of one case: the others are worth no less
                failures.append(f"{op} {layer} {dtype} {layout}: {_sentence(error)}")
            if json_file is not None:
                write_figures(json_file, device, timings=[asdict(t) for t in timings], failures=failures)
    finally:
        bar.close()
        if timings:
            for text in (machine_line(device), timings_table(timings), "", summary(timings), "", losses(timings)):
                echo(text)
    if json_file is not None:
        echo(f"Wrote {json_file}.")
    if plot is not None:
        draw(timings, plot)
        echo(f"Drew {plot}.")
    if failures:
        raise RuntimeError("\n".join([f"{len(failures)} of {len(chosen)} cases did not run:", *failures]))
    return timings


def timings_table(timings: Sequence[Timing]) -> str:
    """Return the timings as text."""

    def times(value: float | str | None) -> str:
        return value if isinstance(value, str) else DASH if value is None else f"{value:.1f}"

    header = ("op", "layer", "shape", "dtype", "layout", "ms", "GB/s", "x floor", "x eager", "x compiled", "x torch")
    rows: list[tuple[Any, ...]] = [
        (
            t.op,
            t.layer,
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


def summary(timings: Sequence[Timing]) -> str:
    """Return a line for each operator: medians over its cases."""

    def over(values: Iterable[float | str | None]) -> str:
        figures = [value for value in values if isinstance(value, float)]
        return f"{median(figures):.1f}" if figures else DASH

    rows: list[tuple[Any, ...]] = []
    for op in dict.fromkeys(t.op for t in timings):
        of_op = [t for t in timings if t.op == op]
        columns = [[getattr(t, name) for t in of_op] for name in ("gbps", "floor", "eager", "compiled", "torch")]
        rows.append((op, len(of_op), *map(over, columns)))
    return table(("medians", "cases", "GB/s", "x floor", "x eager", "x compiled", "x torch"), rows)


def losses(timings: Sequence[Timing]) -> str:
    """Say where a peer is faster."""
    lost = [
        f"  {t.op} {t.layer} {t.dtype} {t.layout}: {value:.2f} x {peer}"
        for t in timings
        for peer, value in (("eager", t.eager), ("compiled", t.compiled), ("torch", t.torch))
        if isinstance(value, float) and value < 1.0
    ]
    return "\n".join([f"A peer is faster in {len(lost)} of {len(timings)} cases.", *lost])


def draw(timings: Sequence[Timing], path: Path) -> None:
    """Draw each operator's time over its floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    kinds = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
    for shift, (dtype, layout) in enumerate(kinds):
        found = [[t.floor for t in timings if (t.op, t.dtype, t.layout) == (op, dtype, layout)] for op in OPS]
        values = [median(floors) if floors else 0.0 for floors in found]
        positions = [i + 0.13 * (shift - (len(kinds) - 1) / 2) for i in range(len(OPS))]
        axes.bar(positions, values, 0.12, label=f"{dtype}, {layout}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(OPS)), OPS)
    axes.set_ylabel("time / floor (median over shapes)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Distance from a copy (statistics: from a sum), {len(timings)} cases", x=0.02, ha="left")
    write_figure(path, figure)
