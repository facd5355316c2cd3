"""Bias correction: of quantized weights (Banner, Nahshan, Soudry 2019, eq. 12-13), and of a layer's output."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ptq4cuda.quantizer import QuantizedWeight

WeightCorrection = Literal["none", "mean", "mean+variance"]
WEIGHT_CORRECTIONS = get_args(WeightCorrection)


def correct_bias(quantized: QuantizedWeight, weight: Tensor, correction: WeightCorrection) -> QuantizedWeight:
    """Restore the mean, and the variance, that quantization took from each output channel.

    With μ = E[W] - E[Wq] and ξ = ‖W - E[W]‖ / ‖Wq - E[Wq]‖ the weights become ξ (Wq + μ); without the variance
    correction ξ is 1. Both are linear in the codes and join scale and offset.

    Args:
        quantized: the weights Wq.
        weight: the float weights W, quantized.codes' shape.
        correction: "none", "mean" or "mean+variance".
    """
    if correction == "none":
        return quantized
    w, wq = weight.double().flatten(1), quantized.values().double().flatten(1)
    mean, mean_q = w.mean(1), wq.mean(1)
    gain = torch.ones_like(mean)
    if correction == "mean+variance":
        norm, norm_q = (w - mean[:, None]).norm(dim=1), (wq - mean_q[:, None]).norm(dim=1)
        gain = torch.where(norm_q > 0, norm / norm_q, 1.0)  # a row of one value has no variance to restore
        gain = torch.where(gain > 0, gain, 1.0)
    scale = quantized.scale.double()
    return QuantizedWeight(
        quantized.codes,
        quantized.bits,
        (gain * scale).float(),
        (quantized.offset.double() + (mean - mean_q) / scale).float(),
    )
