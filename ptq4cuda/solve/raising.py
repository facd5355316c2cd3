"""Raises layers to more bits, those first that hurt most for what they cost, until a network is as good as asked.

Weights and inputs are raised apart, to 6 bits and then to 8. What each of them costs at the output is measured once,
on the network as it was quantized first. Sorted by what a step takes away for what it adds in bytes and in bits to
multiply, the steps make one path, and a network is a length of that path. The search is for the shortest that will
do. Networks are tried at marks along the path, which lie a decibel of the predicted noise apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ptq4cuda.artifact.record import QuantRecord, Trade
from ptq4cuda.calibrate.inputs import Inputs, some_samples
from ptq4cuda.calibrate.signals import progress_bar
from ptq4cuda.config import QuantConfig
from ptq4cuda.containers import call_apart
from ptq4cuda.metrics import Measure, Noise
from ptq4cuda.nn import QuantModule
from ptq4cuda.processes import ALONE, Processes

_SAMPLES = 32  # calibration samples on which damage is measured
_FEWEST_SAMPLES, _PRODUCTS = 4, 1 << 38  # or fewer, for no more products of weights and inputs in all
_WIDTHS = (6, 8)

Kind = Literal["weight_bits", "activation_bits"]
Overrides = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Part:
    """What is raised as one: the weights of a layer, or an input with all layers that share its quantizer.

    Attributes:
        kind: which of the two.
        layers: their names.
        bits: as quantized.
        damage: noise over signal at the network's outputs that it makes alone.
        weights: how many there are; of an input 0.
        products: of weights and inputs, in a sample.
        values: of an input, in a sample; of weights 0.
    """

    kind: Kind
    layers: tuple[str, ...]
    bits: int
    damage: float
    weights: int
    products: int
    values: int = 0


@dataclass(frozen=True)
class Step:
    """A part raised to more bits.

    Attributes:
        part: which.
        bits: that it gets.
        gain: noise over signal at the network's outputs that it is predicted to take away.
        price: in shares of all bytes and products.
        bytes: that it adds.
    """

    part: Part
    bits: int
    gain: float
    price: float
    bytes: int


@dataclass(eq=False)
class Trial:
    """A network that was tried, its record and, where there is one, the user's measure of it."""

    network: nn.Module
    record: QuantRecord
    value: float | None = None


# --- damage -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_parts(
    reference: nn.Module,
    quantized: nn.Module,
    inputs: Inputs,
    match_means: bool,
    progress: str = "",
    processes: Processes = ALONE,
) -> list[Part]:
    """Measure what the weights and the input of each quantized layer cost at the network's outputs, each alone.

    Args:
        reference: the float network in the form that was quantized; it is changed and changed back.
        quantized: the network with its QuantModules, simulated.
        inputs: calibration data, of which the first samples are used.
        match_means: whether the mean of what a part makes of a layer's output is that of the float layer, as where
            biases are corrected.
        progress: what its bar is called, "" for none.
        processes: that each measure some of them, all with the same networks.
    """
    some = inputs.head(_SAMPLES)

    def outputs() -> Iterator[Any]:
        return (call_apart(reference, *batch) for batch in some)

    modules = {name: module for name, module in quantized.named_modules() if isinstance(module, QuantModule)}
    layers = {name: reference.get_submodule(name) for name in modules}
    with _counting(modules, layers) as (products, read):
        expected = list(outputs())
    samples = some.samples
    few = max(_FEWEST_SAMPLES, _PRODUCTS // max(1, sum(products.values()) // samples * 2 * len(modules)))
    if few < samples:  # of large images, which have many values each
        some = some_samples(reference, some, 0, few)
        expected = list(outputs())

    def damage_of(kind: Kind, names: Sequence[str]) -> float:
        noise = Noise()
        with _quantized_alone(kind, {layers[name]: modules[name] for name in names}, match_means):
            for unquantized, found in zip(expected, outputs(), strict=True):
                noise.add(unquantized, found)
        return noise.relative

    def part(kind: Kind, names: Sequence[str], damage: float) -> Part:
        module = modules[names[0]]
        bits = module.weight_bits if kind == "weight_bits" else cast(Tensor, module.activation_bits)
        return Part(
            kind,
            tuple(names),
            math.ceil(float(bits.float().mean())),  # an allocation leaves a remainder
            damage,
            module.weight_shape.numel() if kind == "weight_bits" else 0,
            sum(products[name] for name in names) // samples,
            0 if kind == "weight_bits" else max(read[name] for name in names) // samples,
        )

    # Layers that read one tensor have its quantizer.
    sharing: dict[tuple[bytes, ...], list[str]] = {}
    for name, module in modules.items():
        quantizer = module.activation
        if quantizer is not None:
            values = (quantizer.bits, quantizer.scale, quantizer.zero_point)
            sharing.setdefault(tuple(t.cpu().numpy().tobytes() for t in values), []).append(name)
    each: list[tuple[Kind, list[str]]] = [("weight_bits", [name]) for name in modules]
    each += [("activation_bits", names) for names in sharing.values()]
    first, end = (len(each) * rank // processes.count for rank in (processes.rank, processes.rank + 1))
    own = []
    with progress_bar(end - first, progress) as bar:
        for kind, names in each[first:end]:
            own.append(damage_of(kind, names))
            bar.update()
    damages = processes.gather(own)
    return [part(kind, names, damage) for (kind, names), damage in zip(each, damages, strict=True)]


def note_damage(record: QuantRecord, parts: Sequence[Part]) -> None:
    """Note what layers do at a network's outputs, with the bits that they have in it.

    Args:
        record: of the network.
        parts: as measured, of the same or of other bits: noise is taken to fall fourfold with each bit.
    """
    layers = {layer.name: layer for layer in record.layers}
    for part in parts:
        for layer in (layers[name] for name in part.layers if name in layers):
            bits = getattr(layer, part.kind)
            if bits is not None:
                noise = part.damage / len(part.layers) * 4.0 ** (part.bits - bits)
                setattr(layer, "weight_damage" if part.kind == "weight_bits" else "input_damage", noise)


@contextmanager
def _counting(
    modules: Mapping[str, QuantModule], layers: Mapping[str, nn.Module]
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Count the products of layers, and the values that they read, while they are called."""
    products, read = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def count(name: str) -> Callable[[nn.Module, Any, Any, Tensor], None]:
        shape = modules[name].weight_shape

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            products[name] += output.numel() // shape[0] * shape.numel()
            read[name] += (args[0] if args else kwargs["input"]).numel()

        return hook

    hooks = [
        layer.register_forward_hook(count(name), prepend=True, with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        yield products, read
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _quantized_alone(kind: Kind, modules: Mapping[nn.Module, QuantModule], match_means: bool) -> Iterator[None]:
    """Let float layers compute with their quantized weights and float inputs, or the other way round."""

    def forward_of(layer: nn.Module, module: QuantModule) -> Callable[..., Tensor]:
        compute = layer.forward
        quantizer = module.activation
        weight = module.dequantized_weight().to(layer.weight) if kind == "weight_bits" else None  # type: ignore[arg-type]

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x: Tensor = args[0] if args else kwargs["input"]
            if weight is not None:
                own = layer.weight.data
                layer.weight.data = weight
                try:
                    found: Tensor = compute(x)
                finally:
                    layer.weight.data = own
            else:
                assert quantizer is not None
                found = compute(quantizer.fake_quantize(x))
            if not match_means or quantizer is None:
                return found
            axis = quantizer.axis % found.dim()
            missing: Tensor = compute(x) - found
            return found + missing.mean([d for d in range(found.dim()) if d != axis], keepdim=True)

        return forward

    for layer, module in modules.items():
        vars(layer)["forward"] = forward_of(layer, module)
    try:
        yield
    finally:
        for layer in modules:
            del vars(layer)["forward"]


# --- the path ---------------------------------------------------------------------------------------------------


def path_of(parts: Sequence[Part], config: QuantConfig, room: float = math.inf) -> list[Step]:
    """Return the steps to 8 bits everywhere: the most noise for what it costs first.

    Quantization noise is taken to fall fourfold with each bit.

    Args:
        parts: of the network as quantized first.
        config: whose overrides are left as they are.
        room: bytes that there are for the steps; those that do not fit are left out. Inputs take none, but where the
            network is too large as it is nothing is raised.
    """
    if room < 0:
        return []
    all_weights = max(1, sum(part.weights for part in parts))
    all_products = max(1, sum(part.products for part in parts if part.kind == "weight_bits"))
    steps = []
    for part in parts:
        part = replace(part, layers=tuple(name for name in part.layers if config.override_of(name) is None))
        bits, damage = part.bits, part.damage
        for width in _WIDTHS if part.layers else ():
            if width <= bits:
                continue
            more, left = width - bits, damage * 4.0 ** (bits - width)
            price = more / 4.0 * (part.weights / all_weights + part.products / all_products)
            steps.append(Step(part, width, damage - left, price, math.ceil(part.weights * more / 8)))
            bits, damage = width, left
    steps.sort(key=lambda step: -step.gain / max(step.price, 1e-12))
    fitting, full = [], set()
    for step in steps:
        if step.bytes > room:
            full.add(step.part.layers)
        if step.bytes and step.part.layers in full:
            continue
        room -= step.bytes
        fitting.append(step)
    return fitting


def marks_of(path: Sequence[Step], damage: float) -> list[int]:
    """Return lengths of a path at which the predicted noise has fallen by another decibel, and its full length.

    Args:
        path: the steps.
        damage: of all parts, before the first step.
    """
    marks, left, decibels = [], damage, 1.0
    for length, step in enumerate(path, 1):
        left -= step.gain
        fallen = 10.0 * math.log10(damage / left) if 0.0 < left < damage else 0.0 if left >= damage else math.inf
        if fallen >= decibels or length == len(path):
            marks.append(length)
            decibels = max(decibels, math.floor(fallen) if fallen < math.inf else decibels) + 1.0
    return marks


def overrides_of(path: Sequence[Step]) -> Overrides:
    """Return the bits that steps give to layers."""
    overrides: Overrides = {}
    for step in path:
        for name in step.part.layers:
            overrides.setdefault(name, {})[step.part.kind] = step.bits
    return overrides


# --- the search -------------------------------------------------------------------------------------------------


def search(excess: Callable[[int], float], first: float, count: int) -> int | None:
    """Return the least of 1 to `count` that will do, None if the last will not.

    Each second try halves what is left, the others go where the excess says; a try that is no more than a decibel
    better than it need be ends the search. There are at most 2 ceil(log2(count)) + 2 tries.

    Args:
        excess: of a number: by how many decibels the noise is too much; 0 and less will do.
        first: the excess of 0, which will not do.
        count: the marks, about a decibel apart.
    """
    low, high, guess = 0, count + 1, _after(0, first)
    halve = False
    while high - low > 1:
        middle = (low + min(high, count) + 1) // 2
        number = middle if halve or guess is None else guess
        number = min(max(number, low + 1), min(high - 1, count))
        found = excess(number)
        if found > 0.0:
            low = number
        else:
            high = number
            if found > -1.0:
                break
        guess, halve = _after(number, found), not halve
    return high if high <= count else None


def _after(number: int, excess: float) -> int | None:
    """Return what an excess suggests to try next."""
    return number + math.ceil(excess) if math.isfinite(excess) else None


def excess_of(trial: Trial, config: QuantConfig, measure: Measure | None) -> float:
    """Return by how many decibels the noise of a network is too much for what was asked; 0 and less will do."""
    found = [-math.inf]
    least = trial.record.least_sqnr
    if config.target_sqnr is not None and least is not None:
        found.append(config.target_sqnr - least)
    if measure is not None and trial.value is not None:
        found.append(measure.excess(trial.value))
    return max(found)


def raise_layers(
    first: Trial,
    parts: Sequence[Part],
    config: QuantConfig,
    measure: Measure | None,
    attempt: Callable[[QuantConfig], Trial],
) -> Trial:
    """Raise layers until the network is as good as asked or the size is used up.

    Args:
        first: the network as configured.
        parts: of it.
        config: how it was quantized.
        measure: the user's, with its limit.
        attempt: quantizes the network in another way.

    Returns:
        The network, whose record tells what was tried on the way; where none will do the best that was found.
    """
    room = math.inf
    if config.size_budget is not None:
        room = math.floor(config.size_budget * first.record.float_bytes) - first.record.bytes
    path = path_of(parts, config, room)
    marks = marks_of(path, sum(part.damage for part in parts))
    products = {part.layers[0]: part.products for part in parts if part.kind == "weight_bits"}
    tried = {0: first}

    def excess(number: int) -> float:
        overrides = overrides_of(path[: marks[number - 1]])
        tried[number] = attempt(replace(config, overrides={**config.overrides, **overrides}))
        return excess_of(tried[number], config, measure)

    chosen = 0
    missing = excess_of(first, config, measure)
    if config.target_sqnr is None and measure is None:
        chosen = len(marks)
        if chosen:
            excess(chosen)
    elif missing > 0.0:
        found = search(excess, missing, len(marks)) if marks else None
        chosen = found if found is not None else min(tried, key=lambda n: (excess_of(tried[n], config, measure), n))
    trial = tried[chosen]
    record = trial.record
    record.tried = len(tried)
    record.trade = [
        _trade(tried[number], overrides_of(path[: marks[number - 1]] if number else ()), products)
        for number in sorted(tried)
        if number <= chosen
    ]
    record.config = config
    if measure is not None:
        record.float_value, record.max_drop = measure.reference, measure.max_drop
    note_damage(record, parts)
    record.shortfall = _shortfall(trial, config, measure)
    if record.shortfall:
        warnings.warn(f"ptq4cuda: {record.shortfall}", stacklevel=4)
    return trial


def _trade(trial: Trial, overrides: Overrides, products: Mapping[str, int]) -> Trade:
    record = trial.record
    return Trade(
        tuple(overrides),
        record.sqnr,
        record.bytes,
        bits=overrides,
        least_sqnr=record.least_sqnr,
        value=trial.value,
        bit_operations=sum(
            round(products.get(layer.name, 0) * layer.weight_bits * (layer.activation_bits or 32.0))
            for layer in record.layers
            if layer.weight_bits is not None
        ),
    )


def _shortfall(trial: Trial, config: QuantConfig, measure: Measure | None) -> str:
    """Say what was asked for and not reached."""
    missed = []
    record = trial.record
    if measure is not None and trial.value is not None and measure.excess(trial.value) > 0.0:
        missed.append(
            f"the measure is {trial.value:.6g}, {measure.reference - trial.value:.4g} below that of the float model "
            f"({measure.reference:.6g}), and was to be no more than {measure.max_drop:g} below it"
        )
    least = record.least_sqnr
    if config.target_sqnr is not None and least is not None and least < config.target_sqnr:
        missed.append(f"the output SQNR is {least:.1f} dB, and was to be {config.target_sqnr:g}")
    if not missed:
        return ""
    if config.size_budget is not None:
        remedy = "within size_budget; a larger one, or execution of some layers in float by overrides, goes further"
    else:
        remedy = "with every layer that may be raised at 8 bits; overrides can leave layers in float"
    return f"{'; '.join(missed)}: this is the best that was found {remedy}"
