"""Whole networks, in float as PyTorch runs them best and in 4-bit integers: python benchmarks/models.py.

The networks have random weights with BatchNorm statistics that fit (architectures.py): this measures time and memory,
not accuracy. Every figure is the median of several calls in one process; the variants of a row take turns, so that a
machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import torch
from torch import Tensor, nn

from ptq4cuda import QuantConfig, quantize
from ptq4cuda.record import record_of
from ptq4cuda.report import DASH, table

NETWORKS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2")
INTEGER = "4-bit integer"


def held_bytes(network: nn.Module) -> int:
    """Return the bytes of all tensors that a network holds, temporary ones of its integer kernels included."""
    tensors = [t for m in network.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())


def variants(net: nn.Module, integer: nn.Module, compiled: bool) -> dict[str, tuple[nn.Module, torch.dtype]]:
    """Return the ways to run a network, with the dtype of their input."""
    last = net.to(memory_format=torch.channels_last)
    half = copy.deepcopy(last).to(torch.bfloat16)
    ways: dict[str, tuple[nn.Module, torch.dtype]] = {
        "float32": (last, torch.float32),
        "bfloat16": (half, torch.bfloat16),
        INTEGER: (integer, torch.float32),
    }
    if compiled:
        ways["float32 compiled"] = (torch.compile(last), torch.float32)  # type: ignore[assignment]
        ways["bfloat16 compiled"] = (torch.compile(half), torch.bfloat16)  # type: ignore[assignment]
    return ways


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


@torch.no_grad()
def measure(name: str, batches: list[int], size: int, compiled: bool, repeats: int) -> list[dict[str, Any]]:
    """Measure one network at several batch sizes."""
    net = architectures.ARCHITECTURES[name]()
    net = architectures.calibrate_batch_norm(net, architectures.images(8, 64)).eval()
    integer = quantize(net, [architectures.images(4, min(size, 96), seed=1)], QuantConfig.fast())
    runs_as = {layer.execution for layer in record_of(integer).layers}
    rows = []
    ways = variants(net, integer, compiled)
    for batch in batches:
        x = architectures.images(batch, size, seed=2).contiguous(memory_format=torch.channels_last)

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
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, default=Path("models.json"), help="output file (default: %(default)s)")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.network:
        rows += measure(name, arguments.batch, arguments.size, not arguments.no_compile, arguments.repeats)
    header = ("network", "batch", "as", "ms", "images/s", "× float32", "× best float", "MB held")
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
        )
        for row in rows
    ]
    print(table(header, cells))
    print(f"\n{torch.get_num_threads()} threads, {arguments.size} pixels, medians of {arguments.repeats} calls.")
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
