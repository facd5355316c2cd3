"""channel_statistics against numpy in extended precision, and its determinism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ops import oracle
from ops.backends import Backend

COUNT, MIN, MAX, MEAN, M2, ABSDEV, POSITIVE = range(7)

SHAPES = [*oracle.OF_CHANNELS, (2, 2, 96, 96)]  # channels that several blocks share


def close(a: Tensor, b: Tensor) -> bool:
    """1e-10 of the value; for sums that cancel, of the values they were made of."""
    spread = torch.maximum(b[:, MIN].abs(), b[:, MAX].abs())[:, None]
    size = torch.ones_like(b) * spread
    size[:, M2] = b[:, M2]
    size[:, [COUNT, POSITIVE]] = 1
    return a.dtype == torch.float64 and bool(((a - b).abs() <= 1e-10 * torch.maximum(b.abs(), size)).all())


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_agree_with_numpy(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout in oracle.layouts(shape):
        x = oracle.make(shape, dtype, layout).nan_to_num(1.5, 50.0, -50.0).clamp(-6e4, 6e4)
        for axis in range(-x.dim(), 0) if x.dim() else [0]:
            expected = oracle.statistics(x, axis)
            found = backend.channel_statistics(x, axis)
            assert close(found, expected), (layout, axis)
            assert torch.equal(found[:, [COUNT, MIN, MAX]], expected[:, [COUNT, MIN, MAX]])
            centre = expected[:, MEAN] + torch.linspace(-1, 1, len(expected), dtype=torch.float64)
            expected = oracle.statistics(x, axis, centre)
            assert close(backend.channel_statistics(x, axis, centre), expected), (layout, axis)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_a_large_mean_costs_no_precision(backend: Backend, layout: str, spread: float) -> None:
    noise = torch.randn(4, 6, 30, 31, generator=torch.Generator().manual_seed(0)) * spread
    offset = torch.tensor([1e6, -1e6, 3e4, 1.0, 0.0, 1e-3]).view(1, 6, 1, 1)
    x = oracle.arrange(noise + offset, layout)
    expected, found = oracle.statistics(x, 1), backend.channel_statistics(x, 1)
    # Means that are merged, and the centre of the deviations, are float64: 2^-53 of the mean is lost there.
    lost = 2.0**-53 * expected[:, MEAN].abs()
    slack = 1e-10 * expected[:, M2] + 4 * lost * (expected[:, M2] * expected[:, COUNT]).sqrt()
    assert bool(((found - expected)[:, M2].abs() <= slack).all())
    slack = 1e-10 * expected[:, ABSDEV] + 2 * lost
    assert bool(((found - expected)[:, ABSDEV].abs() <= slack).all())
    torch.testing.assert_close(found[:, MEAN], expected[:, MEAN], rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_squares_survive_any_mean(backend: Backend, layout: str) -> None:
    """Channels with means of 0 to 300 standard deviations side by side, and a dead one."""
    noise = torch.randn(5, 8, 40, 41, generator=torch.Generator().manual_seed(0))
    for means in ([0, 1, 5, 7, 7.5, -7.7, 0, 3], [0, 7.9, 8, -8.1, 9, 20, 300, 0]):
        x = noise + torch.tensor(means).view(1, 8, 1, 1)
        x[:, 0] = 0  # a dead channel
        x = oracle.arrange(x, layout)
        expected, found = oracle.statistics(x, 1), backend.channel_statistics(x, 1)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_extremes(backend: Backend, layout: str) -> None:
    x = torch.randn(3, 4, 8, 9, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e30
    x[:, 1] *= 1e-30
    x[:, 2] = 0.0
    x[1, 2, 3, 4] = 3e38
    x[:, 3] = torch.finfo(torch.float32).smallest_normal
    x = oracle.arrange(x, layout)
    expected, found = oracle.statistics(x, 1), backend.channel_statistics(x, 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [0.0, -2.5, 7.0])
def test_constant_channels(backend: Backend, layout: str, value: float) -> None:
    x = oracle.arrange(torch.full((2, 3, 5, 7), value), layout)
    positive = float(value > 0)
    assert backend.channel_statistics(x, 1).tolist() == [[70.0, value, value, value, 0.0, 0.0, positive]] * 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("place", [(0, 0), (2, 13)])
def test_values_that_are_not_finite(backend: Backend, layout: str, place: tuple[int, int]) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    for channel, value in enumerate((nan, inf, -inf)):
        x[place[0], channel, place[1]] = value
    x[0, 3, 5], x[2, 3, 30] = inf, nan
    clean = oracle.statistics(x[:, 4:], 1)
    found = backend.channel_statistics(oracle.arrange(x, layout), 1)
    assert found[:4, MIN].isnan().tolist() == [True, False, False, True]
    assert found[:4, MAX].isnan().tolist() == [True, False, False, True]
    assert found[1, MAX] == inf
    assert found[2, MIN] == -inf
    assert not found[:4, [MEAN, M2, ABSDEV]].isfinite().any()
    assert found[:, COUNT].tolist() == [120.0] * 5
    assert torch.equal(found[:4, POSITIVE], (x[:, :4] > 0).double().mean((0, 2)))
    assert close(found[4:], clean)


@pytest.mark.parametrize(
    ("shape", "channels"), [((0,), 0), ((0, 4, 3), 4), ((2, 0, 3), 0), ((2, 40, 0), 40), ((0, 1), 1)], ids=str
)
def test_empty(backend: Backend, shape: tuple[int, ...], channels: int) -> None:
    inf = float("inf")
    found = backend.channel_statistics(torch.empty(shape), 1 if len(shape) > 1 else 0)
    assert found.tolist() == [[0.0, inf, -inf, 0.0, 0.0, 0.0, 0.0]] * channels
    assert found.shape == (channels, 7)


def test_statistics_merge_as_one_tensor_would(backend: Backend) -> None:
    """The rows are what Chan's formula needs."""
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0)) + 100
    a, b = backend.channel_statistics(x[:2], 1), backend.channel_statistics(x[2:], 1)
    whole = backend.channel_statistics(x, 1)
    delta = b[:, MEAN] - a[:, MEAN]
    m2 = a[:, M2] + b[:, M2] + delta**2 * a[:, COUNT] * b[:, COUNT] / whole[:, COUNT]
    torch.testing.assert_close(m2, whole[:, M2], rtol=1e-12, atol=0)


# --- determinism ---------------------------------------------------------------------------------------------

DETERMINISTIC = [((2, 3, 60, 61), 1), ((5, 20, 30, 30), 1), ((64, 7), 0), ((3, 400, 4, 4), 1), ((1, 2, 130, 132), 1)]


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_address_does_not_matter(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """The order of the sums follows from the shape: a copy that begins elsewhere in memory gives the same bits."""
    if not backend.native:
        return
    for shape, axis in DETERMINISTIC:
        x = oracle.arrange(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), layout)
        moved, _ = oracle.guarded(shape, dtype, x.stride(), 33)
        moved.copy_(x)
        first = backend.channel_statistics(x, axis)
        for y in (x, moved):
            assert torch.equal(backend.channel_statistics(y, axis), first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_number_of_threads_does_not_matter(cpu: Backend, layout: str) -> None:
    threads = torch.get_num_threads()
    try:
        for shape, axis in DETERMINISTIC:
            x = oracle.arrange(torch.randn(shape, generator=torch.Generator().manual_seed(0)), layout)
            results = []
            for n in (1, 2, 3, 8):
                torch.set_num_threads(n)
                results.append(cpu.channel_statistics(x, axis))
            assert all(torch.equal(result, results[0]) for result in results), shape
    finally:
        torch.set_num_threads(threads)


FINGERPRINT = """
import hashlib, torch, ptq4cuda.ops as ops
from ptq4cuda import _native
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape in ((2, 3, 60, 61), (5, 20, 30, 30), (3, 400, 4, 4)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
            x = x.to(dtype).contiguous(memory_format=memory_format)
            x[0, 0, 0, :3] = torch.tensor([float("inf"), -7.5, 60000.0])
            scale, zero = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) + 0.1, 3
            packed = ops.quantize_pack(x, scale, torch.full((shape[1],), zero, dtype=torch.int32))
            for y in (
                ops.channel_statistics(x.nan_to_num(0, 5, -5)),
                ops.fake_quantize(x, scale, torch.full((shape[1],), zero, dtype=torch.int32), 5),
                packed,
                ops.unpack_dequantize(packed, scale, torch.full((shape[1],), zero, dtype=torch.int32), shape[1]),
            ):
                digest.update(y.contiguous().view(torch.uint8).numpy().tobytes())
print(_native.build_info["simd_level"], digest.hexdigest())
"""


def test_the_instruction_set_does_not_matter(printed_at: Callable[..., list[str]]) -> None:
    digests = dict(printed_at(level, FINGERPRINT) for level in ("baseline", "avx2", "avx512", "avx512_vnni", "amx"))
    assert "baseline" in digests
    assert len(set(digests.values())) == 1, digests
