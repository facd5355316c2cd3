"""Real trained networks and real images to measure accuracy on.

They are not part of the project. The folder named by the environment variable PTQ4CUDA_DATA, by default
../shared/data beside the repository, holds

    resnet_cifar10.py, resnet20_cifar10.safetensors           build(name), preprocess(uint8 NHWC)
    cifar10_calib.npz, cifar10_test.npz                       images uint8 [N, 32, 32, 3], labels
    mobilenetv1_025.py, mobilenetv1_025_imagenet.safetensors  build(), preprocess(uint8 NHWC)
    imagenet_calib/, imagenet_val/                            JPEG, the first three characters of a name = label
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(os.environ.get("PTQ4CUDA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@dataclass(frozen=True)
class Subject:
    """A network to measure: in evaluation mode, with calibration images and labelled test batches."""

    name: str
    model: nn.Module
    calibration: Tensor
    test: list[tuple[Tensor, Tensor]]


def available() -> bool:
    """Tell whether the networks and images are there."""
    return DATA.is_dir()


def resnet20(calibration_images: int = 256, test_images: int = 2000) -> Subject:
    """ResNet-20 on CIFAR-10."""
    module = _import(DATA / "resnet_cifar10.py")
    model = _load(module.build("resnet20"), "resnet20_cifar10.safetensors")
    calibration, _ = _arrays("cifar10_calib.npz", calibration_images)
    images, labels = _arrays("cifar10_test.npz", test_images)
    test = list(zip(module.preprocess(images).split(250), labels.split(250), strict=True))
    return Subject("ResNet-20, CIFAR-10", model, module.preprocess(calibration), test)


def mobilenet(calibration_images: int = 128, test_images: int = 300) -> Subject:
    """MobileNetV1 of width 0.25 on ImageNet."""
    module = _import(DATA / "mobilenetv1_025.py")
    model = _load(module.build(), "mobilenetv1_025_imagenet.safetensors")
    calibration, _ = _photographs(DATA / "imagenet_calib", calibration_images, module.SIZE)
    images, labels = _photographs(DATA / "imagenet_val", test_images, module.SIZE)
    test = list(zip(module.preprocess(images).split(50), labels.split(50), strict=True))
    return Subject("MobileNetV1 0.25, ImageNet", model, module.preprocess(calibration), test)


SUBJECTS = {"resnet20": resnet20, "mobilenet": mobilenet}


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load(model: nn.Module, file: str) -> nn.Module:
    model.load_state_dict(load_file(DATA / file), strict=False)  # num_batches_tracked is not in the files
    return model.eval()


def _arrays(file: str, count: int) -> tuple[np.ndarray, Tensor]:
    with np.load(DATA / file) as arrays:
        images = next(a for a in arrays.values() if a.ndim == 4)
        labels = next(a for a in arrays.values() if a.ndim == 1)
    return images[:count], torch.as_tensor(labels[:count], dtype=torch.int64)


def _photographs(folder: Path, count: int, size: int) -> tuple[np.ndarray, Tensor]:
    from PIL import Image

    images, labels = [], []
    for path in sorted(folder.glob("*.jpg"))[:count]:
        image = Image.open(path).convert("RGB")
        left, top = (image.width - size) // 2, (image.height - size) // 2
        images.append(np.asarray(image.crop((left, top, left + size, top + size))))
        labels.append(int(path.name[:3]))
    return np.stack(images), torch.tensor(labels)
