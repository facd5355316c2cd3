"""Any arguments at all: all implementations return the same bits or refuse in the same words.

Those are the reference, the CPU kernels, the CUDA sources and the functions of ptq4cuda.ops; nothing crashes, hangs
or wraps around.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import oracle
from ops.backends import Backend
from ptq4cuda import ops
from ptq4cuda.ops import checks, panels
from ptq4cuda.ops.nibbles import Nibbles

# The backends are fixtures of the whole session: sharing them between examples is what is meant.
some = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

ABSURD = (-(2**63), -(2**62), -1, 0, 1, 9, 2**47, 2**62, 2**63 - 1)
GEOMETRY = (*ABSURD, 2**30 - 1, 2**30, 2**31)  # as sizes of results, these would only take memory and time
DTYPES = (*oracle.DTYPES, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool)
FLOATS = (0.0, -0.0, 1.0, -1.5, 1e-40, 1e-38, 3e38, 1e30, float("inf"), float("-inf"), float("nan"))
Draw = Callable[[Any], Any]


def chance(draw: Draw, one_in: int) -> bool:
    return bool(draw(st.integers(1, one_in)) == one_in)


def laid_out(draw: Draw, x: Tensor) -> Tensor:
    """x in some memory layout, also such as no layout has a name for."""
    kind = draw(
        st.sampled_from(("contiguous", "contiguous", "channels_last", "permuted", "strided", "misaligned", "0"))
    )
    if kind == "0":  # all elements are one
        return x.flatten()[:1].expand(x.numel()).as_strided(x.shape, [0] * x.dim()) if x.numel() else x
    if not x.numel() or (x.dim() < 2 and kind in ("channels_last", "permuted")):
        return x
    return oracle.arrange(x, kind)


def floats(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) * 4
    for value in draw(st.lists(st.sampled_from(FLOATS), max_size=3)):
        if x.numel():
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    return laid_out(draw, x.to(dtype))


def integers(draw: Draw, shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return laid_out(draw, torch.randint(low, high + 1, shape, dtype=dtype, generator=generator))


def spoiled(draw: Draw, value: Any) -> Any:
    """Something else in the place of an argument."""
    if not isinstance(value, Tensor):
        return draw(st.sampled_from((*ABSURD, None, 0.5, "x", torch.zeros(1))))
    what = draw(st.integers(0, 7))
    if max(value.shape, default=0) >= 2**40:  # of which torch makes nothing else
        what = 7
    if what == 0:
        return value.to(draw(st.sampled_from(DTYPES)))
    if what == 1:
        return value[..., :-1] if value.dim() and value.shape[-1] else value[None]
    if what == 2:
        return torch.cat([value, value]) if value.dim() and len(value) < 2**62 else value[None]
    if what == 3:
        return value[None] if draw(st.booleans()) else value.flatten()
    if what == 4:
        return value.flatten()[:0]
    if what == 5:
        return value.reshape(*value.shape, 1).squeeze(0)
    if what == 6 and value.is_floating_point():
        return torch.nn.Parameter(value.clone())
    return draw(st.sampled_from((None, 3, "x", [1.0], torch.zeros(0, 2**61), torch.zeros(()))))


def quantizer(draw: Draw, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    def length() -> int:
        return 1 if chance(draw, 4) else channels

    scale = floats(draw, (length(),), torch.float32)
    if not chance(draw, 8):
        scale = scale.nan_to_num(1.0, 1.0, 1.0).abs().clamp(2.0**-20, 2.0**20)
    widest = 2**31 - 1 if chance(draw, 10) else 300
    zero_point = integers(draw, (length(),), -widest, widest, torch.int32)
    return scale, zero_point, integers(draw, (length(),), 0, 9 if chance(draw, 10) else 8, torch.uint8)


def shape(draw: Draw) -> tuple[int, ...]:
    if chance(draw, 25):
        return draw(st.sampled_from(((0, 2**62), (2**40, 0), (0, 2**40, 2**20), (2**62, 0, 3), (3, 0, 2**50, 1))))
    return tuple(draw(st.lists(st.sampled_from((0, 1, 1, 2, 3, 5, 17)), max_size=5)))


def elementwise(draw: Draw) -> tuple[Any, ...]:
    x = floats(draw, shape(draw), draw(st.sampled_from(oracle.DTYPES)))
    axis = draw(st.integers(-x.dim() - 1, x.dim()))
    channels = x.shape[axis] if -x.dim() <= axis < x.dim() else 1
    return (x, *quantizer(draw, min(channels, 20)), axis)


def packing(draw: Draw) -> tuple[Any, ...]:
    x, scale, zero_point, _, axis = elementwise(draw)
    return x, scale, zero_point, axis


def unpacking(draw: Draw) -> tuple[Any, ...]:
    size = shape(draw)
    packed = integers(draw, size, 0, 255, torch.uint8)
    channels = 2 * size[-1] - draw(st.integers(0, 1)) if size else 1
    axis = draw(st.integers(-2, 2))
    scale, zero_point, _ = quantizer(draw, min(20, (size or (1,))[0] if axis == 0 else max(channels, 0)))
    return packed, scale, zero_point, axis, channels, draw(st.sampled_from(oracle.DTYPES))


def statistics(draw: Draw) -> tuple[Any, ...]:
    x, scale, _, _, axis = elementwise(draw)
    centre = None if draw(st.booleans()) else scale.double()
    if isinstance(centre, Tensor) and -x.dim() <= axis < x.dim():
        centre = centre[:1].expand(min(x.shape[axis], 20))
    return x, axis, centre


def histogram(draw: Draw) -> tuple[Any, ...]:
    x, low, _, _, axis = elementwise(draw)
    high = floats(draw, low.shape, torch.float32)
    bins = draw(st.sampled_from((1, 2, 7, 4096, 0, 4097, *ABSURD)))
    return x, low if draw(st.booleans()) else -low.abs(), high, bins, axis


def rows(draw: Draw) -> tuple[Tensor, Tensor, Tensor, int, int]:
    count, length = draw(st.integers(0, 5)), draw(st.integers(0, 30))
    bits = integers(draw, (count,), 0, 9 if chance(draw, 8) else 8, torch.uint8)
    offsets, total = ops.row_offsets(bits, length)
    if chance(draw, 5):
        offsets = offsets + draw(st.sampled_from((*ABSURD[:4], 1, 2**62)))
    if chance(draw, 8):
        offsets = offsets.flip(0)
    total += draw(st.sampled_from((0, 0, 0, 1, -1, 7)))
    return integers(draw, (count, length), 0, 255, torch.uint8), bits, offsets, length, total


def row_packing(draw: Draw) -> tuple[Any, ...]:
    codes, bits, offsets, _, total = rows(draw)
    return codes, bits, offsets, draw(st.sampled_from((2**47, 2**62, -1))) if chance(draw, 10) else total


def row_unpacking(draw: Draw) -> tuple[Any, ...]:
    _, bits, offsets, length, total = rows(draw)
    packed = integers(draw, (max(total, 0),), 0, 255, torch.uint8)
    return packed, bits, offsets, draw(st.sampled_from((2**47, 2**62, -1))) if chance(draw, 10) else length


def pair(draw: Draw, usual: tuple[int, ...]) -> tuple[int, int]:
    return tuple(draw(st.sampled_from(GEOMETRY if chance(draw, 25) else usual)) for _ in range(2))  # type: ignore[return-value]


def pooling(draw: Draw) -> tuple[Any, ...]:
    x = integers(draw, tuple(draw(st.sampled_from((0, 1, 2, 5, 8))) for _ in range(4)), 0, 255, torch.uint8)
    geometry = (pair(draw, (1, 2, 3)), pair(draw, (1, 2, 3)), pair(draw, (0, 1, 2)), pair(draw, (1, 1, 2)))
    return x, *geometry, draw(st.booleans())


def convolution(draw: Draw) -> tuple[Any, ...]:
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    channels = groups * draw(st.integers(1, 9))
    depthwise = groups > 1 and draw(st.booleans())
    outputs = channels if depthwise else groups * draw(st.sampled_from((0, 1, 5, 8, 16, 17)))
    groups = channels if depthwise else groups
    size = tuple(draw(st.sampled_from((0, 1, 2, 5, 8))) for _ in range(2))
    batch = draw(st.sampled_from((0, 1, 2)))
    kernel, dilation, stride = pair(draw, (1, 1, 2, 3)), pair(draw, (1, 1, 2)), pair(draw, (1, 1, 2, 3, 2**30 - 1))
    padding = pair(draw, (0, 0, 1, 2, 3))
    if chance(draw, 12):
        padding, stride = (2**18, draw(st.integers(0, 2))), (2**17, 1)
    x = integers(draw, (batch, channels, *size), 0, 255, torch.uint8)
    taps = tuple(min(max(k, 1), 4) for k in kernel)
    plain = torch.randint(-128, 128, (outputs, *taps, channels // groups), dtype=torch.int8)
    low_bytes, weight = 0, panels.weight_panels(plain, groups) if outputs else torch.zeros(0, dtype=torch.int8)
    if groups == 1 and chance(draw, 4):
        source = Nibbles.of(torch.arange(channels, dtype=torch.uint8) % 9)
        x, low_bytes = integers(draw, (batch, source.bytes, *size), 0, 255, torch.uint8), source.low_bytes
        weight = source.weight_panels(plain)
    if not outputs:
        shape_of = panels.shape_of_panels(0, taps, 2 * x.shape[1] if low_bytes else channels // groups, groups)
        weight = torch.zeros(shape_of, dtype=torch.int8)
    zero_sums = integers(draw, (taps[0] * taps[1], outputs), -999, 999, torch.int32) if draw(st.booleans()) else None

    def vector() -> Tensor:
        values = floats(draw, (outputs,), torch.float32)
        return values if chance(draw, 8) else values.nan_to_num(1.0, 1.0, 1.0).clamp(-1e3, 1e3)

    residual: tuple[Any, ...] = (None, None, None)
    if draw(st.booleans()):
        try:
            out = tuple(
                (n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
            )
        except ZeroDivisionError:
            out = (1, 1)
        out = tuple(n if 0 <= n < 10 else 1 for n in out)
        residual = (integers(draw, (batch, outputs, *out), 0, 255, torch.uint8), *quantizer(draw, outputs)[:2])

    def layout(bits: Tensor) -> Nibbles | None:
        return Nibbles.of(bits.expand(outputs)) if outputs and draw(st.booleans()) else None

    coded = [quantizer(draw, outputs) for _ in range(draw(st.integers(0, 2)))]
    layouts = [layout(parameters[2]) for parameters in coded]
    values = draw(st.sampled_from((None, *oracle.DTYPES)))
    returned = oracle.outputs(*coded, layouts=layouts, values=values)

    span = draw(st.sampled_from(ABSURD)) if chance(draw, 25) else draw(st.sampled_from((None, panels.NIBBLES)))
    slope = draw(st.sampled_from((0.0, 0.0, 1.0, 0.1, -1.0, *FLOATS)))
    upper = draw(st.sampled_from((float("inf"), float("inf"), 6.0, 0.0, *FLOATS)))
    geometry = (kernel, stride, padding, dilation, groups, low_bytes, span, slope, upper)
    return x, weight, zero_sums, vector(), vector(), *geometry, *residual, *returned.values()


OPERATORS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "channel_statistics": statistics,
    "channel_histogram": histogram,
    "fake_quantize": elementwise,
    "quantize": elementwise,
    "quantize_pack": packing,
    "unpack_dequantize": unpacking,
    "pack_codes": row_packing,
    "unpack_codes": row_unpacking,
    "max_pool_codes": pooling,
    "conv2d_integer": convolution,
}


@st.composite
def calls(draw: Draw) -> tuple[str, tuple[Any, ...]]:
    """An operator and its arguments: right ones, nearly right ones, and such as cannot be meant."""
    op = draw(st.sampled_from([*OPERATORS, "conv2d_integer"]))
    arguments = list(OPERATORS[op](draw))
    while chance(draw, 3):
        at = draw(st.integers(0, len(arguments) - 1))
        arguments[at] = spoiled(draw, arguments[at])
    return op, tuple(arguments)


def outcome(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor] | Exception:
    try:
        found = call(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:  # nothing else may come, as AssertionError or IndexError
        return error
    return [found] if isinstance(found, Tensor) else list(found)


# Values that are not read back from a device: kernels go on with them, in bounds.
OF_VALUES = re.compile(
    "(scale|zero_point|bits) must be .*(finite|from|0 to 8)|does not fit into|overlap at|are not those of"
)
# What torch says itself, before it calls a kernel, of what is no tensor or no dtype.
OF_TORCH = re.compile("Expected a value of type|supported ScalarType")


def strides(x: Tensor) -> list[int]:
    """The strides that say where an element lies."""
    return [stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1] if x.numel() else []


def agree(
    op: str, found: list[Tensor] | Exception, expected: list[Tensor] | Exception, of_device: bool = False
) -> None:
    if isinstance(expected, Exception):
        if of_device and OF_VALUES.search(str(expected)):
            return
        assert isinstance(found, Exception), f"{expected!r}, but a result"
        if isinstance(expected, (TypeError, ValueError)):
            assert str(expected) in str(found) or OF_TORCH.search(str(found)), (found, expected)
        return
    assert not isinstance(found, Exception), found
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype, strides(a), a.requires_grad) == (b.shape, b.dtype, strides(b), b.requires_grad)
        if op == "channel_statistics":  # of infinite values there are sums in any order, and no finite ones
            torch.testing.assert_close(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0), rtol=1e-9, atol=1e-9)
            assert torch.equal(a.isfinite(), b.isfinite())
        else:
            assert oracle.same(a, b)


def check(op: str, arguments: tuple[Any, ...], implementations: list[Backend]) -> bool:
    """Tell whether a call is right; the first implementation is the reference."""
    expected = outcome(getattr(implementations[0], op), arguments)
    for implementation in implementations[1:]:
        found = outcome(getattr(implementation, op), arguments)
        agree(op, found, expected, implementation.is_cuda_source)
    named = dict(zip(inspect.signature(getattr(checks, op)).parameters, arguments, strict=True))
    if op == "pack_codes":
        del named["offsets"], named["packed_bytes"]
    found = outcome(lambda: getattr(ops, op)(**named), ())
    if not isinstance(found, Exception) and not isinstance(expected, Exception) and op != "pack_codes":
        agree(op, found, expected)
    return not isinstance(expected, Exception)


@some
@given(call=calls())
def test_any_arguments(
    reference: Backend, cpu: Backend, cuda_on_cpu: Backend, call: tuple[str, tuple[Any, ...]]
) -> None:
    check(*call, [reference, cpu, cuda_on_cpu])
