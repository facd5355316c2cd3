"""Our engines: the modules that execute the steps of a LayerProgram.

An engine prepares its step for the device that it is on, and again where it is moved to another: weights in panels,
and on a GPU codes that only convolutions read as packed nibbles (ops.nibbles), where that saves a quarter of their
bytes or more. Pooling and concatenation, residual sums, depthwise and grouped convolutions and linear layers read
bytes. A weight is held once: by the engine, of which the quantized layer reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda import _native, ops
from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.compat import tree_map
from ptq4cuda.execute import program as steps
from ptq4cuda.execute.program import LayerProgram, Value, map_values, weight_unit, zero_sums
from ptq4cuda.nn import QuantModule
from ptq4cuda.nn.conv import misfit_of_window
from ptq4cuda.nn.quant_module import memory_format_of
from ptq4cuda.nn.quant_tensor import QuantizerState, tensor_of_values
from ptq4cuda.nn.spec import Geometry, pair_text
from ptq4cuda.ops import FLOATING, checks, nibbles, panels
from ptq4cuda.ops.layers import Code
from ptq4cuda.ops.nibbles import Nibbles
from ptq4cuda.ops.schemas import argument
from ptq4cuda.quantizer import QuantParams

_LEAST_SAVING = 0.25  # of the bytes of codes that are packed
_FIELDS = ("bits", "scale", "zero_point")

Outputs = Tensor | tuple[Tensor, ...]  # several where the readers of a layer disagree on codes


@dataclass(frozen=True)
class Packing:
    """Which codes of a convolution travel packed between convolutions, where a device reads packed codes.

    Attributes:
        source: those that it reads: not with groups.
        outputs: numbers of those that it returns: only if panels.whole_octets.
        always: on every device; None where that is for the device to say: a GPU packs.
    """

    source: bool = False
    outputs: frozenset[int] = frozenset()
    always: bool | None = None

    def on(self, device: torch.device) -> bool:
        """Tell whether codes are packed on a device."""
        return device.type == "cuda" if self.always is None else self.always


class IntegerConv2d(QuantizerState):
    """A convolution that reads codes and computes in integers.

    Args:
        weight: int8 [O, R, S, C / groups].
        scale: float32 [O]; weight * scale is the value of the weight, times the scale of the input.
        bias: float32 [O] or None.
        source: the quantizer of the input: bits and zero points ([C] or [1]) are used, the scale is part of `scale`.
        geometry: how the window moves.
        activation: follows the convolution, and the residual if there is one.
        residual: the quantizer of the codes that forward adds ([O] or [1]).
        outputs: one or two quantizers of what is returned ([O] or [1]); the first may be None, for values.
        packing: which codes travel packed.
        dtype: of the values.

    Raises:
        ValueError: a parameter does not fit, or a sum could leave 32 bits.
    """

    weight: Tensor
    zero_sums: Tensor | None
    scale: Tensor
    bias: Tensor
    source_bits: Tensor
    residual_scale: Tensor | None
    residual_zero_point: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        source: QuantParams,
        geometry: Geometry = Geometry(),  # noqa: B008 (it is frozen)
        *,
        activation: Activation = IDENTITY,
        residual: QuantParams | None = None,
        outputs: Sequence[QuantParams | None] = (None,),
        packing: Packing = Packing(),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if weight.dtype != torch.int8 or weight.dim() != 4:
            raise ValueError(f"weight must be int8 [O, R, S, C / groups], got {weight.dtype} {list(weight.shape)}")
        out_channels, rows, columns, self.channels = weight.shape
        if out_channels % geometry.groups:
            raise ValueError(f"{out_channels} output channels do not make {geometry.groups} groups")
        if not bool(torch.isfinite(scale).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
            raise ValueError("scale and bias must be finite")
        if not 1 <= len(outputs) <= 2 or None in outputs[1:]:
            raise ValueError(f"a convolution has one or two outputs, of which the first may be values, got {outputs}")
        for name, params in (("residual", residual), *((f"output {i}", params) for i, params in enumerate(outputs))):
            if params is not None and params.scale.numel() not in (1, out_channels):
                raise ValueError(f"{name} has {params.scale.numel()} channels, the convolution has {out_channels}")
        self.kernel_size, self.geometry = (rows, columns), geometry
        self.activation, self.packing, self.dtype = activation, packing, dtype
        sums = zero_sums(weight, source, geometry.groups)
        self._keep("zero_sums", sums.to(torch.int32) if bool(sums.any()) else None)
        self._keep("scale", scale)
        self._keep("bias", torch.zeros_like(scale) if bias is None else bias)
        self._keep("source_bits", source.bits)
        for field in ("scale", "zero_point"):
            self._keep(f"residual_{field}", None if residual is None else getattr(residual, field))
        self.has_values, self.coded = outputs[0] is None, len([params for params in outputs if params is not None])
        for i, params in enumerate(params for params in outputs if params is not None):
            for field in _FIELDS:
                self._keep(f"out{i}_{field}", getattr(params, field))
        # Names of buffers, in the order of the operator's arguments.
        self._outputs = [
            [f"out{i}_{field}" for i in range(self.coded)] for field in ("scale", "zero_point", "bits", "starts")
        ]
        self._prepare(weight)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)  # all of it follows from the layer's own state

    @classmethod
    def of(
        cls,
        step: steps.Layer,
        dtype: torch.dtype = torch.float32,
        packing: Packing = Packing(),
    ) -> IntegerConv2d:
        """Prepare a step.

        Raises:
            NotExecutable: the layer cannot be executed in integers; the message says why.
        """
        weight, scale = step.weight()
        geometry = step.geometry or Geometry()
        phases = math.prod(geometry.phases)
        assert step.source.quantizer is not None
        bias = step.bias
        if phases > 1:
            scale, bias = scale.repeat_interleave(phases), None if bias is None else bias.repeat_interleave(phases)
        return cls(
            weight if step.geometry is not None else weight[:, None, None],
            scale,
            bias,
            step.source.quantizer,
            geometry,
            activation=step.activation,
            residual=None if step.residual is None else step.residual.quantizer,
            outputs=[output.quantizer and output.quantizer.repeated(phases) for output in step.outputs],
            packing=packing,
            dtype=dtype,
        )

    # --- for the device -----------------------------------------------------------------------------------

    def _prepare(self, weight: Tensor) -> None:
        """Lay out weights [O, R, S, C / groups], and codes that travel packed, for the device that they are on."""
        device, groups = weight.device, self.geometry.groups
        packs = self.packing.on(device)
        source_bits = self.source_bits.expand(self.channels * groups)
        self.span: int | None = None
        if packs and self.packing.source:
            layout = Nibbles.of(source_bits)
            self._keep("weight", layout.weight_panels(weight))
            self.source_channels, self.low_bytes = layout.bytes, layout.low_bytes
        else:
            self._keep("weight", panels.weight_panels(weight, groups))
            self.source_channels, self.low_bytes = len(source_bits), 0
            if device.type == "cpu":
                codes = (1 << source_bits.to(torch.int32)) - 1
                self.span = panels.span_of_sums(self.weight, codes, self.kernel_size, groups)
        self.packed_bytes = [0] * self.coded
        for i in range(self.coded):
            starts = torch.empty(0, dtype=torch.int32, device=device)
            if packs and i + self.has_values in self.packing.outputs:
                layout = Nibbles.of(getattr(self, f"out{i}_bits").expand(len(self.scale)))
                starts, self.packed_bytes[i] = layout.starts, layout.bytes
            self._keep(f"out{i}_starts", starts)

    def weight_bytes(self) -> Tensor:
        """Return the weights, int8 [O, R, S, C / groups]."""
        outputs = len(self.scale)
        if self.low_bytes:
            weight = nibbles.weight_of_panels(self.weight, outputs, self.kernel_size, self.low_bytes)
            return weight[..., : self.channels]  # of the low nibbles
        return panels.weight_of_panels(self.weight, outputs, self.kernel_size, self.channels, self.geometry.groups)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerConv2d:
        """Let the values that it returns follow .half() and the like, and the layout the device."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        if dtype not in FLOATING:
            raise TypeError(f"a network in integers returns float32, float16 or bfloat16, not {dtype}")
        before = self.scale.device.type
        super()._apply(fn, recurse)
        self.dtype = dtype
        if self.scale.device.type != before and "meta" not in (before, self.scale.device.type):
            self._prepare(self.weight_bytes())
        return self

    # --- in use -------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Outputs:
        """Return the convolution of codes x, uint8 [N, C, H, W], plus the residual's values, channels_last.

        Packed codes are uint8 [N, bytes, H, W], which comes in and goes out.
        """
        if x.shape[1] != self.source_channels:
            takes = f"the convolution takes {self.source_channels} channels"
            raise RuntimeError(f"the input has the shape {list(x.shape)}, and {takes}")
        if (residual is None) != (self.residual_scale is None):
            raise ValueError("a residual comes with its quantizer, and only with it")
        try:
            outputs = self._convolve(x, residual)
        except (RuntimeError, ValueError):
            misfit = misfit_of_window(x, self.kernel_size, self.geometry.padding, self.geometry.dilation)
            if misfit:
                raise RuntimeError(f"the input has the shape {list(x.shape)}, {misfit}") from None
            raise
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _convolve(self, x: Tensor, residual: Tensor | None) -> list[Tensor]:
        # The operator itself: what ops.conv2d_integer would check again and again has been checked once.
        return torch.ops.ptq4cuda.conv2d_integer(*self._arguments(x, residual))  # type: ignore[no-any-return]

    def prepared(self) -> Tensor:
        """Return what the operator run_layers needs of it beside the weight: uint8 [bytes], on the CPU."""
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.geometry.dilation, strict=True)]
        largest = (1 << self.source_bits.to(torch.int32)) - 1  # of its codes, as prepare_layer asks for
        x = largest.to(torch.uint8).view(1, -1, 1, 1).expand(1, self.source_channels, *reach)
        residual = None
        if self.residual_scale is not None:
            g = self.geometry
            size = checks.output_size(x.shape[2:], self.kernel_size, g.stride, g.padding, g.dilation)
            residual = x.new_zeros((1, len(self.scale), *size))
        return torch.ops.ptq4cuda.prepare_layer(*self._arguments(x, residual))  # type: ignore[no-any-return]

    def add_to(self, code: Code, source: int, residual: int | None) -> list[int]:
        """Add its step to a code, and return the numbers of the outputs."""
        g = self.geometry
        return code.convolve(
            source,
            self.weight,
            self.prepared(),
            len(self.scale),
            self.kernel_size,
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
            self.span,
            residual=residual,
            values=self.has_values,
            second=self.has_values + self.coded > 1,
        )

    def _arguments(self, x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
        g = self.geometry
        return (
            x,
            self.weight,
            self.zero_sums,
            self.scale,
            self.bias,
            self.kernel_size,
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
            self.low_bytes,
            self.span,
            self.activation.negative_slope,
            argument(self.activation.upper),
            residual,
            self.residual_scale,
            self.residual_zero_point,
            *(argument([getattr(self, name) for name in names]) for names in self._outputs),
            argument(self.packed_bytes),
            checks.number_of(self.dtype) if self.has_values else None,
        )

    def weight_codes(self, layer: QuantModule) -> Tensor:
        """Return the codes [O, *kernel, C / groups] of its layer, that weight_bytes made bytes of."""
        weight = layer.spec.from_2d(layer, self.weight_bytes()).double()
        shape = (-1,) + (1,) * (weight.dim() - 1)
        codes = weight * weight_unit(layer.weight_bits).view(shape) - layer.weight_offset.double().view(shape)
        return codes.to(torch.uint8)

    @property
    def plain(self) -> bool:
        """Whether it computes its layer alone, from bytes to values."""
        alone = self.has_values and not self.coded and self.residual_scale is None
        return alone and self.activation == IDENTITY and not self.low_bytes

    @property
    def kernel(self) -> str:
        """What computes the layer: kernel size and stride, how products are summed, what is fused."""
        size, groups = f"{self.kernel_size[0]}x{self.kernel_size[1]}", self.geometry.groups
        parts = [size if max(self.geometry.stride) == 1 else f"{size}/{pair_text(self.geometry.stride)}"]
        depthwise = panels.is_depthwise(len(self.scale), self.channels, groups)
        if groups > 1:
            parts.append("depthwise" if depthwise else f"{groups} groups")
        if self.low_bytes:
            parts.append("packed")
        if not depthwise:
            narrow = self.scale.device.type == "cpu" and _native.narrow_sums
            parts.append(
                "32-bit sums" if not narrow else "8-bit codes" if (self.span or -1) < 0 else f"span {self.span}"
            )
        if self.geometry.extra is not None:
            parts.append(f"blocks of {pair_text(self.geometry.phases)}")
        if self.residual_scale is not None:
            parts.append("residual")
        if self.has_values + self.coded > 1:
            parts.append("2 outputs")
        return ", ".join(parts)

    def extra_repr(self) -> str:
        """Describe the geometry, as `print(module)` shows it."""
        g = self.geometry
        return (
            f"{len(self.scale)} outputs, kernel_size={self.kernel_size}, stride={g.stride}, "
            f"padding={g.padding}, dilation={g.dilation}, groups={g.groups}"
        )


class IntegerLayer(nn.Module):
    """A layer that is a convolution of images in another view: a linear, a 1-d or a transposed one."""

    def __init__(self, convolution: IntegerConv2d, kind: type[QuantModule]) -> None:
        super().__init__()
        self.convolution, self.kind = convolution, kind

    @classmethod
    def of(cls, step: steps.Layer, dtype: torch.dtype = torch.float32, packing: Packing = Packing()) -> IntegerLayer:
        """Prepare a step, see IntegerConv2d.of."""
        return cls(IntegerConv2d.of(step, dtype, packing), type(step.module))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Outputs:
        """Return the layer's output for codes."""
        spec, channels, geometry = self.kind.spec, self.convolution.source_channels, self.convolution.geometry
        found = f"the input has the shape {list(x.shape)}"
        if spec.dims and x.dim() != spec.dims + 2:
            raise RuntimeError(f"{found}, and the convolution takes {spec.form}")
        if x.shape[spec.axis] != channels:
            takes = f"convolution takes {channels} channels" if spec.dims else ""
            takes = takes or f"layer takes {channels} features along the last dimension"
            raise RuntimeError(f"{found}, and the {takes}")
        images = spec.images(x)
        y = self.convolution(images, None if residual is None else spec.images(residual))
        return tree_map(lambda t: spec.outputs(geometry.arranged(t, images), x), y)  # type: ignore[no-any-return]

    def add_to(self, code: Code, source: int, residual: int | None) -> list[int]:
        """See IntegerConv2d.add_to."""
        return self.convolution.add_to(code, source, residual)

    def weight_codes(self, layer: QuantModule) -> Tensor:
        """See IntegerConv2d.weight_codes."""
        return self.convolution.weight_codes(layer)

    @property
    def plain(self) -> bool:
        """See IntegerConv2d.plain."""
        return self.convolution.plain

    @property
    def kernel(self) -> str:
        """What computes the layer, see IntegerConv2d.kernel."""
        return self.convolution.kernel


class Quantize(QuantizerState):
    """Turns values into codes where a network enters integers."""

    bits: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, params: QuantParams) -> None:
        super().__init__()
        self.axis = params.axis
        for name in _FIELDS:
            self.register_buffer(name, getattr(params, name), persistent=False)

    def add_to(self, code: Code, source: int) -> int:
        """Add its step to a code, and return the number of the codes."""
        return code.quantize(source, self.scale, self.zero_point, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return uint8 codes."""
        try:
            if self.axis < -1 and x.dim() != 1 - self.axis:
                raise ValueError("no batch")
            return ops.quantize(x, self.scale, self.zero_point, self.bits, self.axis)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            self._refuse(x)
            raise

    def _refuse(self, x: object) -> None:
        """Raise, in one sentence, where an input is to blame for what failed."""
        x = tensor_of_values(x)
        found = f"the input has the shape {list(x.shape)}"
        if self.axis < -1 and x.dim() != 1 - self.axis:
            form = "[N, C, H, W]" if self.axis == -3 else "[N, C, L]"
            raise RuntimeError(f"{found}, and the network in integers takes batches {form}")
        channels = max(getattr(self, name).numel() for name in _FIELDS)
        if x.dim() < -self.axis or channels not in (1, x.shape[self.axis]):
            kind = "channels" if self.axis < -1 else "features along the last dimension"
            raise RuntimeError(f"{found}, and the network takes {channels} {kind}")


# --- whole programs -------------------------------------------------------------------------------------------


def engine_of(
    step: steps.Layer,
    dtype: torch.dtype,
    packing: Packing = Packing(),
) -> IntegerConv2d | IntegerLayer:
    """Prepare a layer."""
    images = step.module.spec.dims == 2 and step.geometry is not None and step.geometry.extra is None
    return IntegerConv2d.of(step, dtype, packing) if images else IntegerLayer.of(step, dtype, packing)


def packed_values(program: LayerProgram) -> set[Value]:
    """Return the codes that travel packed where a device reads packed codes: from convolutions to convolutions."""
    readers, found = program.readers(), set[Value]()
    returned = set[Value]()
    map_values(returned.add, program.result)
    for step in program:
        if not isinstance(step, steps.Layer) or step.module.spec.dims < 2 or step.geometry is None:
            continue
        outputs, per_group = step.module.weight_shape[:2]
        if step.geometry.extra is not None or not panels.whole_octets(outputs, per_group, step.geometry.groups):
            continue
        for value in step.outputs:
            if value.quantizer is None or value in returned:
                continue
            dense = all(
                isinstance(r, steps.Layer)
                and r.module.spec.dims == 2
                and r.geometry is not None
                and r.geometry.groups == 1
                and r.residual is not value
                for r in readers[value]
            )
            if dense and Nibbles.of(value.quantizer.bits.expand(outputs)).bytes <= (1 - _LEAST_SAVING) * outputs:
                found.add(value)
    return found


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """Return values in the memory format that a convolution's output has in PyTorch, of an input like this."""
    return x.contiguous(memory_format=memory_format_of(like))
