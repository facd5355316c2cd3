"""Estimates what the convolutions of ResNet-50 take on an H100, layer by layer, by count of instructions.

    python tools/conv_estimate.py [--batch 64] [--high 0.3]

The issue slots of a main loop, of what is before it and of finishing an output are those of benchmarks/sass.json, the
blocks those of the plan that the host makes. A
layer takes as long as the multiprocessor with most blocks issues them, at 60 % of its slots, or as its bytes take at
the pace of a copy, whichever is more. It is a bound from counting and no time: latency, bank conflicts and the
second-level cache are not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ptq4cuda.ops.plan import conv_plan  # noqa: E402

MULTIPROCESSORS, CLOCK, ISSUE, COPY = 132, 1.75e9, 0.6, 3.0e12
LAUNCH = 3e-6  # seconds, of the kernel that adds up shares or copies


@dataclass(frozen=True)
class Layer:
    """A convolution and how often it is there; `edge` is of the output."""

    name: str
    channels: int
    outputs: int
    edge: int
    kernel: int = 1
    stride: int = 1
    residual: bool = False
    second: bool = False
    packed: bool = True  # its codes
    count: int = 1


def resnet50() -> Iterator[Layer]:
    """Yield the layers: the last of a block adds the residual and has two outputs, one of them in bytes."""
    yield Layer("conv1", 4, 64, 112, 7, 2, packed=False)
    channels = 64
    for stage, (width, blocks, edge) in enumerate(((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)), 1):
        stride = 1 if stage == 1 else 2
        name, wide = f"layer{stage}", 4 * width
        yield Layer(f"{name}.0.conv1", channels, width, edge * stride)
        yield Layer(f"{name}.0.conv2", width, width, edge, 3, stride)
        yield Layer(f"{name}.0.downsample", channels, wide, edge, 1, stride)
        yield Layer(f"{name}.conv1", wide, width, edge, count=blocks - 1)
        yield Layer(f"{name}.conv2", width, width, edge, 3, count=blocks - 1)
        yield Layer(f"{name}.conv3", width, wide, edge, residual=True, second=True, count=blocks)
        channels = wide
    yield Layer("fc", 2048, 1000, 1, packed=False)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one layer by issue slots and by bytes, and the plan in words."""

    issue: float
    memory: float
    plan: str

    @property
    def seconds(self) -> float:
        """Return what decides."""
        return max(self.issue, self.memory)


def estimate(layer: Layer, batch: int, high: float, kernels: dict[str, dict[str, float]]) -> Estimate:
    """Estimate one call of a layer; `high` is the share of channels of more than four bits."""

    def pixel_bytes(channels: int) -> int:
        low = channels // 2
        return low + -(-int(channels * high / 2) // 16) * 16

    pixels, taps = batch * layer.edge**2, layer.kernel**2
    bytes_in = pixel_bytes(layer.channels) if layer.packed else layer.channels
    vectors = layer.channels % 16 == 0
    if layer.packed:
        low = layer.channels // 2
        chunks = -(-taps * low // 32) + -(-taps * (bytes_in - low) // 32)
    else:
        chunks = -(-taps * layer.channels // 64)
    plan = conv_plan(pixels, layer.outputs, 1, chunks, layer.packed, vectors, MULTIPROCESSORS)
    strips, warps = plan.tile[0] // 64, plan.tile[1] // 32
    kernel = f"conv_kernel<{strips}, {warps}, {16 if vectors else 4}, {str(layer.packed).lower()}>"
    out = "float" if layer.name == "fc" else "Packed"
    finisher = (
        f"finish_kernel<{out}, {'Residual' if layer.residual else 'None'}, {'Bytes' if layer.second else 'None'}>"
    )
    slots = kernels[kernel]["prologue"] + 64 * kernels[finisher]["finish"]
    slots += -(-chunks // plan.splits) * 2 * kernels[kernel]["slots"]
    issue = plan.busiest * strips * warps * slots / (4 * ISSUE * CLOCK)
    outputs = pixels * layer.outputs
    out = 4 * outputs if layer.name == "fc" else pixels * pixel_bytes(layer.outputs)
    memory = (
        pixels * layer.stride**2 if layer.kernel > 1 else pixels
    ) * bytes_in + taps * layer.channels * layer.outputs
    memory += out + outputs * (layer.residual + layer.second)
    if not vectors and layer.kernel > 1:  # words with padding are copied first
        issue += LAUNCH + 2 * pixels * layer.stride**2 * bytes_in / COPY
    if plan.splits > 1:
        issue += LAUNCH
        memory += 8 * outputs * plan.splits
    return Estimate(issue, memory / COPY, plan.describe(MULTIPROCESSORS))


def table(batch: int, high: float) -> str:
    """Return the estimate in Markdown."""
    kernels = json.loads((ROOT / "benchmarks" / "sass.json").read_text())["kernels"]
    lines = ["| layer | times | plan | issue us | memory us |", "|---|---|---|---|---|"]
    total = 0.0
    for layer in resnet50():
        found = estimate(layer, batch, high, kernels)
        total += layer.count * found.seconds
        lines.append(
            f"| {layer.name} | {layer.count} | {found.plan} | {1e6 * found.issue:.1f} | {1e6 * found.memory:.1f} |"
        )
    return "\n".join([*lines, f"| all | | | {1e3 * total:.2f} ms | |"])


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--high", type=float, default=0.3, help="share of channels of more than four bits")
    options = parser.parse_args(arguments)
    print(table(options.batch, options.high))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
