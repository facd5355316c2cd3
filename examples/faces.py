"""Quantize the three networks of a face detector, with a measure of its own: python examples/faces.py.

pip install facenet-pytorch scikit-image. The weights of MTCNN come with the first package, a hundred faces of
25 x 25 pixels with the second: they are pasted, enlarged, into photographs. The measure is the mean overlap of faces
with their boxes in percent, false alarms taken off. Each network is judged as a part of the detector, with those
before it quantized already, and the detector as a whole is to stay within one percent of the float one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ptq4cuda import QuantConfig, quantize, report

try:
    import skimage
    from facenet_pytorch import MTCNN
    from PIL import Image
    from scipy.optimize import linear_sum_assignment
except ImportError as error:
    raise SystemExit(f"{__doc__}\n{error}: pip install facenet-pytorch scikit-image") from None

DATA = Path(skimage.__file__).parent / "data"
PHOTOGRAPHS = ("coffee.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png", "grass.png")
STAGES = ("pnet", "rnet", "onet")
CELL = 130  # pixels of a photograph for each face


def photographs(faces: np.ndarray, seed: int) -> tuple[list[Image.Image], list[np.ndarray]]:
    """Paste faces [N, 25, 25], twelve to a photograph; return the photographs, and where the faces are."""
    random = np.random.default_rng(seed)
    images, places = [], []
    for index in range(len(faces) // 12):
        path = DATA / PHOTOGRAPHS[(index + seed) % len(PHOTOGRAPHS)]
        image = Image.open(path).convert("RGB").resize((4 * CELL, 3 * CELL))
        places.append(np.zeros((12, 4)))
        for k, face in enumerate(faces[12 * index : 12 * index + 12]):
            size = int(random.integers(60, 120))
            pixels = np.uint8(255 * np.clip(face * random.uniform(0.6, 1.2), 0, 1))
            x, y = (CELL * c + int(random.integers(0, CELL - size)) for c in (k % 4, k // 4))
            image.paste(Image.fromarray(pixels).convert("RGB").resize((size, size), Image.Resampling.BICUBIC), (x, y))
            places[-1][k] = x, y, x + size, y + size
        images.append(image)
    return images, places


def detect(detector: MTCNN, images: list[Image.Image]) -> list[np.ndarray]:
    """Return the boxes [N, 4] in each image."""
    found = (detector.detect(image)[0] for image in images)
    return [np.zeros((0, 4)) if boxes is None else boxes.astype(float) for boxes in found]


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union [N, M] of boxes [N, 4] and [M, 4]."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return np.asarray(shared / (areas[0][:, None] + areas[1][None, :] - shared))


def mean_overlap(places: list[np.ndarray], boxes: list[np.ndarray]) -> float:
    """Return the mean overlap of faces and boxes in percent, one box to a face; what is left over counts as none."""
    total = count = 0.0
    for expected, found in zip(places, boxes, strict=True):
        shared = overlaps(expected, found)
        total += float(shared[linear_sum_assignment(-shared)].sum())
        count += max(len(expected), len(found))
    return 100.0 * total / count


def seen_by(detector: MTCNN, images: list[Image.Image]) -> dict[str, list[Tensor]]:
    """Return the batches that each network sees when the detector looks at images."""
    seen: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}
    hooks = [
        getattr(detector, stage).register_forward_pre_hook(lambda _, args, s=stage: seen[s].append(args[0].clone()))
        for stage in STAGES
    ]
    detect(detector, images)
    for hook in hooks:
        hook.remove()
    return {
        "pnet": seen["pnet"][::3],  # of all sizes, one image at a time
        "rnet": list(torch.cat(seen["rnet"])[:512].split(128)),
        "onet": list(torch.cat(seen["onet"])[:256].split(64)),
    }


def bytes_of(detector: MTCNN) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in detector.state_dict().values())


def milliseconds(detector: MTCNN, images: list[Image.Image]) -> float:
    """Return the median time of an image."""
    times = []
    for image in images:
        start = time.perf_counter()
        detector.detect(image)
        times.append(1000.0 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Quantize one network after the other, and print what it cost and bought."""
    faces = np.load(DATA / "lfw_subset.npy")[:100]
    calibration, _ = photographs(faces[:48], seed=0)
    sets = [photographs(faces[52:], seed) for seed in (1, 2, 3)]
    images, places = ([item for one in sets for item in one[i]] for i in (0, 1))
    detector = MTCNN(keep_all=True).eval()
    batches = seen_by(detector, calibration)

    def measured(stage: str, network: nn.Module) -> float:
        setattr(detector, stage, network)
        return mean_overlap(places, detect(detector, images))

    size, time_before = bytes_of(detector), milliseconds(detector, images)
    wanted = 0.99 * measured("pnet", detector.pnet)
    print(f"float: {size:,} bytes, {time_before:.0f} ms an image, {wanted / 0.99:.2f} % overlap")
    for stage in STAGES:
        network: nn.Module = getattr(detector, stage)
        room = max(measured(stage, network) - wanted, 0.0)
        quantized = quantize(
            network, batches[stage], QuantConfig(), evaluate=partial(measured, stage), max_drop=room, progress=False
        )
        setattr(detector, stage, quantized)
        print(f"\n{stage}\n{report(quantized)}")
    overlap = mean_overlap(places, detect(detector, images))
    size, time_after = bytes_of(detector), milliseconds(detector, images)
    print(f"\nquantized: {size:,} bytes, {time_after:.0f} ms an image, {overlap:.2f} % overlap")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
