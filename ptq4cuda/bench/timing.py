"""Times calls that take turns, so that a machine that slows down slows all of them; says on which machine."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ptq4cuda import _native


def take_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, least_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round, after one call of each that does not count.

    Args:
        calls: by name. Work that they leave to a GPU is waited for.
        rounds: at least.
        least_seconds: further rounds follow until all of them together took this long.
    """

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for call in calls.values():
        timed(call)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    done, total = 0, 0.0
    while done < rounds or total < least_seconds:
        for name, call in calls.items():
            seconds[name].append(timed(call))
            total += seconds[name][-1]
        done += 1
    return seconds


def captured(call: Callable[[], object], times: int) -> Callable[[], None]:
    """Return what replays a CUDA graph of a call, so many times in a row."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # the first may compile, choose algorithms or initialise
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


def write_figures(path: Path, device: str, **figures: object) -> None:
    """Write machine and figures so far as JSON, in one step: whatever ends the run leaves a whole file."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps({"machine": machine_line(device), **figures}, indent=1) + "\n")
    unfinished.replace(path)


def machine_line(device: str) -> str:
    """Name what the figures were measured on."""
    if device == "cpu":
        level = _native.build_info.get("simd_level", "no native library")
        return f"{processor()} ({level}), {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def processor() -> str:
    """Name the processor."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()
