"""Exports quantized networks as ONNX files, and compares onnxruntime and OpenVINO on them with the networks.

python benchmarks/onnx_files.py [--threads N] prints one line a network: how near the runtimes come (SQNR of all
outputs, share of equal answers, images whose outputs are equal bit for bit), how many of its convolutions and matrix
products they compute in integers, and how long a call takes, the median, the runtimes in turns. It needs the extra
`peers`; networks of the folder PTQ4CUDA_DATA are left out without it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import networks
import torch
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig
from ptq4cuda.bench.architectures import ARCHITECTURES, calibrate_batch_norm, images

try:
    import onnx
    import onnxruntime
    import openvino
except ImportError as error:
    raise SystemExit(f"{__doc__}\n{error}: pip install '.[peers]'") from None

LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


class Subject(NamedTuple):
    """A network in integers, the float one, and images that calibration has not seen."""

    name: str
    net: nn.Module
    qnet: nn.Module
    test: Tensor


def subjects(part: str) -> Iterator[Subject]:
    """Quantize the networks that have `part` in their names."""
    for name in ("resnet18", "mobilenet_v2", "unet"):
        if part not in name:
            continue
        net = calibrate_batch_norm(ARCHITECTURES[name](), images(4)).eval()
        qnet = ptq4cuda.quantize(net, images(16, seed=1).split(8), QuantConfig.fast(), progress=False)
        yield Subject(name, net, qnet, images(8, seed=2))
    for name, make in networks.SUBJECTS.items() if networks.available() else ():
        if part in name:
            of = make()
            qnet = ptq4cuda.quantize(of.model, of.calibration.split(64), progress=False)
            yield Subject(of.name, of.model, qnet, torch.cat([batch for batch, _ in of.test])[:200])


class Runtime(NamedTuple):
    """A file in a runtime: the function that it is, and its layers that are computed in integers, and all."""

    run: Callable[[Tensor], Tensor]
    integers: int
    layers: int


def in_onnxruntime(file: Path, threads: int) -> Runtime:
    """Read a file into onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.optimized_model_filepath = str(file.with_suffix(".optimized.onnx"))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    integers = sum("Integer" in kind or kind in ("QLinearConv", "QLinearMatMul", "QGemm") for kind in kinds)
    floats = sum(kind in (*LAYERS, "FusedConv", "FusedMatMul") for kind in kinds)
    name = session.get_inputs()[0].name
    return Runtime(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), integers, integers + floats)


def in_openvino(file: Path, threads: int) -> Runtime:
    """Read a file into OpenVINO."""
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = {
            key: value if isinstance(value, str) else value.astype(str) for key, value in node.get_rt_info().items()
        }
        if facts["layerType"] in ("Convolution", "Deconvolution", "MatMul", "FullyConnected"):
            found.append(facts["runtimePrecision"])
    request = compiled.create_infer_request()
    integers = sum(precision in ("u8", "i8") for precision in found)
    return Runtime(lambda x: torch.from_numpy(request.infer({0: x.numpy()})[0].copy()), integers, len(found))


def decibels(expected: Tensor, found: Tensor) -> float:
    """Return the SQNR of outputs, inf where they are equal."""
    noise = float((expected.double() - found.double()).square().sum())
    return 10 * math.log10(float(expected.double().square().sum()) / noise) if noise else math.inf


def milliseconds(functions: list[Callable[[Tensor], Tensor]], x: Tensor, rounds: int = 15) -> list[float]:
    """Return the median of each, called in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, taken in zip(functions, times, strict=True):
            function(x)  # what the one before it left in caches does not count
            begin = time.perf_counter()
            function(x)
            taken.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(taken) for taken in times]


@torch.inference_mode()
def compare(subject: Subject, file: Path, threads: int) -> str:
    """Return a line of the table."""
    x = subject.test
    export = ptq4cuda.export_onnx(subject.qnet, file, x[:1])
    runtimes = [in_onnxruntime(file, threads), in_openvino(file, threads)]
    expected = torch.cat([subject.qnet(part) for part in x.split(8)])
    parts = []
    for runtime in runtimes:
        found = torch.cat([runtime.run(part) for part in x.split(8)])
        answers = (found.argmax(1) == expected.argmax(1)).float().mean()
        same = sum(map(torch.equal, found, expected))
        parts.append(
            f"{decibels(expected, found):.1f} dB, {answers:.2%}, {same} of {len(x)} equal, "
            f"{runtime.integers}/{runtime.layers}"
        )
    one = x[:1].contiguous(memory_format=torch.channels_last)
    plain = x[:1].contiguous()
    ways = [lambda _: subject.net(one), lambda _: subject.qnet(one), *(lambda _, r=r: r.run(plain) for r in runtimes)]
    times = [f"{ms:.2f}" for ms in milliseconds(ways, one)]
    return " | ".join((subject.name, f"{export.bytes / 1e6:.2f}", *parts, *times))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the runtimes (default: 1)")
    parser.add_argument("--only", default="", help="a part of a network's name: others are left out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("network | MB | onnxruntime | OpenVINO | float, ms | ours | onnxruntime | OpenVINO")
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects(arguments.only):
            print(compare(subject, Path(folder) / "net.onnx", arguments.threads), flush=True)


if __name__ == "__main__":
    main()
