"""The paper's table on real networks, and the ladder to the default: benchmarks/accuracy.py [--network resnet20].

Three parts: 4-bit activations with 8-bit weights, 4-bit weights with 8-bit activations, and 4 bits for both, each
with every method of the paper alone and with all of them, beside the baseline that the paper compares with (KLD).
Then the steps that lead to the default. First convolution and last layer at 8 bits, and in the default depthwise
ones; statistics from the calibration images, not from the test images; every input of a layer is quantized,
residual sums included.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import networks
from tqdm import tqdm

from ptq4cuda import QuantConfig, quantize
from ptq4cuda.metrics import Comparison, compare
from ptq4cuda.report import table


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    setting: str
    name: str
    config: QuantConfig


def methods() -> list[Method]:
    """Return the paper's three-part table with its baselines, then the steps from fast() to the default."""
    w8a4, w4a8, w4a4 = QuantConfig.naive(8, 4), QuantConfig.naive(4, 8), QuantConfig.naive()
    acts, both = {"activation_allocation": "analytic", "channel_bits": (0, 8)}, {"bias_correction": "mean+variance"}
    weights = {"weight_allocation": "analytic", "channel_bits": (0, 8)}
    default = QuantConfig()
    return [
        Method("W8A4", "naive", w8a4),
        Method("W8A4", "KLD threshold", replace(w8a4, clipping="kld")),
        Method("W8A4", "ACIQ, Laplace", replace(w8a4, clipping="laplace")),
        Method("W8A4", "ACIQ, Gaussian", replace(w8a4, clipping="gaussian")),
        Method("W8A4", "ACIQ, the better of both", replace(w8a4, clipping="mix")),
        Method("W8A4", "bit allocation", replace(w8a4, **acts)),
        Method("W8A4", "ACIQ + bit allocation", replace(w8a4, clipping="laplace", **acts)),
        Method("W4A8", "naive", w4a8),
        Method("W4A8", "bias correction", replace(w4a8, **both)),
        Method("W4A8", "bit allocation", replace(w4a8, **weights)),
        Method("W4A8", "bias correction + bit allocation", replace(w4a8, **both, **weights)),
        Method("W4A4", "naive", w4a4),
        Method("W4A4", "all three: paper()", QuantConfig.paper()),
        Method("W4A4", "fast(): searched clips, bits by gain", QuantConfig.fast()),
        Method("W4A4", "+ weights fitted to the output", replace(default, target="output", rounding="nearest")),
        Method("W4A4", "+ error-compensated rounding", replace(default, target="output", rounding="compensated")),
        Method("W4A4", "+ coordinate descent", replace(default, target="output")),
        Method("W4A4", "+ sums of blocks: the default", default),
        Method("W4A4", "the default, depthwise at 4 bits", replace(default, depthwise_bits=None)),
        Method("W4A4", "the default, 4 bits for every channel", replace(default, activation_allocation="uniform")),
        Method("W4A4", "the default, a scale per tensor", replace(default, activation_granularity="per_tensor")),
        Method("W4A8", "the default with 8-bit activations", replace(default, activation_bits=8)),
        Method("W8A4", "the default with 8-bit weights", replace(default, weight_bits=8)),
    ]


def measure(subject: networks.Subject, method: Method) -> tuple[Comparison, float]:
    """Quantize and compare; return the result and the seconds that quantization took."""
    start = time.perf_counter()
    quantized = quantize(subject.model, subject.calibration.split(64), method.config, progress=False)
    seconds = time.perf_counter() - start
    return compare(subject.model, quantized, subject.test), seconds


def main() -> None:
    """Print the table and write it to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=networks.SUBJECTS, nargs="*", default=list(networks.SUBJECTS))
    parser.add_argument("--calibration", type=int, default=None, help="images (default: what the network has)")
    parser.add_argument("--csv", type=Path, default=Path("accuracy.csv"), help="output file (default: %(default)s)")
    arguments = parser.parse_args()
    if not networks.available():
        parser.error(f"there are no networks in {networks.DATA}; set PTQ4CUDA_DATA to their folder")

    lines = []
    for name in arguments.network:
        subject = networks.SUBJECTS[name](*([arguments.calibration] if arguments.calibration else []))
        rows = []
        for method in tqdm(methods(), desc=name, unit="row"):
            result, seconds = measure(subject, method)
            figures = (
                f"{result.top1:.2f}",
                f"{result.agreement:.2f}",
                f"{result.sqnr:.1f}",
                f"{seconds:.1f}",
            )
            rows.append((method.setting, method.name, *figures))
            lines.append(
                {
                    "network": subject.name,
                    "setting": method.setting,
                    "method": method.name,
                    "calibration_images": len(subject.calibration),
                    **asdict(result),
                    "seconds": seconds,
                    **method.config.to_dict(),
                }
            )
        print(
            f"\n{subject.name}: float top-1 {result.float_top1:.2f} %, {result.images} test images, "
            f"{len(subject.calibration)} calibration images, static statistics; first and last layer at 8 bits, from "
            "fast() on also depthwise layers\n"
        )
        print(table(("W/A", "method", "top-1 %", "agreement %", "SQNR dB", "seconds"), rows))
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    print(f"\nWrote {arguments.csv}.")


if __name__ == "__main__":
    main()
