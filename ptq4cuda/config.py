"""QuantConfig: how a network is quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from ptq4cuda.errors import LaterVersionError
from ptq4cuda.solve.bits import AllocationRule
from ptq4cuda.solve.clipping import ClipRule
from ptq4cuda.solve.correction import WEIGHT_CORRECTIONS, WeightCorrection
from ptq4cuda.solve.rounding import ROUNDINGS, Rounding

Granularity = Literal["per_channel", "per_tensor"]
Execution = Literal["auto", "integer", "simulate"]
Target = Literal["weights", "output", "block"]
BiasCorrection = WeightCorrection | Literal["output"]
LayerAllocation = Literal["uniform", "measured"]
FLOAT = "float"  # an override that leaves a layer in float
_BITS = ("weight_bits", "activation_bits")
Override = Mapping[str, int] | Literal["float"]
VERSION = 2  # of the fields; more of them make another version


@dataclass(frozen=True)
class Activations:
    """What a QuantConfig says of the inputs of layers; see there."""

    bits: int
    clipping: str
    clip_exponent: float
    granularity: Granularity
    allocation: str
    channel_bits: tuple[int, int]


@dataclass(frozen=True)
class Weights:
    """What a QuantConfig says of weights, and of the bias that goes with them; see there."""

    bits: int
    allocation: str
    channel_bits: tuple[int, int]
    fold_activation_scale: bool
    target: Target
    rounding: Rounding
    bias_correction: BiasCorrection


@dataclass(frozen=True)
class QuantConfig:
    """How a network is quantized. The default is the most accurate W4A4 that integers can execute.

    Attributes:
        weight_bits: bits of weights, 1 to 8: the mean over a layer's output channels, with layer_allocation over all
            weights.
        activation_bits: bits of the inputs of layers, 1 to 8: the mean over channels, with layer_allocation over all
            values that layers read.
        first_last_bits: bits of weights and input of first and last layers, 1 to 8: those that read an image, and
            those behind which no other lies.
        depthwise_bits: bits of weights and input of depthwise convolutions, 1 to 8; None: those of other layers.
            They are few of the weights and most of the damage.
        overrides: by the name of a layer or a pattern ("layer1.*"): "float" leaves it in float, {"weight_bits": 8,
            "activation_bits": 8} or one of the two sets its bits. The last pattern that fits a name counts.
        clipping: the ClipRule by which ranges of activations are chosen: "laplace" or "gaussian" (optimal for that
            distribution), "mix" (the better of both as measured), "mse" (searched on the histogram), "percentile",
            "kld", "minmax", "headroom" (the whole range and a share of a bit more), or "auto" (of all but kld and
            headroom the one with the least error, tensor by tensor). Tensors of 8 bits are not clipped: with
            activation_bits=8 they have headroom under mse and auto, else their whole range, as under laplace and
            gaussian tensors without a known distribution have. Outliers of a vanishing share of the samples are
            clipped before.
        clip_exponent: k of the error E|x̂ - x|^k that "mse" minimises and "mix" and "auto" compare.
        activation_granularity: one scale per channel or one per tensor.
        activation_allocation: the AllocationRule by which bits are divided among the channels of an activation:
            "uniform", "analytic" (eq. 10-11) or "greedy" (by measured gain, weighted with what an error costs at the
            output).
        weight_allocation: "uniform" or "analytic", among a layer's output channels.
        layer_allocation: "uniform", the same bits for all layers, or "measured": layers share out what they have
            together, whole bits each, by what their noise does at the network's outputs, where other samples say that
            this helps. First and last layers, depthwise ones with bits of their own, and inputs whose channels all
            have the same bits have no part in it, and overrides change nothing in what other layers have.
        channel_bits: fewest and most bits that an allocation gives a channel. Of the input of a 3x3 convolution with
            stride 1, in the form that integers execute, these are 6 at most: see docs/kernels.md.
        fold_activation_scale: quantize weights times the scale of their input channel, the form that integers can
            execute. The paper quantizes the weights as they are, which per channel can only be simulated.
        target: what the weights are to reproduce: the float "weights", the float "output" of the layer from the
            quantized input (least squares), or "block": where the output is added to a shortcut, their sum.
        rounding: of weights: "nearest", "compensated" (error-compensated, GPTQ) or "descent" (that and coordinate
            descent). The last two look at the layer's input.
        bias_correction: "none", "mean" or "mean+variance" of the weights (eq. 12-13), or "output": the bias matches
            the mean of the float output.
        target_sqnr: SQNR in dB of every output, over all samples and of the median one; of four calibration batches
            and more every eighth is held out for this. Weights and inputs of layers are raised to 6 and 8 bits, worst
            first for their cost, until it is met.
        size_budget: bytes of the quantized network as a share of its float32 bytes: weights and inputs are raised
            while they fit. With target_sqnr, or a measure that quantize() is given, no more than that asks for.
        execution: "simulate" computes in floating point, "integer" with the codes, which needs fold_activation_scale
            or one scale per tensor; "auto" does that for every layer that can. NaN in an image, which no code stands
            for, is zero in integers.
        version: of the fields.

    Raises:
        ValueError: a field has a value that is not among those above, or that does not go with another's.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    first_last_bits: int = 8
    depthwise_bits: int | None = 8
    overrides: Mapping[str, Override] = field(default_factory=dict)
    clipping: str = "mse"
    clip_exponent: float = 2.5
    activation_granularity: Granularity = "per_channel"
    activation_allocation: str = "greedy"
    weight_allocation: str = "uniform"
    channel_bits: tuple[int, int] = (1, 8)
    fold_activation_scale: bool = True
    target: Target = "block"
    rounding: Rounding = "descent"
    bias_correction: BiasCorrection = "output"
    layer_allocation: LayerAllocation = "measured"
    target_sqnr: float | None = None
    size_budget: float | None = None
    execution: Execution = "auto"
    version: int = field(default=VERSION, repr=False)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_last_bits", "depthwise_bits"):
            if name != "depthwise_bits" or self.depthwise_bits is not None:
                _check_bits(name, getattr(self, name))
        choices: dict[str, tuple[Any, ...]] = {
            "clipping": tuple(rule.name for rule in ClipRule.all()),
            "activation_granularity": get_args(Granularity),
            "activation_allocation": tuple(rule.name for rule in AllocationRule.all()),
            "weight_allocation": tuple(rule.name for rule in AllocationRule.all() if not rule.needs_errors),
            "fold_activation_scale": (True, False),
            "target": get_args(Target),
            "rounding": ROUNDINGS,
            "bias_correction": (*WEIGHT_CORRECTIONS, "output"),
            "layer_allocation": get_args(LayerAllocation),
            "execution": get_args(Execution),
            "version": (VERSION,),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        fewest, most = _pair(self.channel_bits)
        object.__setattr__(self, "channel_bits", (fewest, most))  # a file's header holds a list
        if not (isinstance(self.clip_exponent, (int, float)) and 1.0 <= self.clip_exponent <= 8.0):
            raise ValueError(f"clip_exponent must be a number from 1 to 8, got {self.clip_exponent!r}")
        if self.target_sqnr is not None and not (_is_number(self.target_sqnr) and math.isfinite(self.target_sqnr)):
            raise ValueError(f"target_sqnr must be a number of dB or None, got {self.target_sqnr!r}")
        if self.size_budget is not None and not (_is_number(self.size_budget) and 0.0 < self.size_budget <= 1.0):
            raise ValueError(f"size_budget must be a share of the float32 bytes, 0 to 1, got {self.size_budget!r}")
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides must map name patterns to bits or 'float', got {self.overrides!r}")
        for pattern, override in self.overrides.items():
            if not isinstance(pattern, str):
                raise ValueError(f"overrides must map name patterns to bits or 'float', got the pattern {pattern!r}")
            if override == FLOAT:
                continue
            if not isinstance(override, Mapping) or not override or set(override) - set(_BITS):
                raise ValueError(f"overrides[{pattern!r}] must be 'float' or have keys of {_BITS}, got {override!r}")
            for name, bits in override.items():
                _check_bits(f"overrides[{pattern!r}][{name!r}]", bits)
        self._check_allocations()

    def _check_allocations(self) -> None:
        """Raise ValueError where bits cannot be divided among channels as asked, or not be used then."""

        def divided(own: str) -> list[int]:
            """Return the bits of layers whose channels may get other ones."""
            bits = [getattr(self, own), self.first_last_bits, self.depthwise_bits or 8]
            bits += [o[own] for o in self.overrides.values() if isinstance(o, Mapping) and own in o]
            return [b for b in bits if b < 8]

        weights, activations = divided("weight_bits"), divided("activation_bits")
        if self.activation_granularity == "per_tensor":
            activations = []
        for name, mean_bits in (("activation_allocation", activations), ("weight_allocation", weights)):
            rule: str = getattr(self, name)
            for bits in mean_bits:
                try:
                    AllocationRule.named(rule).check(bits, *self.channel_bits)
                except ValueError as error:
                    raise ValueError(f"channel_bits do not go with {name} {rule!r}: {error}") from error
        if self.weight_allocation == "uniform" or not weights or self.channel_bits[0] > 0:
            return
        if self.rounding != "nearest" or self.target != "weights":
            raise ValueError(
                f"with weight_allocation {self.weight_allocation!r} and channel_bits {self.channel_bits} weights may "
                "have no bits, which they can with rounding 'nearest' and target 'weights' only: give channel_bits "
                f"(1, {self.channel_bits[1]})"
            )

    @property
    def activations(self) -> Activations:
        """What it says of the inputs of layers."""
        return Activations(
            self.activation_bits,
            self.clipping,
            self.clip_exponent,
            self.activation_granularity,
            self.activation_allocation,
            self.channel_bits,
        )

    @property
    def weights(self) -> Weights:
        """What it says of weights."""
        return Weights(
            self.weight_bits,
            self.weight_allocation,
            self.channel_bits,
            self.fold_activation_scale,
            self.target,
            self.rounding,
            self.bias_correction,
        )

    def override_of(self, name: str) -> Override | None:
        """Return what overrides the bits of a layer, or None."""
        fitting = [value for pattern, value in self.overrides.items() if fnmatchcase(name, pattern)]
        return fitting[-1] if fitting else None

    def quantizes(self, name: str) -> bool:
        """Tell whether a layer is to be quantized."""
        return self.override_of(name) != FLOAT

    @classmethod
    def paper(cls, weight_bits: int = 4, activation_bits: int = 4, **fields: Any) -> QuantConfig:
        """Return all three methods of Banner, Nahshan, Soudry (2019): ACIQ, bit allocation, bias correction.

        Like every preset it takes further fields, which come before its own.
        """
        preset = cls.naive(
            weight_bits,
            activation_bits,
            clipping="laplace",
            activation_allocation="analytic",
            weight_allocation="analytic",
            channel_bits=(0, 8),
            bias_correction="mean+variance",
        )
        return replace(preset, **fields)

    @classmethod
    def naive(cls, weight_bits: int = 4, activation_bits: int = 4, **fields: Any) -> QuantConfig:
        """Return the paper's baseline: the whole range of every channel, rounded to nearest."""
        preset = cls(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            depthwise_bits=None,
            clipping="minmax",
            activation_allocation="uniform",
            fold_activation_scale=False,
            target="weights",
            rounding="nearest",
            bias_correction="none",
            layer_allocation="uniform",
        )
        return replace(preset, **fields)

    @classmethod
    def fast(cls, **fields: Any) -> QuantConfig:
        """Return closed forms and searches on statistics alone, executable by integers: the quickest good W4A4."""
        return replace(cls(target="weights", rounding="nearest", layer_allocation="uniform"), **fields)

    @classmethod
    def w4a8(cls, **fields: Any) -> QuantConfig:
        """Return the paper's methods with 4-bit weights and 8-bit activations."""
        return cls.paper(4, 8, **fields)

    @classmethod
    def w8a4(cls, **fields: Any) -> QuantConfig:
        """Return the paper's methods with 8-bit weights and 4-bit activations."""
        return cls.paper(8, 4, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; from_dict makes the same configuration of them."""
        return {
            **asdict(self),
            "overrides": {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.overrides.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Return the configuration that to_dict described, of this version or an earlier one.

        Raises:
            LaterVersionError: it is of a later version, and has fields that this one does not know.
            TypeError, ValueError: the values do not describe one.
        """
        version = values.get("version", 1)
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown and _is_number(version) and version > VERSION:
            raise LaterVersionError(
                f"its QuantConfig is of version {version} and has {', '.join(unknown)}, which this ptq4cuda does not "
                f"know, having version {VERSION}: upgrade ptq4cuda"
            )
        # What was no choice then.
        before = {"layer_allocation": "uniform"} if _is_number(version) and version < 2 else {}
        return cls(**{**before, **values, "version": VERSION})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_bits(name: str, bits: Any) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise ValueError(f"{name} must be an int from 1 to 8, got {bits!r}")


def _pair(channel_bits: Any) -> tuple[int, int]:
    if not (
        isinstance(channel_bits, (tuple, list))
        and len(channel_bits) == 2
        and all(isinstance(b, int) for b in channel_bits)
        and 0 <= channel_bits[0] <= channel_bits[1] <= 8
    ):
        raise ValueError(f"channel_bits must be two ints, 0 <= fewest <= most <= 8, got {channel_bits!r}")
    return channel_bits[0], channel_bits[1]
