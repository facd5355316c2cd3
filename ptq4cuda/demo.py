"""The demo: train a small network on real images, quantize it, show what 4 bits cost and bought."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from ptq4cuda.artifact.file import load, save
from ptq4cuda.artifact.report import DASH, report, table
from ptq4cuda.artifact.writing import write_figure
from ptq4cuda.config import QuantConfig
from ptq4cuda.metrics import Comparison, compare
from ptq4cuda.pipeline import quantize

Batches = list[tuple[Tensor, Tensor]]

CONFIGS = {
    "W8A4 naive": QuantConfig.naive(8, 4),
    "W8A4 paper": QuantConfig.paper(8, 4),
    "W4A8 naive": QuantConfig.naive(4, 8),
    "W4A8 paper": QuantConfig.paper(4, 8),
    "W4A4 naive": QuantConfig.naive(),
    "W4A4 paper": QuantConfig.paper(),
    "W4A4 default": QuantConfig(),
}


class DigitsNet(nn.Module):
    """A small residual network with BatchNorm for 8x8 images."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, 10] of images [N, 1, 8, 8]."""
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Row:
    """One configuration's result."""

    name: str
    result: Comparison
    bytes: int
    seconds: float


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's handwritten digits: training images [N, 1, 8, 8] and labels, test images and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    images = torch.tensor(data.images[order], dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    labels = torch.tensor(data.target[order], dtype=torch.int64)
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def train(images: Tensor, labels: Tensor, epochs: int = 8, *, progress: bool = True) -> DigitsNet:
    """Train a DigitsNet, the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DigitsNet()
        optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-2, epochs=epochs, steps_per_epoch=-(-len(images) // 64)
        )
        for _ in trange(epochs, desc="train", unit="epoch", disable=not progress):
            for batch in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(images[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
    return net.eval()


def run(
    file: Path | None = None,
    plot: Path | None = None,
    *,
    echo: Callable[[str], object] = print,
    progress: bool = True,
) -> list[Row]:
    """Train, quantize, compare, save and load; print what happens.

    Args:
        file: where the 4-bit network is kept; default: a temporary file.
        plot: an image file to draw the comparison into.
        echo: prints a text.
        progress: show progress bars.

    Raises:
        RuntimeError: the network that was loaded gives other outputs than the one that was saved.
    """
    train_images, train_labels, images, labels = digits()
    net = train(train_images, train_labels, progress=progress)
    test = list(zip(images.split(200), labels.split(200), strict=True))

    with tempfile.TemporaryDirectory() as folder:
        path = file if file is not None else Path(folder, "digits.ptq4")
        float_path = Path(folder, "digits.safetensors")
        save_file(net.state_dict(), float_path)
        rows, quantized = [], None
        for name, config in CONFIGS.items():
            start = time.perf_counter()
            quantized = quantize(net, train_images[:256].split(64), config, progress=progress)
            seconds = time.perf_counter() - start
            save(quantized, path)
            rows.append(Row(name, compare(net, quantized, test), path.stat().st_size, seconds))
        assert quantized is not None
        echo(f"\n{len(images)} test images; calibrated on 256 training images without labels\n")
        echo(results_table(rows, float_path.stat().st_size))
        chance = margin(rows[0].result.float_top1, len(images))
        echo(
            f"\nSQNR tells the configurations apart. {len(images)} images hardly do: their top-1 is within\n"
            f"{chance:.1f} points of that of any number of them, 19 times of 20."
        )
        echo(f"\nThe {rows[-1].name} network, layer by layer:\n\n{report(quantized)}\n")

        loaded = load(path, DigitsNet())
        with torch.no_grad():
            if not torch.equal(loaded(images), quantized(images)):
                raise RuntimeError(f"the network loaded from {path} gives other outputs than the one saved")
        name, size = rows[-1].name, path.stat().st_size
        echo(f"Saved the {name} network ({size:,} bytes) and loaded it back: same outputs, bit for bit.")
        if file is not None:
            echo(f"It is in {file}.")
    if plot is not None:
        draw(rows, plot)
        echo(f"Drew {plot}.")
    return rows


def results_table(rows: list[Row], float_bytes: int) -> str:
    """Return the comparison as text."""
    header = ("", "SQNR dB", "agreement %", "top-1 %", "file bytes", "seconds")
    lines: list[tuple[object, ...]] = [
        ("float32", DASH, "100.0", f"{rows[0].result.float_top1:.1f}", f"{float_bytes:,}", DASH)
    ]
    for row in rows:
        r = row.result
        numbers = (f"{r.sqnr:.1f}", f"{r.agreement:.1f}", f"{r.top1:.1f}")
        lines.append((row.name, *numbers, f"{row.bytes:,}", f"{row.seconds:.2f}"))
    return table(header, lines)


def margin(percent: float, images: int) -> float:
    """Return how far a share may be from that of all images there are, in points, 19 times of 20.

    Half the interval of Wilson (1927), which also holds where all or none are right.

    Args:
        percent: that was found.
        images: among so many.
    """
    share, z = percent / 100.0, 1.96
    spread = share * (1.0 - share) / images + z * z / (4.0 * images * images)
    return 100.0 * z * math.sqrt(spread) / (1.0 + z * z / images)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the SQNR of the configurations side by side, from zero, and agreement with what chance may make of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    settings = list(dict.fromkeys(row.name.split()[0] for row in rows))
    for axes, field, label in zip(
        figure.subplots(1, 2),
        ("sqnr", "agreement"),
        ("SQNR of the logits, dB", f"same class as float, % of {rows[0].result.images} images"),
        strict=True,
    ):
        for shift, (method, colour) in enumerate(
            (("naive", "#b0b7c3"), ("paper", "#2a6fdb"), ("default", "#12355b"))
        ):
            shown = [row for row in rows if row.name.endswith(method)]
            places = [settings.index(row.name.split()[0]) + 0.28 * (shift - 1) for row in shown]
            values = [getattr(row.result, field) for row in shown]
            chance = [margin(row.result.agreement, row.result.images) for row in shown]
            bars = axes.bar(
                *(places, values, 0.26),
                color=colour,
                label=method,
                yerr=chance if field == "agreement" else None,
                error_kw={"capsize": 2, "linewidth": 1},
            )
            if field == "sqnr":
                axes.bar_label(bars, fmt="%.1f", fontsize=8)
        axes.set_xticks(range(len(settings)), settings)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0.0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    figure.suptitle("Handwritten digits: a float network and its 4-bit forms", x=0.02, ha="left")
    write_figure(path, figure)
