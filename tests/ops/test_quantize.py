"""fake_quantize and quantize against numpy, on every backend."""

from __future__ import annotations

import pytest
import torch

from ops import oracle
from ops.backends import Backend

SHAPES = [
    (2, 5, 7, 6),  # rows of 42: groups of values that touch two channels
    (3, 8, 1, 1),
    (1, 1, 9, 33),
    (4, 33),
    (2, 16, 5),
    (5,),
    (1,),
    (),
    (2, 3, 4, 5, 6),
    (37, 3, 2, 2),
    (1, 40, 3, 3),
]
EMPTY = [(0,), (0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)]
OPS = ("fake_quantize", "quantize")


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_codes_agree_with_numpy(backend: Backend, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout in oracle.layouts(shape):
        x = oracle.make(shape, dtype, layout)
        for axis in range(-x.dim(), x.dim()) if x.dim() else [0]:
            scale, zero_point, bits = oracle.quantizer(x.shape[axis] if x.dim() else 1, seed=axis + 8)
            for parameters in (
                (scale, zero_point, bits),
                (scale[:1], zero_point[:1], bits[:1]),
                (scale, zero_point[:1], bits[-1:]),
            ):
                y = getattr(backend, op)(x, *parameters, axis)
                expected = getattr(oracle, op)(x, *parameters, axis)
                assert oracle.same(y, expected), (layout, axis)
                assert y.stride() == torch.empty_like(x).stride(), (layout, axis)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_many_values(backend: Backend, op: str, dtype: torch.dtype) -> None:
    """Enough for a thread to take several turns."""
    for shape, layout in (
        ((3, 5, 61, 67), "contiguous"),
        ((3, 5, 61, 67), "channels_last"),
        ((2, 24, 40, 37), "channels_last"),
        ((70001,), "misaligned"),
        ((2, 6, 64, 80), "contiguous"),  # rows of whole vectors
        ((2, 6, 64, 80), "misaligned"),
        ((1, 3100, 3, 3), "contiguous"),  # more channels than shared memory has room for
    ):
        x = oracle.make(shape, dtype, layout)
        axis = 1 if len(shape) > 1 else 0
        parameters = oracle.quantizer(shape[1] if axis else 1)
        assert oracle.same(getattr(backend, op)(x, *parameters, axis), getattr(oracle, op)(x, *parameters, axis))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_any_alignment_of_input_and_output(backend: Backend, op: str, dtype: torch.dtype) -> None:
    out_dtype = dtype if op == "fake_quantize" else torch.uint8
    for length in (1, 2, 3, 7, 8, 9, 16, 31, 100):
        for offset in range(9):
            storage = oracle.make((length + offset,), dtype, seed=length)
            x = storage[offset:].view(1, length)
            parameters = oracle.quantizer(length)
            for shift in (offset, offset + 1, 0):
                out, raw = oracle.guarded((1, length), out_dtype, (length, 1), 16 + shift)
                getattr(backend, op)(x, *parameters, 1, out=out)
                assert oracle.same(out, getattr(oracle, op)(x, *parameters, 1)), (length, offset, shift)
                assert bool((oracle.surroundings(out, raw) == 0x5A).all()), (length, offset, shift)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_many_values_at_any_alignment(backend: Backend, op: str, dtype: torch.dtype) -> None:
    shape = (1, 2, 90, 96)
    out_dtype = dtype if op == "fake_quantize" else torch.uint8
    parameters = oracle.quantizer(2)
    for offset, shift in ((0, 1), (3, 0), (3, 3), (5, 4)):
        storage = oracle.make((2 * 90 * 96 + offset,), dtype)
        x = storage[offset:].view(shape)
        out, raw = oracle.guarded(shape, out_dtype, x.stride(), 16 + shift)
        getattr(backend, op)(x, *parameters, 1, out=out)
        assert oracle.same(out, getattr(oracle, op)(x, *parameters, 1)), (offset, shift)
        assert bool((oracle.surroundings(out, raw) == 0x5A).all()), (offset, shift)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("op", OPS)
def test_out(backend: Backend, op: str, layout: str) -> None:
    x = oracle.make((3, 5, 7, 9), torch.float32, layout)
    parameters = oracle.quantizer(5)
    dtype = x.dtype if op == "fake_quantize" else torch.uint8
    out, raw = oracle.guarded(tuple(x.shape), dtype, x.stride(), 3)
    getattr(backend, op)(x, *parameters, 1, out=out)
    assert oracle.same(out, getattr(oracle, op)(x, *parameters, 1))
    assert out.stride() == x.stride()
    assert bool((oracle.surroundings(out, raw) == 0x5A).all())


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty(backend: Backend, op: str, shape: tuple[int, ...]) -> None:
    axis = 1 if len(shape) > 1 else 0
    for x in (torch.empty(shape), torch.empty(shape).movedim(0, -1).contiguous().movedim(-1, 0)):
        y = getattr(backend, op)(x, *oracle.quantizer(shape[axis]), axis)
        assert y.shape == x.shape
        assert y.dtype == (x.dtype if op == "fake_quantize" else torch.uint8)
        getattr(backend, op)(x, *oracle.quantizer(shape[axis]), axis, out=torch.empty_like(y))


def test_values_by_hand(backend: Backend) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([0.0, 0.25, 0.75, 1.25, -0.25, -0.75, 100.0, -100.0, inf, -inf, nan, 1e30, -1e30])
    one = (torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32), torch.tensor([4], dtype=torch.uint8))
    # 0.25 / 0.5 = 0.5 rounds to the even 0; 0.75 / 0.5 = 1.5 to 2; 1.25 / 0.5 = 2.5 to 2.
    assert backend.quantize(x, *one, 0).tolist() == [3, 3, 5, 5, 3, 1, 15, 0, 15, 0, 3, 15, 0]
    y = backend.fake_quantize(x, *one, 0)
    assert y[:10].tolist() == [0.0, 0.0, 1.0, 1.0, 0.0, -1.0, 6.0, -1.5, 6.0, -1.5]
    assert y[10].isnan()
    assert y[11:].tolist() == [6.0, -1.5]


@pytest.mark.parametrize(("zero_point", "expected"), [(-7, 0), (0, 0), (9, 9), (15, 15), (99, 15)])
def test_nan_becomes_the_code_nearest_to_zero(backend: Backend, zero_point: int, expected: int) -> None:
    x = torch.full((3,), float("nan"))
    parameters = (
        torch.ones(1),
        torch.tensor([zero_point], dtype=torch.int32),
        torch.tensor([4], dtype=torch.uint8),
    )
    assert backend.quantize(x, *parameters, 0).tolist() == [expected] * 3


def test_bits_bound_the_codes(backend: Backend) -> None:
    x = torch.linspace(-1000, 1000, 2001).repeat(9, 1)
    bits = torch.arange(9, dtype=torch.uint8)
    codes = backend.quantize(x, torch.full((9,), 0.5), torch.full((9,), 100, dtype=torch.int32), bits, 0)
    assert codes.amin(1).tolist() == [0] * 9
    assert codes.amax(1).tolist() == [2**b - 1 for b in range(9)]


def test_extreme_scales(backend: Backend) -> None:
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    x = torch.tensor([[0.0, tiny, -tiny, 1.0, huge, -huge]] * 3)
    parameters = (
        torch.tensor([tiny, 1.0, huge]),
        torch.tensor([1, 1 << 22, -(1 << 22)], dtype=torch.int32),
        torch.full((3,), 8, dtype=torch.uint8),
    )
    for op in OPS:
        assert oracle.same(getattr(backend, op)(x, *parameters, 0), getattr(oracle, op)(x, *parameters, 0))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_straight_through_gradient(backend: Backend, dtype: torch.dtype) -> None:
    x = oracle.make((3, 6, 5, 4), dtype).nan_to_num(0.3, 80.0, -80.0)
    scale, zero_point, bits = oracle.quantizer(6)
    x.requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (backend.fake_quantize(x, scale, zero_point, bits, 1) * weight).sum().backward()
    assert x.grad is not None
    # One where the value is rounded and not clipped, in the units of the codes.
    steps = torch.round(x.detach().float() * (1 / scale).view(-1, 1, 1)) + zero_point.view(-1, 1, 1)
    inside = (steps >= 0) & (steps <= (2.0 ** bits.float() - 1).view(-1, 1, 1))
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(x.grad, weight * inside)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [3e-8, 2e-6, 1e-4, 0.37, 300.0, 4e37])
def test_every_16_bit_float(backend: Backend, dtype: torch.dtype, scale: float) -> None:
    """All 65,536 values go in; subnormal, ordinary and overflowing ones come out."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    arguments = torch.tensor([scale]), torch.tensor([100], dtype=torch.int32), torch.tensor([8], dtype=torch.uint8), 0
    codes = ((x.double() / torch.tensor([scale]).double()).nan_to_num(0.0, 1e9, -1e9).round() + 100).clamp(0, 255)
    found = backend.quantize(x, *arguments).double()
    # the quotient is a float32 product in the operator: a tie may fall the other way
    assert (found - codes).abs().max() <= 1
    assert (found != codes).double().mean() < 1e-3
    expected = ((found.float() - 100) * torch.tensor([scale])).to(dtype)
    assert oracle.same(backend.fake_quantize(x, *arguments), torch.where(x.isnan(), x, expected))
