"""Regions: what is executed at a stretch is what its steps compute one by one, whoever calls, with whatever."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, _native, quantize
from ptq4cuda.bench import architectures
from ptq4cuda.execute import program as steps
from ptq4cuda.execute import regions
from ptq4cuda.execute.regions import Region
from ptq4cuda.nn import QuantModule

FAST = replace(QuantConfig.fast(), activation_granularity="per_tensor")  # so that features are codes of images
pytestmark = pytest.mark.skipif(not _native.cpu_loaded, reason="there is no native library")


class Everything(nn.Module):
    """All that a region can hold: sums, two outputs, pooling, concatenation, groups, flattening, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.wide, self.narrow = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.depthwise, self.grouped = nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.Conv2d(16, 8, 3, 1, 1, groups=2)
        self.last, self.fc, self.out = nn.Conv2d(24, 5, 3, padding=1), nn.Linear(5 * 16, 20), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        y = F.relu6(self.depthwise(F.leaky_relu(self.wide(x), 0.1)))
        x = self.narrow(y) + x
        x = F.relu(self.last(torch.cat((x, self.grouped(x)), 1)))
        return self.out(F.relu(self.fc(x.flatten(1)))), y


class Bottlenecks(nn.Module):
    """Convolutions that read what the one before has just made, with kernels far apart and with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.ModuleList(nn.Conv2d(8, 24, 1) for _ in range(4))
        self.depthwise = nn.ModuleList(
            nn.Conv2d(24, 24, kernel, stride, padding, dilation, groups=24)
            for kernel, stride, padding, dilation in ((5, 2, 3, 2), (3, 1, 1, 1), (1, 2, 2, 1), (3, 1, 0, 1))
        )
        self.narrow = nn.ModuleList(nn.Conv2d(24, 8, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for wide, depthwise, narrow in zip(self.wide, self.depthwise, self.narrow, strict=True):
            y = narrow(F.relu(depthwise(F.relu(wide(x)))))
            x = x + y if x.shape == y.shape else y
        return x


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv1d(3, 16, 5, 2), nn.Conv1d(16, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(F.max_pool1d(F.relu(self.first(x)), 2)).mean(2))


class Pyramid(nn.Module):
    """Large images of few channels, then small ones of many."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.first, self.second = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.shrink, self.deep, self.fc = nn.Conv2d(48, 256, 3, 4), nn.Conv2d(256, 256, 3), nn.Linear(1024, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        y = F.max_pool2d(F.relu(self.second(F.relu(self.first(x))) + x), 3, 2, 1)
        z = F.relu(self.shrink(torch.cat((y, self.side(y)), 1)))
        return self.fc(F.max_pool2d(F.relu(self.deep(z)), 3).flatten(1)), y


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return architectures.images(5, 16)


def everything(pictures: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return quantize(Everything().eval(), [pictures], FAST, progress=False)


@pytest.fixture(scope="module")
def network(pictures: Tensor) -> nn.Module:
    return everything(pictures)


def regions_of(network: nn.Module) -> list[Region]:
    return [module for module in network.modules() if isinstance(module, Region)]


def same(expected: object, found: object) -> bool:
    a, b = torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found)
    return len(a) == len(b) and all(
        (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()) and torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def one_by_one(network: nn.Module, *inputs: Tensor) -> object:
    """Call a network whose regions are watched."""
    handles = [m.register_forward_hook(lambda *_: None) for r in regions_of(network) for m in r.engines]
    try:
        return network(*inputs)
    finally:
        for handle in handles:
            handle.remove()


def test_all_in_integers_is_one_region(network: nn.Module, pictures: Tensor) -> None:
    (region,) = regions_of(network)
    kinds = {type(call.step) for call in region.calls}
    assert kinds == {steps.Quantize, steps.Layer, steps.MaxPool, steps.Concatenate, steps.Reshape}
    assert {call.step for call in region.calls} == set(ptq4cuda.program(network)) - {
        step for step in ptq4cuda.program(network) if isinstance(step, (steps.Input, steps.Float))
    }


def test_many_images_are_executed_some_at_a_time(network: nn.Module, pictures: Tensor) -> None:
    """So many that their values would take more than memory that is kept."""
    (region,) = regions_of(network)
    copies = 4001
    few, many = region(pictures), region(pictures.repeat(copies, 1, 1, 1))
    assert all(torch.equal(y, x.repeat(copies, *[1] * (x.dim() - 1))) for x, y in zip(few, many, strict=True))
    of_few, of_many = (
        torch.ops.ptq4cuda.memory_of_layers([x], region.constants, region._numbers, region._dtype)
        for x in (pictures, pictures.repeat(copies, 1, 1, 1))
    )
    assert of_few < of_many <= 28 << 20 < of_few * copies


def test_chains_of_many_images() -> None:
    """Chains are the same whether images are executed together or some at a time."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, 1, 1), *(m for _ in range(4) for m in (nn.ReLU(), nn.Conv2d(64, 64, 1)))]
    network = quantize(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 1024, 2)).eval(),
        [torch.randn(2, 3, 32, 32)],
        FAST,
        progress=False,
    )
    (region,) = regions_of(network)
    x = torch.randn(3, 3, 32, 32).repeat(200, 1, 1, 1)
    memory = torch.ops.ptq4cuda.memory_of_layers([x], region.constants, region._numbers, region._dtype)
    assert memory <= 28 << 20 and same(one_by_one(network, x), network(x))


def test_the_front_of_many_images() -> None:
    """Where products take less time than memory, steps of large images are executed for few of them at a time."""
    torch.manual_seed(0)
    network = quantize(Pyramid().eval(), [torch.randn(2, 3, 64, 64)], FAST, progress=False)
    (region,) = regions_of(network)
    x, before = torch.randn(18, 3, 64, 64), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for images in (x, x[:17], x.contiguous(memory_format=torch.channels_last), x):
                assert same(one_by_one(network, images), network(images))
            few, many = (
                torch.ops.ptq4cuda.memory_of_layers([images], region.constants, region._numbers, region._dtype)
                for images in (x[:threads], x)
            )
            share = 0.8 if _native.build_info["simd_level"] == "amx" else 1.01
            assert many * threads < few * len(x) * share
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_at_a_stretch_as_one_by_one(network: nn.Module, pictures: Tensor, batch: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in (pictures[:batch], pictures[:batch].contiguous(memory_format=torch.channels_last)):
            assert same(one_by_one(network, x), network(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chains_as_one_by_one(threads: int) -> None:
    torch.manual_seed(0)
    network = quantize(Bottlenecks().eval(), [architectures.images(4, 40)], FAST, progress=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch, height, width in ((1, 40, 40), (3, 31, 57), (2, 73, 12), (16, 12, 12)):
            x = torch.randn(batch, 3, height, width)
            assert same(one_by_one(network, x), network(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(network: nn.Module, pictures: Tensor, dtype: torch.dtype) -> None:
    half = copy.deepcopy(network).to(dtype)
    assert half(pictures.to(dtype))[1].dtype == dtype
    assert same(one_by_one(half, pictures.to(dtype)), half(pictures.to(dtype)))


@pytest.mark.parametrize("strided", [False, True])
def test_sequences(strided: bool) -> None:
    torch.manual_seed(0)
    x = architectures.waves(6, 40) if hasattr(architectures, "waves") else torch.randn(6, 3, 40)
    x = x[:, :1].repeat(1, 3, 1) if x.shape[1] != 3 else x
    network = quantize(Sequence().eval(), [x], FAST, progress=False)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x
    assert all(region._numbers for region in regions_of(network))
    assert same(one_by_one(network, x), network(x))


def test_other_sizes_of_images(network: nn.Module) -> None:
    torch.manual_seed(0)
    convolutions = quantize(
        nn.Sequential(Everything().stem, nn.ReLU(), Everything().wide).eval(),
        [architectures.images(4, 16)],
        FAST,
        progress=False,
    )
    for height, width in ((16, 16), (7, 33), (1, 1), (40, 3)):
        x = torch.randn(2, 3, height, width)
        assert same(one_by_one(convolutions, x), convolutions(x))


def test_a_hook_sees_the_codes_of_its_layer(network: nn.Module, pictures: Tensor) -> None:
    seen: list[torch.dtype] = []
    layer = network.get_submodule("narrow")
    assert isinstance(layer, QuantModule)
    expected = network(pictures)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert same(expected, network(pictures)) and seen == [torch.uint8]
    handle.remove()
    assert same(expected, network(pictures)) and len(seen) == 1


def test_copies_and_pickles(network: nn.Module, pictures: Tensor) -> None:
    expected = network(pictures)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        (region,) = regions_of(other)
        weights = {id(m.weight) for m in other.modules() if isinstance(m, regions.IntegerConv2d)}
        assert weights <= {id(t) for t in region.constants}  # held once
        assert same(expected, other(pictures))


def test_many_threads_call_one_network(network: nn.Module, pictures: Tensor) -> None:
    expected = [network(pictures[: n + 1]) for n in range(5)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: network(pictures[: i % 5 + 1]), range(60)))
    assert all(same(expected[i % 5], y) for i, y in enumerate(found))


def test_what_is_kept_suits_its_inputs(network: nn.Module) -> None:
    """Other numbers of images and of threads, in other formats and places, in turns, and more than are kept."""
    (region,) = regions_of(copy.deepcopy(network))
    run, before = torch.ops.ptq4cuda.run_layers, torch.get_num_threads()
    try:
        for batch in (1, 2, 1, 3, 2, *range(1, 12), 1):
            torch.set_num_threads(1 + batch % 2)
            x = architectures.images(batch, 16)
            for given in (x, x.contiguous(memory_format=torch.channels_last), x.mT, x + 0):
                expected = run.default([given], region.constants, region._numbers, region._dtype)
                assert same(expected, region(given))
    finally:
        torch.set_num_threads(before)
    with pytest.raises(RuntimeError, match="run_layers: input 0 has the shape"):
        run.kept([torch.zeros(3)], region._kept.number)


def test_layers_are_kept_as_long_as_their_region(network: nn.Module, pictures: Tensor) -> None:
    (region,) = regions_of(copy.deepcopy(network))
    expected = region(pictures)
    copied, pickled = copy.deepcopy(region), pickle.loads(pickle.dumps(region))
    number = region._kept.number
    del region
    gc.collect()
    with pytest.raises(RuntimeError, match=f"run_layers: no layers are kept by the number {number}"):
        torch.ops.ptq4cuda.run_layers.kept([pictures], number)
    assert same(expected, copied(pictures))
    assert same(expected, pickled(pictures))
    assert len({number, copied._kept.number, pickled._kept.number}) == 3


def test_export_and_compile(network: nn.Module, pictures: Tensor) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(network, (pictures,), dynamic_shapes={"x": {0: batch}})
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("run_layers" in name for name in called) == 1
    assert not any("conv2d_integer" in name for name in called)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for x in (pictures, pictures[:2]):
        assert same(network(x), loaded(x))
        assert same(network(x), compiled(x))


def test_traced_and_not_scripted(network: nn.Module, pictures: Tensor) -> None:
    traced = torch.jit.trace(network, (pictures,))
    assert "Tensor[] constants" in str({n.schema() for n in traced.inlined_graph.nodes() if "run_layers" in n.kind()})
    assert same(network(pictures[:3]), traced(pictures[:3]))
    with pytest.raises(TypeError, match=r"^torch\.jit\.script does not take quantized layers: use torch\.export"):
        torch.jit.script(network)


SCRIPT = """
import pickle, sys
region = pickle.load(open(sys.argv[1], "rb"))
region._prepare()
pickle.dump((region._numbers, region.constants), open(sys.argv[2], "wb"))
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_what_another_processor_prepared_is_laid_out_anew(
    network: nn.Module, pictures: Tensor, level: str, printed_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    (region,) = regions_of(network)
    (tmp_path / "region").write_bytes(pickle.dumps(region))
    printed_at(level, SCRIPT, tmp_path / "region", tmp_path / "prepared")
    numbers, constants = pickle.loads((tmp_path / "prepared").read_bytes())
    assert numbers == region._numbers
    run = torch.ops.ptq4cuda.run_layers
    assert same(
        run([pictures], region.constants, region._numbers, torch.float32),
        run([pictures], constants, numbers, torch.float32),
    )


def any_codes(network: nn.Module, pictures: Tensor, count: int, seed: int = 0) -> int:
    """Execute so many codes that were changed at random, and return how many were refused: memory must stay whole."""
    (region,) = regions_of(network)
    assert region._numbers is not None
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    refused = 0
    for _ in range(count):
        code, constants = list(region._numbers), list(region.constants)
        for _ in range(1 + draw(2)):
            kind = draw(4)
            if kind == 0:
                del code[draw(len(code)) :]
            elif kind == 1:
                code[draw(len(code))] = draw(20) - 2
            elif kind == 2:
                i, j = draw(len(constants)), draw(len(constants))
                constants[i], constants[j] = constants[j], constants[i]
            else:
                i = draw(len(constants))
                constants[i] = constants[i].flatten()[: draw(constants[i].numel() + 1)]
            if not code:
                break
        try:
            torch.ops.ptq4cuda.run_layers([pictures[:1]], constants, code, torch.float32)
        except RuntimeError as error:
            refused += 1
            assert "run_layers" in str(error) or "must" in str(error)
    return refused


def test_any_code_is_refused_or_executed(network: nn.Module, pictures: Tensor) -> None:
    assert 300 < any_codes(network, pictures, 1500) < 1500
