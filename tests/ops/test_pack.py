"""quantize_pack, unpack_dequantize, pack_codes and unpack_codes against numpy and Python integers."""

from __future__ import annotations

import pytest
import torch

import ptq4cuda.ops
from ops import oracle
from ops.backends import Backend

SHAPES = [
    (2, 5, 7, 6),
    (3, 8, 1, 1),
    (1, 1, 9, 33),
    (4, 33),
    (4, 32),
    (2, 16, 5),
    (1, 2, 1),
    (2, 3, 2, 3, 4),
    (2, 160, 4, 4),  # more channels than a tile is wide
    (3, 192, 7, 10),
    (3, 129, 3, 3),
    (2, 66, 8, 16),
    (1, 3, 40, 40),
    (5, 7, 2, 2),  # tiles that span samples
]
EMPTY = [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (0, 0)]


def expected_pack(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    four = torch.full_like(zero_point, 4, dtype=torch.uint8)
    pad = zero_point.clamp(0, 15)
    pad = pad.expand(x.shape[0]) if axis == 0 else pad[-1:].expand(x.shape[0])
    return oracle.pack(oracle.quantize(x, scale, zero_point, four, axis), pad)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_agrees_with_numpy(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout in oracle.layouts(shape):
        x = oracle.make(shape, dtype, layout)
        for axis in (0, 1):
            scale, zero_point, _ = oracle.quantizer(shape[axis])
            for parameters in ((scale, zero_point), (scale[:1], zero_point[:1]), (scale[:1], zero_point)):
                packed = backend.quantize_pack(x, *parameters, axis)
                assert packed.is_contiguous()
                assert oracle.same(packed, expected_pack(x, *parameters, axis)), (layout, axis)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_agrees_with_numpy(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed_shape = (shape[0], *shape[2:], (shape[1] + 1) // 2)
    packed = torch.randint(0, 256, packed_shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = torch.stack([packed % 16, packed // 16], -1).flatten(-2)[..., : shape[1]].movedim(-1, 1)
    for axis in (0, 1):
        scale, zero_point, _ = oracle.quantizer(shape[axis])
        for parameters in ((scale, zero_point), (scale[:1], zero_point[:1])):
            expected = oracle.dequantize(codes.numpy(), *parameters, axis, dtype)
            values = backend.unpack_dequantize(packed, *parameters, axis, shape[1], dtype)
            assert oracle.same(values, expected)
            assert values.movedim(1, -1).is_contiguous()
            for layout in ("contiguous", "channels_last"):
                stride = oracle.arrange(expected, layout).stride()
                for offset in (16, 17):
                    out, raw = oracle.guarded(shape, dtype, stride, offset)
                    backend.unpack_dequantize(packed, *parameters, axis, out=out)
                    assert oracle.same(out, expected), (layout, offset)
                    assert bool((oracle.surroundings(out, raw) == 0x5A).all()), (layout, offset)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 6, 8), (2, 13, 5, 7), (2, 64, 4, 6)], ids=str)
def test_pack_into_any_place(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale, zero_point, _ = oracle.quantizer(shape[1])
    for layout in oracle.layouts(shape):
        x = oracle.make(shape, dtype, layout)
        expected = expected_pack(x, scale, zero_point, 1)
        for offset in range(16, 22):
            out, raw = oracle.guarded(tuple(expected.shape), torch.uint8, expected.stride(), offset)
            backend.quantize_pack(x, scale, zero_point, 1, out=out)
            assert oracle.same(out, expected), (layout, offset)
            assert bool((oracle.surroundings(out, raw) == 0x5A).all()), (layout, offset)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_values(backend: Backend, layout: str) -> None:
    for shape in ((2, 24, 50, 52), (3, 9, 47, 33), (1, 6, 300, 299)):  # the last: blocks take several tiles
        x = oracle.make(shape, torch.float16, layout)
        scale, zero_point, _ = oracle.quantizer(shape[1])
        packed = expected_pack(x, scale, zero_point, 1)
        assert oracle.same(backend.quantize_pack(x, scale, zero_point, 1), packed)
        codes = oracle.quantize(x, scale, zero_point, torch.full((shape[1],), 4, dtype=torch.uint8), 1)
        expected = oracle.dequantize(codes.numpy(), scale, zero_point, 1, torch.float16)
        out = torch.empty_like(x)
        assert oracle.same(backend.unpack_dequantize(packed, scale, zero_point, 1, out=out), expected)


@pytest.mark.parametrize("shape", [(5, 16, 40, 30), (3100, 10, 1, 1)], ids=str)
def test_quantizers_of_samples(backend: Backend, shape: tuple[int, ...]) -> None:
    """Long rows, and more quantizers than shared memory has room for."""
    x = oracle.make(shape, torch.float16, "channels_last")
    scale, zero_point, _ = oracle.quantizer(shape[0])
    packed = expected_pack(x, scale, zero_point, 0)
    assert oracle.same(backend.quantize_pack(x, scale, zero_point, 0), packed)
    codes = oracle.quantize(x, scale, zero_point, torch.full((shape[0],), 4, dtype=torch.uint8), 0)
    values = backend.unpack_dequantize(packed, scale, zero_point, 0, shape[1], torch.float16)
    assert oracle.same(values, oracle.dequantize(codes.numpy(), scale, zero_point, 0, torch.float16))


@pytest.mark.parametrize("offset", [16, 19])
def test_more_values_than_a_cache_holds(cpu: Backend, offset: int) -> None:
    """They are written past the caches, line by line; here rows begin and end within lines."""
    shape = (2, 37, 343, 347)
    scale, zero_point, _ = oracle.quantizer(shape[1])
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = torch.nn.functional.pad(codes, (0, 0, 0, 0, 0, 1)).movedim(1, -1)
    packed = packed[..., ::2] | packed[..., 1::2] << 4
    out, raw = oracle.guarded(shape, torch.float32, codes.stride(), offset)
    cpu.unpack_dequantize(packed, scale, zero_point, 1, out=out)
    assert oracle.same(out, oracle.dequantize(codes.numpy(), scale, zero_point, 1, torch.float32))
    assert bool((oracle.surroundings(out, raw) == 0x5A).all())


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    scale, zero_point, _ = oracle.quantizer(shape[1])
    packed = backend.quantize_pack(x, scale, zero_point, 1)
    assert packed.shape == (shape[0], *shape[2:], (shape[1] + 1) // 2)
    values = backend.unpack_dequantize(packed, scale, zero_point, 1, shape[1], torch.float32)
    assert values.shape == shape


# --- rows of any bit-width -----------------------------------------------------------------------------------


def rows_of_codes(bits: torch.Tensor, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (len(bits), length), generator=generator)
    return (codes % (1 << bits.long())[:, None]).to(torch.uint8)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 16, 33, 300, 2064])
def test_rows_of_codes(backend: Backend, length: int) -> None:
    bits = torch.tensor([3, 0, 1, 8, 4, 5, 2, 7, 6, 4, 0, 8], dtype=torch.uint8)
    codes = rows_of_codes(bits, length)
    offsets, total = ptq4cuda.ops.row_offsets(bits, length)
    packed = backend.pack_codes(codes, bits, offsets, total)
    assert bytes(packed.tolist()) == oracle.pack_rows(codes, bits)
    assert torch.equal(backend.unpack_codes(packed, bits, offsets, length), codes)
    for offset in (16, 19):
        out, raw = oracle.guarded((total,), torch.uint8, (1,), offset)
        assert torch.equal(backend.pack_codes(codes, bits, offsets, out=out), packed)
        assert bool((oracle.surroundings(out, raw) == 0x5A).all())
        out, raw = oracle.guarded(tuple(codes.shape), torch.uint8, codes.stride(), offset)
        assert torch.equal(backend.unpack_codes(packed, bits, offsets, out=out), codes)
        assert bool((oracle.surroundings(out, raw) == 0x5A).all())


def test_rows_may_lie_apart_and_in_any_order(backend: Backend) -> None:
    bits = torch.tensor([4, 8, 3], dtype=torch.uint8)
    codes = rows_of_codes(bits, 5)
    offsets = torch.tensor([12, 1, 7])
    packed = backend.pack_codes(codes, bits, offsets, 20)
    expected = bytearray(20)
    for row, width, offset in zip(codes, bits, offsets.tolist(), strict=True):
        data = oracle.pack_rows(row[None], width[None])
        expected[offset : offset + len(data)] = data
    assert bytes(packed.tolist()) == bytes(expected)
    assert torch.equal(backend.unpack_codes(packed, bits, offsets, 5), codes)


def test_rows_of_other_strides(backend: Backend) -> None:
    bits = torch.tensor([4, 9, 5, 9, 2, 9], dtype=torch.uint8)[::2]
    codes = rows_of_codes(bits, 11).t().contiguous().t()
    offsets, total = ptq4cuda.ops.row_offsets(bits, 11)
    packed = backend.pack_codes(codes, bits, offsets, total)
    assert bytes(packed.tolist()) == oracle.pack_rows(codes, bits)
    spread = torch.stack([packed, packed], 1)[:, 0]
    assert torch.equal(backend.unpack_codes(spread, bits, offsets, 11), codes)


@pytest.mark.parametrize("no_rows", [True, False])
def test_no_rows_and_no_bytes(backend: Backend, no_rows: bool) -> None:
    bits = torch.zeros(0 if no_rows else 4, dtype=torch.uint8)
    codes = torch.zeros((len(bits), 6), dtype=torch.uint8)
    offsets, total = ptq4cuda.ops.row_offsets(bits, 6)
    assert total == 0
    packed = backend.pack_codes(codes, bits, offsets, 0)
    assert packed.shape == (0,)
    assert torch.equal(backend.unpack_codes(packed, bits, offsets, 6), codes)


@pytest.mark.parametrize(
    ("bits", "offset", "complaint"),
    [
        (9, 0, r"bits must be 0 to 8, got 9"),
        (4, 7, "row 1 of 5 codes of 4 bits at byte 7"),
        (4, -1, "byte -1"),
        (4, 1 << 62, "row 1"),
    ],
)
def test_a_row_outside_of_the_buffer(backend: Backend, bits: int, offset: int, complaint: str) -> None:
    """The CPU raises. On a device the table cannot be read without waiting: the row has no bytes there."""
    if not backend.native:
        return
    table = torch.tensor([4, bits], dtype=torch.uint8)
    codes = torch.full((2, 5), 15, dtype=torch.uint8)
    offsets = torch.tensor([0, offset])
    packed = torch.full((8,), 255, dtype=torch.uint8)
    if backend.is_cuda_source:
        assert backend.pack_codes(codes, table, offsets, 8).tolist() == [255, 255, 15, 0, 0, 0, 0, 0]
        assert backend.unpack_codes(packed, table, offsets, 5).tolist() == [[15] * 5, [0] * 5]
    else:
        with pytest.raises(RuntimeError, match=complaint):
            backend.pack_codes(codes, table, offsets, 8)
        with pytest.raises(RuntimeError, match=complaint):
            backend.unpack_codes(packed, table, offsets, 5)
