"""benchmark(): how long a network of one's own takes in float, simulated and in integers."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda import graph
from ptq4cuda.artifact.file import load, save
from ptq4cuda.artifact.report import DASH, table
from ptq4cuda.bench.timing import machine_line, take_turns
from ptq4cuda.calibrate.inputs import Batch, arguments_of, batch_size, check_model, device_of
from ptq4cuda.compat import tree_map_only
from ptq4cuda.config import QuantConfig
from ptq4cuda.errors import naming_failures
from ptq4cuda.nn import QuantModule
from ptq4cuda.pipeline import quantize

_ROUNDS = 5  # at least
_MOST_THREADS = 1024  # more than any machine has cores; OpenMP crashes on numbers that are far too large


@dataclass(frozen=True)
class BenchmarkRow:
    """One way to run the network.

    Attributes:
        batch: samples of a call.
        way: "float", "simulate" or "integer".
        ms: median milliseconds of a call.
        samples_per_second: of these calls.
        over_float: times faster than float; None where that was not measured.
    """

    batch: int
    way: str
    ms: float
    samples_per_second: float
    over_float: float | None


@dataclass(frozen=True)
class Benchmark:
    """What benchmark() measured: print it.

    Attributes:
        machine: processor or GPU, instructions of the integer kernels, threads, version of torch.
        rows: by batch, then by way.
        remarks: what was not measured, and what runs otherwise than its name says.
    """

    machine: str
    rows: tuple[BenchmarkRow, ...]
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a table."""
        header = ("batch", "way", "ms", "samples/s", "× float")
        rows = [
            (
                row.batch,
                row.way,
                f"{row.ms:.4g}",
                f"{row.samples_per_second:.1f}",
                DASH if row.over_float is None else f"{row.over_float:.2f}",
            )
            for row in self.rows
        ]
        remarks = [f"{remark[:1].upper()}{remark[1:]}." for remark in self.remarks]
        return "\n".join([f"{self.machine}, medians", "", table(header, rows), *(["", *remarks] if remarks else [])])


@torch.no_grad()
def benchmark(
    net: nn.Module,
    example: Any,
    batches: Sequence[int] = (1, 8),
    threads: int | None = None,
    *,
    float_net: nn.Module | None = None,
    seconds: float = 1.0,
) -> Benchmark:
    """Time a network in float, simulated and in integers, in one run: the three take turns.

    Args:
        net: a float network in evaluation mode, which is quantized by QuantConfig.fast() on the example: times do not
            depend on how good its quantizers are. Or a network of quantize() or load(); then `float_net` is needed
            to time it in float and simulated, too.
        example: a batch of inputs as for quantize(), of one sample or more; they are repeated to fill a batch. It is
            given in its memory format, as is the network: channels_last is faster for most convolutions in float.
        batches: numbers of samples of a call.
        threads: of PyTorch, meanwhile. Default: as many as it has.
        float_net: the float network that a quantized one was made of, or of its architecture.
        seconds: that are spent on each batch at least, and never less than five calls of each.

    Returns:
        medians: print it, or take its rows. A compiled network is timed compiled.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or value, the network cannot be quantized, the two
            are not of one architecture, or a call fails.
    """
    _check(net, batches, threads, float_net, seconds)
    batch = arguments_of(graph.unwrap(net), example, "the example")
    with _threads(threads):
        device = device_of(net)
        batch = tree_map_only(Tensor, lambda t: t.to(device), batch)
        ways, remarks = _ways(net, float_net, batch, example)
        rows: list[BenchmarkRow] = []
        for count in batches:
            calls = {way: _call(way, network, resized(batch, count)) for way, network in ways.items()}
            times = {way: statistics.median(s) for way, s in take_turns(calls, _ROUNDS, seconds).items()}
            rows += [
                BenchmarkRow(count, way, 1e3 * s, count / s, times["float"] / s if "float" in times else None)
                for way, s in times.items()
            ]
        return Benchmark(machine_line(device.type), tuple(rows), tuple(remarks))


def _check(net: Any, batches: Any, threads: Any, float_net: Any, seconds: Any) -> None:
    for name, value in (("net", net), ("float_net", float_net)):
        if not isinstance(value, nn.Module) and not (value is None and name == "float_net"):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
    whole = isinstance(batches, Sequence) and all(type(count) is int and count > 0 for count in batches)
    if not whole or isinstance(batches, str) or not batches:
        raise ValueError(f"batches must be numbers of samples, from 1, as (1, 8), got {batches!r}")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= _MOST_THREADS):
        raise ValueError(f"threads must be a number from 1 to {_MOST_THREADS}, got {threads!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0.0 <= seconds < float("inf"):
        raise ValueError(f"seconds must be a number from 0, got {seconds!r}")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ways(
    net: nn.Module, float_net: nn.Module | None, batch: Batch, example: Any
) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the ways to run a network, and what is to be said about them."""
    remarks = []
    quantized = net
    if not any(isinstance(module, QuantModule) for module in net.modules()):
        if float_net is not None:
            raise ValueError("float_net goes with a quantized net, but net is a float network itself: leave it out")
        check_model(graph.unwrap(net))
        _call("float", net, batch)
        float_net, quantized = net, quantize(net, [example], QuantConfig.fast(), progress=False)
        remarks.append("quantized by QuantConfig.fast() on the example")
    ways: dict[str, nn.Module] = {}
    if float_net is not None:
        check_model(graph.unwrap(float_net))
        ways = {"float": float_net, "simulate": _simulated(graph.unwrap(quantized), float_net)}
    else:
        remarks.append("float and simulate are not measured: they need the float network, float_net=...")
    layers = [module for module in quantized.modules() if isinstance(module, QuantModule)]
    simulated = sum(layer.engine is None for layer in layers)
    if simulated == len(layers):
        ways.setdefault("simulate", quantized)
        remarks.append("no layer computes in integers: report() says why")
    else:
        ways["integer"] = quantized
        if simulated:
            remarks.append(f"in integers {simulated} of {len(layers)} quantized layers stay simulated: see report()")
    return ways, remarks


def _simulated(quantized: nn.Module, float_net: nn.Module) -> nn.Module:
    """Return a quantized network as load() gives it to be looked into."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/net.ptq4"
        save(quantized, path)
        try:
            return load(path, float_net, execution="simulate")
        except ValueError as error:
            why = str(error).replace(repr(path), "net").replace(path, "net")
            raise ValueError(f"float_net is no network of net's architecture: {why}") from error


def resized(batch: Batch, count: int) -> Batch:
    """Return arguments for another number of samples: the first ones, over and over where they do not suffice.

    Every tensor as long as the batch has one row a sample; tensors of other lengths stay as they are.
    """
    given = batch_size(batch)

    def fill(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != given:
            return tensor.clone()
        return torch.cat([tensor] * -(-count // given))[:count].clone()  # in its memory format

    filled: Batch = tree_map_only(Tensor, fill, batch)
    return filled


def _call(way: str, network: nn.Module, batch: Batch) -> Callable[[], object]:
    """Return what calls a network, once it has been called.

    Raises:
        ValueError: the call fails.
    """
    args, kwargs = batch
    call = partial(network, *args, **kwargs)
    name = "the float network" if way == "float" else "the quantized network"
    with naming_failures(f"{name} fails on a batch of {batch_size(batch)}"):
        call()
    return call
