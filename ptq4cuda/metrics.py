"""How close a quantized network is to its float original."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda.containers import contents


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
    """Signal and noise energy of a tensor, summed over chunks, and of each sample."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self._samples: list[Tensor] = []  # float64 [samples, 2]: signal, noise

    def add(self, expected: Any, found: Any, samples: int = 0) -> None:
        """Add a chunk; what is not a floating tensor is passed over.

        Args:
            expected: a tensor, or several in containers of any class.
            found: the same.
            samples: of a batch, to tell them apart: those tensors count that have one item for each.
        """
        if samples:
            self._samples.append(torch.zeros(samples, 2, dtype=torch.float64, device="cpu"))
        self._add(expected, found, samples)

    def _add(self, expected: Any, found: Any, samples: int) -> None:
        if isinstance(expected, Tensor) and expected.is_floating_point():
            masked = ~expected.isfinite()  # classes that are not there, and the like
            # In place: these are twice the size of what they are made of.
            noise = expected.to(torch.float64, copy=True).sub_(found).masked_fill_(masked, 0.0).square_()
            noise.nan_to_num_(nan=math.inf, posinf=math.inf)
            signal = expected.to(torch.float64, copy=True).masked_fill_(masked, 0.0).square_()
            self.signal += float(signal.sum())
            self.noise += float(noise.sum())
            if samples and expected.dim() and len(expected) == samples:
                self._samples[-1] += torch.stack([t.reshape(samples, -1).sum(1) for t in (signal, noise)], 1).cpu()
        else:
            for e, f in zip(contents(expected) or (), contents(found) or (), strict=True):
                self._add(e, f, samples)

    @property
    def sqnr(self) -> float | None:
        """Signal to quantization noise ratio in dB; None without noise or signal, -inf where NaN or Inf was found."""
        return None if self.noise == 0.0 or self.signal == 0.0 else _decibels(self.signal / self.noise)

    @property
    def median_sqnr(self) -> float | None:
        """The same of the median sample."""
        return self._quantile(0.5)

    @property
    def worst_sqnr(self) -> float | None:
        """The same of the worst sample."""
        return self._quantile(0.0)

    def _quantile(self, share: float) -> float | None:
        signal, noise = torch.cat([torch.zeros(0, 2, dtype=torch.float64, device="cpu"), *self._samples]).unbind(1)
        ratios = (signal / noise)[signal > 0]  # inf without noise
        if not len(ratios):
            return None
        ratio = float(ratios.quantile(share, interpolation="lower"))
        return _decibels(ratio) if ratio < math.inf else None


def _decibels(ratio: float) -> float:
    return 10.0 * math.log10(ratio) if ratio > 0.0 else -math.inf


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
        expected, found = model(x.clone()).double(), quantized(x.clone()).double()  # they may write into it
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
