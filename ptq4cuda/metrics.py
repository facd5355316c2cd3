"""How close a quantized network is to its float original."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Comparison:
    """A quantized classifier beside its float original.

    Attributes:
        images: number of images.
        float_top1: percent of images that the float network classifies right.
        top1: the same of the quantized network.
        agreement: percent of images to which both give the same class.
        sqnr: signal to quantization noise ratio of the logits in dB, inf where they are equal.
    """

    images: int
    float_top1: float
    top1: float
    agreement: float
    sqnr: float


class Noise:
    """Signal and noise energy of a tensor, summed over chunks."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, expected: Any, found: Any) -> None:
        """Add a chunk; what is not a floating tensor is passed over."""
        if isinstance(expected, Tensor) and expected.is_floating_point():
            masked = ~expected.isfinite()  # classes that are not there, and the like
            error = (expected.double() - found.double()).masked_fill(masked, 0.0)
            self.signal += float(expected.double().masked_fill(masked, 0.0).square().sum())
            self.noise += float(error.square().sum())
        elif isinstance(expected, (tuple, list)):
            for e, f in zip(expected, found, strict=True):
                self.add(e, f)
        elif isinstance(expected, dict):
            for key in expected:
                self.add(expected[key], found[key])
        elif is_dataclass(expected):
            for field in fields(expected):
                self.add(getattr(expected, field.name), getattr(found, field.name))

    @property
    def sqnr(self) -> float | None:
        """Signal to quantization noise ratio in dB; None without noise or signal."""
        if self.noise == 0.0 or self.signal == 0.0:
            return None
        return 10.0 * math.log10(self.signal / self.noise)


@torch.no_grad()
def compare(model: nn.Module, quantized: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Comparison:
    """Run two classifiers on labelled images.

    Args:
        model: the float network.
        quantized: the quantized network.
        batches: pairs of images [N, ...] and labels [N].

    Raises:
        ValueError: there are no images.
    """
    images = float_right = right = agree = 0
    noise = Noise()
    for x, target in batches:
        expected, found = model(x).double(), quantized(x).double()
        images += len(x)
        float_right += int((expected.argmax(1) == target).sum())
        right += int((found.argmax(1) == target).sum())
        agree += int((expected.argmax(1) == found.argmax(1)).sum())
        noise.add(expected, found)
    if images == 0:
        raise ValueError("there are no images to compare on")
    percent = 100.0 / images
    sqnr = math.inf if noise.sqnr is None else noise.sqnr
    return Comparison(images, percent * float_right, percent * right, percent * agree, sqnr)
