"""Compares native kernels with the reference, for a sanitizer to watch.

Arguments: a library of the execution model or of the CPU kernels (built with sanitizers, see test_model.py), or
"cuda" (compute-sanitizer on a GPU, see benchmarks/gpu_check.sh), where fewer shapes and dtypes must do; then
operators, if not all of them.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given, settings
from torch import Tensor

from execute import test_regions
from ops import oracle, test_any_arguments
from ops.backends import Backend
from ptq4cuda.bench import architectures
from ptq4cuda.ops import panels, reference, registration, row_offsets
from ptq4cuda.ops.nibbles import Nibbles

EXAMPLES = int(os.environ.get("PTQ4CUDA_EXAMPLES", "300"))  # of arguments at random

SHAPES = ((2, 5, 7, 6), (1, 3, 17, 19), (3, 16, 4, 4), (2, 130, 3, 3), (4, 33), (1, 1, 1, 1), (2, 3, 65, 64))

CASES = (
    (torch.float32, "contiguous"),
    (torch.float32, "misaligned"),
    (torch.float32, "channels_last"),
    (torch.float16, "misaligned"),
    (torch.float16, "channels_last"),
    (torch.bfloat16, "contiguous"),
    (torch.bfloat16, "strided"),
)
SHAPES_ON_GPU = SHAPES[:5]
CASES_ON_GPU = ((torch.float32, "misaligned"), (torch.float16, "channels_last"))

# Input and output channels, kernel, groups, width: every way to fetch codes, tiles of every size, depthwise. The
# model runs them on a small device and on one so large that they share out their columns, if these are enough. On a
# GPU there are further ones, so wide that its multiprocessors have large tiles.
CONVOLUTIONS = (
    (16, 64, 1, 1, 50),
    (20, 24, 3, 1, 20),
    (3, 7, 3, 1, 9),
    (6, 10, 3, 2, 9),
    (64, 20, 3, 1, 9),
    (40, 40, 3, 40, 9),
    (9, 9, 3, 9, 11),
)

_alive: list[torch.library.Library] = []  # a namespace lives as long as its library


def check(native: Any, x: Tensor, wanted: set[str]) -> int:
    """Compare operators on x with the reference, and return how many calls that were."""
    calls = 0

    def compare(op: str, *arguments: Any, tolerance: float = 0.0) -> None:
        nonlocal calls
        if op in wanted:
            found, expected = getattr(native, op)(*arguments), getattr(reference, op)(*arguments)
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
            calls += 1

    for axis in (0, 1):
        scale, zero_point, bits = oracle.quantizer(x.shape[axis])
        for op in ("fake_quantize", "quantize"):
            compare(op, x, scale, zero_point, bits, axis)
        compare("quantize_pack", x, scale, zero_point, axis)
        unpacking = reference.quantize_pack(x, scale, zero_point, axis), scale, zero_point, axis
        compare("unpack_dequantize", *unpacking, x.shape[1], x.dtype)
        if "unpack_dequantize" in wanted:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            native.unpack_dequantize.out(*unpacking, out=out)
            assert oracle.same(out, reference.unpack_dequantize(*unpacking, x.shape[1], x.dtype))
            calls += 1
        for bins in (1, 30, 2048, 4096):
            compare("channel_histogram", x, -4 * scale, 4 * scale, bins, axis)
    finite = x.nan_to_num(1, 2, -2).clamp(-1e3, 1e3)
    for centre in (None, torch.ones(x.shape[1], dtype=torch.float64)):
        compare("channel_statistics", finite, 1, centre, tolerance=1e-10)
    return calls


def check_pooling(native: Any, wanted: set[str]) -> int:
    """Compare poolings with the reference, by 16 codes, by words and by bytes, and return how many that were."""
    sizes = (32, 12, 5) if "max_pool_codes" in wanted else ()
    for channels in sizes:
        x = torch.randint(0, 256, (2, channels, 9, 7), dtype=torch.uint8)
        x = x.contiguous(memory_format=torch.channels_last)
        window = (3, 2), (2, 2), (1, 1), (1, 2), True
        assert oracle.same(native.max_pool_codes(x, *window), reference.max_pool_codes(x, *window))
    return len(sizes)


def check_rows(native: Any) -> Iterator[bool]:
    """Compare the packing of rows with the reference, call by call."""
    for length in (1, 7, 8, 30):
        bits = torch.tensor([3, 0, 8, 4, 1, 7], dtype=torch.uint8)
        codes = (torch.arange(6 * length).view(6, length) % (1 << bits.long())[:, None]).to(torch.uint8)
        offsets, total = row_offsets(bits, length)
        packed = native.pack_codes(codes, bits, offsets, total)
        yield oracle.same(packed, reference.pack_codes(codes, bits, offsets, total))
        yield oracle.same(native.unpack_codes(packed, bits, offsets, length), codes)


def check_convolution(native: Any, channels: int, outputs: int, kernel: int, groups: int, pixels: int) -> int:
    """Compare a padded convolution of all its variants with the reference, and return how many calls that were."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randint(0, 256, (2, channels, 3, pixels), dtype=torch.uint8, generator=generator)
    shape = (outputs, kernel, kernel, channels // groups)
    weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    scale, zero_point, bits = oracle.quantizer(outputs)
    zeros = torch.randint(-999, 999, (kernel * kernel, outputs), dtype=torch.int32, generator=generator)
    geometry = (kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), groups
    residual = torch.randint(0, 256, (2, outputs, 3, pixels), dtype=torch.uint8, generator=generator)
    packing = Nibbles.of(bits)
    inputs = [(x, panels.weight_panels(weight, groups), 0)]
    if groups == 1:
        source = Nibbles.of(torch.arange(channels, dtype=torch.uint8) % 9)
        inputs.append((source.pack(x), source.weight_panels(weight), source.low_bytes))
    layouts = [None, *([packing] if panels.whole_octets(outputs, channels // groups, groups) else [])]
    both = (scale, zero_point, bits), (scale * 2, zero_point, bits)
    outs = [
        oracle.outputs(values=torch.float16),
        *(oracle.outputs(*both, layouts=(packed, packed)) for packed in layouts),
    ]
    calls = 0
    for (codes, ordered, low_bytes), added, out in itertools.product(
        inputs, ((None, None, None), (residual, scale, zero_point)), outs
    ):
        numbers = (low_bytes, panels.NIBBLES, 0.0, 9.0)
        arguments = (codes, ordered, zeros, scale / 99, scale, *geometry, *numbers, *added, *out.values())
        expected = reference.conv2d_integer(*arguments)
        found = native.conv2d_integer(*arguments)
        assert all(oracle.same(*pair) for pair in zip(found, expected, strict=True))
        calls += 1
    return calls


def wide_convolutions() -> Iterator[tuple[int, int, int, int, int]]:
    """Convolutions of about 70, 140 and 270 output pixels a multiprocessor, of 2 images of 3 rows."""
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    for pixels in (70, 140, 270):
        yield 16, 24, 1, 1, multiprocessors * pixels // 6


def check_any_arguments(native: Backend) -> int:
    """Compare EXAMPLES calls with the reference, some with wrong arguments, empty tensors or absurd geometry."""
    calls = 0
    specification = Backend("reference", define("ptq4cuda_reference"))

    @settings(max_examples=EXAMPLES, deadline=None, derandomize="PTQ4CUDA_EXAMPLES" not in os.environ, database=None)
    @given(call=test_any_arguments.calls())
    def run(call: tuple[str, tuple[Any, ...]]) -> None:
        nonlocal calls
        test_any_arguments.check(*call, [specification, native])
        calls += 1

    run()
    return calls


def check_layers() -> int:
    """Execute a network in integers, and codes of run_layers that were changed at random; return how many."""
    pictures = architectures.images(5, 16)
    network = test_regions.everything(pictures)
    with torch.no_grad():
        assert test_regions.same(test_regions.one_by_one(network, pictures), network(pictures))
    test_regions.any_codes(network, pictures, EXAMPLES, seed=EXAMPLES)
    return EXAMPLES + 1


def define(namespace: str) -> str:
    library = registration.define(namespace)
    registration.implement(library, namespace)
    _alive.append(library)
    return namespace


def operators(library: str) -> Backend:
    """The operators of a library, or those of the GPU for "cuda"."""
    if library == "cuda":
        return Backend("cuda", "ptq4cuda", "cuda")
    name, namespace = ("cpu", "ptq4cuda") if is_of_cpu(library) else ("cuda_on_cpu", define("ptq4cuda_on_cpu"))
    torch.ops.load_library(library)
    return Backend(name, namespace)


def is_of_cpu(library: str) -> bool:
    return library.endswith("cpu.so")


def main(library: str, *operators_wanted: str) -> None:
    native, on_gpu = operators(library), library == "cuda"
    wanted = set(operators_wanted) or {schema.split("(")[0] for schema in registration.SCHEMAS}
    calls = 0
    for dtype, layout in CASES_ON_GPU if on_gpu else CASES:
        for shape in SHAPES_ON_GPU if on_gpu else SHAPES:
            if layout in oracle.layouts(shape):
                calls += check(native, oracle.make(shape, dtype, layout), wanted)
    if {"pack_codes", "unpack_codes"} & wanted:
        same = list(check_rows(native))
        assert all(same)
        calls += len(same)
    calls += check_pooling(native, wanted)
    for device in (None,) if on_gpu or is_of_cpu(library) else (0, 31):
        if device is not None:
            ctypes.CDLL(library).cuda_on_cpu_use_device(device)
        convolutions = (*CONVOLUTIONS, *(wide_convolutions() if on_gpu else ()))
        for convolution in convolutions if "conv2d_integer" in wanted else ():
            calls += check_convolution(native, *convolution)
    if not on_gpu:
        calls += check_any_arguments(native)
    if is_of_cpu(library):
        calls += check_layers()
    print(f"{calls} operator calls, all as the reference")


if __name__ == "__main__":
    main(*sys.argv[1:])
