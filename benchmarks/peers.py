"""Times ptq4cuda beside what its users would run on a CPU instead: python benchmarks/peers.py [CASE ...] [--busy].

A case is a network of ptq4cuda.bench.architectures, the pixels of its images and how many of them are in a call:
resnet18@224x8. `resnet18` means all of CASES that begin so. Contenders are 4-bit integers of ours, int8 of OpenVINO
(quantized by NNCF), of onnxruntime (U8S8) and of PyTorch (PT2E, x86 inductor), and float32, compiled and eager. All
have the same random weights, whose BatchNorms fit (speed does not depend on them), the same calibration images and
the same input, in each one's own layout.

Each contender is a process of its own, so that no thread pool stands beside another, with as many threads as asked
for and whatever else its library does by default. Processes are started one after the other, which gives the time
from their start to their first result, and the memory that a process has that only loads and runs a network. Then
they take turns, in rounds: a call that does not count and then as many as fit into a turn. Figures are medians of the
rounds' medians. With --busy each round is followed by one beside a process that keeps a core busy. Every contender
is asked what it executes, and its output is compared with the float one.

--simd lets all of them use lesser instructions than the processor has, with the same names as PTQ4CUDA_SIMD;
onnxruntime cannot be told, and is left out.

`pip install '.[peers]'` brings the others; one that is not there is left out. Files that contenders load are made
once, in --folder. Figures go to --json, in which cases that are not measured anew stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

CASES = (
    *("resnet18@224x1", "resnet18@224x8", "resnet50@224x1", "resnet50@224x8"),
    *("mobilenet_v2@224x1", "mobilenet_v2@224x8", "mobilenet_v2@32x1"),
)
# What ours is told by PTQ4CUDA_SIMD, and how the others are: oneDNN, which OpenVINO has too, and PyTorch.
SIMD = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx512_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "ATEN_CPU_CAPABILITY": "avx512"},
}
_CALIBRATION = 16  # images
_PAUSE = 0.05  # seconds between turns, in which the threads of the one before go to sleep
_QUIET = 0.05  # share of the cores that other work may take
_QUICK = 10.0  # seconds of starts after which a contender is not started again


@dataclass(frozen=True)
class Case:
    """A network, the pixels of its images, how many are in a call, and the folder of its files."""

    name: str
    folder: Path

    @property
    def parts(self) -> tuple[str, int, int]:
        """Network, pixels and batch."""
        network, size, batch = re.fullmatch(r"(\w+)@(\d+)x(\d+)", self.name).groups()  # type: ignore[union-attr]
        return network, int(size), int(batch)

    def file(self, name: str) -> Path:
        """Return the path of a file that serves all batches, or, with a {} in its name, this one."""
        network, size, batch = self.parts
        return self.folder / f"{network}@{size}" / name.format(batch)

    @property
    def inputs(self) -> Any:
        """float32 [batch, 3, pixels, pixels]."""
        return np.load(self.file("input{}.npy"))

    def float_network(self, calibrated: bool = False) -> Any:
        """Return the float network: with BatchNorms that fit, or as its class makes it, for weights that follow."""
        from ptq4cuda.bench import architectures

        build = architectures.ARCHITECTURES[self.parts[0]]
        if calibrated:
            return architectures.calibrate_batch_norm(build(), architectures.images(8, 64))
        architectures.randomize = lambda net, seed=0: net
        return build().eval()

    def trained_network(self) -> Any:
        """Return the float network with the weights that all contenders have."""
        import torch

        net = self.float_network()
        net.load_state_dict(torch.load(self.file("float.pt"), mmap=True))
        return net


@dataclass(frozen=True)
class Loaded:
    """A contender that is ready: `call` returns the output, `executes` what runs and whether that is in integers."""

    call: Callable[[], Any]
    executes: Callable[[], tuple[str, bool]]


@dataclass(frozen=True)
class Contender:
    """One way to run a network: how its file is made where it is missing, and loaded. It needs modules."""

    label: str
    file: str
    make: Callable[[Case, Path], None]
    load: Callable[[Case, int], Loaded]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """What is not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


# --- PyTorch: ours, float32 and PT2E ----------------------------------------------------------------------------


def make_float(case: Case, path: Path) -> None:
    """Write the weights."""
    import torch

    torch.save(case.float_network(calibrated=True).state_dict(), path)


def calibration(case: Case) -> Any:
    """Return the images that all calibrate on, float32 [N, 3, pixels, pixels]."""
    return np.load(case.file("calibration.npy"))


def make_ours(case: Case, path: Path) -> None:
    """Quantize by the preset that takes seconds: the default's networks take as long, with the same bits."""
    import torch

    import ptq4cuda

    batches = torch.from_numpy(calibration(case)).split(4)
    network = ptq4cuda.quantize(case.trained_network(), batches, ptq4cuda.QuantConfig.fast(), progress=False)
    ptq4cuda.save(network, path)


def make_pt2e(case: Case, path: Path) -> None:
    """Quantize for inductor's kernels on x86, for this batch."""
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = case.parts[2]
    images = torch.from_numpy(calibration(case))
    images = images.repeat(-(-batch // len(images)), 1, 1, 1)
    exported = torch.export.export(case.trained_network(), (images[:batch],)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for chunk in images[: len(images) // batch * batch].split(batch):
        prepared(chunk)
    torch.export.save(torch.export.export(convert_pt2e(prepared), (images[:batch],)), path)


def load_ours(case: Case, threads: int) -> Loaded:
    """Load into the architecture."""
    import ptq4cuda
    from ptq4cuda import _native
    from ptq4cuda.artifact.record import record_of

    network = ptq4cuda.load(case.file(OURS.file), case.float_network())
    layers = Counter(layer.execution for layer in record_of(network).layers)
    level = _native.build_info.get("simd_level", "no native library")
    return of_torch(
        case, threads, network, f"{level}, layers: {counts(layers)}", lambda ops: set(layers) == {"integer"}
    )


def load_eager(case: Case, threads: int) -> Loaded:
    """Load the weights."""
    import torch

    return of_torch(case, threads, case.trained_network().to(memory_format=torch.channels_last))


def load_compiled(case: Case, threads: int) -> Loaded:
    """Load the weights and compile, with BatchNorm folded and weights packed."""
    import torch

    return of_torch(case, threads, torch.compile(case.trained_network().to(memory_format=torch.channels_last)))


def load_pt2e(case: Case, threads: int) -> Loaded:
    """Load the exported program and compile it."""
    import torch
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401 (it registers the operators of the program)

    def all_in_integers(ops: Counter[str]) -> bool:
        return any("qconv" in op for op in ops) and not any("conv" in op and "qconv" not in op for op in ops)

    network = torch.export.load(case.file(PT2E.file)).module()
    return of_torch(case, threads, torch.compile(network), "", all_in_integers)


def of_torch(
    case: Case,
    threads: int,
    network: Any,
    first: str = "",
    is_integer: Callable[[Counter[str]], bool] = lambda ops: False,
) -> Loaded:
    """Return what calls a network, and its operators with products, as PyTorch's profiler sees them."""
    import torch

    torch.set_num_threads(threads)
    x = torch.from_numpy(case.inputs).contiguous(memory_format=torch.channels_last)

    def call() -> Any:
        with torch.inference_mode():
            return network(x).numpy()

    def executes() -> tuple[str, bool]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        weighted = re.compile(r"ptq4cuda::|(onednn|mkldnn)::\w*(conv|linear)|aten::(convolution|addmm)$")
        ops: Counter[str] = Counter(event.name for event in profile.events() if weighted.match(event.name))
        return ", ".join(filter(None, (first, counts(ops)))), is_integer(ops)

    return Loaded(call, executes)


def counts(counter: Mapping[str, int]) -> str:
    """Return a counter as text."""
    return ", ".join(f"{n} {name}" for name, n in counter.items())


# --- onnxruntime and OpenVINO -----------------------------------------------------------------------------------


def onnx_file(case: Case) -> Path:
    """Return the float network as ONNX, of any batch."""
    import torch

    path = case.file("float.onnx")
    if not path.exists():
        sample = torch.from_numpy(calibration(case)[:2])
        shapes = {0: torch.export.Dim("n", min=1, max=256)}
        options = {"dynamo": True, "external_data": False, "dynamic_shapes": (shapes,), "verbose": False}
        torch.onnx.export(case.trained_network(), (sample,), path, input_names=["x"], output_names=["y"], **options)
    return path


def make_onnxruntime(case: Case, path: Path) -> None:
    """Quantize as onnxruntime's documentation says: U8S8, QDQ, weights per channel."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images: Iterator[Any] = iter(np.split(calibration(case), _CALIBRATION))

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.images, None)
            return None if x is None else {"x": x}

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(onnx_file(case), prepared, skip_symbolic_shape=True)
    kinds = {"activation_type": q.QuantType.QUInt8, "weight_type": q.QuantType.QInt8}
    q.quantize_static(prepared, path, Images(), quant_format=q.QuantFormat.QDQ, per_channel=True, **kinds)


def load_onnxruntime(case: Case, threads: int) -> Loaded:
    """Open a session."""
    import onnxruntime

    path = str(case.file(ONNXRUNTIME.file))

    def open_session(optimized: str = "") -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        if optimized:
            options.optimized_model_filepath = optimized
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    session, x = open_session(), case.inputs

    def executes() -> tuple[str, bool]:
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            open_session(f"{folder}/optimized.onnx")
            graph = onnx.load(f"{folder}/optimized.onnx").graph
        ops = Counter(node.op_type for node in graph.node)
        return counts(ops), "QLinearConv" in ops and not {"Conv", "FusedConv"} & set(ops)

    return Loaded(lambda: session.run(None, {"x": x})[0], executes)


def make_openvino(case: Case, path: Path) -> None:
    """Quantize by NNCF with its defaults."""
    import nncf
    import openvino

    images = nncf.Dataset(list(np.split(calibration(case), _CALIBRATION)))
    openvino.save_model(nncf.quantize(openvino.convert_model(onnx_file(case)), images), path)


def load_openvino(case: Case, threads: int) -> Loaded:
    """Compile for this batch, for latency."""
    import openvino

    core, x = openvino.Core(), case.inputs
    model = core.read_model(case.file(OPENVINO.file))
    model.reshape(list(x.shape))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()

    def executes() -> tuple[str, bool]:
        layers: Counter[tuple[str, str, str]] = Counter()
        for op in compiled.get_runtime_model().get_ops():
            said = [op.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision", "primitiveType")]
            if "Convolution" in said[0] or said[0] in ("FullyConnected", "MatMul"):
                layers[said[0], said[1], said[2]] += 1
        convolutions = {precision for kind, precision, _ in layers if "Convolution" in kind}
        return counts({" ".join(said): n for said, n in layers.items()}), convolutions <= {"u8", "i8"}

    return Loaded(lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)[0], executes)


_ONNX = ("onnx", "onnxscript")
OURS = Contender("4-bit, ours", "net.ptq4", make_ours, load_ours)
OPENVINO = Contender("OpenVINO int8", "int8.xml", make_openvino, load_openvino, ("openvino", "nncf", *_ONNX))
ONNXRUNTIME = Contender("onnxruntime int8", "u8s8.onnx", make_onnxruntime, load_onnxruntime, ("onnxruntime", *_ONNX))
PT2E = Contender("PT2E int8", "pt2e{}.pt2", make_pt2e, load_pt2e, ("torchao",))
CONTENDERS = {
    "ours": OURS,
    "openvino": OPENVINO,
    "onnxruntime": ONNXRUNTIME,
    "pt2e": PT2E,
    "compiled": Contender("float32 compiled", "float.pt", make_float, load_compiled),
    "eager": Contender("float32", "float.pt", make_float, load_eager),
}
INT8_RUNTIMES = ("openvino", "onnxruntime")
FLOAT = ("compiled", "eager")


# --- in a process of its own ------------------------------------------------------------------------------------


def make_files(case: Case, names: list[str]) -> None:
    """Write the files that are missing."""
    import torch

    from ptq4cuda.bench import architectures

    _, size, batch = case.parts
    case.file("").mkdir(parents=True, exist_ok=True)
    arrays = {
        "calibration.npy": lambda: architectures.images(_CALIBRATION, size, seed=1).numpy(),
        "input{}.npy": lambda: architectures.images(batch, size, seed=2).numpy(),
    }
    for name, array in arrays.items():
        if not case.file(name).exists():
            np.save(case.file(name), array())
    for name in ("eager", *names):  # the float weights are everybody's
        path = case.file(CONTENDERS[name].file)
        if not path.exists():
            print(f"{case.name}: making {path.name} ...", file=sys.stderr)
            part = path.with_name(f"part.{path.name}")
            try:
                CONTENDERS[name].make(case, part)
            except Exception:  # of one contender: it will be left out
                traceback.print_exc()
            for written in path.parent.glob(f"{part.stem}.*"):  # OpenVINO writes two
                written.rename(written.with_name(written.name.removeprefix("part.")))
    if not case.file("output{}.npy").exists():
        with torch.no_grad():
            np.save(case.file("output{}.npy"), case.trained_network()(torch.from_numpy(case.inputs)).numpy())


def serve(case: Case, name: str, threads: int, since: float) -> None:
    """Load and run a contender, tell how that went, then take a turn for each number of seconds that is sent."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    loaded = CONTENDERS[name].load(case, threads)
    output = np.array(loaded.call(), dtype=np.float64)
    start = time.monotonic() - since
    for _ in range(3):
        loaded.call()
    status = Path("/proc/self/status").read_text()
    memory = {key: int(re.search(rf"{key}:\s+(\d+) kB", status).group(1)) << 10 for key in ("VmRSS", "VmHWM")}  # type: ignore[union-attr]
    executes, integer = loaded.executes()
    expected = np.load(case.file("output{}.npy")).astype(np.float64)
    sqnr = 10 * np.log10((expected**2).sum() / max(((expected - output) ** 2).sum(), 1e-30))
    first = {"start": start, "rss": memory["VmRSS"], "peak_rss": memory["VmHWM"], "sqnr": sqnr}
    print(json.dumps({**first, "executes": executes, "integer": integer}), file=replies)
    for line in sys.stdin:
        wall, cpu = take_turn(loaded.call, float(line))
        print(json.dumps({"ms": 1e3 * statistics.median(wall), "cpu_ms": 1e3 * statistics.median(cpu)}), file=replies)


def take_turn(call: Callable[[], object], seconds: float) -> tuple[list[float], list[float]]:
    """Return the seconds of calls, on the wall and of all processors, after one that does not count."""
    call()
    wall: list[float] = []
    cpu: list[float] = []
    while len(wall) < 3 or sum(wall) < seconds:
        before = time.process_time()
        start = time.perf_counter()
        call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - before)
    return wall, cpu


# --- the one that asks ------------------------------------------------------------------------------------------


class Child:
    """A contender's process."""

    def __init__(self, case: Case, name: str, threads: int, log: Any) -> None:
        self.process = child("serve", case, name, threads, log)
        self.facts: dict[str, Any] = self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"it ended with status {self.process.wait()}")
        return dict(json.loads(line))

    def turn(self, seconds: float) -> dict[str, float]:
        """Let it take a turn."""
        print(seconds, file=self.process.stdin, flush=True)
        reply = self._reply()
        time.sleep(_PAUSE)
        return reply

    def end(self) -> None:
        """Let it end."""
        self.process.communicate()


def child(role: str, case: Case, names: str, threads: int, log: Any) -> subprocess.Popen[str]:
    """Start this program in a role."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_FREEZING": "1"}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(case.folder / "inductor"))
    command = [sys.executable, __file__, case.name, "--folder", str(case.folder), "--threads", str(threads)]
    command += ["--child", role, names, str(time.monotonic())]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=log, text=True)


@contextlib.contextmanager
def busy_core() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process, stopped, that keeps the last core that may be used busy."""
    core = max(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def measure(case: Case, names: list[str], arguments: argparse.Namespace, log: Any) -> dict[str, Any]:
    """Return the figures of each contender on a case, and the share of the processors that other work took."""
    children: dict[str, Child] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            children[name], rows[name] = start(case, name, arguments, log)
        except RuntimeError as error:
            print(f"{case.name}: {CONTENDERS[name].label} is left out: {error}; {log.name} says why", flush=True)
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    with busy_core() if arguments.busy else contextlib.nullcontext() as beside:
        own = [*(served.process.pid for served in children.values()), *([beside.pid] if beside else [])]
        before = processor_time(own)
        for number in range(arguments.rounds if children else 0):
            first = number % len(children)  # no one always comes after the same
            for busy in (False, True) if beside else (False,):
                if beside:
                    beside.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
                    time.sleep(_PAUSE)
                for name in [*children][first:] + [*children][:first]:
                    found.setdefault((name, busy), []).append(children[name].turn(arguments.turn))
        whole, others = (after - earlier for after, earlier in zip(processor_time(own), before, strict=True))
    for served in children.values():
        served.end()
    for (name, busy), replies in found.items():
        for key in replies[0]:
            figures = [reply[key] for reply in replies]
            rows[name][f"busy_{key}" if busy else key] = statistics.median(figures)
            rows[name][f"rounds_{'busy_' if busy else ''}{key}"] = figures
    return {"others": others / max(whole, 1), "rows": rows}


def processor_time(own: list[int]) -> tuple[int, int]:
    """Return ticks of all processors so far: all, and those of other processes than these and this one."""
    user, nice, system, idle, waiting, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    busy = user + nice + system + sum(rest)
    others = busy
    for pid in (os.getpid(), *own):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        others -= int(fields[11]) + int(fields[12])
    return busy + idle + waiting, others


def start(case: Case, name: str, arguments: argparse.Namespace, log: Any) -> tuple[Child, dict[str, Any]]:
    """Start a contender, several times where that is quick; return the last process, and medians."""
    facts: list[dict[str, Any]] = []
    while True:
        served = Child(case, name, arguments.threads, log)
        facts.append(served.facts)
        if len(facts) == arguments.starts or sum(fact["start"] for fact in facts) > _QUICK:
            medians = {key: statistics.median(fact[key] for fact in facts) for key in ("start", "rss", "peak_rss")}
            return served, {**facts[-1], **medians}
        served.end()


def machine() -> str:
    """Name the processor and what it has for products of bytes."""
    from ptq4cuda.bench.timing import processor

    line = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = line[1].split() if line else []
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
    has = ", ".join(flag for flag in known if flag in flags)
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores ({has})"


def versions() -> str:
    """Name what is installed."""
    packages = ("torch", "torchao", "onnxruntime", "openvino", "nncf")
    there = [name for name in packages if importlib.util.find_spec(name) is not None]
    return ", ".join(f"{name} {metadata.version(name)}" for name in there)


def chosen_cases(words: list[str]) -> list[str]:
    """Return the cases that are meant."""
    from ptq4cuda.bench.architectures import ARCHITECTURES

    cases: list[str] = []
    for word in words:
        found = [case for case in CASES if case == word or re.match(rf"{re.escape(word)}[@x]", case)]
        if not found and re.fullmatch(rf"({'|'.join(ARCHITECTURES)})@[1-9]\d*x[1-9]\d*", word):
            found = [word]
        if not found:
            raise SystemExit(
                f"{word!r} is no case: take one of {', '.join(CASES)}, or NETWORK@PIXELSxBATCH, where networks are "
                f"{', '.join(ARCHITECTURES)}"
            )
        cases += found
    return cases or list(CASES)


# --- tables -----------------------------------------------------------------------------------------------------


def ratio_to_int8(rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return how many times faster ours is than the better of the int8 runtimes: medians of ratios of a round."""
    found = [
        statistics.median(
            theirs / ours for theirs, ours in zip(rows[name]["rounds_ms"], rows["ours"]["rounds_ms"], strict=True)
        )
        for name in INT8_RUNTIMES
        if name in rows and "ours" in rows
    ]
    return min(found, default=None)


def tables(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figures as tables in Markdown, and what was executed."""
    names = [name for name in CONTENDERS if any(name in case["rows"] for case in cases.values())]
    labels = [CONTENDERS[name].label for name in names]

    def rows_of(cell: Callable[[Mapping[str, Any]], str]) -> list[list[str]]:
        return [
            [*case.split("@"), *(cell(found["rows"][name]) if name in found["rows"] else "–" for name in names)]
            for case, found in cases.items()
        ]

    times = rows_of(lambda row: f"{row['ms']:.3g}")
    for line, found in zip(times, cases.values(), strict=True):
        ratio = ratio_to_int8(found["rows"])
        line.append("–" if ratio is None else f"{ratio:.2f}")
    head = ["network", "pixels x batch", *labels]
    texts = ["\n".join(dict.fromkeys(case["machine"] for case in cases.values()))]
    texts += ["Milliseconds of a call:", markdown([*head, "int8 runtimes / ours"], times)]
    loud = [f"{name} {case['others']:.0%}" for name, case in cases.items() if case.get("others", 0) > _QUIET]
    if loud:
        texts.append(f"Not quiet: other work took a share of the cores meanwhile ({', '.join(loud)}).")
    if any("busy_ms" in row for case in cases.values() for row in case["rows"].values()):

        def slower(row: Mapping[str, Any]) -> str:
            if "busy_ms" not in row:
                return "–"
            return f"{row['busy_ms'] / row['ms']:.2f} ({row['busy_cpu_ms'] / row['cpu_ms']:.2f})"

        texts.append("Beside a process that keeps a core busy, times slower (times the processors' time):")
        texts.append(markdown(head, rows_of(slower)))
    texts.append("A process that only loads and runs it: MB, and seconds from its start to its first result:")
    texts.append(markdown(head, rows_of(lambda row: f"{row['rss'] / 1e6:.0f}, {row['start']:.2g} s")))
    executed = ["What was executed, and the SQNR of the output, the float network's the signal:", ""]
    for case, found in cases.items():
        for name, row in found["rows"].items():
            line = f"- {case}, {CONTENDERS[name].label}: {row['executes']}; {min(row['sqnr'], 999):.1f} dB"
            executed.append(line if row["integer"] or name in FLOAT else f"{line}; NOT ALL IN INTEGERS")
    return "\n\n".join([*texts, "\n".join(executed)])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Measure, print tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, of %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of each contender")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turn", type=float, default=0.3, help="seconds of a turn")
    parser.add_argument("--starts", type=int, default=3, help="of each contender's process, at most")
    parser.add_argument("--simd", choices=SIMD, help="lesser instructions for all")
    parser.add_argument("--busy", action="store_true", help="measure beside a busy core, too")
    parser.add_argument("--json", type=Path, default=Path("peers.json"), help="default: %(default)s")
    parser.add_argument("--make", action="store_true", help="only make the files that contenders load")
    parser.add_argument("--show", action="store_true", help="print the tables of --json, and measure nothing")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ptq4cuda-peers")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        role, names, since = arguments.child
        case = Case(arguments.cases[0], arguments.folder)
        if role == "make":
            make_files(case, names.split(","))
        else:
            serve(case, names, arguments.threads, float(since))
        return
    measured: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    if arguments.show:
        print(tables(measured))
        return
    if arguments.simd:
        os.environ.update(PTQ4CUDA_SIMD=arguments.simd, **SIMD[arguments.simd])
    names = arguments.only.split(",")
    unknown = sorted(set(names) - set(CONTENDERS))
    if unknown:
        parser.error(f"there is no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    cases = chosen_cases(arguments.cases)
    for name in list(names):
        missing = CONTENDERS[name].missing
        why = f"{', '.join(missing)} is not installed (extra peers)" if missing else ""
        if arguments.simd and name == "onnxruntime":
            why = f"it takes all instructions that there are, not {arguments.simd} alone"
        if why:
            names.remove(name)
            print(f"{CONTENDERS[name].label} is left out: {why}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with open(arguments.folder / "log", "w") as log:
        for name in cases:
            case = Case(name, arguments.folder)
            with child("make", case, ",".join(names), arguments.threads, log) as making:
                making.communicate()
            if arguments.make:
                continue
            figures = measure(case, names, arguments, log)
            about = f"{machine()}, {arguments.threads} threads, {versions()}"
            key = f"{name}, {arguments.simd}" if arguments.simd else name
            found[key] = measured[key] = {"machine": about, **figures}
            arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    if not arguments.make:
        print(tables(found))


if __name__ == "__main__":
    main()
