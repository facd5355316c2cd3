"""conv2d_integer against sums of Python's making, on every backend."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ops import oracle
from ops.backends import BACKENDS, NATIVE, Backend
from ops.test_nibbles import bits_of, codes_of
from ptq4cuda import ops
from ptq4cuda.ops import panels
from ptq4cuda.ops.layers import Code
from ptq4cuda.ops.nibbles import Nibbles
from ptq4cuda.ops.plan import conv_plan

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution, its codes and its weights at random or at their limits."""

    channels: int
    outputs: int
    size: Pair = (7, 9)
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    batch: int = 2
    bits: int = 4  # of the codes
    weight: int = 127  # the largest
    zero_point: bool = True
    extreme: bool = False  # all codes and weights as large as can be

    def make(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, weights [O, R, S, C / groups] and zero points, some that no code has."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 1 << self.bits, (self.batch, self.channels, *self.size), dtype=torch.uint8, generator=g)
        shape = (self.outputs, *self.kernel, self.channels // self.groups)
        weight = torch.randint(-self.weight - 1, self.weight + 1, shape, dtype=torch.int8, generator=g)
        if self.extreme:
            x.fill_((1 << self.bits) - 1)
            weight.copy_(
                torch.where(torch.arange(self.outputs) % 2 == 0, self.weight, -self.weight - 1)[:, None, None, None]
            )
        zero_point = torch.randint(-20, 256, (self.channels,), dtype=torch.int32, generator=g)
        return x, weight, zero_point if self.zero_point else torch.zeros_like(zero_point)

    def span(self, weight: Tensor) -> int:
        codes = torch.full((self.channels,), (1 << self.bits) - 1)
        return panels.span_of_sums(panels.weight_panels(weight, self.groups), codes, self.kernel, self.groups)

    def sums(self, x: Tensor, weight: Tensor, zero_point: Tensor) -> Any:
        """Return Σ weight * (code - zero_point), int64 [N, O, H', W'], tap by tap."""
        values = x.numpy().astype(np.int64) - zero_point.numpy().astype(np.int64)[:, None, None]
        rows, columns = self.padding
        values = np.pad(values, ((0, 0), (0, 0), (rows, rows), (columns, columns)))
        values = values.reshape(self.batch, self.groups, -1, *values.shape[2:])
        kernel = weight.numpy().astype(np.int64).reshape(self.groups, -1, *self.kernel, weight.shape[-1])
        end = [values.shape[3 + d] - self.dilation[d] * (self.kernel[d] - 1) for d in (0, 1)]
        total: Any = 0
        for r, s in itertools.product(*map(range, self.kernel)):
            top, left = r * self.dilation[0], s * self.dilation[1]
            read = values[..., top : top + end[0] : self.stride[0], left : left + end[1] : self.stride[1]]
            total = total + np.einsum("ngchw,goc->ngohw", read, kernel[:, :, r, s])
        return total.reshape(self.batch, self.outputs, *total.shape[3:])

    def arguments(self, weight: Tensor, zero_point: Tensor, span: int | None = None) -> dict[str, Any]:
        """Return the arguments of the operator from weight on, by name, with plain scales."""
        zeros = zero_point.view(self.groups, 1, 1, 1, -1).to(torch.int64)
        zeros = (weight.view(self.groups, -1, *weight.shape[1:]).to(torch.int64) * zeros).sum(-1).flatten(0, 1)
        return {
            "weight": panels.weight_panels(weight, self.groups),
            "zero_sums": zeros.flatten(1).t().contiguous().to(torch.int32) if self.zero_point else None,
            "scale": torch.ones(self.outputs),
            "bias": torch.zeros(self.outputs),
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "low_bytes": 0,
            "span": self.span(weight) if span is None else span,
            "negative_slope": 1.0,
            "upper": float("inf"),
            "residual": None,
            "residual_scale": None,
            "residual_zero_point": None,
            **oracle.outputs(values=torch.float32),
        }


def run(backend: Backend, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return the only output."""
    (result,) = backend.conv2d_integer(x, *arguments.values())
    assert isinstance(result, Tensor)
    return result


def channels_last(x: Tensor) -> Tensor:
    return oracle.arrange(x, "channels_last")


GEOMETRIES = {
    "1x1": Case(64, 32),
    "1x1 odd": Case(13, 21, batch=3),
    "1x1 stride": Case(20, 24, stride=(2, 3)),
    "1x1 padded": Case(8, 16, padding=(1, 2)),
    "3x3": Case(32, 48, kernel=(3, 3), padding=(1, 1)),
    "3x3 unpadded": Case(12, 16, kernel=(3, 3)),
    "3x3 stride": Case(16, 16, kernel=(3, 3), padding=(1, 1), stride=(2, 2), size=(13, 12)),
    "3x3 dilated": Case(8, 18, kernel=(3, 3), padding=(2, 3), dilation=(2, 3), size=(11, 10)),
    "first": Case(3, 32, kernel=(7, 7), padding=(3, 3), stride=(2, 2), size=(21, 30), bits=8),
    "first dilated": Case(3, 16, kernel=(3, 3), padding=(2, 1), dilation=(1, 2), size=(9, 11), bits=8),
    "first grey": Case(1, 20, kernel=(5, 5), stride=(1, 2), size=(12, 13), bits=8),
    "1x7": Case(6, 5, kernel=(1, 7), padding=(0, 3)),
    "even kernel": Case(5, 7, kernel=(2, 4), padding=(1, 2), stride=(3, 1)),
    "kernel over the edge": Case(4, 4, kernel=(5, 5), padding=(4, 4), size=(2, 3), stride=(2, 1)),
    "padding beyond the kernel": Case(4, 4, kernel=(2, 2), padding=(3, 4), size=(2, 2), dilation=(2, 1)),
    "groups": Case(24, 40, kernel=(3, 3), padding=(1, 1), groups=4),
    "groups whole": Case(12, 48, kernel=(3, 2), padding=(1, 1), groups=3),
    "groups odd": Case(15, 9, kernel=(3, 2), padding=(1, 1), groups=3),
    "depthwise": Case(40, 40, kernel=(3, 3), padding=(1, 1), groups=40),
    "depthwise narrow": Case(9, 9, kernel=(3, 3), padding=(1, 1), groups=9),
    "depthwise 5x5": Case(64, 64, kernel=(5, 5), padding=(2, 2), stride=(2, 2), groups=64, size=(11, 12)),
    "depthwise unpadded": Case(96, 96, kernel=(2, 3), dilation=(2, 1), groups=96),
    "depthwise multiplied": Case(8, 24, kernel=(3, 3), padding=(1, 1), groups=8),
    "one channel": Case(1, 1, kernel=(3, 3), padding=(1, 1)),
    "one pixel": Case(70, 33, size=(1, 1), batch=5),
    "vectors": Case(96, 70, kernel=(3, 3), padding=(1, 1), stride=(1, 2)),
    "a row": Case(7, 3, size=(1, 200), kernel=(1, 3)),
    "wide": Case(16, 16, size=(3, 130), kernel=(3, 3), padding=(1, 1), batch=1),
    "deep": Case(600, 20, size=(3, 3), kernel=(3, 3), padding=(1, 1), batch=1),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_sums_are_exact(backend: Backend, name: str) -> None:
    for zero_point in (True, False):
        case = dataclasses.replace(GEOMETRIES[name], zero_point=zero_point)
        x, weight, zeros = case.make()
        y = run(backend, channels_last(x), case.arguments(weight, zeros))
        assert oracle.same(y, torch.from_numpy(case.sums(x, weight, zeros)).float())
        assert y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "name",
    [
        *("1x1", "3x3", "first", "first dilated", "first grey"),
        *("groups odd", "depthwise", "depthwise 5x5", "depthwise narrow"),
    ],
)
def test_codes_and_weights_at_their_limits(backend: Backend, name: str, bits: int) -> None:
    """No instruction may saturate, whatever span the weights allow."""
    for weight_limit in (127, 7):
        case = dataclasses.replace(GEOMETRIES[name], bits=bits, extreme=True, weight=weight_limit)
        x, weight, zeros = case.make()
        expected = torch.from_numpy(case.sums(x, weight, zeros)).float()
        for span in {case.span(weight), panels.NIBBLES}:
            assert oracle.same(run(backend, channels_last(x), case.arguments(weight, zeros, span)), expected), span


def test_spans() -> None:
    def span(weight: list[list[int]], code: int, groups: int = 1) -> int:
        w = torch.tensor(weight, dtype=torch.int8)[:, None, None, :]
        codes = torch.full((w.shape[-1] * groups,), code)
        return panels.span_of_sums(panels.weight_panels(w, groups), codes, (1, 1), groups)

    assert span([[127] * 64], 15) == 8  # 8 pairs of 3810, not 16
    assert span([[-128] * 64], 15) == 8
    assert span([[127] * 64], 17) == 4
    assert span([[-128] * 64], 63) == 2
    # Two pairs do not fit, or not even one: nibble by nibble.
    assert span([[-128] * 64], 127) == -8 == panels.NIBBLES
    assert span([[127] * 64], 255) == -8
    assert span([[127, 127] + [10] * 62], 255) == -16
    # Positive and negative products bound a sum apart. 16 words are all there are.
    assert span([[127, -127] * 32], 15) == 16
    assert span([[127, -127] * 32, [127] * 64], 15) == 8
    assert span([[1] * 6], 255) == 8


def finished(case: Case, sums: Any, a: dict[str, Any], residual: Tensor | None) -> Tensor:
    """The epilogue, operation by operation in float32."""
    along = lambda p: p.numpy().reshape(-1, 1, 1)  # noqa: E731
    with np.errstate(over="ignore"):
        y = sums.astype(np.float32) * along(a["scale"]) + along(a["bias"])
        if residual is not None:
            difference = residual.numpy().astype(np.float32) - along(a["residual_zero_point"]).astype(np.float32)
            y = y + difference * along(a["residual_scale"])
        slope = np.float32(a["negative_slope"])
        y = np.minimum(np.where(y > 0, y, y * slope if slope else slope), np.float32(a["upper"]))
    assert y.dtype == np.float32
    return torch.from_numpy(y)


@pytest.mark.parametrize("activation", [(1.0, float("inf")), (0.0, float("inf")), (0.0, 6.0), (0.1, 40.0)], ids=str)
@pytest.mark.parametrize("name", ["1x1 odd", "3x3", "groups odd", "depthwise", "depthwise narrow"])
def test_epilogue(backend: Backend, name: str, activation: tuple[float, float]) -> None:
    case = GEOMETRIES[name]
    x, weight, zeros = case.make()
    sums = case.sums(x, weight, zeros)
    g = torch.Generator().manual_seed(3)
    a = case.arguments(weight, zeros)
    a["scale"] = torch.rand(case.outputs, generator=g) * 0.01
    a["bias"] = torch.randn(case.outputs, generator=g)
    a["negative_slope"], a["upper"] = activation
    x = channels_last(x)
    for residual in (None, torch.randint(0, 256, sums.shape, dtype=torch.uint8, generator=g)):
        if residual is not None:
            a["residual"] = channels_last(residual)
            a["residual_scale"], a["residual_zero_point"], _ = oracle.quantizer(case.outputs, 4)
        y = finished(case, sums, a, residual)
        for dtype in oracle.DTYPES:
            assert oracle.same(run(backend, x, a | {"dtype": dtype}), y.to(dtype))
        for few in (False, True):
            scale, zero_point, bits = (p[:1] if few else p for p in oracle.quantizer(case.outputs, 5))
            codes = run(backend, x, a | oracle.outputs((scale, zero_point, bits)))
            assert oracle.same(codes, oracle.quantize(y, scale, zero_point, bits, 1))
            assert codes.movedim(1, -1).is_contiguous()


def packed_arguments(case: Case, which: str) -> tuple[Tensor, Any, dict[str, Any]]:
    """Return packed codes, what their sums are, and the arguments."""
    bits = bits_of(case.channels, which)
    layout = Nibbles.of(bits)
    _, weight, zeros = case.make()
    codes = codes_of(bits, case.size, case.batch)
    a = case.arguments(weight, zeros, panels.NIBBLES)
    a |= {"weight": layout.weight_panels(weight), "low_bytes": layout.low_bytes}
    return layout.pack(codes), case.sums(codes, weight, zeros), a


@pytest.mark.parametrize("which", ["none", "some", "all"])
@pytest.mark.parametrize("name", [name for name, case in GEOMETRIES.items() if case.groups == 1])
def test_packed_codes(backend: Backend, name: str, which: str) -> None:
    x, sums, a = packed_arguments(GEOMETRIES[name], which)
    y = run(backend, x, a)
    assert oracle.same(y, torch.from_numpy(sums).float())
    assert oracle.same(run(backend, x.contiguous(), a), y)
    assert oracle.same(run(backend, x[1:], a), y[1:])


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", ["1x1", "1x1 odd", "3x3", "groups odd", "depthwise", "depthwise narrow"])
def test_two_outputs(backend: Backend, name: str, relu: bool) -> None:
    """Both are what one alone would be, values or codes of either quantizer, with a residual and without."""
    case = GEOMETRIES[name]
    x, weight, zeros = case.make()
    sums = case.sums(x, weight, zeros)
    g = torch.Generator().manual_seed(4)
    a = case.arguments(weight, zeros)
    a["scale"], a["bias"] = torch.rand(case.outputs, generator=g) * 0.01, torch.randn(case.outputs, generator=g)
    a["negative_slope"] = 0.0 if relu else 1.0
    x = channels_last(x)
    first, second = oracle.quantizer(case.outputs, 5), oracle.quantizer(case.outputs, 6)
    for residual in (None, torch.randint(0, 256, sums.shape, dtype=torch.uint8, generator=g)):
        if residual is not None:
            a["residual"] = channels_last(residual)
            a["residual_scale"], a["residual_zero_point"], _ = oracle.quantizer(case.outputs, 4)
        y = finished(case, sums, a, residual)
        for also in (second, tuple(p[:1] for p in second)):
            codes = oracle.quantize(y, *also, 1)
            calls = [(a | oracle.outputs(also, values=dtype), y.to(dtype)) for dtype in oracle.DTYPES]
            calls.append((a | oracle.outputs(first, also), oracle.quantize(y, *first, 1)))
            for arguments, expected in calls:
                outputs = backend.conv2d_integer(x, *arguments.values())
                assert len(outputs) == 2
                assert oracle.same(outputs[0], expected)
                assert oracle.same(outputs[1], codes)
                assert all(output.movedim(1, -1).is_contiguous() for output in outputs)


def finishing(case: Case, sums: Any, a: dict[str, Any], seed: int) -> Tensor:
    """Add to the arguments what a layer within a residual block has, and return its values."""
    g = torch.Generator().manual_seed(seed)
    a["scale"], a["bias"] = torch.rand(case.outputs, generator=g) * 0.01, torch.randn(case.outputs, generator=g)
    a["negative_slope"] = 0.0
    residual = torch.randint(0, 256, sums.shape, dtype=torch.uint8, generator=g)
    a["residual"] = channels_last(residual)
    a["residual_scale"], a["residual_zero_point"], _ = oracle.quantizer(case.outputs, 4)
    return finished(case, sums, a, residual)


def assert_packed(outputs: Sequence[Tensor], expected: Sequence[tuple[Tensor, Nibbles | None]]) -> None:
    for output, (codes, layout) in zip(outputs, expected, strict=True):
        assert output.movedim(1, -1).is_contiguous()
        assert oracle.same(output, layout.pack(codes) if layout else codes)


@pytest.mark.parametrize("which", ["none", "some", "all"])
@pytest.mark.parametrize(
    "name", ["1x1", "1x1 odd", "3x3", "3x3 dilated", "first", "groups whole", "depthwise", "one channel", "vectors"]
)
def test_packed_outputs(backend: Backend, name: str, which: str) -> None:
    """One output or both are packed, also where one is values, of codes of per-channel bits and of one number."""
    case = GEOMETRIES[name]
    x, weight, zeros = case.make()
    sums, a = case.sums(x, weight, zeros), case.arguments(weight, zeros)
    y, x = finishing(case, sums, a, 5), channels_last(x)
    scale, zero_point, _ = oracle.quantizer(case.outputs, 5)
    first, second = ((scale * k, zero_point, bits_of(case.outputs, which)) for k in (0.2, 0.1))
    one, other = (oracle.quantize(y, *quantizer, 1) for quantizer in (first, second))
    layout = Nibbles.of(first[2])
    for arguments, expected in (
        (oracle.outputs(first, layouts=[layout]), [(one, layout)]),
        (oracle.outputs(first, second, layouts=(layout, None)), [(one, layout), (other, None)]),
        (oracle.outputs(first, second, layouts=(None, layout)), [(one, None), (other, layout)]),
        (oracle.outputs(first, second, layouts=(layout, layout)), [(one, layout), (other, layout)]),
        (oracle.outputs(second, layouts=[layout], values=torch.float32), [(y, None), (other, layout)]),
    ):
        assert_packed(backend.conv2d_integer(x, *(a | arguments).values()), expected)
    uniform = scale[:1], zero_point[:1], torch.full((1,), {"none": 4, "some": 5, "all": 8}[which]).to(torch.uint8)
    layout = Nibbles.of(uniform[2].expand(case.outputs))
    outputs = backend.conv2d_integer(x, *(a | oracle.outputs(uniform, layouts=[layout])).values())
    assert_packed(outputs, [(oracle.quantize(y, *uniform, 1), layout)])


def test_sums_beyond_two_to_the_24_are_rounded_once(backend: Backend) -> None:
    case = Case(2100, 16, size=(2, 2), bits=8, batch=1, zero_point=False)
    x, weight, zeros = case.make()
    x, weight = x | 0xC1, (weight & 0x7F) | 0x61
    sums = case.sums(x, weight, zeros)
    assert (abs(sums) > 1 << 24).any()
    y = run(backend, channels_last(x), case.arguments(weight, zeros))
    assert oracle.same(y, torch.from_numpy(sums.astype(np.float32)))


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided", "misaligned"])
def test_any_layout(backend: Backend, layout: str) -> None:
    for name in ("1x1 odd", "3x3", "depthwise"):
        case = GEOMETRIES[name]
        x, weight, zeros = case.make()
        a = case.arguments(weight, zeros)
        assert oracle.same(
            run(backend, oracle.arrange(x, layout), a), torch.from_numpy(case.sums(x, weight, zeros)).float()
        )


def test_reads_stay_inside_of_the_input(backend: Backend) -> None:
    """What lies around the input in memory has no influence, also on channels that do not fill a word."""
    for name in ("1x1 odd", "3x3", "first", "first grey", "groups odd", "depthwise", "depthwise narrow"):
        case = GEOMETRIES[name]
        x, weight, zeros = case.make()
        a = case.arguments(weight, zeros)
        inside, raw = oracle.guarded(tuple(x.shape), torch.uint8, channels_last(x).stride(), 64)
        inside.copy_(x)
        expected = run(backend, channels_last(x), a)
        assert oracle.same(run(backend, inside, a), expected)
        raw[:64] = raw[-64:] = 0xFF
        assert oracle.same(run(backend, inside, a), expected)


@pytest.mark.parametrize("name", ["1x1", "3x3", "depthwise"])
def test_empty_batch(backend: Backend, name: str) -> None:
    case = GEOMETRIES[name]
    x, weight, zeros = case.make()
    y = run(backend, channels_last(x)[:0], case.arguments(weight, zeros))
    assert y.shape[0] == 0
    assert y.shape[1] == case.outputs
    arguments = case.arguments(weight, zeros)
    arguments |= oracle.outputs(oracle.quantizer(case.outputs), values=torch.float32)
    outputs = backend.conv2d_integer(channels_last(x)[:0], *arguments.values())
    assert [output.dtype for output in outputs] == [torch.float32, torch.uint8]
    assert outputs[1].shape == y.shape


@pytest.mark.parametrize(
    ("multiprocessors", "case", "shared"),
    [
        (1, Case(64, 32, kernel=(3, 3), padding=(1, 1)), False),
        (16, Case(256, 32, kernel=(3, 3), padding=(1, 1), bits=8), True),
        (16, Case(260, 70, size=(3, 5), kernel=(3, 3), padding=(1, 1), batch=1), True),
        (16, Case(24, 30, size=(3, 3), kernel=(5, 5), groups=3, padding=(2, 2)), False),  # too few columns
        (33, Case(301, 21, size=(4, 4), kernel=(3, 2), bits=8), True),
        (60, Case(48, 20, size=(4, 4), kernel=(7, 7), padding=(3, 3), groups=2), True),
        (60, Case(54, 40, size=(4, 4), kernel=(7, 7), padding=(3, 3), groups=2), True),
        (60, Case(100, 20, size=(4, 4), kernel=(3, 3), batch=1), True),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_small_outputs_share_out_the_columns(
    cuda_on_cpu: Backend, execution_model: ctypes.CDLL, multiprocessors: int, case: Case, shared: bool, packed: bool
) -> None:
    execution_model.cuda_on_cpu_use_device(multiprocessors - 1)
    packed = packed and case.groups == 1
    if packed:
        x, sums, a = packed_arguments(case, "some")
    else:
        x, weight, zeros = case.make()
        sums, a = case.sums(x, weight, zeros), case.arguments(weight, zeros)
    # Codes that do not fill words, or words with padding, are copied first.
    begins = math.gcd(a["low_bytes"], x.shape[1] - a["low_bytes"]) if packed else case.channels // case.groups
    filled = begins % 4 != 0 or (begins % 16 != 0 and max(case.padding) > 0)
    launches = 1 + shared + filled
    before = execution_model.cuda_on_cpu_launches()
    y = run(cuda_on_cpu, channels_last(x), a)
    assert execution_model.cuda_on_cpu_launches() - before == launches
    assert oracle.same(y, torch.from_numpy(sums).float())

    y, x = finishing(case, sums, a, 3), channels_last(x)
    quantizer = oracle.quantizer(case.outputs, 5)
    codes = oracle.quantize(y, *quantizer, 1)
    b = a | oracle.outputs(quantizer, values=torch.float32)
    assert_packed(cuda_on_cpu.conv2d_integer(x, *b.values()), [(y, None), (codes, None)])
    if case.groups == 1:
        layout = Nibbles.of(quantizer[2])
        b = a | oracle.outputs(quantizer, quantizer, layouts=(layout, None))
        assert_packed(cuda_on_cpu.conv2d_integer(x, *b.values()), [(codes, layout), (codes, None)])
    assert execution_model.cuda_on_cpu_launches() - before == launches * (2 if case.groups > 1 else 3)


@pytest.mark.parametrize("tile", [(128, 128), (64, 128), (64, 64), (64, 32)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [64, 36])
def test_every_tile(
    cuda_on_cpu: Backend, execution_model: ctypes.CDLL, tile: tuple[int, int], packed: bool, channels: int
) -> None:
    """Tiles that are just not full along both sides, whole vectors and words, with all that a layer may have."""
    execution_model.cuda_on_cpu_use_device(0)
    outputs, pixels = tile
    case = Case(channels, outputs - 8, (1, pixels - 3), (1, 3), padding=(0, 1), batch=1)
    if packed:
        x, sums, a = packed_arguments(case, "some")
    else:
        x, weight, zeros = case.make()
        sums, a = case.sums(x, weight, zeros), case.arguments(weight, zeros)
    chunks = -(-channels * 3 // 64)
    assert conv_plan(pixels - 3, outputs - 8, 1, chunks, packed, channels == 64, 1).tile == tile
    y, x = finishing(case, sums, a, 7), channels_last(x)
    first, second = ((*oracle.quantizer(case.outputs, seed)[:2], bits_of(case.outputs, "some")) for seed in (5, 6))
    one, other = (oracle.quantize(y, *quantizer, 1) for quantizer in (first, second))
    layout = Nibbles.of(first[2])
    packed_out = a | oracle.outputs(first, second, layouts=(layout, None))
    assert_packed(cuda_on_cpu.conv2d_integer(x, *packed_out.values()), [(one, layout), (other, None)])
    assert_packed(cuda_on_cpu.conv2d_integer(x, *(a | {"dtype": torch.float16}).values()), [(y.half(), None)])


@pytest.mark.parametrize("name", ["1x1", "3x3", "depthwise"])
@pytest.mark.parametrize("what", ["bias", "infinite", "zero point", "scale", "slope", "negative zero", "upper"])
@pytest.mark.parametrize("which", [name for name in BACKENDS if name != "cpu"])
def test_unusual_constants(request: pytest.FixtureRequest, which: str, name: str, what: str) -> None:
    """What a short cut would get wrong: NaN, infinities, zero points beyond 2^22, tiny scales, any activation.

    Quantizers that are no quantizers are refused where their values are on the CPU; on a device they are not read.
    """
    backend: Backend = request.getfixturevalue(which)
    case = GEOMETRIES[name]
    x, weight, zeros = case.make()
    sums, a = case.sums(x, weight, zeros), case.arguments(weight, zeros)
    g = torch.Generator().manual_seed(8)
    a["scale"], a["bias"] = torch.rand(case.outputs, generator=g) * 0.01, torch.randn(case.outputs, generator=g)
    residual = torch.randint(0, 256, sums.shape, dtype=torch.uint8, generator=g)
    a["residual"], a["negative_slope"] = channels_last(residual), 0.0
    a["residual_scale"], a["residual_zero_point"], _ = oracle.quantizer(case.outputs, 4)
    scale, zero_point, bits = oracle.quantizer(case.outputs, 5)
    if what == "bias":
        a["bias"][1] = float("nan")
    elif what == "infinite":
        a["scale"][2], a["bias"][3], a["residual_scale"][4] = float("inf"), float("-inf"), float("inf")
    elif what == "zero point":
        zero_point[:4] = torch.tensor([1 << 23, -(1 << 26), (1 << 31) - 1, (1 << 22) + 1], dtype=torch.int32)
        a["scale"][:4] = torch.tensor([3e7, 1e7, 1e9, 1e5])
        a["residual_zero_point"][5] = 1 << 24
    elif what == "scale":
        scale[:3] = torch.tensor([1e-39, 1e-30, 1e38])
    elif what == "slope":
        a["negative_slope"] = -1.5
    elif what == "negative zero":
        a["negative_slope"], a["upper"] = -0.0, 0.0
    else:
        a["upper"] = -0.5
    with np.errstate(invalid="ignore"):
        y = finished(case, sums, a, residual)
    x = channels_last(x)
    if which == "reference" and what in ("infinite", "zero point", "scale"):
        with pytest.raises(ValueError, match=r"scale must be positive and finite|zero_point"):
            run(backend, x, a | oracle.outputs((scale, zero_point, bits)))
        return
    assert oracle.same(run(backend, x, a), y)
    with np.errstate(over="ignore"):
        codes = oracle.quantize(y, scale, zero_point, bits, 1)
    assert oracle.same(run(backend, x, a | oracle.outputs((scale, zero_point, bits))), codes)
    layout = Nibbles.of(bits)
    if what != "slope":  # one activation is enough
        b = a | oracle.outputs(*[(scale, zero_point, bits)] * 2, layouts=(layout, None))
        assert_packed(backend.conv2d_integer(x, *b.values()), [(codes, layout), (codes, None)])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_work(cpu: Backend, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in (
            Case(64, 200, size=(40, 41), batch=3),
            Case(33, 70, size=(30, 57), kernel=(3, 3), padding=(1, 1), batch=2),
            Case(80, 80, size=(50, 33), kernel=(3, 3), padding=(1, 1), groups=80),
            Case(512, 300, size=(2, 2), kernel=(3, 3), padding=(1, 1), batch=1),
        ):
            x, weight, zeros = case.make()
            y = run(cpu, channels_last(x), case.arguments(weight, zeros))
            assert oracle.same(y, torch.from_numpy(case.sums(x, weight, zeros)).float())
    finally:
        torch.set_num_threads(before)


def test_panels_and_back() -> None:
    for name, case in GEOMETRIES.items():
        _, weight, _ = case.make()
        there = panels.weight_panels(weight, case.groups)
        assert tuple(there.shape) == panels.shape_of_panels(case.outputs, case.kernel, weight.shape[-1], case.groups)
        back = panels.weight_of_panels(there, case.outputs, case.kernel, weight.shape[-1], case.groups)
        assert torch.equal(back, weight), name


# --- arguments -------------------------------------------------------------------------------------------------

RESIDUAL = {
    "residual": torch.zeros(2, 18, 11, 10, dtype=torch.uint8),
    "residual_scale": torch.ones(1),
    "residual_zero_point": torch.zeros(1, dtype=torch.int32),
}
ONE = (torch.ones(18), torch.zeros(18, dtype=torch.int32), torch.full((1,), 4, dtype=torch.uint8))
OUT = oracle.outputs(ONE)
PACKED = OUT | {"out_starts": [torch.full((4,), 12, dtype=torch.int32)], "out_bytes": [12]}
# What is wrong about a call of the 3x3 dilated convolution, and what the typed function says.
BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 8, 11, 10)}, "x must be a uint8 tensor"),
    ({"x": torch.zeros(2, 8, 11, dtype=torch.uint8)}, "x must be a uint8 tensor"),
    ({"x": torch.zeros(2, 9, 11, 10, dtype=torch.uint8)}, "weight must be torch.int8"),
    ({"x": torch.zeros(2, 0, 11, 10, dtype=torch.uint8)}, "0 input and 18 output channels do not make 1 groups"),
    ({"weight": torch.zeros(2, 18, 16, 4)}, "weight must be torch.int8"),
    ({"weight": torch.zeros(1, 18, 16, 4, dtype=torch.int8)}, r"weight must be torch.int8 \[2, 18, 16, 4\]"),
    ({"zero_sums": torch.zeros(9, 18)}, "zero_sums must be torch.int32"),
    ({"zero_sums": torch.zeros(18, 9, dtype=torch.int32)}, r"zero_sums must be torch.int32 \[9, 18\]"),
    ({"scale": torch.ones(18, dtype=torch.float64)}, "scale must be torch.float32"),
    ({"bias": torch.ones(17)}, r"bias must have the shape \[18\], got \[17\]"),
    ({"kernel_size": (0, 3)}, "kernel_size must be two numbers from 1 to 1073741823"),
    ({"kernel_size": (9, 3)}, "is larger than the padded input"),
    ({"stride": (1, 0)}, "stride must be two numbers from 1 to 1073741823"),
    ({"padding": (-1, 0)}, "padding must be two numbers from 0 to 1073741823"),
    ({"dilation": (0, 1)}, "dilation must be two numbers from 1 to 1073741823"),
    ({"groups": 0}, "do not make 0 groups"),
    ({"groups": 4}, "do not make 4 groups"),
    ({"span": 0}, "span must be 1 to 1073741824"),
    ({"low_bytes": 4, "groups": 2}, "holds no packed codes"),
    ({"low_bytes": 12}, "holds no packed codes"),
    ({"low_bytes": -4}, "holds no packed codes"),
    ({"low_bytes": 3}, "holds no packed codes"),
    ({"low_bytes": 4}, r"weight must be torch.int8 \[2, 36, 16, 4\]"),
    (RESIDUAL | {"residual": RESIDUAL["residual"][:1]}, r"residual must be torch.uint8 \[2, 18, 11, 10\]"),
    (RESIDUAL | {"residual": RESIDUAL["residual"].int()}, "residual must be torch.uint8"),
    (RESIDUAL | {"residual_scale": None}, "residual needs residual_scale"),
    (RESIDUAL | {"residual_scale": torch.ones(3)}, "scale must have the shape"),
    (OUT | {"out_bits": [None]}, "bits must be a tensor, got NoneType"),
    (OUT | {"out_scale": [torch.ones(17)]}, "scale must have the shape"),
    (OUT | {"out_zero_point": [torch.zeros(18)]}, "zero_point must be torch.int32"),
    (oracle.outputs(ONE, (ONE[0], ONE[1], torch.ones(18))), "bits must be torch.uint8"),
    (oracle.outputs((torch.ones(2), *ONE[1:]), values=torch.float32), "scale must have the shape"),
    (oracle.outputs(ONE, ONE, ONE), "there are one or two outputs, got 3"),
    (oracle.outputs(ONE, ONE, values=torch.float32), "there are one or two outputs, got 3"),
    (oracle.outputs(), "there are one or two outputs"),
    (PACKED | {"out_starts": [ONE[1]]}, r"out_starts\[0\] must have the shape \[4\]"),
    (PACKED | {"out_starts": [ONE[0][:4]]}, r"out_starts\[0\] must be torch.int32"),
    (PACKED | {"out_bytes": [8]}, "18 outputs in 1 groups are not packed in 8 bytes"),
    (PACKED | {"out_bytes": [18]}, "are not packed in 18 bytes"),
    ({"dtype": torch.int32}, "dtype must be float32, float16 or bfloat16"),
]


def dilated() -> tuple[Tensor, dict[str, Any]]:
    case = GEOMETRIES["3x3 dilated"]
    x, weight, zeros = case.make()
    return channels_last(x), case.arguments(weight, zeros)


@pytest.mark.parametrize(
    ("wrong", "message"), BAD, ids=[f"{next(iter(wrong))} {i}" for i, (wrong, _) in enumerate(BAD)]
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    x, arguments = dilated()
    arguments = arguments | wrong
    x = arguments.pop("x", x)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.conv2d_integer(x, **oracle.typed(arguments))


@pytest.mark.parametrize("which", NATIVE)
def test_direct_calls_are_checked(request: pytest.FixtureRequest, which: str) -> None:
    backend: Backend = request.getfixturevalue(which)
    for wrong, _ in BAD:
        x, arguments = dilated()
        arguments = arguments | wrong
        x = arguments.pop("x", x)
        with pytest.raises(RuntimeError, match="conv2d_integer"):
            run(backend, x, arguments)


def test_the_typed_function_and_its_defaults() -> None:
    case = GEOMETRIES["1x1 odd"]
    x, weight, zeros = dataclasses.replace(case, zero_point=False).make()
    one, zero = torch.ones(case.outputs), torch.zeros(case.outputs)
    (y,) = ops.conv2d_integer(x, panels.weight_panels(weight, 1), one, zero, (1, 1))
    assert oracle.same(y, torch.from_numpy(case.sums(x, weight, zeros)).float())


# --- instruction sets ------------------------------------------------------------------------------------------

# Codes of all sums from 0 to 32,640: whether two panels are on lines (csrc/cpu/conv_finish.cpp), and what they are.
LINES = {
    "relu": ((1, 1), {"negative_slope": 0.0}),
    "relu6": ((1, 1), {"negative_slope": 0.0, "upper": 6.0}),
    "no activation": ((1, 1), {}),
    "0 to 8 bits": ((1, 1), {"out_bits": [torch.arange(20, dtype=torch.uint8) % 9]}),
    "nothing but a bias": ((1, 1), {"scale": torch.zeros(20)}),
    "nearly constant": ((1, 1), {"scale": torch.full((20,), 1e-30)}),
    "ties that go both ways": ((0, 0), {"scale": torch.full((20,), 1 / 512), "bias": torch.zeros(20)}),
    "falling in a panel": ((1, 0), {"scale": torch.linspace(0.0019, -1e-4, 20)}),
    "a slope": ((0, 0), {"negative_slope": 0.5}),
    "out of range": ((0, 0), {"bias": torch.full((20,), 1e38)}),
}


@pytest.mark.parametrize("what", LINES)
def test_layers_that_are_kept_have_the_same_codes(cpu: Backend, what: str) -> None:
    """One multiplication takes the place of five steps where it gives the same codes of all sums, and only there."""
    on_lines, change = LINES[what]
    codes = torch.arange(256, dtype=torch.uint8)
    x = torch.zeros(1, 4, 256, 256, dtype=torch.uint8)
    x[0, 1], x[0, 2] = codes, codes[:, None]
    weight = torch.tensor([3, 1, 127, -5], dtype=torch.int8).expand(20, 1, 1, 4).contiguous()
    g = torch.Generator().manual_seed(0)
    case = Case(4, 20, bits=8)
    a = case.arguments(weight, torch.tensor([9, -70, 40, 3], dtype=torch.int32)) | {
        "scale": torch.rand(20, generator=g) * 2e-3 + 1e-5,
        "bias": torch.randn(20, generator=g),
        **oracle.outputs(
            (torch.ones(20), torch.arange(20, dtype=torch.int32) % 9, torch.full((20,), 4, dtype=torch.uint8))
        ),
        **change,
    }
    prepared = torch.ops.ptq4cuda.prepare_layer(x.amax((0, 2, 3), keepdim=True).expand_as(x), *a.values())
    code = Code([False])
    numbers = code.convolve(
        0,
        a["weight"],
        prepared,
        20,
        *(a[name] for name in ("kernel_size", "stride", "padding", "dilation", "groups", "span")),
        residual=None,
        values=False,
        second=False,
    )
    (y,) = torch.ops.ptq4cuda.run_layers([x], code.constants, code.returning(numbers), torch.float32)
    assert torch.equal(y, run(cpu, x, a))
    assert tuple(prepared[at : at + 4].view(torch.float32).item() for at in (1024, 2048)) == on_lines


FINGERPRINT = """
import hashlib, torch, ptq4cuda.ops as ops
from ptq4cuda import _native
from ptq4cuda.ops import panels
from ptq4cuda.ops.layers import Code
from ptq4cuda.quantizer import QuantParams
digest = hashlib.sha256()
g = torch.Generator().manual_seed(0)
for channels, outputs, groups, bits in (
    (20, 33, 1, 4), (3, 8, 1, 8), (20, 8, 1, 8), (24, 12, 4, 4), (70, 70, 70, 8), (9, 9, 9, 8)
):
    x = torch.randint(0, 1 << bits, (2, channels, 9, 11), dtype=torch.uint8, generator=g)
    weight = torch.randint(-128, 128, (outputs, 3, 3, channels // groups), dtype=torch.int8, generator=g)
    weight = panels.weight_panels(weight, groups)
    scale = torch.rand(outputs, generator=g) * 1e-3 + 1e-5
    bias = torch.randn(outputs, generator=g)
    span = panels.span_of_sums(weight, torch.full((channels,), (1 << bits) - 1), (3, 3), groups)
    zeros = torch.randint(-99, 99, (9, outputs), dtype=torch.int32, generator=g)
    residual = torch.randint(0, 256, (2, outputs, 9, 11), dtype=torch.uint8, generator=g)
    bits = torch.randint(0, 9, (outputs,), dtype=torch.uint8, generator=g)
    quantizer = QuantParams(bits, scale * 99, zeros[0].contiguous())
    for slope, upper in ((1.0, float("inf")), (0.0, float("inf")), (0.2, 6.0)):
        for added in (None, residual):
            for out in (None, quantizer):
                outputs = ops.conv2d_integer(
                    x, weight, scale, bias, (3, 3), (1, 1), (1, 1), (1, 1), groups, span=span, zero_sums=zeros,
                    negative_slope=slope, upper=upper, residual=added, residual_scale=scale,
                    residual_zero_point=zeros[1].contiguous(),
                    outputs=(out, QuantParams(quantizer.bits, scale, zeros[2].contiguous())))
                for y in outputs:
                    digest.update((y + 0).numpy().tobytes())
        # Kept: one multiplication, where it gives the same codes.
        shape, whole = ((3, 3), (1, 1), (1, 1), (1, 1), groups), torch.empty(0, dtype=torch.int32)
        prepared = torch.ops.ptq4cuda.prepare_layer(
            x.amax((0, 2, 3), keepdim=True).expand_as(x), weight, zeros, scale, bias, *shape, 0, span, slope, upper,
            None, None, None,
            [scale * 99], [zeros[2].contiguous() % 7], [bits], [whole], [0], None)
        code = Code([False])
        (out,) = code.convolve(
            0, weight, prepared, len(scale), *shape, span, residual=None, values=False, second=False)
        (y,) = torch.ops.ptq4cuda.run_layers([x], code.constants, code.returning([out]), torch.float32)
        digest.update((y + 0).numpy().tobytes())
print(_native.build_info["simd_level"], digest.hexdigest())
"""


def test_the_instruction_set_does_not_matter(printed_at: Callable[..., list[str]]) -> None:
    digests = dict(
        printed_at(level, FINGERPRINT) for level in ("baseline", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx")
    )
    assert "baseline" in digests
    assert len(set(digests.values())) == 1, digests


MATRICES = """
import hashlib, torch, ptq4cuda.ops as ops
from ptq4cuda import _native
from ptq4cuda.ops import panels
digest = hashlib.sha256()
g = torch.Generator().manual_seed(0)
for channels, outputs, groups, kernel, stride, padding, dilation, size in (
    (64, 80, 1, (3, 3), 1, (1, 1), 1, (2, 5, 7)),      # rows of a padded band as they lie, five panels
    (128, 33, 1, (3, 3), 1, (1, 1), 1, (1, 9, 31)),
    (64, 40, 1, (3, 3), 1, (2, 2), 2, (2, 9, 12)),
    (64, 40, 1, (1, 3), 1, (0, 1), 1, (2, 4, 9)),
    (64, 40, 1, (2, 1), 1, (1, 0), 1, (2, 4, 9)),
    (64, 40, 1, (3, 3), 1, (1, 36), 36, (1, 76, 144)),  # with tiles between the rows
    (64, 40, 1, (3, 3), 1, (12, 12), 12, (1, 28, 28)),  # gathered: too much lies between the rows
    (128, 160, 2, (3, 3), 1, (1, 1), 1, (1, 6, 6)),    # groups of whole lines
    (64, 48, 1, (3, 3), 2, (1, 1), 1, (2, 9, 9)),      # gathered
    (128, 64, 1, (1, 1), 1, (0, 0), 1, (3, 4, 5)),     # in place, the last pixels gathered
    (128, 64, 1, (1, 1), 1, (1, 1), 1, (3, 4, 5)),
    (128, 64, 1, (1, 1), 2, (0, 0), 1, (1, 7, 70)),    # and every other one
    (72, 32, 1, (1, 1), 1, (0, 0), 1, (1, 5, 8)),      # the last chunk begins within the one before
    (20, 64, 1, (1, 1), 1, (0, 0), 1, (1, 3, 3)),      # a chunk that is not full, less than a matrix of pixels
    (20, 40, 1, (5, 5), 1, (2, 2), 1, (1, 6, 7)),      # many pieces
    (3, 64, 1, (7, 7), 2, (3, 3), 1, (1, 20, 21)),     # the first layer of a network
    (320, 200, 1, (1, 1), 1, (0, 0), 1, (1, 1, 1)),    # the last
):
    x = torch.randint(0, 256, (size[0], channels, *size[1:]), dtype=torch.uint8, generator=g)
    weight = torch.randint(-128, 128, (outputs, *kernel, channels // groups), dtype=torch.int8, generator=g)
    weight = panels.weight_panels(weight, groups)
    span = panels.span_of_sums(weight, torch.full((channels,), 255), kernel, groups)
    zeros = torch.randint(-99, 99, (kernel[0] * kernel[1], outputs), dtype=torch.int32, generator=g)
    (y,) = ops.conv2d_integer(
        x.contiguous(memory_format=torch.channels_last), weight, torch.ones(outputs), torch.zeros(outputs),
        kernel, (stride, stride), padding, (dilation, dilation), groups, span=span, zero_sums=zeros)
    digest.update((y + 0).numpy().tobytes())
print(_native.build_info["simd_level"], digest.hexdigest())
"""


def test_every_way_to_matrices(printed_at: Callable[..., list[str]]) -> None:
    digests = dict(printed_at(level, MATRICES) for level in ("baseline", "avx512_vnni", "amx"))
    assert len(set(digests.values())) == 1, digests
    if "amx" not in digests:
        pytest.skip("this processor has no AMX")


# Of panels of outputs whose zero points are all 0, csrc/cpu/conv_finish.cpp leaves steps out.
ZEROS = """
import hashlib, itertools, torch
from ptq4cuda import _native
from ptq4cuda.ops import panels

op, digest, facts = torch.ops.ptq4cuda, hashlib.sha256(), []
g = torch.Generator().manual_seed(0)
outputs, count = 176, 11

def draw(low, high, *shape, dtype=torch.uint8):
    return torch.randint(low, high, shape, dtype=dtype, generator=g).contiguous(
        memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)

def scale(top):
    return torch.rand(outputs, generator=g) * top + 1e-3

for groups, slope, added, second, other in itertools.product(
    (1, outputs), (0.0, 1.0), (False, True), (False, True), ("none", "sum", "residual", "first", "second")
):
    def zero_points(what, *shape):  # of an output in the fifth panel and of one in the ninth, if any
        zeros = torch.zeros(*shape, outputs, dtype=torch.int32)
        zeros[..., [70, 140]] = torch.tensor([7, -2], dtype=torch.int32) * (what == other)
        return zeros
    channels = outputs if groups > 1 else 12
    x = draw(0, 16, 2, channels, 5, 7)
    weight = draw(-128, 128, outputs, 3, 3, channels // groups, dtype=torch.int8)
    weight = panels.weight_panels(weight.contiguous(), groups)
    codes = ["first", "second"] if second else ["first"]
    arguments = (
        weight, zero_points("sum", 9), scale(1e-3), torch.randn(outputs, generator=g),
        (3, 3), (1, 1), (1, 1), (1, 1), groups, 0, None, slope, float("inf"),
        *((draw(0, 256, 2, outputs, 5, 7), scale(1e-2), zero_points("residual")) if added else (None,) * 3),
        [scale(0.2) for _ in codes], [zero_points(what) for what in codes],
        [draw(0, 9, outputs) for _ in codes], [torch.empty(0, dtype=torch.int32)] * len(codes), [0] * len(codes),
        None)
    for y in op.conv2d_integer(x, *arguments):
        digest.update(y.contiguous().numpy().tobytes())
    if groups == 1 and added and second and slope == 0.0:
        one = arguments[13][:1, :, :3, :3]
        prepared = op.prepare_layer(x[:1, :, :3, :3], *arguments[:13], one, *arguments[14:])
        at = [64 + 1024 * panel + 964 for panel in range(2 * count)]
        bits = [str(int(prepared[i : i + 4].view(torch.float32).item())) for i in at]
        facts += ["".join(bits[:count]), "".join(bits[count:])]
print(_native.build_info["simd_level"], digest.hexdigest(), *facts)
"""


def test_steps_that_change_nothing_are_left_out(printed_at: Callable[..., list[str]]) -> None:
    runs = [printed_at(level, ZEROS) for level in ("baseline", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx")]
    assert len({digest for _, digest, *_ in runs}) == 1, runs
    none, all_but_two = "1" * 11, "11110111011"
    for _, _, *facts in runs:  # of the panels of the first output and of the second
        assert facts == [none, none, *[all_but_two] * 4, all_but_two, none, none, all_but_two]


# --- windows (csrc/cpu/conv_winograd.h) ---------------------------------------------------------------------------

WINDOWS = """
import itertools, sys, torch
from ptq4cuda import _native
from ptq4cuda.ops import panels
from ptq4cuda.ops.layers import Code

op = torch.ops.ptq4cuda
g = torch.Generator().manual_seed(0)

def draw(low, high, *shape, dtype=torch.uint8):
    return torch.randint(low, high + 1, shape, dtype=dtype, generator=g)

def quantizer(outputs):
    return torch.rand(outputs, generator=g) * 90 + 9, draw(0, 15, outputs, dtype=torch.int32), draw(0, 8, outputs)

def levels(kind, outputs, channels):
    # Weights of an output are levels on a grid of its own: 16 of them, as many as may be with both ends, or none.
    if kind == "constant":
        return draw(-128, 127, outputs, 1, 1, 1, dtype=torch.int8).expand(outputs, 3, 3, channels).contiguous()
    if kind == "28 levels, extreme":
        level = torch.where(draw(0, 1, outputs, 3, 3, channels) > 0, 27, 0)
        level[:, :, :, 0], level[0], level[1 % outputs] = 0, 27, 27
        return (4 * level - 54).to(torch.int8)
    level = draw(0, 15, outputs, 3, 3, channels, dtype=torch.int8)
    step = draw(1, 8, outputs, 1, 1, 1, dtype=torch.int8)
    return (level * step - draw(0, 8, outputs, 1, 1, 1, dtype=torch.int8) * step - step // 2).to(torch.int8)

def arguments(weight, kernel, padding, out, residual=None, second=None, values=None):
    outputs = len(weight)
    zeros = draw(-99, 99, kernel * kernel, outputs, dtype=torch.int32) if outputs % 3 else None
    codes = [q for q in (out, second) if q is not None]
    return (
        panels.weight_panels(weight, 1), zeros, torch.rand(outputs, generator=g) * 1e-2 + 1e-3,
        torch.randn(outputs, generator=g), [kernel] * 2, [1, 1], list(padding), [1, 1], 1, 0, None,
        0.1, 900.0, residual, *((None, None) if residual is None else quantizer(outputs)[:2]),
        *(list(each) or None for each in (zip(*codes) if codes else ((), (), ()))),
        [torch.empty(0, dtype=torch.int32)] * len(codes) or None, [0] * len(codes) or None, values)

used = 0
def convolve(code, source, x, args, residual=None):
    global used
    largest = torch.full((1, x.shape[1], *args[4]), int(x.max()), dtype=torch.uint8)
    shape = [1, len(args[2]), *(2 * p + 1 for p in args[6])]  # of the outputs of an image of the kernel's size
    added = None if args[13] is None else torch.zeros(shape, dtype=torch.uint8)
    prepared = op.prepare_layer(largest, *args[:13], added, *args[14:])
    used += prepared.numel() > 16 * args[0].numel() // 9 and args[4] == [3, 3]
    return code.convolve(source, args[0], prepared, len(args[2]), *args[4:9], None, residual=residual,
                         values=args[-1] is not None, second=len(args[16] or []) + (args[-1] is not None) > 1)

number = 0
for kind, channels, size, padding in itertools.product(
    ("16 levels", "28 levels, extreme", "constant"), (16, 48, 112), ((4, 5), (9, 14), (7, 7)), ((1, 1), (0, 2))
):
    number += 1
    outputs = (8, 33, 80)[number % 3]
    x = draw(0, 63, 3, channels, *size).contiguous(memory_format=torch.channels_last)
    x[0] = 63
    shape = (3, outputs, size[0] + 2 * padding[0] - 2, size[1] + 2 * padding[1] - 2)
    added = draw(0, 255, *shape).contiguous(memory_format=torch.channels_last) if number % 2 else None
    args = arguments(levels(kind, outputs, channels), 3, padding, quantizer(outputs) if number % 5 else None, added,
                     quantizer(outputs) if number % 4 == 0 else None,
                     None if number % 5 else torch.float32)
    wanted = op.conv2d_integer(x, *args)
    code = Code([False] * (1 if added is None else 2))
    made = convolve(code, 0, x, args, None if added is None else 1)
    found = op.run_layers([x] if added is None else [x, added], code.constants, code.returning(made), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)), (kind, channels, size, padding)

# Some rows at a time, between two others.
x = draw(0, 15, 2, 16, 21, 10).contiguous(memory_format=torch.channels_last)
at_most = (torch.full((16,), 2.0), torch.zeros(16, dtype=torch.int32), torch.full((16,), 6, dtype=torch.uint8))
code, value, y = Code([False]), 0, x
for kernel in (1, 3, 1):
    weight = levels("16 levels", 16, 16)[:, :kernel, :kernel].contiguous()
    args = arguments(weight, kernel, (kernel // 2,) * 2, at_most)
    (value,) = convolve(code, value, torch.full((1, 16, 1, 1), 63), args)
    (y,) = op.conv2d_integer(y, *args)
(found,) = op.run_layers([x], code.constants, code.returning([value]), torch.float32)
assert torch.equal(y, found)
print(_native.build_info["simd_level"], used)
"""


@pytest.mark.parametrize("level", ["baseline", "avx_vnni", "avx512_vnni"])
def test_windows_add_up_to_the_same_sums(level: str, printed_at: Callable[..., list[str]]) -> None:
    """Transformed windows of codes and weights, and products of these, lose nothing."""
    reached, used = printed_at(level, WINDOWS)
    assert int(used) == (55 if reached not in ("avx2", "avx512") else 0)
