"""IntegerConv2d: a quantized layer in integers gives what the simulated one gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.execute.engines import IntegerConv2d, IntegerLayer
from ptq4cuda.execute.program import Layer, Value, weight_bytes
from ptq4cuda.nn import QuantConv2d, QuantLinear
from ptq4cuda.nn.spec import Geometry
from ptq4cuda.quantizer import QuantizedWeight, QuantParams


def quantizer(channels: int, bits: int | None = 4, signed: bool = True, seed: int = 0) -> QuantParams:
    """Random quantizers; bits None is 0 to 8 of each channel, constants among them."""
    g = torch.Generator().manual_seed(seed)
    width = torch.randint(0, 9, (channels,), dtype=torch.uint8, generator=g)
    width = width if bits is None else torch.full_like(width, bits)
    high = torch.rand(channels, generator=g) + 0.5
    low = -torch.rand(channels, generator=g) if signed else torch.zeros(channels)
    return QuantParams.from_range(low, high, width, constant=torch.randn(channels, generator=g))


def layer(conv: nn.Conv2d, source: QuantParams, bits: int = 4) -> QuantConv2d:
    """Quantize a layer with offsets that integers can hold."""
    quantized = QuantConv2d.from_float(conv, source, weight_bits=bits, bias_correction="none")
    assert quantized.weight_offset is not None
    unit = 2.0 ** min(bits - 7, 0)
    quantized.weight_offset = torch.full_like(quantized.weight_offset, -128.0 if bits == 8 else -8 + 3 * unit)
    return quantized


def engine(
    quantized: QuantConv2d,
    outputs: Sequence[QuantParams | None] = (None,),
    residual: QuantParams | None = None,
    activation: Activation = IDENTITY,
) -> IntegerConv2d:
    """Return what executes a layer with these outputs."""
    step = Layer.alone(
        quantized,
        outputs=tuple(Value(f"y{i}", params) for i, params in enumerate(outputs)),
        residual=None if residual is None else Value("residual", residual),
        activation=activation,
    )
    return IntegerConv2d.of(step)


CONVS = {
    "3x3": nn.Conv2d(24, 20, 3, padding=1),
    "1x1": nn.Conv2d(12, 33, 1, stride=2, bias=False),
    "same": nn.Conv2d(8, 16, (3, 5), padding="same", dilation=2),
    "valid": nn.Conv2d(8, 16, 3, padding="valid"),
    "groups": nn.Conv2d(24, 20, 3, padding=2, groups=4),
    "depthwise": nn.Conv2d(36, 36, 3, padding=1, groups=36),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("source_bits", [4, 8, None])
@pytest.mark.parametrize("name", CONVS)
def test_integer_execution_is_what_was_simulated(name: str, source_bits: int | None, bits: int) -> None:
    torch.manual_seed(0)
    conv = CONVS[name]
    source = quantizer(conv.in_channels, source_bits)
    simulated = layer(conv, source, bits)
    x = torch.randn(2, conv.in_channels, 9, 10)
    integer = engine(simulated)
    found = integer(source.quantize(x))
    expected = simulated(x)
    assert torch.equal(found, expected)


def test_a_block_of_codes() -> None:
    """Two convolutions and a residual, from codes to codes: each step as the operators do it one by one."""
    torch.manual_seed(1)
    first, second = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
    source, middle, out = quantizer(16, 8), quantizer(24, None, signed=False, seed=1), quantizer(16, 4, seed=2)
    relu = Activation(0.0)
    one = engine(layer(first, source), [middle], activation=relu)
    two = engine(layer(second, middle), [out], source, relu)
    codes = source.quantize(torch.randn(2, 16, 7, 6))
    found = two(one(codes), codes)

    values = engine(layer(first, source))
    hidden = middle.quantize(values(codes).relu())
    values = engine(layer(second, middle))
    added = (codes.float() - source.zero_point.view(-1, 1, 1)) * source.scale.view(-1, 1, 1)
    assert torch.equal(one(codes), hidden)
    assert torch.equal(found, out.quantize((values(hidden) + added).relu()))


def test_two_outputs() -> None:
    torch.manual_seed(1)
    source, first, second = quantizer(16, 8), quantizer(24, 4, seed=1), quantizer(24, None, seed=2)
    quantized = layer(nn.Conv2d(16, 24, 3, padding=1), source)
    codes = source.quantize(torch.randn(2, 16, 7, 6))
    y = engine(quantized)(codes)
    found = engine(quantized, [first, second])(codes)
    assert len(found) == 2
    assert torch.equal(found[0], first.quantize(y))
    assert torch.equal(found[1], second.quantize(y))
    found = engine(quantized, [None, second])(codes)
    assert torch.equal(found[0], y)
    assert torch.equal(found[1], second.quantize(y))
    linear = QuantLinear.from_float(nn.Linear(16, 24), quantizer(1, 8), bias_correction="none")
    assert linear.weight_offset is not None
    linear.weight_offset = torch.full_like(linear.weight_offset, -8.0)
    x = torch.randint(0, 256, (2, 5, 16), dtype=torch.uint8)
    step = Layer.alone(linear, outputs=(Value("values"), Value("codes", replace(second, axis=-1))))
    outputs = IntegerLayer.of(step)(x)
    assert [tuple(output.shape) for output in outputs] == [(2, 5, 24)] * 2


def weights(codes: Tensor, bits: int, offset: float) -> QuantizedWeight:
    one = torch.ones(len(codes))
    return QuantizedWeight(codes, (one * bits).to(torch.uint8), one * 0.5, one * offset)


@pytest.mark.parametrize(
    ("bits", "offset", "expected"),
    [
        (4, -8.0, [-64, 56]),
        (4, -7.625, [-61, 59]),
        (8, -128.0, [-128, 127]),
        (2, -1.5, [-48, 48]),
        (7, -64.0, [-64, 63]),
    ],
)
def test_weights_as_bytes(bits: int, offset: float, expected: list[int]) -> None:
    codes = torch.tensor([[0, 2**bits - 1]], dtype=torch.uint8)
    quantized = weights(codes, bits, offset)
    found, scale = weight_bytes(quantized)
    assert found.flatten().tolist() == expected
    assert torch.equal(found * scale[:, None], quantized.values())


@pytest.mark.parametrize(("bits", "offset"), [(4, -7.3125), (8, -127.5), (4, 3.0), (8, 0.0)])
def test_weights_that_are_no_bytes(bits: int, offset: float) -> None:
    with pytest.raises(ValueError, match=rf"channel 0, {bits} bits with offset {offset}.*are no signed bytes"):
        weight_bytes(weights(torch.tensor([[0, 2**bits - 1]], dtype=torch.uint8), bits, offset))


def test_layers_that_cannot_be_lowered() -> None:
    source = quantizer(8)
    conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match="its padding has the mode 'reflect'"):
        engine(layer(conv, source))
    with pytest.raises(ValueError, match="its input is not quantized"):
        engine(QuantConv2d.from_float(nn.Conv2d(8, 8, 3)))
    with pytest.raises(ValueError, match="its padding 'same' is wider on one side"):
        engine(layer(nn.Conv2d(8, 8, 2, padding="same"), source))
    with pytest.raises(ValueError, match="which is not folded"):
        unfolded = QuantConv2d.from_float(nn.Conv2d(8, 8, 3), source, bias_correction="none", folded=False)
        unfolded.weight_offset = torch.full((8,), -8.0)
        engine(unfolded)


def test_an_unfolded_depthwise_layer_needs_no_folding() -> None:
    conv, source = CONVS["depthwise"], quantizer(36)
    unfolded = QuantConv2d.from_float(conv, source, bias_correction="none", folded=False)
    unfolded.weight_offset = torch.full((36,), -8.0)
    x = torch.randn(2, 36, 9, 10)
    expected = unfolded(x)
    found = engine(unfolded)(source.quantize(x))
    assert torch.equal(found, expected)


def test_bad_arguments() -> None:
    source = quantizer(8)
    weight, scale = torch.ones(4, 1, 1, 8, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match="weight must be int8"):
        IntegerConv2d(weight.float(), scale, None, source)
    with pytest.raises(ValueError, match="do not make 3 groups"):
        IntegerConv2d(weight, scale, None, source, Geometry(groups=3))
    with pytest.raises(ValueError, match="must be finite"):
        IntegerConv2d(weight, scale * math.inf, None, source)
    with pytest.raises(ValueError, match="output 0 has 8 channels, the convolution has 4"):
        IntegerConv2d(weight, scale, None, source, outputs=[source])
    for outputs in ([], [source] * 3, [source, None]):
        with pytest.raises(ValueError, match="one or two outputs, of which the first may be values"):
            IntegerConv2d(weight, scale, None, source, outputs=outputs)
    with pytest.raises(ValueError, match="can leave 32 bits"):
        huge = QuantParams(source.bits, source.scale, source.zero_point * 0 + (1 << 22))
        IntegerConv2d(weight.expand(4, 9, 9, 8), scale, None, huge)
    with pytest.raises(ValueError, match="a residual comes with its quantizer"):
        codes = torch.zeros(1, 8, 2, 2, dtype=torch.uint8)
        IntegerConv2d(weight, scale, None, source)(codes, codes[:, :4])
