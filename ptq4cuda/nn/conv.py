"""QuantConv2d: torch.nn.Conv2d with packed integer weights and a quantized input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.compat import explicit_padding
from ptq4cuda.nn.quant_module import QuantModule, memory_format_of
from ptq4cuda.nn.spec import LayerSpec, per_dim

if TYPE_CHECKING:
    from typing_extensions import Self

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def misfit_of_window(x: Tensor, kernel_size: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> str:
    """Return what is wrong with images that are smaller than the kernel that they are convolved with, or ""."""
    kernel = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    sizes = [size + 2 * p for size, p in zip(x.shape[-len(kernel) :], padding, strict=True)]
    if all(k <= size for k, size in zip(kernel, sizes, strict=True)):
        return ""
    of_sizes, of_kernel = (" x ".join(map(str, each)) for each in (sizes, kernel))
    return f"padded {of_sizes}, and the convolution's kernel is {of_kernel}"


class QuantConvNd(QuantModule):
    """What the convolutions share; the constructor takes the arguments of torch.nn's and makes weights of zeros."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        quantized_input: bool = True,
        folded: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        # A float layer without memory checks the arguments and brings them into the form that _conv_forward reads.
        geometry: Any = self.spec.float_class(
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
        self.kernel_size: tuple[int, ...] = geometry.kernel_size
        self.stride: tuple[int, ...] = geometry.stride
        self.padding: str | tuple[int, ...] = geometry.padding
        self.dilation: tuple[int, ...] = geometry.dilation
        self.padding_mode: PaddingMode = geometry.padding_mode
        self.explicit_padding = explicit_padding(geometry)

    @classmethod
    def like(cls, layer: Any, *, quantized_input: bool = True, folded: bool = True) -> Self:
        """Return a layer that computes as this one does when it is called, on the same device, with weights zero.

        Sizes are those of the weight; what __init__ made of its arguments may have changed since.
        """
        out_channels, per_group, *kernel_size = layer.weight.shape
        dims = cls.spec.dims
        quantized = cls(
            per_group * layer.groups,
            out_channels,
            tuple(kernel_size),
            per_dim(layer.stride, dims),
            layer.padding if isinstance(layer.padding, str) else per_dim(layer.padding, dims),
            per_dim(layer.dilation, dims),
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
        return self._call(input, self._convolve)

    def _misfit(self, x: Tensor) -> str:
        misfit = misfit_of_images(self, x)
        padding = self.padding if isinstance(self.padding, tuple) else (0,) * self.spec.dims
        return (
            misfit
            if misfit or self.padding == "same"
            else misfit_of_window(x, self.kernel_size, padding, self.dilation)
        )

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        memory_format = memory_format_of(x)
        if memory_format == torch.contiguous_format:
            # Weights in channels_last order would turn the output to it, and contiguous() may leave them in it.
            weight = weight.clone(memory_format=torch.contiguous_format)
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.explicit_padding, mode=self.padding_mode), (0,) * self.spec.dims
            x = x.contiguous(memory_format=memory_format)  # circular padding forgets it
        return self.spec.function(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Describe geometry and bits, as `print(module)` shows them."""
        return f"{nn.Conv2d.extra_repr(self)}, {super().extra_repr()}"  # type: ignore[arg-type]

    @property
    def output_padding(self) -> tuple[int, ...]:
        """Zero; nn.Conv2d.extra_repr reads it."""
        return (0,) * self.spec.dims


def misfit_of_images(layer: Any, x: Tensor) -> str:
    """Return what is wrong with the dimensions or the channels of what a convolution is to take, or ""."""
    spec: LayerSpec = layer.spec
    if x.dim() != spec.dims + 2 and not spec.is_single(x):
        return f"and the convolution takes {spec.form} or [{spec.form.removeprefix('[N, ')}"
    if x.shape[spec.axis] != layer.in_channels:
        return f"and the convolution takes {layer.in_channels} channels"
    return ""


class QuantConv2d(QuantConvNd):
    """A 2-d convolution, drop-in for torch.nn.Conv2d: stride, padding of every mode, dilation, groups, bias.

    The constructor takes nn.Conv2d's arguments and makes a layer whose weights are zero, to load a state_dict into;
    from_float quantizes a trained layer. Input [N, C, H, W] (or [C, H, W]) float32, float16 or bfloat16; the output
    has the input's dtype. Padding of mode "zeros" pads with the value zero, which every quantizer represents.
    """


QuantConv2d.spec = LayerSpec(nn.Conv2d, 2, F.conv2d, "stride padding dilation groups", QuantConv2d)
