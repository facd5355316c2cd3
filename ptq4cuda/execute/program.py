"""LayerProgram: what a quantized network computes, step by step, for whatever executes it.

A program is made by lowering a network (execute.lowering). Our engines execute it, and so can any other target: it
knows codes, quantizers and geometry, and nothing of how a device lays out weights or codes in memory, nor of
torch.fx. Sizes of images are not in it; they follow from the input at run time.

    y_o = activation(scale_o * Σ weight * (code - zero_point) + bias_o + residual_o)

Weights are signed bytes. A quantized layer is y_o = D_o · Σ (k + m_o) · (q - z_c) + b_o, with codes k and q. Where
every m_o is a multiple of 2^(b - 7), b the bits of the weights, (k + m_o) · 2^(7 - b) is an integer, and mostly one
of 8 bits. The sum over these bytes needs no sum over the window for m_o; the powers of two go into D_o.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.compat import tree_map
from ptq4cuda.nn import QuantModule
from ptq4cuda.nn.spec import Geometry, pair_text
from ptq4cuda.quantizer import QuantizedWeight, QuantParams


class NotExecutable(ValueError):
    """A layer cannot be executed in integers; the message says why."""


# --- layers as integers ---------------------------------------------------------------------------------------


def weight_unit(bits: Tensor) -> Tensor:
    """Return what a step of the bytes of each row is worth in codes, float64 [O]."""
    return torch.exp2((bits.double() - 7.0).clamp_max(0.0))


def weight_bytes(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return weights as signed bytes and their scales: value = byte * scale, exactly.

    Raises:
        NotExecutable: code + offset, in units of 2^(bits - 7) (of 1 for 8 bits), is no signed byte somewhere.
    """
    unit = weight_unit(weight.bits)
    shape = (-1,) + (1,) * (weight.codes.dim() - 1)
    steps = (weight.codes.double() + weight.offset.double().view(shape)) / unit.view(shape)
    rounded = steps.round().clamp(-128, 127)
    bad = (rounded != steps).flatten(1).any(1)
    if bool(bad.any()):
        o = int(bad.nonzero()[0])
        raise NotExecutable(
            f"the weights of output channel {o}, {int(weight.bits[o])} bits with offset {float(weight.offset[o])}, "
            f"are no signed bytes in units of {float(unit[o])}"
        )
    return rounded.to(torch.int8), weight.scale * unit.float()


def zero_sums(weight: Tensor, source: QuantParams, groups: int) -> Tensor:
    """Return Σ weight * zero_point over the channels, of each tap and output: int64 [R * S, O].

    Args:
        weight: int8 [O, R, S, C / groups].
        source: the quantizer of the input.
        groups: of the convolution.

    Raises:
        NotExecutable: a sum of the convolution could leave 32 bits.
    """
    channels = weight.shape[3] * groups
    codes = ((1 << source.bits.to(torch.int64)) - 1).expand(channels)
    zero_points = source.zero_point.to(torch.int64).expand(channels)

    def by_output(values: Tensor) -> Tensor:  # view [C] so that it broadcasts over weights
        return values.view(groups, -1).repeat_interleave(len(weight) // groups, 0)[:, None, None]

    products = weight.to(torch.int64)
    sums = (products * by_output(zero_points)).sum(-1).flatten(1).t().contiguous()
    reach = (products.abs() * by_output(codes)).sum((1, 2, 3)) + sums.abs().sum(0)
    if len(weight) and int(reach.max()) >= 1 << 31:
        raise NotExecutable(f"the sums of output channel {int(reach.argmax())} can leave 32 bits")
    return sums


# --- steps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Value:
    """What a step gives to others.

    Attributes:
        name: unique in a program.
        quantizer: of codes, uint8, along the channel axis that it has; None for values in floating point, and for
            whatever else a step in float returns.
    """

    name: str
    quantizer: QuantParams | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution of codes [N, C, H, W], or a fully connected layer of codes [*, C].

    One of codes [N, C, L] is one of height one.

    Attributes:
        name: of the module.
        module: holds weights, bias and the quantizer of the input, and is where they are, once, for every target.
        geometry: of a convolution; None for a fully connected layer.
        source: the codes that it reads.
        outputs: what it returns: codes, each with a quantizer of its own; the first may be values.
        activation: follows the sums, and the residual if there is one.
        residual: codes [N, O, H', W'] whose values are added.
    """

    name: str
    module: QuantModule
    geometry: Geometry | None
    source: Value
    outputs: tuple[Value, ...]
    activation: Activation = IDENTITY
    residual: Value | None = None

    @classmethod
    def alone(cls, module: QuantModule, name: str = "", **fields: Any) -> Layer:
        """Return the step that a quantized layer is, which by itself turns codes into values.

        Raises:
            NotExecutable: the layer cannot be executed in integers.
        """
        if module.activation is None:
            raise NotExecutable("its input is not quantized")
        try:
            geometry = module.spec.geometry(module)
        except ValueError as reason:
            raise NotExecutable(str(reason)) from None
        given = {"source": Value("input", module.activation), "outputs": (Value("output"),), **fields}
        return cls(name, module, geometry, **given)

    @property
    def sources(self) -> tuple[Value, ...]:
        """What it reads."""
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @property
    def bias(self) -> Tensor | None:
        """float32 [O]."""
        return self.module.bias

    def weight(self) -> tuple[Tensor, Tensor]:
        """Return the weights, int8, and what a product with a code is worth [O].

        They are [O, C] without a geometry, else those of the 2-d convolution, [O * phases, R, S, C / groups].

        Raises:
            NotExecutable: the layer cannot be executed in integers.
        """
        scale = self.module.product_scale
        if scale is None:
            raise NotExecutable("its input has a scale per channel, which is not folded into the weights")
        weight, scale = weight_bytes(replace(self.module.quantized_weight(), scale=scale))
        return self.module.spec.to_2d(self.module, weight) if self.geometry is not None else weight, scale

    def check(self) -> None:
        """Raise NotExecutable unless weights are bytes and sums have 32 bits."""
        weight, _ = self.weight()
        assert self.source.quantizer is not None
        if self.geometry is None:
            weight = weight[:, None, None]
        zero_sums(weight, self.source.quantizer, 1 if self.geometry is None else self.geometry.groups)

    def __str__(self) -> str:
        shape = self.module.weight_shape
        parts = [f"{self.module.spec.name} {shape[1] * self.module.groups} → {shape[0]}"]
        if self.geometry is not None:
            parts[0] += f", {'x'.join(map(str, shape[2:]))}"
            parts.append(str(self.geometry))
        parts.append(_bits_of(self.module.weight_bits, "weights of "))
        if self.residual is not None:
            parts.append(f"+ {self.residual}")
        parts.append(_activation(self.activation))
        return f"{self.name}({self.source}): {', '.join(filter(None, parts))}"


@dataclass(frozen=True, eq=False)
class _Map:
    source: Value
    output: Value

    @property
    def sources(self) -> tuple[Value, ...]:
        """What it reads."""
        return (self.source,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        """What it returns."""
        return (self.output,)


class Quantize(_Map):
    """Turns values, the source, into codes."""

    def __str__(self) -> str:
        return f"quantize({self.source})"


@dataclass(frozen=True, eq=False)
class MaxPool(_Map):
    """The largest code of each window, arguments as of torch.nn.MaxPool2d; padding is with the least code, 0.

    Of sequences [N, C, L] it is that of images of height one.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    @property
    def window(self) -> tuple[Any, ...]:
        """The arguments, in their order."""
        return self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode

    def __str__(self) -> str:
        window = str(Geometry(self.stride, self.padding, self.dilation))
        return f"max_pool({self.source}): {', '.join(filter(None, (pair_text(self.kernel_size), window)))}"


@dataclass(frozen=True, eq=False)
class Concatenate:
    """Puts codes side by side along the channels; each may have quantizers of its own, which `output` has in turn."""

    sources: tuple[Value, ...]
    output: Value

    @property
    def outputs(self) -> tuple[Value, ...]:
        """What it returns."""
        return (self.output,)

    def __str__(self) -> str:
        return f"concatenate({', '.join(map(str, self.sources))})"


@dataclass(frozen=True, eq=False)
class Reshape(_Map):
    """Moves codes into another shape, in the order that they have as [N, C, H, W].

    Attributes:
        kind: "flatten": [N, *] becomes [N, F]; "squeeze": a dimension of size one goes; "unsqueeze": one comes.
        dim: that dimension, counted from the front, behind the channels.
    """

    kind: Literal["flatten", "squeeze", "unsqueeze"]
    dim: int = 1

    def __str__(self) -> str:
        return f"{self.kind}({self.source})" + ("" if self.kind == "flatten" else f": dimension {self.dim}")


@dataclass(frozen=True, eq=False)
class PixelShuffle(_Map):
    """[N, C * factor², H, W] becomes [N, C, H * factor, W * factor], as in torch.nn.PixelShuffle."""

    factor: int

    def __str__(self) -> str:
        return f"pixel_shuffle({self.source}): {self.factor}"


@dataclass(frozen=True, eq=False)
class Float:
    """A hole: what a target has to compute in floating point, as the float network does.

    Attributes:
        kind: "function": target is called; "method": of the first argument; "module": the network's of this name;
            "attribute": of the network.
        target: the function, or the name.
        args, kwargs: plain values with a Value wherever another step's result is meant. Codes among them are read for
            their shape alone.
        output: what it returns.
        reason: why it is not in integers; "" where it has no weights.
        what: the name of what is called, for people.
    """

    kind: Literal["function", "method", "module", "attribute"]
    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Value
    reason: str = ""
    what: str = ""

    @property
    def sources(self) -> tuple[Value, ...]:
        """What it reads."""
        found: dict[Value, None] = {}
        map_values(lambda value: found.setdefault(value), (self.args, self.kwargs))
        return tuple(found)

    @property
    def outputs(self) -> tuple[Value, ...]:
        """What it returns."""
        return (self.output,)

    def __str__(self) -> str:
        arguments = [_text(a) for a in self.args] + [f"{name}={_text(a)}" for name, a in self.kwargs.items()]
        return f"float {self.what}({', '.join(arguments)})" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, eq=False)
class Input:
    """An argument of the network.

    Attributes:
        name: as forward has it, with its stars.
        output: its value.
        default: empty where there is none.
    """

    name: str
    output: Value
    default: tuple[Any, ...] = ()
    sources: tuple[Value, ...] = ()

    @property
    def outputs(self) -> tuple[Value, ...]:
        """What it returns."""
        return (self.output,)

    def __str__(self) -> str:
        return "input" if not self.default else f"input, {self.default[0]!r} where there is none"


Step = Input | Layer | Quantize | MaxPool | Concatenate | Reshape | PixelShuffle | Float


@dataclass(frozen=True, eq=False)
class LayerProgram:
    """The steps of a network, in an order in which they can be executed; print it to follow the network by it.

    Attributes:
        steps: each reads what steps before it return.
        result: what the network returns: any container of plain values with Values in it.
    """

    steps: tuple[Step, ...]
    result: Any

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def readers(self) -> dict[Value, list[Step]]:
        """Return the steps that read each value; it may be part of the result beside."""
        found: dict[Value, list[Step]] = {value: [] for step in self.steps for value in step.outputs}
        for step in self.steps:
            for source in dict.fromkeys(step.sources):
                found[source].append(step)
        return found

    def __str__(self) -> str:
        """One line a step: what it returns, and with how many bits; what it does, and with what."""
        lines = [f"{', '.join(map(_described, step.outputs))} = {step}" for step in self.steps]
        return "\n".join([*lines, f"return {_text(self.result)}"])


def program(network: nn.Module) -> LayerProgram:
    """Return the program of a network that computes in integers: print it to see what is computed, step by step.

    Raises:
        TypeError: the network was not lowered as a whole: it is simulated, or walked by its modules, each of whose
            layers computes by itself.
    """
    found = vars(network).get(_ATTRIBUTE)
    if not isinstance(found, LayerProgram):
        raise TypeError(
            f"{type(network).__name__} has no program: it does not compute in integers as a whole (report() says why)"
        )
    return found


_ATTRIBUTE = "_ptq4cuda_program"


def attach_program(network: nn.Module, steps: LayerProgram) -> None:
    """Let a program travel with the network that it describes, whose modules it refers to."""
    vars(network)[_ATTRIBUTE] = steps


def map_values(function: Callable[[Value], Any], arguments: Any) -> Any:
    """Return arguments with something else in the place of each Value, also in slices."""

    def leaf(item: Any) -> Any:
        if _is_slice(item):
            return slice(leaf(item.start), leaf(item.stop), leaf(item.step))
        return function(item) if isinstance(item, Value) else item

    return tree_map(leaf, arguments)


# --- as text --------------------------------------------------------------------------------------------------


def _is_slice(item: Any) -> bool:
    return isinstance(item, slice)


def _bits_of(bits: Tensor, of: str) -> str:
    if not bits.numel():
        return ""
    mean = bits.float().mean().item()
    return f"{of}{round(mean, 2):g} bits"


def _described(value: Value) -> str:
    """Return a value's name, and for codes their bits; "each" where channels have quantizers of their own."""
    if value.quantizer is None:
        return value.name
    each = " each" if value.quantizer.scale.numel() > 1 else ""
    return f"{value.name} [{_bits_of(value.quantizer.bits, '')}{each}]"


def _activation(activation: Activation) -> str:
    if activation == IDENTITY:
        return ""
    upper = "" if activation.upper == float("inf") else f"{activation.upper:g}"
    return f"relu{upper}" if activation.negative_slope == 0 else f"leaky_relu{upper} {activation.negative_slope:g}"


def _text(item: Any) -> str:
    if isinstance(item, Value):
        return item.name
    if isinstance(item, (tuple, list)):
        inner = ", ".join(map(_text, item))
        return f"[{inner}]" if isinstance(item, list) else f"({inner}{',' if len(item) == 1 else ''})"
    if isinstance(item, dict):
        return "{" + ", ".join(f"{key!r}: {_text(value)}" for key, value in item.items()) + "}"
    if _is_slice(item):
        parts = [_text(part) if part is not None else "" for part in (item.start, item.stop, item.step)]
        return ":".join(parts if parts[2] else parts[:2])
    return getattr(item, "__name__", None) or repr(item)
