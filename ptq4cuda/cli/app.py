"""The commands. What is heavy is imported where it is used, so that --help comes at once."""

# No postponed annotations here: typer reads them.

import ast
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptq4cuda import _starting
from ptq4cuda._version import __version__
from ptq4cuda.artifact.writing import check_writable

if TYPE_CHECKING:
    from torch import nn

    from ptq4cuda.calibrate.frontier import Memory
    from ptq4cuda.cli.images import Folder, Preprocessing
    from ptq4cuda.config import QuantConfig
    from ptq4cuda.processes import Processes

app = typer.Typer(
    help="Turns a trained PyTorch CNN into a 4-bit one in seconds, without training.",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)

PRESETS = ("default", "fast", "paper", "naive", "w4a8", "w8a4")

# --- options that several commands have -----------------------------------------------------------------------

_MODEL = "A model of timm or torchvision (resnet50, timm/resnet50), or package.module:callable."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A file that quantize wrote.", show_default=False)]
Images = Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of images.", show_default=False)]
Weights = Annotated[Path | None, typer.Option(help="The model's weights: .safetensors, or tensors of torch.save.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm or torchvision get their own weights.")]
Classes = Annotated[int | None, typer.Option(min=1, help="Build the model with that many classes.")]
Batch = Annotated[int, typer.Option(min=1, help="Images that are run at a time.")]
_PANEL = "Images, where the model's own metadata are missing or not wanted"
Size = Annotated[
    str | None, typer.Option(help="Pixels of the input: 224, or 224x192 (height x width).", rich_help_panel=_PANEL)
]
Resize = Annotated[
    int | None,
    typer.Option(min=0, help="Pixels of the shorter side before the centre is cut out.", rich_help_panel=_PANEL),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Mean of values in 0 to 1: three numbers for RGB, as 0.485,0.456,0.406, one for grey images.",
        rich_help_panel=_PANEL,
    ),
]
Std = Annotated[str | None, typer.Option(help="Their standard deviation, as many numbers.", rich_help_panel=_PANEL)]
Interpolation = Annotated[
    str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos.", rich_help_panel=_PANEL)
]
Device = Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one.")]


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version.")] = False,
) -> None:
    """Handle what comes before a command."""
    if version:
        print(f"ptq4cuda {__version__}")
        raise typer.Exit


# --- a model of one's own -------------------------------------------------------------------------------------


@app.command("quantize")
def quantize_command(
    model: Model,
    calibration: Annotated[Path, typer.Option(help="A folder of images, a few hundred; no labels are needed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the quantized network into this file.")],
    weights: Weights = None,
    pretrained: Pretrained = False,
    classes: Classes = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="A folder of images in folders of classes: its top-1 decides which layers get more bits."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0.0, help="Points of top-1 that may be lost on it.  [default: 0.5]", show_default=False),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help=f"{', '.join(PRESETS[:-1])} or {PRESETS[-1]}.", autocompletion=lambda: list(PRESETS)),
    ] = "default",
    field: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of QuantConfig; repeatable.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Calibrate on that many of them at most.")] = 512,
    batch: Batch = 32,
    size: Size = None,
    resize: Resize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="GiB that the process may take: tensors between layers and images go to files near it.  "
            "[default: 3 for these alone]",
        ),
    ] = None,
    spill_folder: Annotated[Path | None, typer.Option(help="For what is beyond that, on a disk.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder for layers that are done: the same command goes on from them.")
    ] = None,
    device: Device = "",
) -> None:
    """Quantize a model and write a file.

    Processes that torchrun starts share the images, and make the file that one process makes.

    ptq4cuda quantize resnet50 --pretrained --calibration images/train -o resnet50.ptq4
    """
    with _mistakes(), _launched(device) as processes:
        import torch

        import ptq4cuda
        from ptq4cuda.calibrate.frontier import Memory

        check_writable(output)
        if max_drop is not None and evaluate is None:
            raise ValueError("--max-drop is how much of the top-1 on --evaluate may be lost: give such a folder, too")
        config = _config(preset, field or [])
        subject = _Subject(model, weights, pretrained, classes, device, size, resize, mean, std, interpolation)
        folder = subject.folder(calibration, images).share(batch, processes)
        if preset == "default":
            _say("preset: default, the most accurate; --preset fast takes about a third of its time")
        limit = None if memory_limit is None else round(memory_limit * 2**30)
        measure = None if evaluate is None else subject.top1(evaluate, batch, Memory(limit, spill_folder))
        # They wait on the host, as many as memory_limit allows.
        read = folder.batches(subject.preprocessing, batch, torch.device("cpu"), "read")
        network = ptq4cuda.quantize(
            subject.model,
            (x for x, _ in read),
            config,
            evaluate=measure,
            max_drop=0.5 if max_drop is None else max_drop,
            memory_limit=limit,
            spill_folder=spill_folder,
            process_group=processes.group,
            checkpoint=checkpoint,
        )
        if processes.rank == 0:
            ptq4cuda.save(network, output)
            print(f"\n{ptq4cuda.report(network)}\n\nWrote {output}: {output.stat().st_size:,} bytes.")
        processes.gather([])  # whether it could be written


@app.command("evaluate")
def evaluate_command(
    model: Model,
    file: File,
    images: Images,
    weights: Weights = None,
    pretrained: Pretrained = False,
    classes: Classes = None,
    most: Annotated[int | None, typer.Option("--images", min=1, help="Of that many images at most.")] = None,
    batch: Batch = 32,
    size: Size = None,
    resize: Resize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    device: Device = "",
) -> None:
    """Measure a file's network beside the float model on images, in folders of classes where labels are known.

    Folders whose names are numbers are these classes; others count from 0 in the order of their names.
    """
    with _mistakes(), _launched(device) as processes:
        import ptq4cuda
        from ptq4cuda.artifact.report import DASH, table
        from ptq4cuda.metrics import compare

        subject = _Subject(model, weights, pretrained, classes, device, size, resize, mean, std, interpolation)
        network = ptq4cuda.load(file, subject.model)
        folder = subject.folder(images, most).share(batch, processes)
        found = compare(
            subject.model,
            network,
            folder.batches(subject.preprocessing, batch, subject.device, "evaluate"),
            processes,
        )
        known = folder.labels is not None
        rows = [
            ("float", f"{found.float_top1:.2f}" if known else DASH, "100.00", DASH),
            (file.name, f"{found.top1:.2f}" if known else DASH, f"{found.agreement:.2f}", f"{found.sqnr:.1f}"),
        ]
        _say(f"\n{table(('', 'top-1 %', 'agreement %', 'SQNR dB'), rows)}\n\n{found.images} images")


@app.command("compare")
def compare_command(
    model: Model,
    file: File,
    images: Images,
    weights: Weights = None,
    pretrained: Pretrained = False,
    classes: Classes = None,
    most: Annotated[int, typer.Option("--images", min=1, help="Of that many images at most.")] = 64,
    batch: Batch = 32,
    size: Size = None,
    resize: Resize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    device: Device = "",
) -> None:
    """Put a file's network beside the float model, layer by layer, on images."""
    with _mistakes():
        from ptq4cuda.artifact.report import DASH, table
        from ptq4cuda.cli.layers import compare_layers

        subject = _Subject(model, weights, pretrained, classes, device, size, resize, mean, std, interpolation)
        folder = subject.folder(images, most)
        batches = (x for x, _ in folder.batches(subject.preprocessing, batch, subject.device, "compare"))
        rows = [
            (row.name, row.kind, row.bits, *(DASH if v is None else f"{v:.1f}" for v in (row.calibrated, row.sqnr)))
            for row in compare_layers(subject.model, file, batches)
        ]
        header = ("layer", "kind", "W/A", "dB when calibrated", "dB here")
        print(f"\n{table(header, rows)}\n\nSQNR of each output, with all layers before it quantized too.")


@app.command("inspect")
def inspect_command(file: File) -> None:
    """Tell what is in a file: how it was quantized, on what, and what it holds."""
    with _mistakes():
        from ptq4cuda.artifact.file import describe_file

        print(describe_file(file))


@app.command("report")
def report_command(
    file: File,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="Write it into this file: a page, .html, or data, .json; repeatable."),
    ] = None,
) -> None:
    """Show what quantization did to each layer of a file's network."""
    with _mistakes():
        from ptq4cuda.artifact.file import read_record
        from ptq4cuda.artifact.report import Report

        check_writable(*(output or ()))
        report = Report.of(read_record(file))
        for path in output or ():
            report.save(path)
        print(report)


@app.command("benchmark")
def benchmark_command(
    model: Model,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A file that quantize wrote; default: quantized by the fast preset."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Images of a call.")] = "1,8",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as many as PyTorch takes.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Spent on each batch at least.")] = 1.0,
    classes: Classes = None,
    size: Size = None,
    device: Device = "",
    json: Annotated[Path | None, typer.Option(help="Write the figures into this file, too.")] = None,
) -> None:
    """Time a model in float, simulated and in integers, with whatever weights it has, on random images."""
    with _mistakes():
        from json import dumps

        import torch

        import ptq4cuda
        from ptq4cuda.artifact.writing import write_whole

        check_writable(json)
        counts = _counts("--batches", batches)
        subject = _Subject(model, None, False, classes, device, size, random=True)
        channels, (height, width) = len(subject.preprocessing.mean), subject.preprocessing.size
        example = torch.randn(max(counts), channels, height, width, generator=torch.Generator().manual_seed(0))
        network = subject.model if file is None else ptq4cuda.load(file, subject.model)
        float_net = None if file is None else subject.model
        found = ptq4cuda.benchmark(network, example, counts, threads, float_net=float_net, seconds=seconds)
        print(f"\n{found}")
        if json is not None:
            write_whole(json, (dumps(found.to_dict(), indent=1) + "\n").encode())


@app.command("export")
def export_command(
    model: Model,
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the network into this file, as ONNX.")],
    weights: Weights = None,
    pretrained: Pretrained = False,
    classes: Classes = None,
    packed: Annotated[bool, typer.Option(help="Store 4-bit weights as uint4; else all as int8.")] = True,
    size: Size = None,
) -> None:
    """Write a file's network as ONNX, for onnxruntime, OpenVINO and others."""
    with _mistakes(ImportError):
        import torch

        import ptq4cuda

        if output.suffix != ".onnx":
            raise ValueError(
                f"a network is exported as .onnx, got {str(output)!r}; docs/deployment.md has other ways"
            )
        check_writable(output)
        subject = _Subject(model, weights, pretrained, classes, "cpu", size)
        network = ptq4cuda.load(file, subject.model, execution="simulate")
        example = torch.zeros(1, len(subject.preprocessing.mean), *subject.preprocessing.size)
        print(f"\n{ptq4cuda.export_onnx(network, output, example, packed=packed)}")


class _Subject:
    """A float model on its device, and how it wants images; says so before anything is done."""

    def __init__(
        self,
        name: str,
        weights: Path | None,
        pretrained: bool,
        classes: int | None,
        device: str,
        size: str | None,
        resize: int | None = None,
        mean: str | None = None,
        std: str | None = None,
        interpolation: str | None = None,
        random: bool = False,
    ) -> None:
        import torch

        from ptq4cuda.cli.models import find_model

        self.device: torch.device = torch.device(_device(device))
        self.model: nn.Module
        self.model, preprocessing = find_model(name, weights, pretrained, classes, random)
        kept = sorted({str(p.dtype) for p in self.model.parameters() if p.is_floating_point()} - {"torch.float32"})
        self.model.to(self.device, torch.float32)  # as images are
        self.preprocessing: Preprocessing = preprocessing.changed(
            size=None if size is None else _pair(size),
            resize=resize,
            mean=None if mean is None else _numbers("--mean", mean),
            std=None if std is None else _numbers("--std", std),
            interpolation=interpolation,
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        taken = f" ({', '.join(kept)}, taken as float32)".replace("torch.", "") if kept else ""
        _say(f"model: {name}, {parameters:,} parameters{taken}, on {self.device}\nimages: {self.preprocessing}")

    def folder(self, path: Path, most: int | None) -> "Folder":
        """List images, and say what was found."""
        from ptq4cuda.cli.images import Folder

        try:
            import PIL  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError("images are read by pillow: run `pip install 'ptq4cuda[cli]'`") from None
        folder = Folder.read(path, most)
        labels = f", {len(set(folder.labels))} classes" if folder.labels is not None else ""
        _say(f"{path}: {len(folder.files)} images{labels}")
        return folder

    def top1(self, path: Path, batch: int, memory: "Memory") -> "Callable[[nn.Module], float]":
        """Return a measure of classifiers, percent of a folder's images that they classify right.

        The images are read once: their pixels are kept, in files beyond the limit of memory.
        """
        import torch

        from ptq4cuda.calibrate.frontier import Frontier
        from ptq4cuda.cli.images import progress
        from ptq4cuda.metrics import class_scores

        folder = self.folder(path, None)
        if folder.labels is None:
            raise ValueError(f"{str(path)!r} has images that are in no folder of a class: top-1 needs their classes")
        frontier = Frontier(self.device, memory)
        kept = [frontier.hold(both) for both in folder.pixels(self.preprocessing, batch, "read")]

        @torch.no_grad()
        def measure(network: "nn.Module") -> float:
            right = 0
            with progress(len(folder.files), "evaluate") as bar:
                for pixels, target in map(frontier.fetch, kept):
                    scores = class_scores(network, "the network", self.preprocessing.normalized(pixels), target)
                    right += int((scores.argmax(1) == target).sum())
                    bar.update(len(target))
            return 100.0 * right / len(folder.files)

        return measure


def _config(preset: str, fields: list[str]) -> "QuantConfig":
    from ptq4cuda.cli.models import close_to
    from ptq4cuda.config import QuantConfig

    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    known = {field.name for field in dataclasses.fields(QuantConfig)}
    given: dict[str, Any] = {}
    for text in fields:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            fields_of = close_to(name, known) or f"those of QuantConfig are {', '.join(sorted(known))}"
            raise ValueError(f"--set takes FIELD=VALUE, got {text!r}; {fields_of}")
        try:
            given[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[name] = value  # a word
    return QuantConfig(**given) if preset == "default" else getattr(QuantConfig, preset)(**given)


def _pair(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--size must be pixels, as 224 or 224x192, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _counts(option: str, text: str) -> tuple[int, ...]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} must be numbers of images, as 1,8, got {text!r}")
    return tuple(map(int, parts))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"{option} must be numbers, as 0.485,0.456,0.406, got {text!r}") from None


# --- what comes with it ---------------------------------------------------------------------------------------


@app.command("info")
def info_command() -> None:
    """Show versions, the native libraries in use, and why something is missing."""
    from ptq4cuda.info import info

    print(info())


@app.command("demo")
def demo_command(
    file: Annotated[Path | None, typer.Option(help="Keep the 4-bit network in this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison into this image file.")] = None,
) -> None:
    """Train a small network on handwritten digits, quantize it, and show what 4 bits cost and bought."""
    try:
        import sklearn  # noqa: F401

        if plot is not None:
            import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        typer.echo(f"ptq4cuda: the demo needs {error.name}: run `pip install 'ptq4cuda[demo]'`", err=True)
        raise typer.Exit(2) from None
    with _mistakes():
        from ptq4cuda import demo

        check_writable(file, plot)
        demo.run(file, plot)


@app.command("bench")
def bench_command(
    device: Device = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Three layers instead of all, half a minute instead of half an hour.")
    ] = False,
    only: Annotated[str, typer.Option(help='Only some cases, for example "fake_quantize layer1 float32".')] = "",
    compiled: Annotated[
        bool | None, typer.Option(help="Compare with torch.compile, too. [default: unless --quick]")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures into this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this image file.")] = None,
) -> None:
    """Time every operator beside a copy of the same memory and beside PyTorch."""
    with _mistakes(RuntimeError):
        from ptq4cuda.bench import kernels

        check_writable(json, plot)
        compiled = not quick if compiled is None else compiled
        kernels.run(_device(device), quick=quick, only=only, compiled=compiled, json_file=json, plot=plot)


@app.command("bench-models")
def bench_models_command(
    model: Annotated[list[str] | None, typer.Option(help="Architecture, as resnet50; repeatable.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images of a call; repeatable. [default: 1, 8, 64]")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Pixels of the sides of an image.")] = 224,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of which the median counts.")] = 5,
    layers: Annotated[bool, typer.Option("--layers", help="Time each layer, too, at the largest batch.")] = False,
    half: Annotated[bool, typer.Option(help="Compare with bfloat16 (on a GPU float16), too.")] = True,
    compiled: Annotated[bool, typer.Option(help="Compare with torch.compile, too.")] = True,
    device: Device = "",
    json: Annotated[Path | None, typer.Option(help="Write the figures into this file.")] = None,
) -> None:
    """Time whole networks with random weights, in float and in 4 bits."""
    with _mistakes():
        from ptq4cuda.bench import models

        check_writable(json)
        models.run(
            _device(device),
            models=model or models.MODELS,
            batches=batch or models.BATCHES,
            size=size,
            repeats=repeats,
            layers=layers,
            half=half,
            compiled=compiled,
            json_file=json,
        )


@contextmanager
def _mistakes(*others: type[Exception]) -> Iterator[None]:
    """Tell a mistake of the caller's in one sentence, and leave with exit status 2."""
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, MemoryError, *others)
    try:
        _starting.started()
        yield
    except kinds as error:
        told = error.strerror if isinstance(error, OSError) and error.filename is None else None
        typer.echo(f"ptq4cuda: {told or str(error) or 'out of memory'}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("\nptq4cuda: interrupted", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _launched(device: str) -> Iterator["Processes"]:
    """Join the processes that torchrun started; where one fails all end, and it says why."""
    import torch

    from ptq4cuda.processes import launched

    with launched(torch.device(_device(device))) as processes:
        try:
            with processes.ending_together():
                yield processes
        except Exception:
            if processes.failed not in (None, processes.rank):
                raise typer.Exit(2) from None
            raise


def _say(text: str) -> None:
    """Print, in the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _device(asked: str) -> str:
    """Return the device that was asked for, or by default cuda where there is one."""
    import torch

    if asked not in ("", "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {asked!r}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device that this PyTorch can use: `ptq4cuda info` says more")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
