"""Integer execution of quantized convolutions: from the weights of QuantConv2d to the arguments of conv2d_integer.

A quantized layer is y_o = D_o · Σ (k + m_o) · (q - z_c) + b_o, with codes k and q. Where every m_o is a multiple of
2^(b - 7), b the bits of the weights, (k + m_o) · 2^(7 - b) is an integer, and mostly one of 8 bits: a signed byte.
The kernel multiplies these bytes with the codes of the input and needs no sum over the window for m_o; the powers of
two go into D_o.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq4cuda import _native
from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.compat import tree_map
from ptq4cuda.nn import QuantConv2d, QuantLinear
from ptq4cuda.nn.quant_module import Outputs, QuantModule
from ptq4cuda.nn.quant_tensor import QuantizerState
from ptq4cuda.ops import FLOATING, nibbles, panels
from ptq4cuda.ops.nibbles import Nibbles
from ptq4cuda.quantizer import QuantizedWeight, QuantParams


def weight_unit(bits: Tensor) -> Tensor:
    """Return what a step of the bytes of each row is worth in codes, float64 [O]."""
    return torch.exp2((bits.double() - 7.0).clamp_max(0.0))


def weight_bytes(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return weights as signed bytes and their scales: value = byte * scale, exactly.

    Raises:
        ValueError: code + offset, in units of 2^(bits - 7) (of 1 for 8 bits), is no signed byte somewhere.
    """
    unit = weight_unit(weight.bits)
    shape = (-1,) + (1,) * (weight.codes.dim() - 1)
    steps = (weight.codes.double() + weight.offset.double().view(shape)) / unit.view(shape)
    rounded = steps.round().clamp(-128, 127)
    bad = (rounded != steps).flatten(1).any(1)
    if bool(bad.any()):
        o = int(bad.nonzero()[0])
        raise ValueError(
            f"the weights of output channel {o}, {int(weight.bits[o])} bits with offset {float(weight.offset[o])}, "
            f"are no signed bytes in units of {float(unit[o])}"
        )
    return rounded.to(torch.int8), weight.scale * unit.float()


def _operands(layer: QuantModule) -> tuple[Tensor, Tensor]:
    """Return the weights of a layer as signed bytes [O, *kernel, C / groups] and what a product is worth [O]."""
    scale = layer.product_scale
    if scale is None:
        raise ValueError("its input has a scale per channel, which is not folded into the weights")
    return weight_bytes(replace(layer.quantized_weight(), scale=scale))


class IntegerConv2d(QuantizerState):
    """A convolution that reads codes and computes in integers: what a QuantConv2d becomes in a lowered network.

    Args:
        weight: int8 [O, R, S, C / groups].
        scale: float32 [O]; weight * scale is the value of the weight, times the scale of the input.
        bias: float32 [O] or None.
        source: the quantizer of the input: bits and zero points ([C] or [1]) are used, the scale is part of `scale`.
        stride, padding, dilation, groups: as in torch.nn.Conv2d; the padding has the value zero.
        activation: follows the convolution, and the residual if there is one.
        residual: the quantizer of the codes that forward adds ([O] or [1]).
        out: the quantizer of the output ([O] or [1]); None returns values.
        also: the quantizer of a second output, codes too; None if there is none.
        packed: which of "source", "out" and "also" are packed codes, see ops.nibbles: the input only without groups,
            an output only if panels.whole_octets.
        dtype: of the values.

    Raises:
        ValueError: a parameter does not fit, or a sum could leave 32 bits.
    """

    weight: Tensor
    zero_sums: Tensor | None
    scale: Tensor
    bias: Tensor
    residual_scale: Tensor | None
    residual_zero_point: Tensor | None
    out_scale: Tensor | None
    out_zero_point: Tensor | None
    out_bits: Tensor | None
    out_starts: Tensor | None
    also_scale: Tensor | None
    also_zero_point: Tensor | None
    also_bits: Tensor | None
    also_starts: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        source: QuantParams,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        *,
        activation: Activation = IDENTITY,
        residual: QuantParams | None = None,
        out: QuantParams | None = None,
        also: QuantParams | None = None,
        packed: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if weight.dtype != torch.int8 or weight.dim() != 4:
            raise ValueError(f"weight must be int8 [O, R, S, C / groups], got {weight.dtype} {list(weight.shape)}")
        outputs, rows, columns, per_group = weight.shape
        if outputs % groups:
            raise ValueError(f"{outputs} output channels do not make {groups} groups")
        if not bool(torch.isfinite(scale).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
            raise ValueError("scale and bias must be finite")
        self.kernel_size, self.stride, self.padding, self.dilation = (rows, columns), stride, padding, dilation
        self.groups, self.activation, self.dtype = groups, activation, dtype
        self.channels = per_group
        channels = per_group * groups
        codes = (1 << source.bits.to(torch.int32)) - 1
        codes, zero_point = codes.expand(channels), source.zero_point.expand(channels)
        zero_sums = self._sum_of_zero_points(weight, zero_point)
        largest = (weight.to(torch.int64).abs() * _by_output(codes, outputs, groups)).sum((1, 2, 3))
        reach = largest + zero_sums.abs().sum(0)
        if outputs and int(reach.max()) >= 1 << 31:
            raise ValueError(f"the sums of output channel {int(reach.argmax())} can leave 32 bits")

        def keep(name: str, tensor: Tensor | None) -> None:  # all of it follows from the layer's own state
            self.register_buffer(name, tensor, persistent=False)

        self.source_channels = channels
        if "source" in packed:
            layout = Nibbles.of(source.bits.expand(channels))
            keep("weight", layout.weight_panels(weight))
            self.source_channels = layout.bytes
            self.low_bytes, self.span = layout.low_bytes, panels.NIBBLES
        else:
            keep("weight", panels.weight_panels(weight, groups))
            self.low_bytes, self.span = 0, panels.span_of_sums(self.weight, codes, self.kernel_size, groups)
        keep("zero_sums", zero_sums.to(torch.int32) if bool(zero_sums.any()) else None)
        keep("scale", scale)
        keep("bias", torch.zeros_like(scale) if bias is None else bias)
        for name, params in (("residual", residual), ("out", out), ("also", also)):
            if params is not None and params.scale.numel() not in (1, outputs):
                raise ValueError(f"{name} has {params.scale.numel()} channels, the convolution has {outputs}")
            for field in ("scale", "zero_point", "bits"):
                keep(f"{name}_{field}", None if params is None else getattr(params, field))
        self.packed_bytes = {"out": 0, "also": 0}
        for name, params in (("out", out), ("also", also)):
            outputs_of = Nibbles.of(params.bits.expand(outputs)) if params is not None and name in packed else None
            keep(f"{name}_starts", None if outputs_of is None else outputs_of.starts)
            self.packed_bytes[name] = 0 if outputs_of is None else outputs_of.bytes

    @classmethod
    def from_quantized(
        cls,
        layer: QuantConv2d,
        *,
        activation: Activation = IDENTITY,
        residual: QuantParams | None = None,
        out: QuantParams | None = None,
        also: QuantParams | None = None,
        packed: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> IntegerConv2d:
        """Lower a quantized layer.

        Raises:
            ValueError: the layer cannot be executed in integers; the message says why.
        """
        source = layer.activation
        if source is None:
            raise ValueError("its input is not quantized")
        padding: object = layer.padding
        if isinstance(padding, str):
            padding = same_padding(layer.kernel_size, layer.dilation) if padding == "same" else (0, 0)
        if layer.padding_mode != "zeros":
            raise ValueError(f"its padding has the mode {layer.padding_mode!r}")
        if padding is None:
            raise ValueError("its padding 'same' is wider on one side, as its kernel has an even size")
        return cls(
            *_operands(layer),
            layer.bias,
            source,
            layer.stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            activation=activation,
            residual=residual,
            out=out,
            also=also,
            packed=packed,
            dtype=dtype,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerConv2d:
        """Let the values that it returns follow .half() and the like."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        if dtype not in FLOATING:
            raise TypeError(f"a network in integers returns float32, float16 or bfloat16, not {dtype}")
        self.dtype = dtype
        super()._apply(fn, recurse)
        return self

    def _sum_of_zero_points(self, weight: Tensor, zero_point: Tensor) -> Tensor:
        """Return Σ weight * zero_point over the channels, of each tap and output: int64 [R * S, O]."""
        zeros = _by_output(zero_point.to(torch.int64), weight.shape[0], self.groups)
        return (weight.to(torch.int64) * zeros).sum(-1).flatten(1).t().contiguous()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Outputs:
        """Return the convolution of codes x, uint8 [N, C, H, W], plus the residual's values, channels_last.

        Packed codes are uint8 [N, bytes, H, W], which comes in and goes out.
        """
        if x.shape[1] != self.source_channels:
            takes = f"the convolution takes {self.source_channels} channels"
            raise RuntimeError(f"the input has the shape {list(x.shape)}, and {takes}")
        if (residual is None) != (self.residual_scale is None):
            raise ValueError("a residual comes with its quantizer, and only with it")
        # The operator itself: what ops.conv2d_integer would check again and again has been checked once.
        first, *second = torch.ops.ptq4cuda.conv2d_integer(
            x,
            self.weight,
            self.zero_sums,
            self.scale,
            self.bias,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.low_bytes,
            self.span,
            self.activation.negative_slope,
            self.activation.upper,
            residual,
            self.residual_scale,
            self.residual_zero_point,
            self.out_scale,
            self.out_zero_point,
            self.out_bits,
            self.out_starts,
            self.packed_bytes["out"],
            self.also_scale,
            self.also_zero_point,
            self.also_bits,
            self.also_starts,
            self.packed_bytes["also"],
            self.dtype,
        )
        return (first, *second) if second else first

    def weight_codes(self, bits: Tensor, offset: Tensor) -> Tensor:
        """Return the codes [O, R, S, C / groups] that weight_bytes made bytes of."""
        outputs = len(self.scale)
        if self.low_bytes:
            weight = nibbles.weight_of_panels(self.weight, outputs, self.kernel_size, self.low_bytes)
            weight = weight[..., : self.channels]  # of the low nibbles
        else:
            weight = panels.weight_of_panels(self.weight, outputs, self.kernel_size, self.channels, self.groups)
        weight = weight.double()
        shape = (-1, 1, 1, 1)
        codes = weight * weight_unit(bits).view(shape) - offset.double().view(shape)
        return codes.to(torch.uint8)

    @property
    def kernel(self) -> str:
        """What computes the layer: kernel size and stride, how products are summed, what is fused."""
        size = f"{self.kernel_size[0]}x{self.kernel_size[1]}"
        parts = [size if max(self.stride) == 1 else f"{size}/{self.stride[0]}"]
        depthwise = panels.is_depthwise(len(self.scale), self.channels, self.groups)
        if self.groups > 1:
            parts.append("depthwise" if depthwise else f"{self.groups} groups")
        if self.low_bytes:
            parts.append("packed")
        if not depthwise:
            narrow = self.scale.device.type == "cpu" and _native.narrow_sums
            parts.append("32-bit sums" if not narrow else "8-bit codes" if self.span < 0 else f"span {self.span}")
        if self.residual_scale is not None:
            parts.append("residual")
        if self.also_scale is not None:
            parts.append("2 outputs")
        return ", ".join(parts)

    def extra_repr(self) -> str:
        """Describe the geometry, as `print(module)` shows it."""
        return (
            f"{len(self.scale)} outputs, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )


class IntegerLinear(nn.Module):
    """A fully connected layer in integers: a convolution of one pixel."""

    def __init__(self, convolution: IntegerConv2d) -> None:
        super().__init__()
        self.convolution = convolution

    @classmethod
    def from_quantized(
        cls,
        layer: QuantLinear,
        *,
        activation: Activation = IDENTITY,
        residual: QuantParams | None = None,
        out: QuantParams | None = None,
        also: QuantParams | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> IntegerLinear:
        """Lower a quantized layer; arguments and errors as for IntegerConv2d.from_quantized."""
        source = layer.activation
        if source is None:
            raise ValueError("its input is not quantized")
        weight, scale = _operands(layer)
        convolution = IntegerConv2d(
            weight[:, None, None, :],
            scale,
            layer.bias,
            source,
            activation=activation,
            residual=residual,
            out=out,
            also=also,
            dtype=dtype,
        )
        return cls(convolution)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Outputs:
        """Return the layer's output for codes [*, C]."""
        y = self.convolution(x.reshape(-1, x.shape[-1], 1, 1), residual)
        return tree_map(lambda t: t.view(*x.shape[:-1], t.shape[1]), y)  # type: ignore[no-any-return]

    def weight_codes(self, bits: Tensor, offset: Tensor) -> Tensor:
        """Return the codes [O, C]."""
        return self.convolution.weight_codes(bits, offset)[:, 0, 0]

    @property
    def kernel(self) -> str:
        """What computes the layer, see IntegerConv2d.kernel."""
        return self.convolution.kernel


def _by_output(values: Tensor, outputs: int, groups: int) -> Tensor:
    """View what belongs to input channels [C] so that it broadcasts over weights [O, R, S, C / groups]."""
    return values.view(groups, -1).repeat_interleave(outputs // groups, 0)[:, None, None]


def same_padding(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the padding that torch.nn.Conv2d calls "same", or None if it differs between the sides."""
    total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
