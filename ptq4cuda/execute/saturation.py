"""saturation(): how often the inputs of quantized layers are at an end of their range, on any data."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda.artifact.record import record_of
from ptq4cuda.calibrate.inputs import batch_size, collect_inputs
from ptq4cuda.containers import call_apart
from ptq4cuda.nn import QuantModule
from ptq4cuda.quantizer import QuantParams


@dataclass(frozen=True)
class Saturation:
    """How often codes of a layer's input are at an end of their range.

    Attributes:
        layer: its name.
        bits: mean over the channels of the input.
        share: of all codes, 0 to 1.
        worst: of the codes of the worst sample.
        sample: its number, counted over all batches.
    """

    layer: str
    bits: float
    share: float
    worst: float
    sample: int

    def __str__(self) -> str:
        return (
            f"{self.layer}: {100 * self.share:.3g} % of its {self.bits:g}-bit inputs are at an end of their range, "
            f"{100 * self.worst:.3g} % in sample {self.sample}"
        )


@torch.no_grad()
def saturation(network: nn.Module, batches: Iterable[Any]) -> list[Saturation]:
    """Count, layer by layer, the input codes that are the largest, or the smallest where that is not zero.

    A range of 8 bits has headroom: hardly a code of the calibration data is at its ends, so what is there on other
    data saturates, and such data should be calibrated on. Ranges of fewer bits are clipped on purpose, and few codes
    are there to choose from: compare their shares with those on the calibration data.

    Args:
        network: made by quantize() or load(); one on a GPU is copied to the host.
        batches: as quantize() takes them.

    Returns:
        One entry for each quantized layer that was called, in the order of the report.

    Raises:
        TypeError: the network was not made by quantize() or load(), or the batches are of the wrong kind.
        ValueError: the batches are empty or contain NaN or Inf.
    """
    record = record_of(network)
    if any(t.is_cuda for t in network.state_dict().values() if isinstance(t, Tensor)):
        network = copy.deepcopy(network).cpu()
    counts: dict[str, list[Tensor]] = {}  # of each call, float64 [N]: the share of each sample
    samples: dict[str, list[int]] = {}  # the number of its first sample
    bits: dict[str, float] = {}
    first = size = 0

    def count(name: str, quantizer: QuantParams, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        codes = x if x.dtype == torch.uint8 else quantizer.quantize(x)
        shape = [-1 if d == quantizer.axis % codes.dim() else 1 for d in range(codes.dim())]
        most = torch.exp2(quantizer.bits.float()).to(torch.int16) - 1
        largest = torch.where(most > 0, most, 256).view(shape)
        smallest = torch.where((most > 0) & (quantizer.zero_point > 0), 0, -1).to(torch.int16).view(shape)
        at_end = (codes == largest) | (codes == smallest)
        if len(codes) % size == 0:  # else it does not keep the samples
            counts.setdefault(name, []).append(at_end.reshape(size, -1).double().mean(1))
            samples.setdefault(name, []).append(first)

    hooks = []
    try:
        for name, module in network.named_modules():
            if not isinstance(module, QuantModule) or module.activation is None:
                continue
            bits[name] = float(module.activation.bits.float().mean())
            reader = module if module.engine is None else module.engine
            assert isinstance(reader, nn.Module)
            hooks.append(reader.register_forward_pre_hook(partial(count, name, module.activation)))
        for batch in collect_inputs(network, batches):
            size = batch_size(batch)
            call_apart(network, *batch)
            first += size
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer in record.layers:
        if layer.name in counts:
            shares = torch.cat(counts[layer.name])
            numbers = torch.cat(
                [torch.arange(n, n + len(c)) for n, c in zip(samples[layer.name], counts[layer.name], strict=True)]
            )
            worst = int(shares.argmax())
            found.append(
                Saturation(
                    layer.name, bits[layer.name], float(shares.mean()), float(shares[worst]), int(numbers[worst])
                )
            )
    return found
