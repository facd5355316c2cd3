"""The paper's table on real networks: python benchmarks/accuracy.py [--network resnet20] [--csv FILE].

Three parts: 4-bit activations with 8-bit weights, 4-bit weights with 8-bit activations, and 4 bits for both, each
with every method of the paper alone and with all of them. First convolution and last layer at 8 bits; statistics from
the calibration images, not from the test images; every input of a layer is quantized, residual sums included.
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
    """Return the paper's ladder, and the default recipe in executable form."""
    w8a4, w4a8, w4a4 = QuantConfig.naive(8, 4), QuantConfig.naive(4, 8), QuantConfig.naive()
    both = "mean+variance"
    return [
        Method("W8A4", "naive", w8a4),
        Method("W8A4", "ACIQ", replace(w8a4, clipping="laplace")),
        Method("W8A4", "bit allocation", replace(w8a4, bit_allocation=True)),
        Method("W8A4", "ACIQ + bit allocation", replace(w8a4, clipping="laplace", bit_allocation=True)),
        Method("W4A8", "naive", w4a8),
        Method("W4A8", "bias correction", replace(w4a8, bias_correction=both)),
        Method("W4A8", "bit allocation", replace(w4a8, bit_allocation=True)),
        Method(
            "W4A8",
            "bias correction + bit allocation",
            replace(w4a8, bias_correction=both, bit_allocation=True),
        ),
        Method("W4A4", "naive", w4a4),
        Method("W4A4", "all three", QuantConfig.paper()),
        Method("W4A4", "all three, executable (default)", QuantConfig()),
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
    parser.add_argument("--csv", type=Path, default=Path("accuracy.csv"), help="output file (default: %(default)s)")
    arguments = parser.parse_args()
    if not networks.available():
        parser.error(f"there are no networks in {networks.DATA}; set PTQ4CUDA_DATA to their folder")

    lines = []
    for name in arguments.network:
        subject = networks.SUBJECTS[name]()
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
            f"{len(subject.calibration)} calibration images; first and last layer at 8 bits\n"
        )
        print(table(("W/A", "method", "top-1 %", "agreement %", "SQNR dB", "seconds"), rows))
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    print(f"\nWrote {arguments.csv}.")


if __name__ == "__main__":
    main()
