"""QuantConv2d and QuantLinear as drop-ins for torch.nn's layers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda import QuantConv2d, QuantLinear, QuantParams
from ptq4cuda.quantizer import QuantizedWeight


def quantizer(channels: int, bits: object = 4, seed: int = 0) -> QuantParams:
    generator = torch.Generator().manual_seed(seed)
    low, high = -torch.rand(channels, generator=generator), 3 * torch.rand(channels, generator=generator)
    bits = torch.as_tensor(bits, dtype=torch.uint8).reshape(-1)
    return QuantParams.from_range(low, high, bits.expand(channels) if channels > 1 else bits)


GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": (2, 1), "dilation": 2},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "bias": False},
    {"groups": 2, "padding": 1},
    {"groups": 6, "padding": 1, "out_channels": 12},
    {"kernel_size": 1},
    {"kernel_size": (1, 5), "padding": (0, 2)},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "reflect"},
]


def make_conv(geometry: dict) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(**{"in_channels": 6, "out_channels": 8, "kernel_size": 3, **geometry})


def executable_form(layer: QuantConv2d, x: Tensor) -> Tensor:
    """The design's formula in integers: y = D (acc + m S) + b over codes, padding with the zero point.

    Written on its own, in float64 (exact for these sums), for folded weights and padding mode "zeros".
    """
    q = layer.activation
    assert q is not None
    codes = q.quantize(x).double() - q.zero_point.view(1, -1, 1, 1).double()
    weight = layer.quantized_weight()
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    k = weight.codes.movedim(-1, 1).double()
    acc = F.conv2d(codes, k, None, *geometry)
    window = F.conv2d(codes, torch.ones_like(k), None, *geometry)
    assert torch.equal(acc, acc.round())
    scale, offset = (p.double().view(1, -1, 1, 1) for p in (weight.scale, weight.offset))
    y = scale * (acc + offset * window)
    return y if layer.bias is None else y + layer.bias.double().view(1, -1, 1, 1)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("folded", [True, False])
def test_eight_bits_come_close_to_float(geometry: dict, folded: bool) -> None:
    conv = make_conv(geometry)
    x = torch.rand(2, 6, 9, 8) * 3 - 0.5
    activation = QuantParams.from_range(x.amin((0, 2, 3)), x.amax((0, 2, 3)), torch.full((6,), 8, dtype=torch.uint8))
    layer = QuantConv2d.from_float(conv, activation, weight_bits=8, folded=folded)
    expected, found = conv(x), layer(x)
    assert found.shape == expected.shape
    assert 10 * torch.log10(expected.square().sum() / (expected - found).square().sum()) > 35


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if "padding_mode" not in g], ids=str)
def test_simulation_is_the_executable_form(geometry: dict) -> None:
    conv = make_conv(geometry)
    x = torch.randn(2, 6, 9, 8)
    bits = torch.tensor([1, 2, 3, 4, 5, 8], dtype=torch.uint8)
    weight_bits = torch.arange(conv.out_channels, dtype=torch.uint8) % 8 + 1
    layer = QuantConv2d.from_float(conv, quantizer(6, bits), weight_bits=weight_bits, bias_correction="mean+variance")
    torch.testing.assert_close(layer(x).double(), executable_form(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_the_layer_computes_with_quantized_operands(per_channel: bool, folded: bool) -> None:
    conv = make_conv({"groups": 3, "out_channels": 9, "padding": 1})
    activation = quantizer(6 if per_channel else 1)
    layer = QuantConv2d.from_float(conv, activation, folded=folded)
    x = torch.randn(2, 6, 7, 7)
    # rounding to 4 bits of each output channel, seen from outside: at most 16 different values a row
    scale = activation.scale.expand(6).view(3, 1, 2, 1, 1).expand(3, 3, 2, 1, 1).reshape(9, 2, 1, 1)
    rows = layer.dequantized_weight() * (scale if folded else 1.0)
    assert all(len(torch.unique((row / row.abs().max() * 1e4).round())) <= 16 for row in rows)
    expected = F.conv2d(activation.fake_quantize(x), layer.dequantized_weight(), conv.bias, 1, 1, 1, 3)
    torch.testing.assert_close(layer(x), expected)


def test_weights_only() -> None:
    conv = make_conv({})
    layer = QuantConv2d.from_float(conv, weight_bits=4)
    x = torch.randn(1, 6, 9, 9)
    assert layer.activation is None
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.dequantized_weight(), conv.bias))


def test_weights_are_really_packed() -> None:
    conv = nn.Conv2d(64, 64, 3, bias=False)
    layer = QuantConv2d.from_float(conv, quantizer(64))
    assert layer.weight_packed.numel() == conv.weight.numel() // 2
    assert sum(t.numel() * t.element_size() for t in layer.state_dict().values()) < 0.14 * 4 * conv.weight.numel()
    assert not list(layer.parameters())


def test_mixed_bits_take_the_bytes_they_need() -> None:
    conv = nn.Conv2d(3, 4, 3)
    layer = QuantConv2d.from_float(conv, weight_bits=torch.tensor([0, 1, 5, 8], dtype=torch.uint8))
    assert layer.weight_packed.numel() == 0 + 4 + 17 + 27


def test_linear() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(10, 7)
    layer = QuantLinear.from_float(linear, quantizer(10), weight_bits=8)
    for shape in ((4, 10), (10,), (2, 3, 10)):
        x = torch.rand(shape)
        expected = F.linear(layer.activation.fake_quantize(x), layer.dequantized_weight(), linear.bias)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    conv = make_conv({"padding": 1})
    layer = QuantConv2d.from_float(conv, quantizer(6))
    x = torch.randn(2, 6, 8, 8).contiguous(memory_format=memory_format)
    assert layer(x).stride() == conv(x).stride()
    for groups in (1, 2):
        circular = make_conv(
            {"padding": 1, "padding_mode": "circular", "groups": groups}
        )  # which forgets it in torch
        y = QuantConv2d.from_float(circular, quantizer(6))(x)
        assert y.stride() == y.contiguous(memory_format=memory_format).stride()


def test_unbatched_input() -> None:
    conv = make_conv({"padding": 1})
    layer = QuantConv2d.from_float(conv, quantizer(6))
    x = torch.randn(6, 8, 8)
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(0))[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64])
def test_input_of_other_dtypes(dtype: torch.dtype) -> None:
    layer = QuantConv2d.from_float(make_conv({}), quantizer(6))
    with pytest.raises(TypeError, match=f"must be float32, float16 or bfloat16, got {dtype}"):
        layer(torch.ones(2, 6, 8, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_scales(dtype: torch.dtype) -> None:
    layer = QuantConv2d.from_float(make_conv({"padding": 1}), quantizer(6))
    x = torch.randn(2, 6, 8, 8)
    expected = layer(x)
    half = copy.deepcopy(layer).to(dtype)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor), name
    y = half(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_state_dict_into_a_fresh_layer() -> None:
    conv = make_conv({"padding": 1})
    bits = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8], dtype=torch.uint8)
    layer = QuantConv2d.from_float(conv, quantizer(6), weight_bits=bits)
    fresh = QuantConv2d(6, 8, 3, padding=1)
    x = torch.randn(1, 6, 5, 5)
    assert bool((fresh(x) == 0).all())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_packed", torch.zeros(5, dtype=torch.uint8), "5 bytes"),
        ("weight_packed", torch.zeros(216), "torch.float32"),
        ("weight_bits", torch.full((8,), 3, dtype=torch.uint8), "weight_bits ask for"),
        ("weight_scale", torch.ones(4), "size mismatch"),
        ("activation_scale", torch.ones(5), r"scale must have the shape \[6\] or \[1\], got \[5\]"),
        ("activation_scale", torch.zeros(6), "positive and finite"),
    ],
)
def test_state_dict_that_does_not_fit(name: str, value: Tensor, message: str) -> None:
    layer = QuantConv2d.from_float(make_conv({"padding": 1}), quantizer(6))
    state = {**layer.state_dict(), name: value}
    with pytest.raises(RuntimeError, match=message):
        QuantConv2d(6, 8, 3, padding=1).load_state_dict(state)


def test_deepcopy_is_independent() -> None:
    layer = QuantConv2d.from_float(make_conv({}), quantizer(6))
    other = copy.deepcopy(layer)
    other.weight_scale.mul_(2)
    assert not torch.equal(layer.weight_scale, other.weight_scale)


def test_compile_fullgraph_with_any_batch() -> None:
    net = nn.Sequential(
        QuantConv2d.from_float(make_conv({"padding": 1}), quantizer(6)),
        nn.ReLU(),
        nn.Flatten(),
        QuantLinear.from_float(nn.Linear(8 * 25, 3), quantizer(8 * 25)),
    )
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5):
        x = torch.randn(batch, 6, 5, 5)
        torch.testing.assert_close(compiled(x), net(x))


def test_gradient_passes_straight_through_inside_the_clip_range() -> None:
    layer = QuantLinear.from_float(nn.Linear(2, 1), QuantParams.from_range(*torch.tensor([[0.0], [1.0]]), _bits(4)))
    x = torch.tensor([[0.5, 7.0]], requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized_weight() * torch.tensor([[1.0, 0.0]]))


def _bits(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.uint8)


def test_repr_names_bits_and_geometry() -> None:
    text = repr(QuantConv2d.from_float(make_conv({"padding": 1}), quantizer(6, 3)))
    assert text == (
        "QuantConv2d(6, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), weight_bits=4, activation_bits=3)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": quantizer(5)}, "activation bits has 5 channels, the layer has 6"),
        ({"activation": 8}, "activation must be an input, QuantParams or None, got int"),
        ({"activation": torch.ones(2, 5, 8, 8)}, r"shape \[2, 5, 8, 8\], and the convolution takes 6 channels"),
        ({"activation": torch.ones(2, 6, 8, 8), "activation_bits": 0}, "bits must be an int from 1 to 8, got 0"),
        ({"activation": torch.full((2, 6, 8, 8), torch.nan)}, "data contains NaN or Inf"),
        ({"weight_bits": 9}, "bits must be 0 to 8, got 9"),
        ({"weight_bits": -1}, "bits must be 0 to 8, got -1"),
        ({"weight_bits": [4] * 8}, "weight_bits must be a number or a tensor, got list"),
        ({"weight_bits": _bits(4).expand(3)}, r"weight_bits has shape \[3\], expected \[8\]"),
        ({"bias_correction": "output"}, "bias_correction must be one of .*got 'output'"),
        ({"layer": nn.Conv1d(6, 8, 3)}, r"layer must be a torch\.nn\.Conv2d, got Conv1d"),
        ({"layer": nn.ConvTranspose2d(6, 8, 3)}, r"layer must be a torch\.nn\.Conv2d, got ConvTranspose2d"),
    ],
)
def test_from_float_refuses(arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        QuantConv2d.from_float(**{"layer": make_conv({}), **arguments})


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [None, 1, -1])
def test_quantizers_from_data(bits: int, axis: int | None) -> None:
    """Nothing is clipped that 8 bits hold; at fewer the range is better than that of the data, for each channel."""
    x = torch.randn(16, 4, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [9.0], [0.1], [0.0]]
    )
    if axis == -1:
        x = x.movedim(1, -1)
    found = QuantParams.from_data(x, bits, axis)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    seen = QuantParams.from_range(rows.amin(1), rows.amax(1), _bits(bits), 1 if axis is None else axis)
    assert found.axis == seen.axis and found.scale.shape == seen.scale.shape

    def error(quantizer: QuantParams) -> Tensor:
        squared = (quantizer.fake_quantize(x) - x).square()
        return squared.sum()[None] if axis is None else squared.movedim(axis, 0).flatten(1).sum(1)

    assert bool((error(found) <= error(seen)).all())
    assert bits == 8 or bool((error(found)[:3] < 0.8 * error(seen)[:3]).all())


def test_quantizers_from_data_refuse() -> None:
    x = torch.ones(2, 3)
    for data, arguments, message in (
        (x.double(), {}, "data must be a float32, float16 or bfloat16 tensor, got "),
        (x, {"axis": 2}, r"data of shape \[2, 3\] has no axis 2"),
        (x, {"bits": 9}, "bits must be an int from 1 to 8, got 9"),
        (x[:0], {}, "data has no values"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            QuantParams.from_data(data, **arguments)


def test_a_layer_calibrates_itself_by_example_inputs() -> None:
    conv, x = make_conv({"padding": 1}), torch.randn(8, 6, 10, 10, generator=torch.Generator().manual_seed(0)).relu()
    layer = QuantConv2d.from_float(conv, x, activation_bits=6)
    explicit = QuantConv2d.from_float(conv, QuantParams.from_data(x, 6, -3))
    assert torch.equal(layer(x), explicit(x))
    with torch.no_grad():
        expected = conv(x)
        noise = (expected - QuantConv2d.from_float(conv, x, weight_bits=8, activation_bits=8)(x)).square().sum()
    assert expected.square().sum() / noise > 1e4
    linear = QuantLinear.from_float(nn.Linear(5, 3), torch.randn(4, 7, 5))
    assert linear.activation is not None and linear.activation.scale.shape == (5,)


def test_weights_that_are_not_finite() -> None:
    conv = make_conv({})
    conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        QuantConv2d.from_float(conv)


def test_quantized_weight_values() -> None:
    codes = torch.arange(8, dtype=torch.uint8).view(2, 1, 1, 4)
    weight = QuantizedWeight(codes, _bits(3).expand(2), torch.tensor([0.5, 2.0]), torch.tensor([-1.0, -4.5]))
    assert weight.values().flatten().tolist() == [-0.5, 0.0, 0.5, 1.0, -1.0, 1.0, 3.0, 5.0]


def test_every_bit_width_and_channel_count_survives_the_packing() -> None:
    for bits, channels in itertools.product(range(9), (1, 2, 3, 7)):
        conv = nn.Conv2d(channels, 3, (1, 3), bias=False)
        layer = QuantConv2d.from_float(conv, weight_bits=bits, bias_correction="none")
        low, high = conv.weight.detach().flatten(1).aminmax(dim=1)
        if bits == 8:  # symmetric about zero
            high = torch.maximum(-low, high)
            low = -high * (128 / 127)
        q = QuantParams.from_range(
            low,
            high,
            _bits(bits).expand(3),
            axis=0,
            constant=conv.weight.detach().flatten(1).double().mean(1),
        )
        expected = q.fake_quantize(conv.weight.detach())
        torch.testing.assert_close(layer.dequantized_weight(), expected, msg=f"{bits} bits, {channels} channels")
