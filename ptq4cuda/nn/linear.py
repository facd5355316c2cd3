"""QuantLinear: torch.nn.Linear with packed integer weights and a quantized input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.nn.quant_module import Outputs, QuantModule
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.solve.correction import WeightCorrection


class QuantLinear(QuantModule):
    """A fully connected layer, drop-in for torch.nn.Linear.

    The constructor takes nn.Linear's arguments and makes a layer whose weights are zero, to load a state_dict into;
    from_float quantizes a trained layer. Input [*, C] float32, float16 or bfloat16; the output has the input's dtype.
    """

    kind = "Linear"
    activation_axis = -1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quantized_input: bool = True,
        folded: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__((out_features, in_features), 1, bias, quantized_input, folded, device)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(cls, linear: nn.Linear, *, quantized_input: bool = True, folded: bool = True) -> QuantLinear:
        """Return a layer of the same size, on the same device, with weights zero."""
        out_features, in_features = linear.weight.shape  # its attributes may have other numbers, after pruning
        layer = cls(
            in_features,
            out_features,
            linear.bias is not None,
            quantized_input=quantized_input,
            folded=folded,
            device=linear.weight.device,
        )
        layer.dtype = linear.weight.dtype
        return layer

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        activation: QuantParams | None = None,
        *,
        weight_bits: int | Tensor = 4,
        bias_correction: WeightCorrection = "mean",
        folded: bool = True,
    ) -> QuantLinear:
        """Quantize a trained layer; arguments as for QuantConv2d.from_float."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls.like(linear, quantized_input=activation is not None, folded=folded)
        layer._quantize_from(linear, activation, weight_bits, bias_correction)
        return layer

    def forward(self, input: Tensor) -> Outputs:
        """Return the product of the quantized input with the quantized weights."""
        try:
            if self.engine is not None:
                return self._integer_forward(input, None)
            return self._simulate(input, F.linear)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            self._refuse(input)
            raise

    def _misfit(self, x: Tensor) -> str:
        fits = x.dim() > 0 and x.shape[-1] == self.in_features
        return "" if fits else f"and the layer takes {self.in_features} features along the last dimension"

    def extra_repr(self) -> str:
        """Describe size and bits, as `print(module)` shows them."""
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {super().extra_repr()}"
        )
