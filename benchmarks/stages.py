"""Where the time of quantize() goes: python benchmarks/stages.py [--network resnet50] [--images 512] [--fast] ...

Quantizes a random network of ptq4cuda.bench.architectures, or one of --model module:function, and prints seconds of
the clock and of the CPU for each stage, in whatever layer, those of trials apart, and the most memory that the
process took. Threads are those of torch (OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ptq4cuda import QuantConfig, pipeline, quantize, save
from ptq4cuda.artifact.report import table
from ptq4cuda.bench import architectures
from ptq4cuda.calibrate import by_graph, signals
from ptq4cuda.calibrate.statistics import ChannelHistogram, ChannelStatistics
from ptq4cuda.solve import layer

DIFFERENT = 64  # images, which are then repeated with other brightness

# Functions by stage; what one of them calls of another counts for that one.
STAGES: list[tuple[str, Any, str]] = [
    ("trial", pipeline, "shares_of"),
    ("model is traced and folded", pipeline, "prepare"),
    ("model is traced and folded", pipeline, "check_shapes"),
    ("what errors cost at the output", by_graph, "output_importance"),
    ("layers in float", signals.LayerCall, "of"),
    ("outliers", signals, "find_outliers"),
    ("statistics", ChannelStatistics, "over"),
    ("histograms", ChannelHistogram, "over"),
    ("ranges and bits", layer, "fit_activation"),
    ("moments of samples", layer, "layer_moments"),
    ("least squares", layer, "fit_weights"),
    ("least squares", layer, "fit_blocks"),
    ("rounding", layer, "round_for_output"),
    ("rounding", layer, "round_to_nearest"),
    ("means of outputs", layer, "match_output"),
    ("quantized layers", by_graph.GraphWalk, "_solve"),
    ("other operations", by_graph.GraphWalk, "visit"),
    ("damage of bits", pipeline, "measure_parts"),
    ("noise of the output", pipeline, "output_noise"),
    ("program of integers", pipeline, "lower"),
]


class Clock:
    """Seconds of the clock and of the CPU by stage, without what other stages took meanwhile."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._stack = ["else"]
        self._since = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def switch(self) -> None:
        """Count what has passed for the stage under way."""
        now = self._now()
        for i in range(2):
            self.seconds[self._stack[-1]][i] += now[i] - self._since[i]
        self._since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts for a stage."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._stack.append(f"trial: {stage}" if self._stack[-1].startswith("trial") else stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._stack.pop()

        return run


def patch(clock: Clock) -> None:
    """Count the time of all stages."""
    for stage, owner, name in STAGES:
        found = vars(owner)[name]
        if isinstance(found, classmethod):
            setattr(owner, name, classmethod(clock.timed(stage, found.__func__)))
        else:
            setattr(owner, name, clock.timed(stage, found))


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", choices=sorted(architectures.ARCHITECTURES))
    parser.add_argument("--model", help="module:function that returns a network")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--fast", action="store_true", help="QuantConfig.fast()")
    parser.add_argument("--progress", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = architectures.images(DIFFERENT, arguments.size)
    if arguments.model:
        module, _, function = arguments.model.partition(":")
        name, network = function, getattr(importlib.import_module(module), function)()
    else:
        name, network = arguments.network, architectures.ARCHITECTURES[arguments.network]()
    network = architectures.calibrate_batch_norm(network, images[:16]).eval()
    repeats = -(-arguments.images // DIFFERENT)
    brightness = torch.linspace(1.0, 0.7, repeats).repeat_interleave(DIFFERENT)[:, None, None, None]
    batches = (images.repeat(repeats, 1, 1, 1) * brightness)[: arguments.images].split(arguments.batch)

    clock = Clock()
    patch(clock)
    config = QuantConfig.fast() if arguments.fast else QuantConfig()
    clock.switch()
    clock.seconds.clear()
    quantized = quantize(network, batches, config, progress=arguments.progress)
    clock.switch()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with tempfile.TemporaryDirectory() as folder:
        save(quantized, Path(folder, "network.ptq4"))
        digest = hashlib.sha256(Path(folder, "network.ptq4").read_bytes()).hexdigest()[:16]
    rows = sorted(clock.seconds.items(), key=lambda item: -item[1][0])
    rows.append(("all", [sum(each) for each in zip(*clock.seconds.values(), strict=True)]))
    print(
        f"\n{name}, {'fast()' if arguments.fast else 'default'}, {arguments.images} images of {arguments.size} pixels"
    )
    print(table(("stage", "s", "CPU s"), [(stage, *(f"{s:.1f}" for s in each)) for stage, each in rows]))
    print(f"peak {peak:.2f} GiB, {torch.get_num_threads()} thread(s), file {digest}")


if __name__ == "__main__":
    main()
