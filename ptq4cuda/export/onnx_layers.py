"""Codes and integer layers as ONNX: QuantizeLinear and DequantizeLinear of scale one around whole numbers.

What flows between the layers is q - z, in uint8 with one zero point for all channels: scales are in the weights, so
that a runtime sees a scale of one before and behind a convolution, and can compute it in integers. A range that is
narrower than that of uint8 is cut where uint8 saturates: at its upper end as the convolution's sums are rounded, at
its lower end as a constant of each channel is added to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto
from torch import Tensor

from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.execute import program as steps
from ptq4cuda.execute.program import weight_unit
from ptq4cuda.export.onnx_graph import OnnxGraph
from ptq4cuda.export.summary import LayerExport
from ptq4cuda.quantizer import QuantParams

_MOST = 255  # of uint8
_WHOLE = 2**63 - 1  # where a Slice ends that goes on to the end


@dataclass(frozen=True)
class Codes:
    """Codes in the graph, as uint8: those of the program, from the least that occurs on.

    Attributes:
        name: of the tensor.
        zero: what stands for zero, int64 [1] or [C].
        low, high: the least and the largest of q - z that occur, likewise.
        behind: dimensions behind that of the channels.
    """

    name: str
    zero: Tensor
    low: Tensor
    high: Tensor
    behind: int

    def units(self, graph: OnnxGraph) -> str:
        """Return q - z in float32."""
        if bool(((self.zero >= 0) & (self.zero <= _MOST)).all()):
            return _dequantize(graph, self.name, self.zero, self.behind)
        return graph.op("Sub", self.from_zero(graph), channels(graph, self.zero, self.behind))

    def from_zero(self, graph: OnnxGraph) -> str:
        """Return the codes themselves in float32: zero is zero more than it should be."""
        return _dequantize(graph, self.name, torch.zeros(1), self.behind)

    def values(self, graph: OnnxGraph, scale: Tensor) -> str:
        """Return (q - z) * scale in float32."""
        return graph.op("Mul", self.units(graph), channels(graph, scale, self.behind))

    def moved(self, graph: OnnxGraph, move: Callable[[str], str], behind: int, times: float = 1.0) -> Codes:
        """Return codes that were moved elsewhere; `times` as many channels, or one of so many."""

        def of_all(t: Tensor) -> Tensor:
            if t.numel() == 1:
                return t
            return t.repeat_interleave(int(times)) if times >= 1 else t[:: round(1 / times)]

        zero, low, high = map(of_all, (self.zero, self.low, self.high))
        alike = zero.numel() == 1
        name = _quantize(graph, move(self.units(graph)), zero, behind) if alike else move(self.name)
        return Codes(name, zero, low, high, behind)


def channels(graph: OnnxGraph, values: Tensor, behind: int) -> str:
    """Return the name of float32 values that broadcast along the channels."""
    shape = (-1, *(1,) * behind) if values.numel() > 1 else ()
    return graph.constant(values.float().reshape(shape))


def _zero_and_scale(graph: OnnxGraph, zero: Tensor) -> tuple[str, str]:
    shape = () if zero.numel() == 1 else (-1,)
    zero = zero.to(torch.uint8).reshape(shape)
    return graph.constant(torch.ones(zero.shape)), graph.constant(zero)


def _dequantize(graph: OnnxGraph, name: str, zero: Tensor, behind: int) -> str:
    return graph.op("DequantizeLinear", name, *_zero_and_scale(graph, zero), axis=-1 - behind)


def _quantize(graph: OnnxGraph, name: str, zero: Tensor, behind: int) -> str:
    return graph.op("QuantizeLinear", name, *_zero_and_scale(graph, zero), axis=-1 - behind)


def _one(values: Tensor) -> Tensor:
    """Return a vector of channels, [1] where all are the same."""
    values = values.reshape(-1)
    return values[:1] if bool((values == values[:1]).all()) else values


def _common_zero(low: Tensor, high: Tensor) -> Tensor | None:
    """Return what can stand for zero in uint8 for all channels, or None."""
    zero = (-low).max().clamp_min(0).reshape(1)
    return zero if int(zero + high.max()) <= _MOST else None


def code_range(params: QuantParams, activation: Activation = IDENTITY) -> tuple[Tensor, Tensor]:
    """Return the least and the largest q - z that codes of an activation's output have, int64 [1] or [C]."""
    zero = params.zero_point.cpu().long()
    low, high = -zero, (1 << params.bits.cpu().long()) - 1 - zero
    low, high = torch.broadcast_tensors(low, high)
    upper = (activation.upper / params.scale.cpu().double()).round().clamp(-(2.0**40), 2.0**40).long()
    high = torch.maximum(torch.minimum(high, upper), low)
    if activation.negative_slope == 0:
        low = torch.minimum(torch.maximum(low, torch.zeros_like(low)), high)
    return _one(low), _one(high)


def quantize_values(graph: OnnxGraph, y: str, params: QuantParams, behind: int) -> Codes:
    """Return the codes of values."""
    low, high = code_range(params)
    inverse = _one(1.0 / params.scale.cpu())
    return _rounded(graph, graph.op("Mul", y, channels(graph, inverse, behind)), low, high, behind)


def _rounded(graph: OnnxGraph, y: str, low: Tensor, high: Tensor, behind: int) -> Codes:
    """Return codes of values in units of them, cut to a range before they are rounded."""
    zero = _common_zero(low, high)
    whole = zero is not None
    zero = _one(-low) if zero is None else zero
    if not bool((low == -zero).all()):
        y = graph.op("Max", y, channels(graph, low, behind))
    if not bool((high == _MOST - zero).all()):
        y = graph.op("Min", y, channels(graph, high, behind))
    if bool(zero.any()):  # some runtimes round after they have added it, which moves what is all but half a code
        y = graph.op("Round", y)
    if whole or bool(((zero >= 0) & (zero <= _MOST)).all()):
        return Codes(_quantize(graph, y, zero, behind), zero, low, high, behind)
    y = graph.op("Add", y, channels(graph, zero, behind))
    return Codes(_quantize(graph, y, torch.zeros(1), behind), zero, low, high, behind)


def _saturated(graph: OnnxGraph, y: str, above: Tensor, low: Tensor, high: Tensor, behind: int) -> Codes:
    """Return codes that are cut to a range where uint8 saturates.

    Args:
        graph: to which it is added.
        y: what they are rounded from, in units of codes, and `above` more.
        above: int64 [O], such that none of the range saturates.
        low: the least of the range, [1] or [O].
        high: the largest.
        behind: dimensions behind the channels.
    """

    def plus(codes: str, zero: Tensor, constant: Tensor, new_zero: Tensor) -> str:
        constant = _one(constant)
        zero_of_constant = (-constant).max().clamp(0, _MOST).reshape(1)
        other = (constant + zero_of_constant).clamp(0, _MOST).to(torch.uint8)
        other = other.reshape((-1, *(1,) * behind) if other.numel() > 1 else ())
        terms = (
            _dequantize(graph, codes, zero, behind),
            _dequantize(graph, graph.constant(other), zero_of_constant, 0),
        )
        return _quantize(graph, graph.op("Add", *terms), new_zero, behind)

    none = torch.zeros(1, dtype=torch.int64)
    codes, above = _quantize(graph, y, none, behind), _one(above)
    to_end = _one(_MOST - high - above)
    if bool(to_end.any()):  # the upper end
        codes, above = plus(codes, none, to_end, none), _one(_MOST - high)
    if above.numel() == 1 and bool((low == -above).all()):
        return Codes(codes, above, low, high, behind)
    if low.numel() == 1:  # the lower end
        return Codes(plus(codes, none, -above, -low), -low, low, high, behind)
    codes = plus(codes, none, -above - low, none)
    zero = _common_zero(low, high)
    if zero is None:
        return Codes(codes, -low, low, high, behind)
    return Codes(plus(codes, none, low, zero), zero, low, high, behind)


class Rounding:
    """How a runtime that sums up products in integers gets codes, `above` larger: rint((sum + bias) * scale).

    Or, as OpenVINO does, rint(sum * scale + bias * scale), rounded to float32 in between or not.

    What is lost where the bias is rounded to a whole product, the scale makes up for: it is a trifle different, which
    moves the thresholds between codes, all of them alike if they are far from zero.

    Args:
        scale, bias: of the layer, float32 [O].
        params: the quantizer of the output.
        low, high: the range of its codes.
        more: int64 [O], by which the runtime's sums are larger, and its biases smaller.

    Attributes:
        above: int64 [O].
        bias: int32 [O].
        scale: float32 [O].
        exact: bool [O]: every sum gets the code that it has in the program, in each of these ways.
    """

    def __init__(
        self, scale: Tensor, bias: Tensor, params: QuantParams, low: Tensor, high: Tensor, more: Tensor
    ) -> None:
        self._more = more.double()[:, None]
        inverse = (1.0 / params.scale.cpu()).expand_as(scale)[:, None]
        self._low, self._high = (t.expand(len(scale))[:, None].double() for t in (low, high))
        self._step = scale.double()[:, None] * inverse.double()
        self._first = bias.double()[:, None] * inverse.double()
        self._codes = self._low + torch.arange(1, 1 + int((high - low).max()), dtype=torch.float64)  # [O, codes]
        # The least sum that gives each code, as the program rounds, in float32.
        estimate = ((self._codes - 0.5 - self._first) / self._step).ceil().clamp(-(2.0**31), 2.0**31)
        self._least = estimate
        for total in (estimate + 1, estimate, estimate - 1, estimate - 2):
            code = ((total.float() * scale[:, None] + bias[:, None]) * inverse).round()
            self._least = torch.where(code >= self._codes, total, self._least)
        self._choose()

    def _choose(self) -> None:
        """Saturate at the upper end of a range if that is exact, or else further up."""
        end, rows = _MOST - self._high, torch.arange(len(self._high))
        found = self._of(rows, end)
        room = (end + self._low).flatten()
        less = 0
        while not bool(found[3].all()) and less < int(room[~found[3]].min()):
            less += 1
            rows = (~found[3]).nonzero().flatten()
            for field, other in zip(found, self._of(rows, end[rows] - less), strict=True):
                field[rows] = other
        self.above, self.bias, self.scale, self.exact = found

    def _of(self, rows: Tensor, above: Tensor) -> tuple[Tensor, ...]:
        """Return `above`, the best bias and scale for it, and whether they are exact, of some channels."""
        high, step, first, codes, least, more = (
            t[rows] for t in (self._high, self._step, self._first, self._codes, self._least, self._more)
        )
        occurs, half = codes <= high, codes - 0.5 + above
        nearest = ((first + above) / step).round()
        bias, scale, most = nearest, step, torch.zeros_like(nearest)
        for tried in (nearest + by for by in range(-2, 3)):
            at = least + tried
            lower = torch.where(occurs, torch.where(at > 0, half / at, torch.inf), 0.0).amax(1, True)
            upper = torch.where(occurs & (at > 1), half / (at - 1), torch.inf).amin(1, True)
            room = (upper / lower - 1).nan_to_num(0.0).clamp(0, 1)
            bias = torch.where(room > most, tried, bias)
            scale = torch.where(room > most, lower * (1 + room / 2), scale)
            most = most.maximum(room)
        bias, scale = (bias - more).clamp(-(2.0**31), 2.0**31 - 1), scale.float()
        added = bias.float() * scale

        def codes_of(total: Tensor) -> Iterator[Tensor]:
            total = total + more
            yield (total + bias).float() * scale
            yield total.float() * scale + added
            yield (total * scale.double() + added.double()).float()

        right = torch.ones_like(occurs)
        for reached, missed in zip(codes_of(least), codes_of(least - 1), strict=True):
            right &= (reached.round() - above >= codes) & (missed.round() - above < codes)
        exact = (right | ~occurs).all(1)
        return above.flatten().long(), bias.flatten().to(torch.int32), scale.flatten(), exact


# --- weights --------------------------------------------------------------------------------------------------


def weight_of(graph: OnnxGraph, step: steps.Layer, packed: bool) -> tuple[str, Tensor, int]:
    """Return the weights of a layer, an int8 tensor of the graph, what a product is worth, and the bits they take.

    Args:
        graph: to which they are added.
        step: the layer.
        packed: let codes of up to 4 bits be uint4, which are brought to bytes in the graph.

    Returns:
        [O * phases, C / groups, *kernel], or [C, O] of a layer without images; float32 [O * phases].
    """
    weight, scale = step.weight()
    if step.geometry is not None:
        scale = scale.repeat_interleave(len(weight) // len(scale))
        weight = weight.movedim(-1, 1)  # [O * phases, C / groups, R, S]
        weight = weight.squeeze(2) if step.module.spec.dims == 1 else weight
    else:
        weight = weight.t()
    quantized = step.module.quantized_weight()
    if not packed or int(quantized.bits.max()) > 4:
        return graph.constant(weight), scale.cpu(), 8
    # (code + offset) / unit, whole numbers of 8 bits; a runtime folds what makes them of the codes.
    unit, codes = weight_unit(quantized.bits), quantized.codes
    codes = codes.t() if step.geometry is None else codes.movedim(-1, 1)
    rows = (1, -1) if step.geometry is None else (-1,) + (1,) * (codes.dim() - 1)
    name = graph.op("Cast", graph.nibbles(codes.contiguous()), to=TensorProto.INT32)
    for kind, numbers in (("Mul", 1 / unit), ("Add", quantized.offset.double() / unit)):
        name = graph.op(kind, name, graph.constant(_one(numbers.round().to(torch.int32)).view(rows)))
    name = name if step.geometry is None else _in_place(graph, name, step)
    return graph.op("Cast", name, to=TensorProto.INT8), scale.cpu(), 4


def _sums_of(step: steps.Layer, zero: Tensor) -> Tensor:
    """Return what a layer makes of the zero of each channel, int64 [O * phases]."""
    weight = step.weight()[0].cpu().long()
    rows = weight if step.geometry is None else weight.sum((1, 2))  # [O * phases, C / groups]
    groups = 1 if step.geometry is None else step.geometry.groups
    sums: Tensor = (rows * zero.view(groups, -1).repeat_interleave(len(rows) // groups, 0)).sum(1)
    return sums


def _in_place(graph: OnnxGraph, name: str, step: steps.Layer) -> str:
    """Return int32 weights [O, C / groups, *kernel] as [O * phases, C / groups, *kernel] of the convolution."""
    module = step.module
    outputs, inputs, *kernel = module.weight_shape
    taps = torch.arange(1, 1 + torch.Size(kernel).numel()).view(1, *kernel, 1)
    places = module.spec.to_2d(module, taps)[..., 0]  # [phases, R, S]: which tap is where, 0: none
    if len(places) == 1:
        return name
    phases, *size = places.shape
    name = graph.op("Reshape", name, graph.constant([outputs, inputs, -1]))
    name = graph.op("Pad", name, graph.constant([0, 0, 1, 0, 0, 0]))
    name = graph.op("Gather", name, graph.constant(places.flatten()), axis=2)  # [O, C / groups, phases * R * S]
    name = graph.op("Reshape", name, graph.constant([outputs, inputs, phases, -1]))
    name = graph.op("Transpose", name, perm=[0, 2, 1, 3])
    return graph.op("Reshape", name, graph.constant([outputs * phases, inputs, *size[2 - module.spec.dims :]]))


# --- layers ---------------------------------------------------------------------------------------------------


def layer(
    graph: OnnxGraph, step: steps.Layer, source: Codes, residual: Codes | None, packed: bool
) -> tuple[list[Codes | str], LayerExport]:
    """Add a layer; return its outputs, codes or the names of values."""
    dims, activation = step.module.spec.dims, step.activation
    weight, scale, bits = weight_of(graph, step, packed)
    x, less = source.units(graph), None
    if source.zero.numel() > 1 and (step.geometry is None or max(step.geometry.padding) == 0):
        x, less = source.from_zero(graph), _sums_of(step, source.zero)
    outputs = step.module.weight_shape[0]
    phases = len(scale) // outputs
    bias = (torch.zeros(outputs) if step.bias is None else step.bias.cpu()).repeat_interleave(phases)

    def product(scale: Tensor, *bias: str) -> str:
        w = graph.op("DequantizeLinear", weight, graph.constant(scale), axis=0)
        if step.geometry is None:
            return graph.op("MatMul", x, w)
        g = step.geometry
        return graph.op(
            "Conv",
            x,
            w,
            *bias,
            strides=g.stride[-dims:],
            pads=g.padding[-dims:] * 2,
            dilations=g.dilation[-dims:],
            group=g.groups,
        )

    reason, rounding = _why_not_rounded(step), None
    if source.zero.numel() > 1 and less is None:
        reason = "channels of its input differ in what stands for zero, and it pads"
    if not reason:
        assert step.outputs[0].quantizer is not None
        params = step.outputs[0].quantizer.repeated(phases)
        low, high = code_range(params, activation)
        more = torch.zeros(len(scale), dtype=torch.int64) if less is None else less
        rounding = Rounding(scale, bias, params, low, high, more)
        if not bool(rounding.exact.all()):
            reason = "a bias that is a whole number would change codes of its output"
    if step.geometry is None:  # products of matrices need no code behind them to be integers
        row = LayerExport(step.name, bits, True)
    else:
        row = LayerExport(step.name, bits, not reason, reason)
    if rounding is not None and not reason:
        added = graph.op("DequantizeLinear", graph.constant(rounding.bias), graph.constant(rounding.scale), axis=0)
        codes = _saturated(graph, product(rounding.scale, added), rounding.above, low, high, dims)
        if step.geometry is not None and step.geometry.extra is not None:
            codes = codes.moved(graph, lambda y: _arranged(graph, y, step), dims, 1 / phases)
        return [codes], row
    # Sums of whole numbers, which float32 holds exactly in any order.
    y = product(torch.ones(()))
    y = y if less is None else graph.op("Sub", y, channels(graph, less, dims))
    y = graph.op("Mul", y, channels(graph, scale, dims))
    y = _arranged(graph, graph.op("Add", y, channels(graph, bias, dims)), step)
    if residual is not None:
        assert step.residual is not None and step.residual.quantizer is not None
        y = graph.op("Add", y, residual.values(graph, step.residual.quantizer.scale.cpu()))
    y = activated(graph, y, activation)
    return [
        y if value.quantizer is None else quantize_values(graph, y, value.quantizer, dims) for value in step.outputs
    ], row


def _why_not_rounded(step: steps.Layer) -> str:
    """Say why the sums of a layer are not rounded to codes at once, as integer convolutions do; "" where they are."""
    params, slope = step.outputs[0].quantizer, step.activation.negative_slope
    if step.geometry is None:
        return "it is a product of matrices"
    if step.residual is not None:
        return "a residual is added to its sums"
    if len(step.outputs) > 1:
        return "its readers want different codes"
    if params is None:
        return "its output is read as values"
    low, high = code_range(params, step.activation)
    if slope not in (0, 1) and (slope < 0 or bool((low < 0).any())):
        return "the activation behind it does not only clip"
    whole = int(high.min()) >= 0 and int(high.max()) <= _MOST and bool((high > low).any())
    return "" if whole else "its outputs are constant"


def activated(graph: OnnxGraph, y: str, activation: Activation) -> str:
    """Return values behind an activation."""
    if activation == IDENTITY:
        return y
    if activation.negative_slope == 0:
        y = graph.op("Relu", y)
    elif activation.negative_slope != 1:
        y = graph.op("LeakyRelu", y, alpha=activation.negative_slope)
    return y if activation.upper == float("inf") else graph.op("Min", y, graph.constant(activation.upper, "float32"))


def _arranged(graph: OnnxGraph, y: str, step: steps.Layer) -> str:
    """Return images of the outputs of a convolution, which are pixels of blocks, as Geometry.arranged does."""
    g, module = step.geometry, step.module
    if g is None or g.extra is None:
        return y
    dims, (v, h), outputs = module.spec.dims, g.phases, module.weight_shape[0]

    def reshaped(y: str, *shape: int) -> str:
        return graph.op("Reshape", y, graph.constant(shape))

    def transposed(y: str, *order: int) -> str:
        return graph.op("Transpose", y, perm=order)

    if dims == 1:
        y = reshaped(transposed(reshaped(y, 0, outputs, h, -1), 0, 1, 3, 2), 0, outputs, -1) if h > 1 else y
    elif v == h > 1:
        y = graph.op("DepthToSpace", y, blocksize=v, mode="CRD")
    elif v != h:  # Reshape keeps sizes in their place alone, and finds one
        y = reshaped(transposed(y, 0, 2, 3, 1), 0, 0, 0, outputs, v, h)
        y = reshaped(transposed(y, 0, 3, 1, 4, 2, 5), 0, 0, 0, v, -1)
        y = transposed(reshaped(transposed(y, 0, 1, 4, 2, 3), 0, 0, 0, -1), 0, 1, 3, 2)
    kernel = module.spec.to_2d(module, torch.zeros(1, *module.weight_shape[2:], 1)).shape[1:3]
    each = zip(g.phases, g.padding, g.dilation, kernel, g.start, g.extra, strict=True)
    beyond = [v * (2 * p - d * (k - 1)) - start - extra for v, p, d, k, start, extra in each]
    if not any(g.start) and not any(beyond):
        return y
    ends = [-more if more else _WHOLE for more in beyond]
    axes = list(range(2, 2 + dims))
    return graph.op("Slice", y, *map(graph.constant, (g.start[-dims:], ends[-dims:], axes)))


def max_pool(graph: OnnxGraph, source: Codes, step: steps.MaxPool) -> Codes:
    """Add a max pooling."""
    dims = source.behind
    kernel, stride, padding, dilation, ceil_mode = step.window
    return source.moved(
        graph,
        lambda name: graph.op(
            "MaxPool",
            name,
            kernel_shape=kernel[-dims:],
            strides=stride[-dims:],
            pads=padding[-dims:] * 2,
            dilations=dilation[-dims:],
            ceil_mode=int(ceil_mode),
        ),
        dims,
    )


def concatenate(graph: OnnxGraph, sources: Sequence[Codes]) -> Codes:
    """Put codes side by side along the channels."""
    behind = sources[0].behind
    sizes = [graph.sizes_of(source.name)[0] for source in sources]

    def side_by_side(name: str) -> Tensor:
        each: list[Tensor] = [getattr(source, name) for source in sources]
        if len({int(t) for t in each if t.numel() == 1}) == 1 == max(t.numel() for t in each):
            return each[0]
        return torch.cat([t.expand(size) for t, size in zip(each, sizes, strict=True)])

    zero, low, high = map(side_by_side, ("zero", "low", "high"))
    axis = -1 - behind
    if zero.numel() == 1:
        name = graph.op("Concat", *(source.units(graph) for source in sources), axis=axis)
        return Codes(_quantize(graph, name, zero, behind), zero, low, high, behind)
    common = _common_zero(low, high)
    if common is None:
        name = graph.op("Concat", *(source.name for source in sources), axis=axis)
        return Codes(name, zero, low, high, behind)
    name = graph.op("Concat", *(source.units(graph) for source in sources), axis=axis)
    return Codes(_quantize(graph, name, common, behind), common, low, high, behind)


def reshape(graph: OnnxGraph, source: Codes, step: steps.Reshape) -> Codes:
    """Move codes into another shape."""
    if step.kind == "flatten":
        each = math.prod(graph.sizes_of(source.name)[1:])
        return source.moved(graph, lambda name: graph.op("Flatten", name, axis=1), 0, each)
    kind, more = ("Squeeze", -1) if step.kind == "squeeze" else ("Unsqueeze", 1)
    dim = graph.constant([step.dim], "int64")
    return source.moved(graph, lambda name: graph.op(kind, name, dim), source.behind + more)


def pixel_shuffle(graph: OnnxGraph, source: Codes, factor: int) -> Codes:
    """Add a pixel shuffling."""
    return source.moved(
        graph,
        lambda name: graph.op("DepthToSpace", name, blocksize=factor, mode="CRD"),
        source.behind,
        1 / factor**2,
    )
