"""Serves one network from many threads for a while: python benchmarks/serving.py [--seconds 600] [--threads 8].

Threads call one network with batches and images of changing sizes, while another thread quantizes, saves and loads.
Every output must be the one that a single thread computed before, and every file that is written the same. It prints
the memory of the process every so often, whether it grows, and how long calls took; the exit status is 1 where an
output or a file differed, or where memory grew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig
from ptq4cuda.bench import architectures

SIZES = ((1, 32), (1, 96), (3, 64), (8, 48), (2, 160))  # of batches, and pixels of their images
GROWTH = 0.02  # of the memory in the second half of the time, that is no noise
SHORTEST, STEP = 1e-5, 1.02  # seconds of the first bin of latencies, and how much longer each is than the one before


@dataclass
class Latencies:
    """How long calls took, counted in bins: a list of all would grow as fast as a network that leaks.

    Attributes:
        counts: of calls in each bin.
        most: seconds.
    """

    counts: list[int] = field(default_factory=lambda: [0] * 800)
    most: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a call."""
        place = int(math.log(max(seconds, SHORTEST) / SHORTEST, STEP))
        self.counts[min(place, len(self.counts) - 1)] += 1
        self.most = max(self.most, seconds)

    def percentile(self, share: float) -> float:
        """Return the seconds that this share of the calls took at most, 2 % above it at worst."""
        below = itertools.accumulate(self.counts)
        place = next(i for i, count in enumerate(below) if count >= share * sum(self.counts))
        return min(SHORTEST * STEP ** (place + 1), self.most)


@dataclass
class Result:
    """What was measured.

    Attributes:
        seconds, threads: as asked for.
        calls: of the network.
        quantized: networks that were quantized, saved and loaded meanwhile.
        wrong: outputs and files that differed.
        curve: pairs of seconds and MB of memory.
        milliseconds: of the calls of each size: percentiles 50, 90, 99 and the most.
    """

    seconds: float
    threads: int
    calls: int = 0
    quantized: int = 0
    wrong: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        """How far the memory of the last quarter is above that of the one before the middle, as a share."""
        sizes = [size for _, size in self.curve]
        quarter = max(len(sizes) // 4, 1)
        before, after = sizes[quarter : 2 * quarter] or sizes[:1], sizes[-quarter:]
        return statistics.median(after) / statistics.median(before) - 1


def resident() -> float:
    """Return the MB of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def serve(seconds: float, threads: int, tell: Callable[[str], None] = print) -> Result:
    """Call a network from many threads for so many seconds."""
    torch.manual_seed(0)
    model = architectures.ARCHITECTURES["mobilenet_v2"](10).eval()
    network = ptq4cuda.quantize(model, [architectures.images(8, 64)], QuantConfig.fast(), progress=False)
    inputs = [torch.randn(batch, 3, size, size) for batch, size in SIZES]
    with torch.no_grad():
        expected = [network(x) for x in inputs]
    result, lock = Result(seconds, threads), threading.Lock()
    times = [Latencies() for _ in SIZES]
    end = time.monotonic() + seconds

    def call(seed: int) -> None:
        rng = random.Random(seed)
        torch.set_num_threads(1)
        while time.monotonic() < end:
            i = rng.randrange(len(SIZES))
            start = time.perf_counter()
            with torch.no_grad():
                right = torch.equal(network(inputs[i]), expected[i])
            took = time.perf_counter() - start
            with lock:
                times[i].add(took)
                result.calls += 1
                result.wrong += not right

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads + 1) as pool:
        others = [pool.submit(call, seed) for seed in range(threads)]
        others.append(pool.submit(_quantize, Path(folder), end, result, lock))
        start, every = time.monotonic(), max(seconds / 40, 0.1)
        while (now := time.monotonic()) < end:
            result.curve.append((round(now - start, 1), round(resident(), 1)))
            tell(f"{result.curve[-1][0]:8.1f} s  {result.curve[-1][1]:8.1f} MB  {result.calls:,} calls")
            time.sleep(min(every, max(end - now, 0.01)))
        for other in others:
            other.result()
    for (batch, size), taken in zip(SIZES, times, strict=True):
        points = [*map(taken.percentile, (0.5, 0.9, 0.99)), taken.most]
        result.milliseconds[f"{batch} x {size} px"] = [round(1e3 * t, 2) for t in points]
    return result


def _quantize(folder: Path, end: float, result: Result, lock: threading.Lock) -> None:
    """Quantize, save and load a small network again and again; the file is the same every time."""
    torch.manual_seed(1)
    head = nn.Flatten(), nn.Linear(8 * 36, 5)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), *head).eval()
    images = architectures.images(4, 10)
    first: tuple[bytes, Tensor] | None = None
    while time.monotonic() < end:
        ptq4cuda.save(ptq4cuda.quantize(model, [images], progress=False), folder / "net.ptq4")
        with torch.no_grad():
            made = (folder / "net.ptq4").read_bytes(), ptq4cuda.load(folder / "net.ptq4", model)(images)
        first = first or made
        with lock:
            result.quantized += 1
            result.wrong += made[0] != first[0] or not torch.equal(made[1], first[1])


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = serve(options.seconds, options.threads)
    print(f"{result.calls:,} calls by {result.threads} threads, {result.quantized:,} networks quantized meanwhile")
    print(f"{result.wrong} outputs or files differed; memory {100 * result.growth:+.1f} % in the second half")
    for name, points in result.milliseconds.items():
        print(f"{name:>12}: 50 % {points[0]} ms, 90 % {points[1]}, 99 % {points[2]}, most {points[3]}")
    if options.json:
        options.json.write_text(json.dumps(asdict(result)))
    return int(result.wrong > 0 or result.growth > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
