"""A quantized network beside its float original, layer by layer, on images of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq4cuda.artifact.file import float_form, load
from ptq4cuda.artifact.record import record_of
from ptq4cuda.errors import naming_failures
from ptq4cuda.metrics import Noise
from ptq4cuda.nn import QuantModule


@dataclass(frozen=True)
class Row:
    """One layer, or the network's output.

    Attributes:
        name: of the layer, "output" of the network.
        kind: class of the float layer.
        bits: of weights and input.
        calibrated: SQNR in dB on the calibration data, None where it is not known or there is no noise.
        sqnr: the same on these images.
    """

    name: str
    kind: str
    bits: str
    calibrated: float | None
    sqnr: float | None


@torch.no_grad()
def compare_layers(model: nn.Module, file: Path, images: Iterable[Tensor]) -> list[Row]:
    """Run a model and a file's network, simulated, on images, and compare what each layer returns.

    Args:
        model: the float network with its weights.
        file: that save() wrote.
        images: batches [N, C, H, W].

    Raises:
        OSError, ValueError: of load(); there are no images.
    """
    quantized = load(file, model, execution="simulate")
    record = record_of(quantized)
    reference = float_form(model, record)
    names = [name for name, module in quantized.named_modules() if isinstance(module, QuantModule)]
    noise = {name: Noise() for name in names}
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        outputs.setdefault(name, []).append(output.clone())  # what follows may write into it

    def against(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        noise[name].add(outputs[name].pop(0), output)

    for name in names:
        reference.get_submodule(name).register_forward_hook(partial(keep, name))
        quantized.get_submodule(name).register_forward_hook(partial(against, name))
    whole, batches = Noise(), 0
    for x in images:
        with naming_failures(f"the float model fails on a batch {list(x.shape)}"):
            expected = reference(x.clone())
        whole.add(expected, quantized(x.clone()))
        outputs.clear()
        batches += 1
    if not batches:
        raise ValueError("there are no images to compare on")
    layers = {layer.name: layer for layer in record.layers}
    rows = []
    for name in names:
        layer = layers[name]
        bits = f"{layer.weight_bits:g}/{'float' if layer.activation_bits is None else f'{layer.activation_bits:.2g}'}"
        rows.append(Row(name, layer.kind, bits, layer.sqnr, noise[name].sqnr))
    return [*rows, Row("output", "", "", record.sqnr, whole.sqnr)]
