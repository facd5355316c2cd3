"""Whole networks, in float as PyTorch runs them best and in 4-bit integers: python benchmarks/models.py.

The networks have random weights with BatchNorm statistics that fit (architectures.py): this measures time and memory,
not accuracy. Every figure is the median of several calls in one process; the variants of a row take turns, so that a
machine that slows down slows all of them. With --layers there is one more table, of every quantized layer by itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptq4cuda import QuantConfig, quantize
from ptq4cuda.integer import IntegerConv2d, IntegerLinear
from ptq4cuda.nn import QuantModule
from ptq4cuda.record import record_of
from ptq4cuda.report import DASH, table

NETWORKS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2")
INTEGER = "4-bit integer"


def held_bytes(network: nn.Module) -> int:
    """Return the bytes of all tensors that a network holds, temporary ones of its integer kernels included."""
    tensors = [t for m in network.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators return for as long as it lives; their working memory is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in storages((args, kwargs))}
        for storage in storages(result):
            if id(storage) not in given:  # neither a view nor written in place
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, size: int) -> None:
        self.live -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the memory of all tensors, each once."""
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return list({id(storage): storage for storage in found}.values())


def peak_bytes(network: nn.Module, x: Tensor) -> int | None:
    """Return the most bytes of activations that are alive at a time, the input aside; None for compiled networks."""
    if hasattr(network, "_orig_mod"):
        return None
    with LiveBytes() as bytes_:
        network(x)
    return bytes_.peak


def variants(
    net: nn.Module, integer: nn.Module, bfloat16: bool, compiled: bool
) -> dict[str, tuple[nn.Module, torch.dtype]]:
    """Return the ways to run a network, with the dtype of their input."""
    ways = {"float32": (net, torch.float32)}
    if bfloat16:
        ways["bfloat16"] = (copy.deepcopy(net).to(torch.bfloat16), torch.bfloat16)
    if compiled:
        ways |= {f"{way} compiled": (torch.compile(network), dtype) for way, (network, dtype) in ways.items()}  # type: ignore[misc]
    return ways | {INTEGER: (integer, torch.float32)}


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each call, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def networks(name: str, size: int) -> tuple[nn.Module, nn.Module]:
    """Return a network in float and in integers."""
    net = architectures.ARCHITECTURES[name]()
    net = architectures.calibrate_batch_norm(net, architectures.images(8, 64)).eval()
    integer = quantize(net, [architectures.images(4, min(size, 96), seed=1)], QuantConfig.fast(), progress=False)
    return net.to(memory_format=torch.channels_last), integer


def images(batch: int, size: int) -> Tensor:
    """Return a batch of images, channels_last."""
    return architectures.images(batch, size, seed=2).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def measure_layers(name: str, batch: int, size: int, repeats: int) -> list[dict[str, Any]]:
    """Measure every quantized layer on the input that it gets, and the float layer of its name on its own."""
    pair = networks(name, size)
    inputs: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[module] = args

    for network in pair:
        hooks = [module.register_forward_pre_hook(keep) for module in network.modules()]
        network(images(batch, size))
        for hook in hooks:
            hook.remove()
    floats = dict(pair[0].named_modules())
    rows = []
    for layer_name, layer in pair[1].named_modules():
        if not isinstance(layer, QuantModule) or floats.get(layer_name) not in inputs:
            continue
        # A float layer gives the shapes: codes come in other types, and two at a time go out.
        ways = {"float32": floats[layer_name], "ours": layer}
        seconds = medians({way: lambda m=m: m(*inputs[m]) for way, m in ways.items()}, repeats)  # type: ignore[misc]
        rows.append(
            {
                "network": name,
                "layer": layer_name,
                "in": list(inputs[ways["float32"]][0].shape),
                "out": list(ways["float32"](*inputs[ways["float32"]]).shape),
                "kernel": kernel_of(layer),
                "float32_seconds": seconds["float32"],
                "seconds": seconds["ours"],
            }
        )
    return rows


def kernel_of(layer: QuantModule) -> str:
    """Describe what computes a layer: its kernel and stride, how far sums stay in 16 bits, what is fused."""
    engine = layer.engine.convolution if isinstance(layer.engine, IntegerLinear) else layer.engine
    if not isinstance(engine, IntegerConv2d):
        return "simulated"
    kind = f"{engine.kernel_size[0]}x{engine.kernel_size[1]}"
    parts = [kind if max(engine.stride) == 1 else f"{kind}/{engine.stride[0]}"]
    if engine.groups > 1:
        parts.append("depthwise" if engine.channels == 1 else f"{engine.groups} groups")
    else:
        parts.append("8-bit codes" if engine.span < 0 else f"span {engine.span}")
    if engine.residual_scale is not None:
        parts.append("residual")
    if engine.also_scale is not None:
        parts.append("2 outputs")
    return ", ".join(parts)


def print_layers(rows: list[dict[str, Any]]) -> None:
    """Print what measure_layers returned, and the sums."""
    cells = [
        (
            row["layer"],
            "x".join(map(str, row["in"])),
            "x".join(map(str, row["out"])),
            row["kernel"],
            f"{1e3 * row['float32_seconds']:.2f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['float32_seconds'] / row['seconds']:.2f}",
        )
        for row in rows
    ]
    total, ours = sum(row["float32_seconds"] for row in rows), sum(row["seconds"] for row in rows)
    cells.append(("all", "", "", "", f"{1e3 * total:.2f}", f"{1e3 * ours:.2f}", f"{total / ours:.2f}"))
    print(table(("layer", "in", "out", "kernel", "float32 ms", "ours ms", "ratio"), cells))


@torch.no_grad()
def measure(
    name: str, batches: list[int], size: int, bfloat16: bool, compiled: bool, repeats: int
) -> list[dict[str, Any]]:
    """Measure one network at several batch sizes."""
    net, integer = networks(name, size)
    runs_as = {layer.execution for layer in record_of(integer).layers}
    rows = []
    ways = variants(net, integer, bfloat16, compiled)
    for batch in batches:
        x = images(batch, size)

        def call(way: tuple[nn.Module, torch.dtype], x: Tensor = x) -> Callable[[], Any]:
            network, dtype = way
            given = x.to(dtype)
            return lambda: network(given)

        seconds = medians({way: call(ways[way]) for way in ways}, repeats)
        best = min(s for way, s in seconds.items() if way != INTEGER)
        rows += [
            {
                "network": name,
                "batch": batch,
                "size": size,
                "way": way,
                "runs_as": sorted(runs_as) if way == INTEGER else ["float"],
                "seconds": s,
                "images_per_second": batch / s,
                "speed_up_over_float32": seconds["float32"] / s,
                "speed_up_over_best_float": best / s,
                "held_bytes": held_bytes(ways[way][0]),
                "peak_activation_bytes": peak_bytes(ways[way][0], x.to(ways[way][1])),
            }
            for way, s in seconds.items()
        ]
    return rows


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(architectures.ARCHITECTURES), nargs="*", default=list(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="calls of which the median counts (default: %(default)s)"
    )
    parser.add_argument("--layers", action="store_true", help="time single layers instead, at the largest batch")
    parser.add_argument("--no-bfloat16", action="store_true", help="leave bfloat16 out: slow where it is emulated")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, default=Path("models.json"), help="output file (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.layers:
        layers = []
        for name in arguments.network:
            layers += measure_layers(name, max(arguments.batch), arguments.size, arguments.repeats)
            print_layers([row for row in layers if row["network"] == name])
        arguments.json.write_text(json.dumps(layers, indent=1) + "\n")
        return
    rows = []
    for name in arguments.network:
        rows += measure(
            name,
            arguments.batch,
            arguments.size,
            not arguments.no_bfloat16,
            not arguments.no_compile,
            arguments.repeats,
        )
    header = ("network", "batch", "as", "ms", "images/s", "× float32", "× best float", "MB held", "MB of activations")
    cells = [
        (
            row["network"],
            row["batch"],
            row["way"],
            f"{1e3 * row['seconds']:.1f}",
            f"{row['images_per_second']:.1f}",
            f"{row['speed_up_over_float32']:.2f}",
            f"{row['speed_up_over_best_float']:.2f}" if row["way"] == INTEGER else DASH,
            f"{row['held_bytes'] / 1e6:.1f}",
            DASH if row["peak_activation_bytes"] is None else f"{row['peak_activation_bytes'] / 1e6:.1f}",
        )
        for row in rows
    ]
    print(table(header, cells))
    print(f"\n{torch.get_num_threads()} threads, {arguments.size} pixels, medians of {arguments.repeats} calls.")
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
