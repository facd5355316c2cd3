"""How much each layer of a quantized network costs, and which to raise to 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from ptq4cuda.artifact.record import QuantRecord, Trade
from ptq4cuda.calibrate.inputs import Batch, Inputs, batch_size
from ptq4cuda.config import QuantConfig
from ptq4cuda.containers import call_apart
from ptq4cuda.metrics import Noise
from ptq4cuda.nn import QuantModule

_SAMPLES = 64  # calibration samples that are looked at


def raise_layers(
    reference: nn.Module,
    inputs: Inputs,
    config: QuantConfig,
    again: Callable[[QuantConfig], tuple[nn.Module, QuantRecord]],
    network: nn.Module,
    record: QuantRecord,
) -> tuple[nn.Module, QuantRecord]:
    """Raise layers to 8 bits, worst first, until the output is as good as asked or the size is used up.

    Args:
        reference: the float network in the form that was quantized; it is changed and changed back.
        inputs: calibration data.
        config: how the network was quantized.
        again: quantizes the network in another way.
        network: as quantized.
        record: of it.

    Returns:
        The network and its record, whose `trade` tells what every step cost and bought.
    """
    damage = layer_damage(reference, network, inputs)
    order = [
        name
        for name in sorted(damage, key=damage.__getitem__, reverse=True)
        if config.override_of(name) is None and min(mean_bits(network, name)) < 8
    ]
    trade = [Trade((), record.sqnr, record.bytes)]
    raised = 0
    while raised < len(order):
        wanted = next_step(config, trade[-1], record.float_bytes, damage, order, raised, network)
        if wanted == raised:
            break
        overrides = {name: {"weight_bits": 8, "activation_bits": 8} for name in order[:wanted]}
        network, record = again(replace(config, overrides={**config.overrides, **overrides}))
        raised = wanted
        trade.append(Trade(tuple(order[:raised]), record.sqnr, record.bytes))
    record.config, record.trade = config, trade
    for layer in record.layers:
        layer.damage = damage.get(layer.name)
    return network, record


@torch.no_grad()
def layer_damage(reference: nn.Module, quantized: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Return the noise at the network's output, relative to the signal, that each quantized layer makes alone.

    Args:
        reference: the float network in the form that was quantized; it is changed and changed back.
        quantized: the network with its QuantModules.
        inputs: calibration data, of which the first samples are used.
    """
    some: list[Batch] = []
    for batch in inputs:
        some.append(batch)
        if sum(map(batch_size, some)) >= _SAMPLES:
            break

    expected = [call_apart(reference, *batch) for batch in some]
    damage = {}
    for name, module in quantized.named_modules():
        if not isinstance(module, QuantModule):
            continue
        layer = reference.get_submodule(name)
        reference.set_submodule(name, module)
        noise = Noise()
        for batch, unquantized in zip(some, expected, strict=True):
            noise.add(unquantized, call_apart(reference, *batch))
        reference.set_submodule(name, layer)
        damage[name] = noise.noise / noise.signal if noise.signal else 0.0
    return damage


def mean_bits(network: nn.Module, name: str) -> tuple[float, float]:
    """Return the mean bits of a layer's weights and of its input."""
    module = cast(QuantModule, network.get_submodule(name))
    activation = module.activation_bits
    return float(module.weight_bits.float().mean()), 8.0 if activation is None else float(activation.float().mean())


def next_step(
    config: QuantConfig,
    last: Trade,
    float_bytes: int,
    damage: dict[str, float],
    order: Sequence[str],
    raised: int,
    network: nn.Module,
) -> int:
    """Return how many of the worst layers to raise next; `raised` where that is enough.

    The output's noise is taken to be made up of the layers' own in proportion to their damage.
    """
    wanted = raised
    if config.target_sqnr is not None and last.sqnr is not None and last.sqnr < config.target_sqnr:
        total = sum(damage.values())
        raised_damage = sum(damage[name] for name in order[:raised])
        allowed = (total - raised_damage) * 10.0 ** ((last.sqnr - config.target_sqnr) / 10.0)
        wanted = raised + 1
        while wanted < len(order) and total - sum(damage[name] for name in order[:wanted]) > allowed:
            wanted += 1
    elif config.target_sqnr is None:
        wanted = len(order)
    if config.size_budget is None:
        return wanted
    budget = math.floor(config.size_budget * float_bytes)
    size, fitting = last.bytes, raised
    for name in order[raised:wanted]:
        module = cast(QuantModule, network.get_submodule(name))
        size += module.weight_shape.numel() - module.weight_packed.numel()
        if size > budget:
            break
        fitting += 1
    return fitting
