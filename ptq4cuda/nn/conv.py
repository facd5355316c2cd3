"""QuantConv2d: torch.nn.Conv2d with packed integer weights and a quantized input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.compat import explicit_padding
from ptq4cuda.nn.quant_module import Outputs, QuantModule
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.solve.correction import WeightCorrection

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return an argument of a convolution for rows and columns, as PyTorch reads it: one number counts for both."""
    first, second = (value, value) if isinstance(value, int) else (value[0], value[-1])
    return first, second


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format that the convolution of x has in PyTorch: of a contiguous kernel, x's own."""
    channels_last = x.dim() == 4 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]  # where C, H or W is one, too
    return torch.channels_last if channels_last else torch.contiguous_format


class QuantConv2d(QuantModule):
    """A 2-d convolution, drop-in for torch.nn.Conv2d: stride, padding of every mode, dilation, groups, bias.

    The constructor takes nn.Conv2d's arguments and makes a layer whose weights are zero, to load a state_dict into;
    from_float quantizes a trained layer. Input [N, C, H, W] (or [C, H, W]) float32, float16 or bfloat16; the output
    has the input's dtype. Padding of mode "zeros" pads with the value zero, which every quantizer represents.
    """

    kind = "Conv2d"
    activation_axis = -3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        quantized_input: bool = True,
        folded: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        # A float layer without memory checks the arguments and brings them into the form that _conv_forward reads.
        geometry = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            padding_mode=padding_mode,
            device="meta",
        )
        super().__init__(tuple(geometry.weight.shape), groups, bias, quantized_input, folded, device)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = geometry.kernel_size, geometry.stride
        self.padding, self.dilation = geometry.padding, geometry.dilation
        self.padding_mode = geometry.padding_mode
        self.explicit_padding = explicit_padding(geometry)

    @classmethod
    def like(cls, conv: nn.Conv2d, *, quantized_input: bool = True, folded: bool = True) -> QuantConv2d:
        """Return a layer that computes as this one does when it is called, on the same device, with weights zero.

        Sizes are those of the weight; what __init__ made of its arguments may have changed since.
        """
        out_channels, per_group, *kernel_size = conv.weight.shape
        layer = cls(
            per_group * conv.groups,
            out_channels,
            (kernel_size[0], kernel_size[1]),
            pair(conv.stride),
            conv.padding if isinstance(conv.padding, str) else pair(conv.padding),
            pair(conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            quantized_input=quantized_input,
            folded=folded,
            device=conv.weight.device,
        )
        layer.dtype = conv.weight.dtype
        if conv.padding_mode != "zeros":  # padding was read by __init__ alone
            layer.explicit_padding = explicit_padding(conv)
        return layer

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        activation: QuantParams | None = None,
        *,
        weight_bits: int | Tensor = 4,
        bias_correction: WeightCorrection = "mean",
        folded: bool = True,
    ) -> QuantConv2d:
        """Quantize a trained convolution.

        Args:
            conv: the float layer; it is not changed.
            activation: quantizer of the input, per tensor or per channel; None leaves the input in float.
            weight_bits: 0 to 8, one number or uint8 [O].
            bias_correction: "none", "mean" or "mean+variance" (eq. 12-13).
            folded: fold the activation's scale into the weights before they are quantized.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
        layer = cls.like(conv, quantized_input=activation is not None, folded=folded)
        layer._quantize_from(conv, activation, weight_bits, bias_correction)
        return layer

    def forward(self, input: Tensor, residual: Tensor | None = None, like: Tensor | None = None) -> Outputs:
        """Return the convolution of the quantized input with the quantized weights.

        Args:
            input: values; in a lowered network their codes.
            residual: codes to add, of a lowered network.
            like: where the input is codes and the output values: what has the memory format that these get.
        """
        try:
            if self.engine is None:
                return self._simulate(input, self._convolve)
            if input.dim() == 3 and not self.reads_codes:
                y = self._integer_forward(input.unsqueeze(0), None)
                assert isinstance(y, Tensor)
                return y.squeeze(0).contiguous()  # images by themselves are never channels_last
            y = self._integer_forward(input, residual)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            self._refuse(input)
            raise
        like = like if self.reads_codes else input
        if like is None:
            return y
        memory_format = memory_format_of(like)
        if isinstance(y, Tensor):
            return y.contiguous(memory_format=memory_format)
        return y[0].contiguous(memory_format=memory_format), y[1]

    def _misfit(self, x: Tensor) -> str:
        if x.dim() != 4 and (x.dim() != 3 or self.reads_codes):
            batch = "" if self.reads_codes else " or [C, H, W]"
            return f"and the convolution takes [N, C, H, W]{batch}"
        if x.shape[-3] != self.in_channels and not self.reads_codes:
            return f"and the convolution takes {self.in_channels} channels"
        padding = self.padding if isinstance(self.padding, tuple) else (0, 0)
        kernel = [(k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        sizes = [size + 2 * p for size, p in zip(x.shape[-2:], padding, strict=True)]
        if self.padding != "same" and any(k > size for k, size in zip(kernel, sizes, strict=True)):
            return f"padded {sizes[0]} x {sizes[1]}, and the convolution's kernel is {kernel[0]} x {kernel[1]}"
        return ""

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if memory_format_of(x) == torch.contiguous_format:
            # Weights in channels_last order would turn the output to it, and contiguous() may leave them in it.
            weight = weight.clone(memory_format=torch.contiguous_format)
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.explicit_padding, mode=self.padding_mode), (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Describe geometry and bits, as `print(module)` shows them."""
        return f"{nn.Conv2d.extra_repr(self)}, {super().extra_repr()}"  # type: ignore[arg-type]

    @property
    def output_padding(self) -> tuple[int, int]:
        """Zero; nn.Conv2d.extra_repr reads it."""
        return (0, 0)
