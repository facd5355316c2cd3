"""Times whole networks: in float as PyTorch runs them best, and in 4-bit integers.

The networks have random weights with BatchNorm statistics that fit (architectures.py): this measures time and memory,
not accuracy. Times are medians of calls that take turns. On a GPU a CUDA graph of several calls is timed, so that
launches cost what they cost in use.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptq4cuda.artifact.record import record_of
from ptq4cuda.artifact.report import DASH, table
from ptq4cuda.bench import architectures
from ptq4cuda.bench.timing import captured, machine_line, take_turns, write_figures
from ptq4cuda.compat import TorchDispatchMode, compiled_from, tree_leaves
from ptq4cuda.config import QuantConfig
from ptq4cuda.execute.regions import Region
from ptq4cuda.nn import QuantModule
from ptq4cuda.pipeline import quantize

MODELS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2")
BATCHES = (1, 8, 64)
OURS = "4-bit"

_CALLS = 10  # of a CUDA graph


@dataclass(frozen=True)
class ModelTiming:
    """One way to run a network.

    Attributes:
        model: of architectures.ARCHITECTURES.
        batch: images of a call.
        size: pixels of their sides.
        way: "float32", "bfloat16" or "float16", these "compiled" by torch.compile, or OURS.
        runs_as: executions of the layers, of OURS.
        ms: median milliseconds of a call.
        images_per_second: of these calls.
        over_float32: times faster than float32.
        over_best: times faster than the best of the others, of OURS.
        held_bytes: of all tensors that the network holds, those of its kernels included.
        peak_bytes: most bytes of activations that are alive at a time, the input aside; None if compiled.
    """

    model: str
    batch: int
    size: int
    way: str
    runs_as: str
    ms: float
    images_per_second: float
    over_float32: float
    over_best: float | None
    held_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class LayerTiming:
    """One quantized layer beside the float layer of its name alone.

    Attributes:
        model: of architectures.ARCHITECTURES.
        layer: name.
        inputs: shape of the input.
        outputs: shape of the output.
        kernel: what computes it, see IntegerConv2d.kernel.
        float_ms: milliseconds of the float layer: of its convolution, without BatchNorm, activation and sum.
        ms: milliseconds of ours, in which they are fused.
    """

    model: str
    layer: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: str
    float_ms: float
    ms: float


def run(
    device: str,
    *,
    models: Sequence[str] = MODELS,
    batches: Sequence[int] = BATCHES,
    size: int = 224,
    repeats: int = 5,
    layers: bool = False,
    half: bool = True,
    compiled: bool = True,
    json_file: Path | None = None,
    echo: Callable[[str], object] = print,
    progress: bool = True,
) -> None:
    """Time networks; print tables and write the figures.

    Args:
        device: "cpu" or "cuda".
        models: names of architectures.ARCHITECTURES.
        batches: images of a call.
        size: pixels of their sides.
        repeats: calls of which the median counts.
        layers: time each layer, too, at the largest batch.
        half: compare with bfloat16 (float16 on a GPU), too; it is slow where it is emulated.
        compiled: compare with torch.compile, too; on a GPU in float16 alone, if that is compared with: float32 is
            slower there by far, and compiling takes a minute.
        json_file: receives machine and figures, after every network.
        echo: prints a text.
        progress: show a progress bar.
    """
    unknown = set(models) - set(architectures.ARCHITECTURES)
    if unknown:
        known = ", ".join(architectures.ARCHITECTURES)
        raise ValueError(f"there is no architecture {', '.join(sorted(unknown))}; there are {known}")
    echo(f"{machine_line(device)}, {size} pixels, channels_last, medians of {repeats} calls")
    timings: list[ModelTiming] = []
    layer_timings: list[LayerTiming] = []
    layer_dtype = torch.float32 if device == "cpu" else torch.float16
    if device != "cpu":
        torch.backends.cudnn.benchmark = True  # PyTorch at its best
    for name in tqdm(models, unit="model", disable=not progress):
        net, ours = pair(name, size, device)
        for batch in batches:
            timings += measure(name, net, ours, images(batch, size, device), repeats, half, compiled)
        if layers:
            x = images(max(batches), size, device)
            layer_timings += measure_layers(name, net, ours, x, repeats, layer_dtype)
        if json_file is not None:
            figures = {"models": [asdict(t) for t in timings], "layers": [asdict(t) for t in layer_timings]}
            write_figures(json_file, device, **figures)
    echo(timings_table(timings))
    echo(losses(timings))
    for name in models if layers else ():
        echo(layers_table([timing for timing in layer_timings if timing.model == name]))
    if json_file is not None:
        echo(f"Wrote {json_file}.")


def pair(name: str, size: int, device: str) -> tuple[nn.Module, nn.Module]:
    """Return a network in float, channels_last, and quantized."""
    net = architectures.ARCHITECTURES[name]()
    net = architectures.calibrate_batch_norm(net, architectures.images(8, 64)).eval().to(device)
    calibration = architectures.images(4, min(size, 96), seed=1).to(device)
    ours = quantize(net, [calibration], QuantConfig.fast(), progress=False)
    return net.to(memory_format=torch.channels_last), ours  # type: ignore[call-overload]


def images(batch: int, size: int, device: str) -> Tensor:
    """Return a batch of images, channels_last."""
    return architectures.images(batch, size, seed=2).to(device).contiguous(memory_format=torch.channels_last)


# --- whole networks -------------------------------------------------------------------------------------------


def variants(net: nn.Module, ours: nn.Module, half: torch.dtype | None, compiled: bool) -> dict[str, nn.Module]:
    """Return the ways to run a network."""
    ways = {"float32": net}
    if half is not None:
        ways[str(half).removeprefix("torch.")] = copy.deepcopy(net).to(half)
    if compiled:
        chosen = {way: network for way, network in ways.items() if half != torch.float16 or way != "float32"}
        ways |= {f"{way} compiled": torch.compile(network) for way, network in chosen.items()}  # type: ignore[misc]
    return ways | {OURS: ours}


@torch.no_grad()
def measure(
    name: str, net: nn.Module, ours: nn.Module, x: Tensor, repeats: int, half: bool, compiled: bool
) -> list[ModelTiming]:
    """Time one network on one batch."""
    half_type = torch.float16 if x.is_cuda else torch.bfloat16
    torch.compiler.reset()
    ways = variants(net, ours, half_type if half else None, compiled)
    given = {way: x.to(half_type) if str(half_type).removeprefix("torch.") in way else x for way in ways}
    seconds = medians({way: partial(network, given[way]) for way, network in ways.items()}, x, repeats)
    runs_as = ", ".join(sorted({layer.execution for layer in record_of(ours).layers}))
    best = min(s for way, s in seconds.items() if way != OURS)
    return [
        ModelTiming(
            name,
            len(x),
            x.shape[-1],
            way,
            runs_as if way == OURS else "float",
            ms=1e3 * s,
            images_per_second=len(x) / s,
            over_float32=seconds["float32"] / s,
            over_best=best / s if way == OURS else None,
            held_bytes=held_bytes(ways[way]),
            peak_bytes=peak_bytes(ways[way], given[way]),
        )
        for way, s in seconds.items()
    ]


def medians(calls: Mapping[str, Callable[[], object]], x: Tensor, repeats: int) -> dict[str, float]:
    """Return the median seconds of each call, which work where x is."""
    count = 1
    if x.is_cuda:
        calls, count = {name: captured(call, _CALLS) for name, call in calls.items()}, _CALLS
    return {name: statistics.median(times) / count for name, times in take_turns(calls, repeats).items()}


def held_bytes(network: nn.Module) -> int:
    """Return the bytes of all tensors that a network holds, those that its integer kernels read included."""
    laid_out = [m.constants for m in network.modules() if isinstance(m, Region)]
    tensors = itertools.chain(network.parameters(), network.buffers(), *laid_out)
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators return for as long as it lives, and of values within a region.

    Other working memory of operators is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        within = 0
        if func is torch.ops.ptq4cuda.run_layers.default:
            within = torch.ops.ptq4cuda.memory_of_layers(*args)
        given = {id(storage) for storage in storages((args, kwargs))}
        for storage in storages(result):
            if id(storage) not in given:  # neither a view nor written in place
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.live + within)
        return result

    def _release(self, size: int) -> None:
        self.live -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the memory of all tensors, each once."""
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return list({id(storage): storage for storage in found}.values())


def peak_bytes(network: nn.Module, x: Tensor) -> int | None:
    """Return the most bytes of activations that are alive at a time, the input aside; None for compiled networks."""
    if compiled_from(network) is not None:
        return None
    counter = LiveBytes()
    with counter:
        network(x)
    return counter.peak


def timings_table(timings: Sequence[ModelTiming]) -> str:
    """Return the timings as text."""
    header = ("model", "batch", "as", "ms", "images/s", "× float32", "× best other", "MB held", "MB of activations")
    rows = [
        (
            t.model,
            t.batch,
            f"{t.way} {t.runs_as}" if t.way == OURS else t.way,
            f"{t.ms:.4g}",
            f"{t.images_per_second:.1f}",
            f"{t.over_float32:.2f}",
            DASH if t.over_best is None else f"{t.over_best:.2f}",
            f"{t.held_bytes / 1e6:.1f}",
            DASH if t.peak_bytes is None else f"{t.peak_bytes / 1e6:.1f}",
        )
        for t in timings
    ]
    return table(header, rows)


def losses(timings: Sequence[ModelTiming]) -> str:
    """Say where another way is faster."""
    ours = [t for t in timings if t.over_best is not None]
    lost = [f"  {t.model}, batch {t.batch}: {t.over_best:.2f} x" for t in ours if t.over_best and t.over_best < 1.0]
    return "\n".join([f"Another way is faster in {len(lost)} of {len(ours)} cases.", *lost])


# --- single layers --------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_layers(
    name: str, net: nn.Module, ours: nn.Module, x: Tensor, repeats: int, dtype: torch.dtype
) -> list[LayerTiming]:
    """Time every quantized layer on the input that it gets, and the float layer of its name in `dtype`."""
    inputs: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[module] = args

    net = net if dtype == torch.float32 else copy.deepcopy(net).to(dtype)
    for network, given in ((net, x.to(dtype)), (ours, x)):
        hooks = [module.register_forward_pre_hook(keep) for module in network.modules()]
        network(given)
        for hook in hooks:
            hook.remove()
    floats = dict(net.named_modules())
    timings = []
    for layer_name, layer in ours.named_modules():
        unquantized = floats.get(layer_name)
        if not isinstance(layer, QuantModule) or unquantized not in inputs:
            continue
        called = layer if layer in inputs else layer.engine  # a lowered graph calls the engine
        assert unquantized is not None and isinstance(called, nn.Module)
        calls = {way: partial(m, *inputs[m]) for way, m in (("float", unquantized), ("ours", called))}
        seconds = medians(calls, x, repeats)
        timings.append(
            LayerTiming(
                name,
                layer_name,
                # A float layer gives the shapes: codes come in other types, and two at a time go out.
                tuple(inputs[unquantized][0].shape),
                tuple(unquantized(*inputs[unquantized]).shape),
                layer.engine.kernel if layer.engine is not None else "simulated",
                float_ms=1e3 * seconds["float"],
                ms=1e3 * seconds["ours"],
            )
        )
    return timings


def layers_table(timings: Sequence[LayerTiming]) -> str:
    """Return the timings of one network's layers as text, and the sums."""
    rows: list[tuple[object, ...]] = [
        (
            t.layer,
            "x".join(map(str, t.inputs)),
            "x".join(map(str, t.outputs)),
            t.kernel,
            f"{t.float_ms:.3g}",
            f"{t.ms:.3g}",
            f"{t.float_ms / t.ms:.2f}",
        )
        for t in timings
    ]
    total, ours = sum(t.float_ms for t in timings), sum(t.ms for t in timings)
    rows.append(("all", "", "", "", f"{total:.3g}", f"{ours:.3g}", f"{total / ours:.2f}"))
    return table((f"layer of {timings[0].model}", "in", "out", "kernel", "float ms", "ours ms", "ratio"), rows)
