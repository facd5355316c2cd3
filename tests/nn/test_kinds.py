"""What a kind of layer is: rows, windows and the 2-d convolution of each give what the float layer computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda import QuantConv1d, QuantConv2d, QuantConvTranspose1d, QuantConvTranspose2d, QuantLinear
from ptq4cuda.nn import SPECS, QuantModule, spec_of
from ptq4cuda.nn.spec import Geometry
from ptq4cuda.quantizer import QuantParams

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (2, 5, 6)),
    "1d": (nn.Conv1d(6, 8, 5, 2, 1, 2, 2), (2, 6, 17)),
    "1d, reflected": (nn.Conv1d(6, 8, 3, padding=2, padding_mode="reflect"), (2, 6, 9)),
    "1d, same": (nn.Conv1d(6, 8, 3, padding="same", dilation=2), (2, 6, 9)),
    "2d": (nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 2), (1, 2), 2), (2, 6, 9, 7)),
    "2d, circular": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 5, 7)),
    "up 1d": (nn.ConvTranspose1d(6, 8, 5, 3, 2, 1, 2), (2, 6, 7)),
    "up 2d": (nn.ConvTranspose2d(6, 8, (4, 3), (2, 3), (1, 4), (1, 2), 2), (2, 6, 5, 7)),
    "up 2d, dilated": (nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, dilation=3), (2, 6, 5, 7)),
    "up 2d, depthwise": (nn.ConvTranspose2d(6, 6, 3, 2, 1, 1, groups=6), (2, 6, 5, 7)),
}
CLASSES = (QuantConv1d, QuantConv2d, QuantConvTranspose1d, QuantConvTranspose2d, QuantLinear)


def quantized(layer: nn.Module, x: Tensor, bits: int = 8) -> Any:
    spec = spec_of(layer)
    assert spec is not None and spec.quantized is not None
    others = [d for d in range(x.dim()) if d != spec.axis % x.dim()]
    params = QuantParams.from_range(
        x.amin(others), x.amax(others), torch.tensor([bits], dtype=torch.uint8), axis=spec.axis
    )
    return spec.quantized.from_float(layer, params, weight_bits=bits)


def sample(name: str) -> tuple[nn.Module, Tensor, QuantModule]:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return layer, x, quantized(layer, x)


def test_every_quantized_class_has_a_kind() -> None:
    assert {spec.quantized for spec in SPECS if spec.quantized is not None} == set(CLASSES)
    assert all(cls.spec.quantized is cls for cls in CLASSES)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_windows_times_rows_is_the_layer(name: str) -> None:
    """What the solvers see of a layer is what it computes."""
    layer, x, module = sample(name)
    spec, groups = module.spec, module.groups
    rows = spec.rows(layer).movedim(1, -1)  # [O, *kernel, C / G]
    windows = spec.windows(module, x).unflatten(-1, (groups, -1)).movedim(-2, 0)  # [G, ..., *kernel, C / G]
    kernel = rows.dim() - 1
    products = torch.einsum(
        "gnd,god->ngo", windows.flatten(-kernel).flatten(1, -2), rows.flatten(1).unflatten(0, (groups, -1))
    )
    y = layer(x)
    expected = y.movedim(spec.axis, -1).reshape(-1, len(rows))
    torch.testing.assert_close(products.flatten(1) + layer.bias, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if "reflected" not in name and "circular" not in name])
@torch.no_grad()
def test_a_layer_is_a_2d_convolution(name: str) -> None:
    layer, x, module = sample(name)
    assert_is_2d_convolution(layer, x, module)


def assert_is_2d_convolution(layer: nn.Module, x: Tensor, module: QuantModule) -> None:
    spec, g = module.spec, module.spec.geometry(module) or Geometry()
    rows = spec.rows(layer).movedim(1, -1)
    weight = spec.to_2d(module, rows)
    assert torch.equal(spec.from_2d(module, weight), rows)
    images = spec.images(x)
    y = F.conv2d(images, weight.movedim(-1, 1), None, g.stride, g.padding, g.dilation, g.groups)
    bias = layer.bias
    expected = layer(x) if bias is None else layer(x) - bias.view(-1, *(1,) * spec.dims)  # type: ignore[operator]
    torch.testing.assert_close(spec.outputs(g.arranged(y, images), x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_transposed_convolutions_of_all_geometries() -> None:
    found = 0
    sizes = ((1, 2), (1, 2, 3), (0, 1, 2, 4), (0, 1, 2), (1, 2, 3), (1, 2, 3, 4))
    for groups, stride, padding, more, dilation, kernel in itertools.product(*sizes):
        if more >= max(stride, dilation) or 5 * stride + dilation * kernel + more <= 2 * padding + 2:
            continue
        layer = nn.ConvTranspose1d(4, 6, kernel, stride, padding, more, groups, False, dilation)
        assert_is_2d_convolution(layer, torch.randn(2, 4, 6), QuantConvTranspose1d.like(layer))
        found += 1
    assert found > 600


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_8_bits_are_close_to_the_float_layer(name: str) -> None:
    layer, x, module = sample(name)
    expected = layer(x)
    assert (module(x) - expected).norm() < 0.02 * expected.norm()
    assert module.weight.shape == layer.weight.shape
    assert (module.weight - layer.weight).abs().max() < 0.02 * layer.weight.abs().max()  # type: ignore[operator]
    if module.spec.dims:  # single images
        torch.testing.assert_close(module(x[0]), module(x)[0])
    half = module(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), module(x.half().float()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_state_goes_into_a_layer_of_the_same_arguments(name: str) -> None:
    layer, x, module = sample(name)
    other = type(module).like(layer)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_constructors_take_the_arguments_of_torch() -> None:
    assert repr(QuantConv1d(4, 6, 3, 2, 1)) == (
        "QuantConv1d(4, 6, kernel_size=(3,), stride=(2,), padding=(1,), weight_bits=0, activation_bits=8)"
    )
    layer = QuantConvTranspose2d(4, 6, 3, 2, 1, 1, 2, False, 1)
    assert repr(layer) == (
        "QuantConvTranspose2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), output_padding=(1, 1), "
        "groups=2, bias=False, weight_bits=0, activation_bits=8)"
    )
    assert layer(torch.ones(1, 4, 5, 5)).shape == (1, 6, 10, 10)
    assert layer.weight.shape == (4, 3, 3, 3)
    with pytest.raises(ValueError, match="groups"):
        QuantConvTranspose2d(4, 6, 3, groups=4)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("1d", (17,), r"the input has the shape \[17\], and the convolution takes \[N, C, L\] or \[C, L\]"),
        ("1d", (2, 5, 17), r"\[2, 5, 17\], and the convolution takes 6 channels"),
        ("1d", (2, 6, 2), r"\[2, 6, 2\], padded 4, and the convolution's kernel is 9"),
        ("up 2d", (6, 5), r"\[6, 5\], and the convolution takes \[N, C, H, W\] or \[C, H, W\]"),
        ("up 2d", (2, 7, 5, 5), r"and the convolution takes 6 channels"),
    ],
)
def test_inputs_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    _, _, module = sample(name)
    with pytest.raises(RuntimeError, match=message):
        module(torch.zeros(shape))
