"""tools/conv_estimate.py on the committed table of machine code."""

import re

import conv_estimate


def test_resnet50_by_count() -> None:
    lines = conv_estimate.table(64, 0.3).splitlines()
    layers = list(conv_estimate.resnet50())
    assert sum(layer.count for layer in layers) == 54
    products = sum(y.count * y.edge**2 * y.outputs * y.channels * y.kernel**2 for y in layers)
    assert 4.0e9 < products < 4.2e9  # of an image
    assert len(lines) == len(layers) + 3
    match = re.search(r"([\d.]+) ms", lines[-1])
    assert match is not None
    assert 1.0 < float(match[1]) < 2.6


def test_the_slower_bound_decides_and_codes_of_few_bits_cost_less() -> None:
    tiles = [(strips, warps) for strips in (1, 2) for warps in (1, 2, 4)]
    kernels = {
        f"conv_kernel<{strips}, {warps}, 16, true>": {"slots": 70.0, "prologue": 900.0} for strips, warps in tiles
    }
    kernels["finish_kernel<Packed, None, None>"] = {"finish": 10.0}
    layer = conv_estimate.Layer("conv", 256, 256, 28, 3)
    wide, narrow = (conv_estimate.estimate(layer, 64, high, kernels) for high in (0.5, 0.0))
    assert wide.seconds == max(wide.issue, wide.memory)
    assert narrow.issue < wide.issue
    assert narrow.memory < wide.memory
