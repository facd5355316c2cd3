"""channel_histogram against numpy, count for count, and what must not change it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ptq4cuda.ops
from ops import oracle
from ops.backends import Backend

NAN, INF = float("nan"), float("inf")

SHAPES = [*oracle.OF_CHANNELS, (1, 2, 130, 132)]  # channels that several blocks, or threads, share


def limits(channels: int) -> tuple[Tensor, Tensor]:
    """Return limits of each channel with values beyond both; in every fifth channel they are equal."""
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(channels, generator=generator) * 6 - 5
    high = low + torch.rand(channels, generator=generator) * 6
    high[4::5] = low[4::5]
    return low, high


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_histograms_agree_with_numpy(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout in oracle.layouts(shape):
        x = oracle.make(shape, dtype, layout)
        for axis in range(-x.dim(), 0) if x.dim() else [0]:
            channels = x.shape[axis] if x.dim() else 1
            low, high = limits(channels)
            for bins, below, above in ((37, low, high), (256, low[:1] - 5, high), (16, low[:1], high[:1])):
                expected = oracle.histogram(x, below, above, bins, axis)
                found = backend.channel_histogram(x, below, above, bins, axis)
                assert oracle.same(found, expected), (layout, axis, bins)
                assert found.is_contiguous()
            numbers = (~x.isnan()).movedim(axis, 0).flatten(1).sum(1) if x.dim() > 1 else (~x.isnan()).reshape(-1)
            assert torch.equal(found.sum(1), numbers)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("bins", [1, 2, 2047, 2048, 4095, 4096])
def test_few_and_many_bins(backend: Backend, bins: int, layout: str) -> None:
    for shape in ((2, 40, 6, 5), (1, 2, 130, 132), (600, 9, 3, 3)):
        x = oracle.make(shape, torch.float32, layout)
        low, high = limits(shape[1])
        expected = oracle.histogram(x, low, high, bins, 1)
        assert oracle.same(backend.channel_histogram(x, low, high, bins, 1), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_values_at_the_edges(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """Bins include their lower edge; the last one also includes the upper limit, and whatever is above."""
    values = torch.tensor([0.0, -0.0, 0.24, 0.25, 0.5, 0.75, 1.0, 1.01, -0.01, 9e3, -9e3, INF, -INF, NAN, NAN])
    x = oracle.arrange(values.to(dtype).repeat(4, 3, 1), layout)
    found = backend.channel_histogram(x, torch.zeros(1), torch.ones(1), 4, 1)
    assert found.tolist() == [[24, 4, 4, 20]] * 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_limits_without_a_finite_factor(backend: Backend, layout: str) -> None:
    """Equal limits, limits too close together or too far apart: everything is in the first bin."""
    low = torch.tensor([1.0, -1.0, 0.0, -3e38, -INF, 0.0, -INF, NAN, 0.0, 2.0])
    high = torch.tensor([1.0, -1.0, 1e-40, 3e38, 0.0, INF, INF, 0.0, NAN, 1.0])
    x = torch.randn(3, 10, 50, generator=torch.Generator().manual_seed(0))
    x[0, :, :4] = torch.tensor([INF, -INF, NAN, 3e38])
    x = oracle.arrange(x, layout)
    expected = torch.zeros(10, 5, dtype=torch.int64)
    expected[:, 0] = 149
    assert torch.equal(backend.channel_histogram(x, low, high, 5, 1), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_differences_that_overflow(backend: Backend, layout: str) -> None:
    x = oracle.arrange(torch.tensor([3e38, -3e38, 1.5e38, 0.0, -1e38]).repeat(2, 3, 1), layout)
    low, high = torch.tensor([-3e38, 0.0, -1e38]), torch.tensor([-1e38, 1.0, 1e38])
    found = backend.channel_histogram(x, low, high, 4000, 1)
    assert torch.equal(found, oracle.histogram(x, low, high, 4000, 1))
    assert found[0, [0, -1]].tolist() == [2, 8]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [0.0, -2.5, NAN])
def test_constant_channels(backend: Backend, layout: str, value: float) -> None:
    """All values in one bin: where counters are kept in copies, none is lost."""
    x = oracle.arrange(torch.full((3, 3, 64, 65), value), layout)
    found = backend.channel_histogram(x, torch.full((3,), -4.0), torch.full((3,), 4.0), 16, 1)
    expected = torch.zeros(3, 16, dtype=torch.int64)
    if value == value:
        expected[:, int(value * 2) + 8] = 3 * 64 * 65
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("shape", "channels"), [((0,), 0), ((0, 4, 3), 4), ((2, 0, 3), 0), ((2, 40, 0), 40), ((0, 1), 1)], ids=str
)
def test_empty(backend: Backend, shape: tuple[int, ...], channels: int) -> None:
    axis = 1 if len(shape) > 1 else 0
    for low in (torch.zeros(channels), torch.zeros(1)):
        found = backend.channel_histogram(torch.empty(shape), low, low + 1, 7, axis)
        assert oracle.same(found, torch.zeros(channels, 7, dtype=torch.int64))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_channel_count(backend: Backend, dtype: torch.dtype) -> None:
    """Rows of all lengths around the vector widths, short and long."""
    for channels in (1, 2, 3, 7, 8, 31, 33, 64, 65):
        for inner in (1, 2, 31, 32, 33, 40):
            x = oracle.make((5, channels, inner), dtype, seed=channels)
            low, high = limits(channels)
            expected = oracle.histogram(x, low, high, 12, 1)
            assert torch.equal(backend.channel_histogram(x, low, high, 12, 1), expected), (channels, inner)


def test_histograms_add_up(backend: Backend) -> None:
    x = oracle.make((6, 4, 50), torch.float32)
    low, high = limits(4)
    parts = [backend.channel_histogram(part, low, high, 33, 1) for part in (x[:2], x[2:])]
    assert torch.equal(parts[0] + parts[1], backend.channel_histogram(x, low, high, 33, 1))


def test_limits_may_be_strided(backend: Backend) -> None:
    x = oracle.make((2, 6, 5), torch.float32)
    low, high = limits(6)
    expected = backend.channel_histogram(x, low, high, 9, 1)
    spread = torch.stack([low, high], dim=1)
    assert torch.equal(backend.channel_histogram(x, spread[:, 0], spread[:, 1], 9, 1), expected)


# --- the typed function --------------------------------------------------------------------------------------


def test_numbers_are_limits() -> None:
    x = oracle.make((2, 5, 7, 6), torch.float16)
    expected = oracle.histogram(x, torch.tensor([-1.0]), torch.tensor([2.5]), 20, 1)
    assert torch.equal(ptq4cuda.ops.channel_histogram(x, -1, 2.5, 20), expected)
    low = torch.full((6,), -1.0)
    expected = oracle.histogram(x, low, torch.tensor([2.5]), 20, -1)
    assert torch.equal(ptq4cuda.ops.channel_histogram(x, low, 2.5, 20, axis=-1), expected)
    assert torch.equal(
        ptq4cuda.ops.channel_histogram(torch.tensor(3.0), 0.0, 4.0, 4, 0), torch.tensor([[0, 0, 0, 1]])
    )


def test_compile() -> None:
    torch.compiler.reset()

    def histogram(x: Tensor) -> Tensor:
        y = x.relu()
        return ptq4cuda.ops.channel_histogram(y, 0.0, y.amax((0, 2)), 50)

    compiled = torch.compile(histogram, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5):
        x = torch.randn(batch, 6, 40, generator=torch.Generator().manual_seed(batch))
        assert torch.equal(compiled(x), histogram(x))


# --- determinism ---------------------------------------------------------------------------------------------

# Channels that one thread counts, or several; histograms that every thread has, or that are too large for that.
CUTS = [
    ((2, 3, 260, 261), 1, 64),
    ((5, 20, 80, 80), 1, 2048),
    ((64, 700), 0, 100),
    ((3, 400, 16, 16), 1, 4096),
    ((1, 1, 600, 601), 1, 2048),
    ((50000, 5), 1, 1000),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_neither_threads_nor_cuts_matter(cpu: Backend, reference: Backend, layout: str) -> None:
    threads = torch.get_num_threads()
    try:
        for shape, axis, bins in CUTS:
            x = oracle.make(shape, torch.float32, layout)
            low, high = limits(shape[axis])
            expected = reference.channel_histogram(x, low, high, bins, axis)
            for n in (1, 2, 3, 8):
                torch.set_num_threads(n)
                assert torch.equal(cpu.channel_histogram(x, low, high, bins, axis), expected), (shape, n)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_tensors_agree(backend: Backend, reference: Backend, layout: str) -> None:
    for dtype in (torch.float32, torch.float16):
        for shape, axis, bins in CUTS:
            x = oracle.make(shape, dtype, layout)
            low, high = limits(shape[axis])
            expected = reference.channel_histogram(x, low, high, bins, axis)
            assert torch.equal(backend.channel_histogram(x, low, high, bins, axis), expected), shape


FINGERPRINT = """
import hashlib, torch, ptq4cuda.ops as ops
from ptq4cuda import _native
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape in ((2, 3, 60, 61), (5, 20, 30, 30), (3, 400, 4, 4)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
            x = x.to(dtype).contiguous(memory_format=memory_format)
            x[0, 0, 0, :4] = torch.tensor([float("inf"), -7.5, 60000.0, float("nan")])
            high = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) * 5
            digest.update(ops.channel_histogram(x, -high, high, 300).numpy().tobytes())
print(_native.build_info["simd_level"], digest.hexdigest())
"""


def test_the_instruction_set_does_not_matter(printed_at: Callable[..., list[str]]) -> None:
    digests = dict(printed_at(level, FINGERPRINT) for level in ("baseline", "avx2", "avx512", "avx512_vnni", "amx"))
    assert "baseline" in digests
    assert len(set(digests.values())) == 1, digests
