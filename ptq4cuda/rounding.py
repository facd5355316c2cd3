"""From float weights to integer codes."""

from __future__ import annotations

from torch import Tensor

from ptq4cuda.quantizer import QuantizedWeight, QuantParams


def round_to_nearest(weight: Tensor, bits: Tensor) -> QuantizedWeight:
    """Quantize each output channel over its own range, widened to contain zero, without clipping.

    Args:
        weight: [O, ...], finite; the channels that a kernel reads together lie innermost ([O, R, S, C]).
        bits: uint8 [O]. A channel of 0 bits becomes its mean.
    """
    rows = weight.flatten(1)
    low, high = rows.aminmax(dim=1)
    quantizer = QuantParams.from_range(low, high, bits, axis=0, constant=rows.double().mean(1))
    codes = quantizer.quantize(weight.float())
    return QuantizedWeight(codes, bits, quantizer.scale, -quantizer.zero_point.float())
