"""The operators as citizens of torch: schemas, fake kernels, gradients, torch.compile, dispatch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import ptq4cuda.ops
from ops import oracle
from ops.backends import NATIVE, Backend, same_storage_on
from ptq4cuda.ops import checks, panels, registration, schemas
from ptq4cuda.ops.nibbles import Nibbles

POOLING = (2, 3), (1, 2), (1, 1), (2, 1), True


def samples(layout: str, dtype: torch.dtype, shape: tuple[int, ...] = (2, 5, 3, 4)) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, by its name with overload; a trailing dict holds keyword arguments."""
    x = oracle.arrange(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), layout)
    scale, zero_point, bits = oracle.quantizer(shape[1])
    packed = torch.randint(0, 256, (shape[0], *shape[2:], (shape[1] + 1) // 2), dtype=torch.uint8)
    codes = torch.randint(0, 4, (3, 9), dtype=torch.uint8)
    width = torch.tensor([2, 5, 8], dtype=torch.uint8)
    offsets, total = ptq4cuda.ops.row_offsets(width, 9)
    return {
        "channel_statistics": (x, 1),
        "channel_histogram": (x, zero_point.float() - 9, scale + 9, 16, 1),
        "fake_quantize": (x, scale, zero_point, bits, 1),
        "fake_quantize.out": (x, scale, zero_point, bits, 1, {"out": torch.empty_like(x)}),
        "quantize": (x, scale, zero_point, bits, 1),
        "quantize.out": (x, scale, zero_point, bits, 1, {"out": torch.empty_like(x, dtype=torch.uint8)}),
        "quantize_pack": (x, scale, zero_point, 1),
        "quantize_pack.out": (x, scale, zero_point, 1, {"out": torch.empty_like(packed)}),
        "unpack_dequantize": (packed, scale, zero_point, 1, shape[1], dtype),
        "unpack_dequantize.out": (packed, scale, zero_point, 1, {"out": torch.empty(shape, dtype=dtype)}),
        "pack_codes": (codes, width, offsets, total),
        "pack_codes.out": (codes, width, offsets, {"out": torch.empty(total, dtype=torch.uint8)}),
        "unpack_codes.out": (torch.randint(0, 256, (total,), dtype=torch.uint8), width, offsets, {"out": codes}),
        "unpack_codes": (torch.randint(0, 256, (total,), dtype=torch.uint8), width, offsets, 9),
        "max_pool_codes": (oracle.arrange(torch.randint(0, 256, shape, dtype=torch.uint8), layout), *POOLING),
        "conv2d_integer": convolution(x, layout, dtype),
    }


def convolution(x: Tensor, layout: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """A 3x3 convolution to 6 channels,to values or, from channels_last, to codes and packed codes."""
    codes = oracle.arrange(torch.randint(0, 16, x.shape, dtype=torch.uint8), layout)
    weight = panels.weight_panels(torch.randint(-9, 9, (6, 3, 3, x.shape[1]), dtype=torch.int8), 1)
    zeros = torch.randint(-9, 9, (9, 6), dtype=torch.int32)
    scale, zero_point, bits = oracle.quantizer(6)
    geometry = ((3, 3), (2, 1), (1, 2), (1, 1), 1, 0)
    rows = (x.shape[2] - 1) // 2 + 1
    residual = torch.randint(0, 16, (x.shape[0], 6, rows, x.shape[3] + 2), dtype=torch.uint8)
    packing = Nibbles.of(bits)
    outputs = oracle.outputs(values=dtype)
    if layout == "channels_last":
        both = (scale, zero_point, bits), (scale * 2, zero_point, bits)
        outputs = oracle.outputs(*both, layouts=(None, packing))
    finish = 8, 0.0, 6.0, residual, scale, zero_point
    return codes, weight, zeros, scale, scale, *geometry, *finish, *outputs.values()


OPERATORS = list(samples("contiguous", torch.float32))


def overload(namespace: str, name: str) -> Any:
    packet, _, variant = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), variant or "default")


_alive: list[torch.library.Library] = []  # torch goes on looking for what a namespace once had


def test_exported_programs_hold_no_dtype_as_such() -> None:
    assert not [schema for schema in (*schemas.SCHEMAS, *schemas.CPU_SCHEMAS) if "ScalarType" in schema]
    library = torch.library.Library("ptq4cuda_numbers", "DEF")
    _alive.append(library)
    library.define("number_of(Tensor x, int dtype) -> int")
    library.impl("number_of", lambda x, number: number, "CompositeExplicitAutograd")
    numbers = [torch.ops.ptq4cuda_numbers.number_of(torch.empty(0), dtype) for dtype in checks.DTYPES]
    assert numbers == [checks.number_of(dtype) for dtype in checks.DTYPES]  # PyTorch's are ours


def test_every_schema_is_sampled() -> None:
    assert sorted(schema.split("(")[0] for schema in registration.SCHEMAS) == sorted(OPERATORS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("which", ["reference", *NATIVE])
def test_opcheck(request: pytest.FixtureRequest, which: str, name: str, layout: str) -> None:
    backend: Backend = request.getfixturevalue(which)
    for dtype in oracle.DTYPES if layout == "channels_last" else (torch.float32,):
        arguments = samples(layout, dtype)[name]
        named = arguments[-1] if isinstance(arguments[-1], dict) else {}
        arguments = arguments[: len(arguments) - bool(named)]
        if named and layout != "contiguous" and "unpack" not in name and "pack" not in name:
            named = {"out": torch.empty_like(arguments[0], dtype=named["out"].dtype)}
        there, named = tree_map_only(Tensor, lambda t: same_storage_on(backend.device, t), (arguments, named))
        torch.library.opcheck(overload(backend.namespace, name), there, named)


def test_opcheck_with_a_gradient(cpu: Backend, cuda_on_cpu: Backend) -> None:
    for backend in (cpu, cuda_on_cpu):
        x, *rest = samples("channels_last", torch.float32)["fake_quantize"]
        torch.library.opcheck(overload(backend.namespace, "fake_quantize"), (x.requires_grad_(), *rest))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("which", NATIVE)
def test_a_native_kernel_is_what_runs(request: pytest.FixtureRequest, which: str, name: str) -> None:
    backend: Backend = request.getfixturevalue(which)
    kernels = torch._C._dispatch_dump(f"{backend.namespace}::{name}")
    key = "CUDA:" if backend.device == "cuda" else "CPU:"
    found = [line for line in kernels.splitlines() if line.startswith(key)]
    source = "/csrc/cuda/" if backend.is_cuda_source else "csrc/cpu/"
    assert len(found) == 1, kernels
    assert source in found[0]


@pytest.mark.parametrize("name", [name for name in OPERATORS if not name.endswith(".out")])
def test_meta_tensors_have_the_same_form(cpu: Backend, name: str) -> None:
    for layout in ("contiguous", "channels_last", "permuted", "strided"):
        for dtype in oracle.DTYPES:
            arguments = samples(layout, dtype)[name]
            meta = tree_map_only(Tensor, lambda a: a.to("meta"), arguments)
            expected = tree_leaves(overload("ptq4cuda", name)(*arguments))
            found = tree_leaves(overload("ptq4cuda", name)(*meta))
            for a, b in zip(found, expected, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert a.stride() == b.stride(), layout


# --- torch.compile -------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A convolution between fake-quantized and packed activations, as a quantized network has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(6, 7, 3)
        # Few binary digits everywhere: the convolution is exact in float32, whatever order it sums in.
        self.conv.weight.data = torch.randint(-8, 9, self.conv.weight.shape) / 16
        self.conv.bias.data = torch.randint(-8, 9, (7,)) / 16
        scale, zero_point, bits = oracle.quantizer(6)
        self.register_buffer("scale", (scale * 8).ceil() / 8)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bits", bits)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = ptq4cuda.ops.fake_quantize(x, self.scale, self.zero_point, self.bits)
        y = self.conv(x).relu()
        packed = ptq4cuda.ops.quantize_pack(y, 0.1, 3)
        z = ptq4cuda.ops.unpack_dequantize(packed, 0.1, 3, 7)
        codes = ptq4cuda.ops.quantize(z, 0.1, 3, 4)
        return z * 2, packed, codes, ptq4cuda.ops.channel_statistics(y)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_with_a_dynamic_batch(compiler: str) -> None:
    torch.compiler.reset()
    block = Block().eval()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counting)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in (3, 5, 2):
            x = torch.randn(batch, 6, 8, 9, generator=torch.Generator().manual_seed(batch))
            *found, statistics = compiled(x)
            *expected, expected_statistics = block(x)
            assert all(map(oracle.same, found, expected))
            torch.testing.assert_close(statistics, expected_statistics, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


def test_compiled_training_has_the_straight_through_gradient() -> None:
    torch.compiler.reset()
    block = Block()
    x = torch.randn(2, 6, 8, 9, generator=torch.Generator().manual_seed(0))

    def loss(x: Tensor) -> Tensor:
        return block.conv(ptq4cuda.ops.fake_quantize(x, block.scale, block.zero_point, block.bits)).square().sum()

    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert eager.grad is not None
    assert eager.grad.abs().sum() > 0
    torch.testing.assert_close(compiled.grad, eager.grad)


# --- devices -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_graphs_capture_every_operator() -> None:
    for name, arguments in samples("contiguous", torch.float32, (4, 6, 32, 32)).items():
        named = arguments[-1] if isinstance(arguments[-1], dict) else {}
        there = tree_map_only(Tensor, Tensor.cuda, arguments[: len(arguments) - bool(named)])
        named = {key: value.cuda() for key, value in named.items()}
        op = overload("ptq4cuda", name)
        expected = op(*there, **named)
        expected = [named["out"].clone()] if named else tree_leaves(expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = op(*there, **named)
        found = [named["out"]] if named else tree_leaves(found)
        for output in found:
            output.zero_()
        graph.replay()
        assert all(oracle.same(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True)), name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_device_that_is_not_the_current_one(device: str = "cuda:1") -> None:
    for name, arguments in samples("channels_last", torch.float32).items():
        if name.endswith(".out"):
            continue
        there = tree_map_only(Tensor, lambda a: a.to(device), arguments)
        found, expected = (tree_leaves(overload("ptq4cuda", name)(*a)) for a in (there, arguments))
        assert all(tensor.device == torch.device(device) for tensor in found)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-10 if name == "channel_statistics" else 0, atol=0)
