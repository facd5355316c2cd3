"""QuantConv2d: torch.nn.Conv2d with packed integer weights and a quantized input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.compat import explicit_padding
from ptq4cuda.nn.quant_module import QuantModule
from ptq4cuda.nn.spec import LayerSpec, per_dim

if TYPE_CHECKING:
    from typing_extensions import Self

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format that the convolution of x has in PyTorch: of a contiguous kernel, x's own."""
    channels_last = x.dim() == 4 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]  # where C, H or W is one, too
    return torch.channels_last if channels_last else torch.contiguous_format


def misfit_of_window(x: Tensor, kernel_size: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> str:
    """Return what is wrong with images that are smaller than the kernel that they are convolved with, or ""."""
    kernel = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    sizes = [size + 2 * p for size, p in zip(x.shape[-2:], padding, strict=True)]
    if all(k <= size for k, size in zip(kernel, sizes, strict=True)):
        return ""
    return f"padded {sizes[0]} x {sizes[1]}, and the convolution's kernel is {kernel[0]} x {kernel[1]}"


class QuantConv2d(QuantModule):
    """A 2-d convolution, drop-in for torch.nn.Conv2d: stride, padding of every mode, dilation, groups, bias.

    The constructor takes nn.Conv2d's arguments and makes a layer whose weights are zero, to load a state_dict into;
    from_float quantizes a trained layer. Input [N, C, H, W] (or [C, H, W]) float32, float16 or bfloat16; the output
    has the input's dtype. Padding of mode "zeros" pads with the value zero, which every quantizer represents.
    """

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
    def like(cls, layer: nn.Conv2d, *, quantized_input: bool = True, folded: bool = True) -> Self:
        """Return a layer that computes as this one does when it is called, on the same device, with weights zero.

        Sizes are those of the weight; what __init__ made of its arguments may have changed since.
        """
        out_channels, per_group, *kernel_size = layer.weight.shape
        quantized = cls(
            per_group * layer.groups,
            out_channels,
            (kernel_size[0], kernel_size[1]),
            per_dim(layer.stride, 2),  # type: ignore[arg-type]
            layer.padding if isinstance(layer.padding, str) else per_dim(layer.padding, 2),  # type: ignore[arg-type]
            per_dim(layer.dilation, 2),  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            quantized_input=quantized_input,
            folded=folded,
            device=layer.weight.device,
        )
        quantized.dtype = layer.weight.dtype
        if layer.padding_mode != "zeros":  # padding was read by __init__ alone
            quantized.explicit_padding = explicit_padding(layer)
        return quantized

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the quantized input with the quantized weights."""
        try:
            if self.engine is None or not self.engine.plain:
                return self._simulate(input, self._convolve)
            if input.dim() == 3:  # images by themselves are never channels_last
                return self._integer_forward(input.unsqueeze(0), self.engine).squeeze(0).contiguous()
            y = self._integer_forward(input, self.engine)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            self._refuse(input)
            raise
        return y.contiguous(memory_format=memory_format_of(input))

    def _misfit(self, x: Tensor) -> str:
        if x.dim() not in (3, 4):
            return "and the convolution takes [N, C, H, W] or [C, H, W]"
        if x.shape[-3] != self.in_channels:
            return f"and the convolution takes {self.in_channels} channels"
        padding = self.padding if isinstance(self.padding, tuple) else (0, 0)
        return "" if self.padding == "same" else misfit_of_window(x, self.kernel_size, padding, self.dilation)

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


QuantConv2d.spec = LayerSpec(nn.Conv2d, 2, F.conv2d, "stride padding dilation groups", QuantConv2d)
