"""QuantConfig: how a network is quantized."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ptq4cuda.clipping import CLIP_RULES, ClipRule
from ptq4cuda.correction import BIAS_CORRECTIONS, BiasCorrection

Granularity = Literal["per_channel", "per_tensor"]
Execution = Literal["simulate"]


@dataclass(frozen=True)
class QuantConfig:
    """How a network is quantized. The default is W4A4 by the paper's methods, in a form that integers can execute.

    Attributes:
        weight_bits: bits of weights, 1 to 8 (with bit_allocation: the mean over a layer's output channels).
        activation_bits: bits of the inputs of layers, 1 to 8 (with bit_allocation: the mean over channels).
        first_last_bits: bits of weights and input of the first convolution and of the last layer, 1 to 8.
        clipping: range of activations: "laplace" or "gaussian" (optimal for that distribution) or "minmax".
            Tensors of 8 bits and tensors without a known distribution keep their whole range.
        activation_granularity: one scale per channel or one per tensor.
        bit_allocation: divide bits among channels (eq. 10-11), of activations and of weights below 8 bits.
        fold_activation_scale: quantize weights times the scale of their input channel, the form that integers can
            execute. The paper quantizes the weights as they are, which per channel can only be simulated.
        bias_correction: of weights, "none", "mean" or "mean+variance" (eq. 12-13).
        execution: "simulate" computes with dequantized values in floating point.

    Raises:
        ValueError: a field has a value that is not among those above.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    first_last_bits: int = 8
    clipping: ClipRule = "laplace"
    activation_granularity: Granularity = "per_channel"
    fold_activation_scale: bool = True
    bit_allocation: bool = True
    bias_correction: BiasCorrection = "mean"
    execution: Execution = "simulate"

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_last_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
                raise ValueError(f"{name} must be an int from 1 to 8, got {bits!r}")
        choices: dict[str, tuple[Any, ...]] = {
            "clipping": CLIP_RULES,
            "activation_granularity": get_args(Granularity),
            "fold_activation_scale": (True, False),
            "bit_allocation": (True, False),
            "bias_correction": BIAS_CORRECTIONS,
            "execution": get_args(Execution),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def paper(cls, weight_bits: int = 4, activation_bits: int = 4) -> QuantConfig:
        """Return all three methods of Banner, Nahshan, Soudry (2019): ACIQ, bit allocation, bias correction."""
        return cls(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            fold_activation_scale=False,
            bias_correction="mean+variance",
        )

    @classmethod
    def naive(cls, weight_bits: int = 4, activation_bits: int = 4) -> QuantConfig:
        """Return the paper's baseline: the whole range of every channel, rounded to nearest."""
        return cls(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            clipping="minmax",
            fold_activation_scale=False,
            bit_allocation=False,
            bias_correction="none",
        )

    @classmethod
    def w4a8(cls) -> QuantConfig:
        """Return the paper's methods with 4-bit weights and 8-bit activations."""
        return cls.paper(weight_bits=4, activation_bits=8)

    @classmethod
    def w8a4(cls) -> QuantConfig:
        """Return the paper's methods with 8-bit weights and 4-bit activations."""
        return cls.paper(weight_bits=8, activation_bits=4)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; QuantConfig(**fields) makes the same configuration."""
        return asdict(self)
