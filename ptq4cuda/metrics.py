"""How close a quantized network is to its float original."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

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
    signal = noise = 0.0
    for x, target in batches:
        expected, found = model(x).double(), quantized(x).double()
        images += len(x)
        float_right += int((expected.argmax(1) == target).sum())
        right += int((found.argmax(1) == target).sum())
        agree += int((expected.argmax(1) == found.argmax(1)).sum())
        signal += float(expected.square().sum())
        noise += float((expected - found).square().sum())
    if images == 0:
        raise ValueError("there are no images to compare on")
    percent = 100.0 / images
    sqnr = 10.0 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
    return Comparison(images, percent * float_right, percent * right, percent * agree, sqnr)
