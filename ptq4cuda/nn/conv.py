"""QuantConv2d: torch.nn.Conv2d with packed integer weights and a quantized input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.compat import explicit_padding
from ptq4cuda.nn.quant_module import Outputs, QuantModule
from ptq4cuda.nn.spec import LayerSpec, per_dim

if TYPE_CHECKING:
    from typing_extensions import Self

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


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


QuantConv2d.spec = LayerSpec(nn.Conv2d, 2, F.conv2d, "stride padding dilation groups", QuantConv2d)
