"""What quantizers promise for all values, on every backend."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ptq4cuda.ops
from ops import oracle
from ops.backends import Backend

# The backend is a fixture of the whole session: sharing it between examples is what is meant.
many = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

floats = st.floats(-1e4, 1e4, width=32)
scales = st.floats(2.0**-20, 2.0**20, width=32)
dtypes = st.sampled_from(oracle.DTYPES)


def quantizer(scale: float, zero_point: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.tensor([scale]),
        torch.tensor([zero_point], dtype=torch.int32),
        torch.tensor([bits], dtype=torch.uint8),
    )


@many
@given(
    values=st.lists(floats, min_size=1, max_size=40),
    scale=scales,
    zero=st.integers(-300, 300),
    bits=st.integers(0, 8),
)
def test_the_round_trip_is_within_half_a_step(
    backend: Backend, values: list[float], scale: float, zero: int, bits: int
) -> None:
    x = torch.tensor(values)
    parameters = quantizer(scale, zero, bits)
    y = backend.fake_quantize(x, *parameters, 0).double()
    step = float(parameters[0])
    low, high = -zero * step, (2**bits - 1 - zero) * step
    # Half a step, and what float32 loses: 2^-24 of the product with the inverse, of the code and of its value.
    slack = 4 * 2.0**-24 * (x.double().abs() + abs(zero) * step + step)
    clipped = x.double().clamp(low, high)
    assert bool(((y - clipped).abs() <= step / 2 + slack).all())


@many
@given(
    values=st.lists(floats, min_size=2, max_size=40),
    scale=scales,
    zero=st.integers(-5, 260),
    bits=st.integers(0, 8),
    dtype=dtypes,
)
def test_codes_are_monotone_and_in_range(
    backend: Backend, values: list[float], scale: float, zero: int, bits: int, dtype: torch.dtype
) -> None:
    x = torch.tensor(values, dtype=dtype).sort().values
    codes = backend.quantize(x, *quantizer(scale, zero, bits), 0).int()
    assert bool((codes.diff() >= 0).all())
    assert int(codes.max()) <= 2**bits - 1


@many
@given(values=st.lists(floats, min_size=1, max_size=40), scale=scales, zero=st.integers(0, 255), dtype=dtypes)
def test_values_of_codes_are_fixed_points(
    backend: Backend, values: list[float], scale: float, zero: int, dtype: torch.dtype
) -> None:
    parameters = quantizer(scale, zero, 8)
    once = backend.fake_quantize(torch.tensor(values), *parameters, 0)
    assert torch.equal(backend.fake_quantize(once, *parameters, 0), once)


@many
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    spatial=st.lists(st.integers(1, 6), max_size=3),
    layout=st.sampled_from(["contiguous", "channels_last", "strided", "misaligned"]),
    axis=st.integers(0, 1),
    seed=st.integers(0, 99),
    dtype=dtypes,
)
def test_unpacking_gives_the_fake_quantized_tensor(
    backend: Backend,
    batch: int,
    channels: int,
    spatial: list[int],
    layout: str,
    axis: int,
    seed: int,
    dtype: torch.dtype,
) -> None:
    shape = (batch, channels, *spatial)
    x = oracle.make(shape, dtype, layout, seed).nan_to_num(0.0)
    scale, zero_point, bits = oracle.quantizer(shape[axis], seed, bits=4)
    packed = backend.quantize_pack(x, scale, zero_point, axis)
    values = backend.unpack_dequantize(packed, scale, zero_point, axis, channels, dtype)
    assert oracle.same(values, backend.fake_quantize(x, scale, zero_point, bits, axis))


@many
@given(data=st.data(), length=st.integers(0, 70), bits=st.lists(st.integers(0, 8), max_size=6))
def test_rows_of_codes_survive_packing(backend: Backend, data: st.DataObject, length: int, bits: list[int]) -> None:
    rows = [data.draw(st.lists(st.integers(0, 2**b - 1), min_size=length, max_size=length)) for b in bits]
    codes = torch.tensor(rows, dtype=torch.uint8).view(len(bits), length)
    table = torch.tensor(bits, dtype=torch.uint8)
    offsets, total = ptq4cuda.ops.row_offsets(table, length)
    packed = backend.pack_codes(codes, table, offsets, total)
    assert bytes(packed.tolist()) == oracle.pack_rows(codes, table)
    assert torch.equal(backend.unpack_codes(packed, table, offsets, length), codes)


@many
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=80),
    channels=st.integers(1, 5),
    channels_last=st.booleans(),
)
def test_statistics_bound_each_other(
    backend: Backend, values: list[float], channels: int, channels_last: bool
) -> None:
    rows = torch.tensor(values).repeat(channels).view(channels, -1)
    x = rows.t().contiguous().t() if channels_last else rows
    count, low, high, mean, m2, absdev, positive = backend.channel_statistics(x, 0).unbind(1)
    slack = 1e-12 * (1 + torch.maximum(low.abs(), high.abs()))
    assert bool((low - slack <= mean).all() and (mean <= high + slack).all())
    assert bool((absdev <= (m2 / count).sqrt() + slack).all())  # Jensen's inequality
    assert bool((m2 / count <= (high - low) ** 2 / 4 + slack * (high - low + 1)).all())  # Popoviciu's
    assert bool(((positive >= 0) & (positive <= 1)).all())
    assert len(set(zip(*(c.tolist() for c in (count, low, high, positive)), strict=True))) == 1
