"""What 4 bits cost: python benchmarks/accuracy.py [--network resnet20 | --model module:function --images FOLDER].

Three tables of the paper (4-bit activations with 8-bit weights, 4-bit weights with 8-bit activations, 4 of each),
each with every method alone and with all of them, and the ladder of the default recipe, one step at a time. All rows
quantize every input of a layer, residual sums included, with statistics measured once on the calibration images.

    --model module:function   function() returns a trained nn.Module, e.g. torchvision.models:resnet18
    --images FOLDER           its images, flat or in subfolders; the last quarter is the test set, without labels
    --only sizes              of 32 to 1,024 calibration images, instead of the tables
    --architectures           random networks of ptq4cuda.bench.architectures: naive, fast() and the default
"""

from __future__ import annotations

import argparse
import csv
import importlib
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.artifact.report import DASH, table
from ptq4cuda.bench import architectures
from ptq4cuda.metrics import Comparison, Noise, compare


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        setting: bits of weights and activations, or "ladder".
        name: what is done.
        config: how.
        images: calibration images, at most.
    """

    setting: str
    name: str
    config: QuantConfig
    images: int


def paper(images: int) -> list[Method]:
    """Return the paper's three tables."""
    w8a4, w4a8, w4a4 = QuantConfig.naive(8, 4), QuantConfig.naive(4, 8), QuantConfig.naive()
    activations = {"activation_allocation": "analytic", "channel_bits": (0, 8)}
    weights = {"weight_allocation": "analytic", "channel_bits": (0, 8)}
    corrected = {"bias_correction": "mean+variance"}
    rows: list[tuple[str, str, QuantConfig]] = [
        ("W8A4", "naive", w8a4),
        ("W8A4", "KLD threshold", replace(w8a4, clipping="kld")),
        ("W8A4", "ACIQ, Laplace", replace(w8a4, clipping="laplace")),
        ("W8A4", "ACIQ, Gaussian", replace(w8a4, clipping="gaussian")),
        ("W8A4", "ACIQ, better of the two", replace(w8a4, clipping="mix")),
        ("W8A4", "bit allocation", replace(w8a4, **activations)),
        ("W8A4", "ACIQ + bit allocation", QuantConfig.w8a4()),
        ("W4A8", "naive", w4a8),
        ("W4A8", "mean correction", replace(w4a8, bias_correction="mean")),
        ("W4A8", "mean and variance correction", replace(w4a8, **corrected)),
        ("W4A8", "bit allocation", replace(w4a8, **weights)),
        ("W4A8", "correction + bit allocation", QuantConfig.w4a8()),
        ("W4A4", "naive", w4a4),
        ("W4A4", "KLD threshold", replace(w4a4, clipping="kld")),
        ("W4A4", "ACIQ, Laplace", replace(w4a4, clipping="laplace")),
        ("W4A4", "correction", replace(w4a4, **corrected)),
        ("W4A4", "bit allocation", replace(w4a4, **(activations | weights))),
        ("W4A4", "all three", QuantConfig.paper()),
    ]
    return [Method(setting, name, config, images) for setting, name, config in rows]


def ladder(images: int) -> list[Method]:
    """Return the default recipe step by step; integers can execute every row but the first."""
    fast, full = QuantConfig.fast(), QuantConfig()
    alike = replace(full, layer_allocation="uniform")
    rows = {
        "all three of the paper, scales folded": replace(QuantConfig.paper(), fold_activation_scale=True),
        "fast(): searched clips, bits by gain, mean output": fast,
        "+ weights fitted to the float output": replace(fast, target="output"),
        "+ compensated rounding": replace(fast, target="output", rounding="compensated"),
        "+ coordinate descent": replace(alike, target="output"),
        "+ blocks make up for their shortcut": alike,
        "+ layers share out the bits of the network (default)": full,
        "default, depthwise at 4 bits": replace(full, depthwise_bits=None),
        "default, 4 bits for every channel": replace(alike, activation_allocation="uniform"),
        "default, one scale per tensor": replace(alike, activation_granularity="per_tensor"),
        "default with 8-bit activations": replace(full, activation_bits=8),
        "default with 8-bit weights": replace(full, weight_bits=8),
    }
    methods = [Method("ladder", name, config, images) for name, config in rows.items()]
    return [*methods, Method("ladder", f"default, {images // 8} images", full, images // 8)]


def sizes(most: int) -> list[Method]:
    """Return fast() and the default with 32, 64, ... calibration images, as many as there are at most."""
    counts = [count for count in (32, 64, 128, 256, 512, 1024) if count <= most]
    presets = {"fast()": QuantConfig.fast(), "default": QuantConfig()}
    return [Method("W4A4", name, config, count) for name, config in presets.items() for count in counts]


def measure(subject: networks.Subject, method: Method) -> tuple[Comparison, float, nn.Module]:
    """Quantize and compare; return the result, the seconds that quantization took and the network."""
    config = replace(method.config, execution="simulate")
    start = time.perf_counter()
    quantized = quantize(subject.model, subject.calibration[: method.images].split(64), config, progress=False)
    seconds = time.perf_counter() - start
    return compare(subject.model, quantized, subject.test), seconds, quantized


def own_subject(source: str, folder: Path, size: int) -> networks.Subject:
    """Return a user's network and images; labels are not known."""
    module, _, function = source.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # Python looks beside this script only
    try:
        make = getattr(importlib.import_module(module), function)
    except (AttributeError, ImportError, ValueError) as error:
        raise SystemExit(f"--model {source!r} does not name a module and its function: {error}") from None
    model = make().eval()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp"))
    if len(paths) < 8:
        raise SystemExit(f"{folder} holds {len(paths)} images; at least 8 are needed")
    # Every fourth image is a test image, so that both sets have images of all subfolders.
    held_out = paths[3::4]
    images = _photographs([p for p in paths if p not in set(held_out)], size)
    test = _photographs(held_out, size)
    labels = torch.full((len(test),), -1)
    return networks.Subject(source, model, images, list(zip(test.split(32), labels.split(32), strict=True)))


def _photographs(paths: list[Path], size: int) -> Tensor:
    """Read images, the shorter side resized to 8/7 of the size, the middle cut out, normalised as for ImageNet."""
    from PIL import Image

    images = []
    for path in tqdm(paths, desc="read", unit="image", delay=1.0):
        image = Image.open(path).convert("RGB")
        factor = size * 8 / 7 / min(image.size)
        width, height = (max(size, round(side * factor)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height)).crop((left, top, left + size, top + size))
        images.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255.0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.stack(images) - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def run_methods(subject: networks.Subject, methods: list[Method]) -> list[dict[str, Any]]:
    """Measure all methods on a network and print the table."""
    lines, rows = [], []
    labels = int(subject.test[0][1][0]) >= 0
    eight: list[str] = []
    for method in tqdm(methods, desc=subject.name, unit="row"):
        result, seconds, quantized = measure(subject, method)
        record = record_of(quantized)
        if method.config == QuantConfig():
            eight = [layer.name for layer in record.layers if layer.weight_bits == layer.activation_bits == 8.0]
        top1 = f"{result.top1:.2f}" if labels else DASH
        figures = (f"{result.agreement:.2f}", f"{result.sqnr:.1f}", f"{record.images}", f"{seconds:.1f}")
        rows.append((method.setting, method.name, top1, *figures))
        lines.append(
            {
                "network": subject.name,
                "setting": method.setting,
                "method": method.name,
                "calibration_images": record.images,
                **asdict(result),
                "seconds": seconds,
                **method.config.to_dict(),
            }
        )
    top1 = f"top-1 {result.float_top1:.2f} %, " if labels else "no labels, "
    print(f"\n{subject.name}: in float {top1}{result.images} test images.")
    print("Statistics are measured once on the calibration images; every input of a layer is quantized.")
    if eight:
        shown = (
            ", ".join(eight) if len(eight) < 8 else f"{eight[0]}, {eight[-1]} and all {len(eight) - 2} depthwise ones"
        )
        print(f"Layers at 8 bits: by default {shown}; for the paper the first convolution and the last layer.")
    print(f"Seconds with {torch.get_num_threads()} thread(s).\n")
    print(table(("W/A", "method", "top-1 %", "agreement %", "SQNR dB", "images", "seconds"), rows))
    return lines


# What keeps a network under two minutes on one core.
CALIBRATION, PIXELS = 128, 64
WIDTH = {"vgg16_bn": 0.125, "mobilenet_v2": 1.0}  # others: a quarter


def run_architectures(names: list[str]) -> list[dict[str, Any]]:
    """Quantize random networks and print SQNR on other images, seconds and peak memory."""
    lines, rows = [], []
    for name in tqdm(names, desc="architectures", unit="network"):
        width = WIDTH.get(name, 0.25)
        calibration, test = architectures.images(CALIBRATION, PIXELS), architectures.images(32, PIXELS, seed=7)
        model = architectures.calibrate_batch_norm(architectures.ARCHITECTURES[name](width=width), calibration[:32])
        with torch.no_grad():
            expected = model(test)
        figures: dict[str, tuple[float, float]] = {}
        presets: dict[str, Callable[[], QuantConfig]] = {
            "naive": QuantConfig.naive,
            "fast": QuantConfig.fast,
            "default": QuantConfig,
        }
        for preset, config in presets.items():
            start = time.perf_counter()
            network = quantize(model, calibration.split(16), replace(config(), execution="simulate"), progress=False)
            seconds = time.perf_counter() - start
            noise = Noise()
            with torch.no_grad():
                noise.add(expected, network(test))
            figures[preset] = (noise.sqnr or 0.0, seconds)
        calibrated = record_of(network).sqnr or 0.0
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        sqnr = [f"{value:.1f}" for value, _ in figures.values()]
        times = [f"{seconds:.1f}" for _, seconds in figures.values()]
        rows.append((name, f"{width:g}", *sqnr, f"{calibrated:.1f}", *times, f"{memory:,}"))
        for preset, (value, seconds) in figures.items():
            lines.append(
                {"network": name, "width": width, "size": PIXELS, "preset": preset, "sqnr": value, "s": seconds}
            )
    print(f"\nRandom weights, BatchNorm calibrated; {CALIBRATION} calibration images, 32 other test images.\n")
    header = (
        "network",
        "width",
        "naive dB",
        "fast dB",
        "default dB",
        "on calibration",
        "naive s",
        "fast s",
        "default s",
    )
    print(table((*header, "peak MiB so far"), rows))
    return lines


def main() -> None:
    """Print the tables and write them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=networks.SUBJECTS, nargs="*", default=list(networks.SUBJECTS))
    parser.add_argument("--model", help="module:function that returns a network")
    parser.add_argument("--images", type=Path, help="folder of images for --model")
    parser.add_argument("--size", type=int, default=224, help="of these images (default: %(default)s)")
    parser.add_argument(
        "--architectures", choices=architectures.ARCHITECTURES, nargs="*", help="default: all of them"
    )
    parser.add_argument("--only", choices=("paper", "ladder", "sizes"), help="one part of the table")
    parser.add_argument("--paper-images", type=int, default=256, help="calibration images of the paper's rows")
    parser.add_argument("--ladder-images", type=int, default=512, help="calibration images of the ladder")
    parser.add_argument("--csv", type=Path, default=Path("accuracy.csv"), help="output file (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.csv.parent.is_dir():
        parser.error(f"there is no folder {arguments.csv.parent} for --csv")

    methods = paper(arguments.paper_images) if arguments.only in (None, "paper") else []
    methods += ladder(arguments.ladder_images) if arguments.only in (None, "ladder") else []
    if arguments.architectures is not None:
        lines = run_architectures(arguments.architectures or list(architectures.ARCHITECTURES))
    elif arguments.model:
        if arguments.images is None or not arguments.images.is_dir():
            parser.error("--model needs --images, a folder")
        subject = own_subject(arguments.model, arguments.images, arguments.size)
        lines = run_methods(subject, methods or sizes(len(subject.calibration)))
    else:
        if not networks.available():
            parser.error(
                f"there are no networks in {networks.DATA}; set PTQ4CUDA_DATA to their folder, or use --model"
            )
        count = max(arguments.paper_images, arguments.ladder_images) if methods else 1024
        lines = []
        for name in arguments.network:
            subject = networks.SUBJECTS[name](calibration_images=count)
            lines += run_methods(subject, methods or sizes(len(subject.calibration)))
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    print(f"\nWrote {arguments.csv}.")


if __name__ == "__main__":
    main()
