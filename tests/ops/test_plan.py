"""What the host works out before a convolution on CUDA: multipliers that divide, and how blocks are cut."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest

from cuda_on_cpu import build
from ptq4cuda.ops.plan import ConvPlan, conv_plan

ROOT = Path(__file__).parents[2]


def test_divisors_by_multiplication_are_exact(model_cache: Path) -> None:
    program = build.program(model_cache, build.HERE / "division.cu")
    found = subprocess.run([str(program)], text=True, capture_output=True, check=True).stdout
    match = re.fullmatch(r"(\d+) compared, 0 wrong\n", found)
    assert match is not None, found
    assert int(match[1]) > 500_000


# Images of an edge at batch 64, outputs, products of an output: layers of networks without their repetitions.
RESNET50 = (
    (112, 64, 196), (56, 64, 64), (56, 64, 576), (56, 256, 64), (56, 64, 256), (56, 128, 256), (28, 128, 1152),
    (28, 512, 128), (28, 512, 256), (28, 128, 512), (28, 256, 512), (14, 256, 2304), (14, 1024, 256), (14, 1024, 512),
    (14, 256, 1024), (14, 512, 1024), (7, 512, 4608), (7, 2048, 512), (7, 2048, 1024), (7, 512, 2048),
)  # fmt: skip
MOBILENET_V2 = (
    (112, 32, 36), (112, 16, 32), (112, 96, 16), (56, 24, 96), (56, 144, 24), (28, 32, 144), (28, 192, 32),
    (14, 64, 192), (14, 384, 64), (14, 96, 384), (14, 576, 96), (7, 160, 576), (7, 960, 160), (7, 320, 960),
    (7, 1280, 320),
)  # fmt: skip
VGG16 = (
    (224, 64, 36), (224, 64, 576), (112, 128, 576), (112, 128, 1152), (56, 256, 1152), (56, 256, 2304),
    (28, 512, 2304), (28, 512, 4608), (14, 512, 4608),
)  # fmt: skip
LAYERS = {"resnet50": RESNET50, "mobilenet_v2": MOBILENET_V2, "vgg16": VGG16}


def plan_of(edge: int, outputs: int, products: int, multiprocessors: int, batch: int = 64) -> ConvPlan:
    vectors = products % 64 == 0
    return conv_plan(batch * edge**2, outputs, 1, -(-products // 64), vectors, vectors, multiprocessors)


@pytest.mark.parametrize("multiprocessors", [132, 80])
@pytest.mark.parametrize("network", LAYERS)
def test_large_layers_fill_the_last_wave(network: str, multiprocessors: int) -> None:
    for edge, outputs, products in LAYERS[network]:
        plan = plan_of(edge, outputs, products, multiprocessors)
        tiles = -(-64 * edge**2 // plan.tile[1]) * -(-outputs // plan.tile[0])
        assert plan.blocks == tiles * plan.splits
        assert plan.busiest == -(-plan.blocks // multiprocessors)
        assert plan.tile[0] == 64 or outputs > 64  # no tile of which half would do
        if 64 * edge**2 * outputs >= multiprocessors * 128 * 128:  # a whole tile for each multiprocessor
            assert plan.fill(multiprocessors) >= 0.7, (edge, outputs, products, plan)


@pytest.mark.parametrize("multiprocessors", [132, 80])
def test_small_outputs_share_out_deep_columns_only(multiprocessors: int) -> None:
    assert plan_of(7, 512, 4608, multiprocessors, batch=1).splits > 4
    assert plan_of(1, 1000, 2048, multiprocessors).splits > 1
    for layer in ((7, 512, 128), (1, 1000, 128), (14, 64, 192)):
        assert plan_of(*layer, multiprocessors, batch=1).splits == 1
    for layers in LAYERS.values():
        for edge, outputs, products in layers:
            plan = plan_of(edge, outputs, products, multiprocessors, batch=1)
            assert plan.splits == 1 or products / 64 / plan.splits >= 4
            assert plan.splits == 1 or plan.busiest <= 3


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_larger_device_is_never_slower(batch: int) -> None:
    for layers in LAYERS.values():
        for layer in layers:
            cycles = [plan_of(*layer, count, batch=batch).cycles for count in (1, 16, 80, 132, 264)]
            assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(cycles)), layer


def test_a_plan_says_what_it_is() -> None:
    assert conv_plan(3136, 512, 1, 72, True, True, 132).describe(132) == (
        "128 x 128, 2 shares: 200 blocks, at most 2 on a multiprocessor, 76% full"
    )


def test_the_plan_counts_with_the_slots_of_the_table() -> None:
    """conv_plan.h weighs tiles by what a chunk of 32 products costs, benchmarks/sass.json counts that of 16."""
    text = (ROOT / "csrc" / "conv_plan.h").read_text()
    tiles = ["2, 4", "1, 4", "1, 2", "1, 1"]
    table = json.loads((ROOT / "benchmarks" / "sass.json").read_text())
    weights = [[int(slots) for slots in array.split(",")] for array in re.findall(r"std::array\{([\d, ]+)\}", text)]
    assert len(weights) == 4
    for slots, codes in zip(weights, ("16, true", "4, true", "16, false", "4, false"), strict=True):
        counted = [2 * table["kernels"][f"conv_kernel<{tile}, {codes}>"]["slots"] for tile in tiles]
        assert slots == pytest.approx(counted, rel=0.03)
