"""QuantLinear: torch.nn.Linear with packed integer weights and a quantized input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.nn.quant_module import QuantModule
from ptq4cuda.nn.spec import LayerSpec

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantLinear(QuantModule):
    """A fully connected layer, drop-in for torch.nn.Linear.

    The constructor takes nn.Linear's arguments and makes a layer whose weights are zero, to load a state_dict into;
    from_float quantizes a trained layer. Input [*, C] float32, float16 or bfloat16; the output has the input's dtype.
    """

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
    def like(cls, layer: nn.Linear, *, quantized_input: bool = True, folded: bool = True) -> Self:
        """Return a layer of the same size, on the same device, with weights zero."""
        out_features, in_features = layer.weight.shape  # its attributes may have other numbers, after pruning
        quantized = cls(
            in_features,
            out_features,
            layer.bias is not None,
            quantized_input=quantized_input,
            folded=folded,
            device=layer.weight.device,
        )
        quantized.dtype = layer.weight.dtype
        return quantized

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of the quantized input with the quantized weights."""
        return self._call(input, F.linear)

    def _misfit(self, x: Tensor) -> str:
        fits = x.dim() > 0 and x.shape[-1] == self.in_features
        return "" if fits else f"and the layer takes {self.in_features} features along the last dimension"

    def extra_repr(self) -> str:
        """Describe size and bits, as `print(module)` shows them."""
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {super().extra_repr()}"
        )


QuantLinear.spec = LayerSpec(nn.Linear, 0, F.linear, "", QuantLinear)
