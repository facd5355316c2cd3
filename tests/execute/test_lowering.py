"""Execution in integers: it computes what the simulated network computes, and the result is a good citizen."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.bench import architectures
from ptq4cuda.execute.engines import IntegerConv2d, Packing
from ptq4cuda.execute.lowering import lower_layers
from ptq4cuda.execute.program import Layer, MaxPool, Quantize
from ptq4cuda.execute.regions import Region
from ptq4cuda.metrics import Noise
from ptq4cuda.nn import QuantConv2d, QuantLinear, QuantModule, QuantTensor
from ptq4cuda.quantizer import QuantParams

FAST = QuantConfig.fast()


def both(model: nn.Module, batch: Tensor, config: QuantConfig = FAST) -> tuple[nn.Module, nn.Module]:
    """Return a network simulated and in integers."""
    return tuple(  # type: ignore[return-value]
        quantize(model, [batch], replace(config, execution=execution), progress=False)
        for execution in ("simulate", "integer")
    )


def sqnr(expected: object, found: object) -> float:
    noise = Noise()
    noise.add(expected, found)
    return 200.0 if noise.sqnr is None else noise.sqnr


def executions(network: nn.Module) -> set[str]:
    return {layer.execution for layer in record_of(network).layers}


@pytest.mark.parametrize("config", [FAST, QuantConfig(), replace(FAST, activation_granularity="per_tensor")])
def test_integer_is_simulate(model: nn.Module, images: Tensor, config: QuantConfig) -> None:
    simulated, integer = both(model, images, config)
    assert executions(integer) == {"integer"}
    assert torch.equal(simulated(images), integer(images))
    assert torch.equal(simulated(images.half().float()), integer(images.half().float()))


class Untraceable(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if x.sum() > -1e9 else x * 0)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A tensor with three readers: two convolutions of other bits and a sum; a pooled one; a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(16, 8, 1)
        self.d = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        a, b = F.relu(self.a(x) + x), F.leaky_relu(self.b(x), 0.2)
        y = F.max_pool2d(torch.cat([a, b], 1), 3, stride=2, padding=1)
        return self.d(F.relu(self.c(y)))


def exact(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the codes that every quantized layer reads."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def on_call(module: QuantModule, args: tuple[Tensor, ...]) -> None:
            codes = args[0]
            if codes.dtype != torch.uint8:
                assert module.activation is not None
                codes = module.activation.quantize(codes)
            seen[name] = codes.int()

        return on_call

    hooks = [
        module.register_forward_pre_hook(hook(name))
        for name, module in network.named_modules()
        if isinstance(module, QuantModule)
    ]
    network(x)
    for handle in hooks:
        handle.remove()
    return seen


def test_layers_read_the_same_codes(images: Tensor) -> None:
    torch.manual_seed(3)
    simulated, integer = both(Block().eval(), images)
    expected, found = exact(simulated, images), exact(integer, images)
    assert expected.keys() == found.keys() and len(found) == 5
    for name, codes in expected.items():
        assert torch.equal(codes, found[name]), name


def test_codes_flow_through_pooling_and_concatenation(images: Tensor) -> None:
    torch.manual_seed(3)
    _, integer = both(Block().eval(), images)
    float_values = []

    def hook(name: str) -> Callable[..., None]:
        def on_call(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if args[0].dtype != torch.uint8:
                float_values.append(name)

        return on_call

    for name, module in integer.named_modules():
        if isinstance(module, QuantModule):
            module.register_forward_hook(hook(name))
    integer(images)
    assert float_values == []
    assert any(isinstance(step, MaxPool) for step in ptq4cuda.program(integer))


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))) + x)


class Bottlenecks(nn.Module):
    """Every residual sum is read with 4 bits by the next block's convolution, and with 8 by its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.blocks = nn.Sequential(*(Bottleneck(20) for _ in range(3)))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.max_pool2d(F.relu(self.stem(x)), 2)).mean((2, 3)))


def test_residual_blocks_pass_codes_alone(images: Tensor) -> None:
    torch.manual_seed(3)
    simulated, integer = both(Bottlenecks().eval(), images)
    assert executions(integer) == {"integer"}
    assert [step.source.name for step in ptq4cuda.program(integer) if isinstance(step, Quantize)] == ["x", "mean"]
    layers = [m.engine for m in integer.modules() if isinstance(m, QuantModule)]
    assert sum(layer.coded == 2 for layer in layers if isinstance(layer, IntegerConv2d)) == 3
    assert torch.equal(simulated(images), integer(images))
    expected, found = exact(simulated, images), exact(integer, images)
    for name, codes in expected.items():
        assert torch.equal(codes, found[name]), name
    compiled = torch.compile(integer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(images), integer(images))


class Edges(nn.Module):
    """Convolutions with readers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.straight = nn.Conv2d(32, 64, 1)
        self.pooled = nn.Conv2d(64, 16, 3, padding=1)
        self.block = nn.Conv2d(16, 48, 3, padding=1)
        self.add, self.depthwise = nn.Conv2d(48, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.grouped = nn.Conv2d(24, 16, 3, padding=1, groups=2)
        self.late, self.last = nn.Conv2d(16, 12, (3, 5), stride=2), nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.straight(F.relu(self.stem(x))))
        x = F.relu(self.pooled(F.max_pool2d(x, 2)))
        x = F.relu(self.add(F.relu(self.block(x))) + x)
        x = F.relu(self.pointwise(F.relu(self.depthwise(x))))
        return self.last(F.relu(self.late(F.relu(self.grouped(x)))))  # type: ignore[no-any-return]


def lowered(simulated: nn.Module, pack: bool | None) -> nn.Module:
    network = copy.deepcopy(simulated)
    lower_layers(network, torch.float32, pack)
    return network


def packed_inputs(network: nn.Module) -> set[str]:
    """Return the layers that read packed codes."""
    engines = {name: m.engine for name, m in network.named_modules() if isinstance(m, QuantModule)}
    return {name for name, engine in engines.items() if isinstance(engine, IntegerConv2d) and engine.low_bytes}


def peak_bytes(network: nn.Module, x: Tensor) -> int:
    """Return the largest input and output, together, of a convolution."""
    sizes = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        sizes.append(sum(t.numel() * t.element_size() for t in (*args, *tree_leaves(output))))

    handles = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, QuantConv2d)]
    network(x)
    for handle in handles:
        handle.remove()
    return max(sizes)


def test_codes_travel_packed_between_convolutions(images: Tensor) -> None:
    torch.manual_seed(3)
    config = replace(FAST, execution="simulate", activation_granularity="per_tensor")
    simulated = quantize(Edges().eval(), [images], config, progress=False)
    unpacked, packed = lowered(simulated, False), lowered(simulated, True)
    # What max pooling, a depthwise or a grouped convolution reads are bytes, and what a sum adds, and the 8 bits of
    # the last layer. Of two outputs, the one for a convolution is packed.
    assert packed_inputs(packed) == {"straight", "block", "add", "pointwise", "late"}
    block = packed.get_submodule("pooled").engine
    assert isinstance(block, IntegerConv2d)
    assert sorted(size > 0 for size in block.packed_bytes) == [False, True]
    assert packed_inputs(lowered(simulated, None)) == packed_inputs(unpacked) == set()  # it is not on a GPU
    assert torch.equal(packed(images), unpacked(images))
    assert torch.equal(simulated(images), packed(images))
    assert peak_bytes(packed, images) < 0.9 * peak_bytes(unpacked, images)
    state, expected = packed.state_dict(), simulated.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(images[:7]), packed(images[:7]))


def test_an_engine_prepares_for_the_device_that_it_is_on(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What moving to a GPU does: weights are laid out anew, in both directions, and the state is the same."""
    torch.manual_seed(3)
    config = replace(FAST, execution="simulate", activation_granularity="per_tensor")
    simulated = quantize(Edges().eval(), [images], config, progress=False)
    network, expected = lowered(simulated, None), simulated(images)
    engines = [module for module in network.modules() if isinstance(module, IntegerConv2d)]
    before = [(engine.weight.clone(), engine.span) for engine in engines]
    assert Packing().on(torch.device("cuda")) and not Packing().on(torch.device("cpu"))
    for packs in (True, False):
        monkeypatch.setattr(Packing, "on", lambda *_, packs=packs: packs)
        for engine in engines:
            engine._prepare(engine.weight_bytes())
        assert packed_inputs(network) == ({"straight", "block", "add", "pointwise", "late"} if packs else set())
        assert torch.equal(network(images), expected)
        state = network.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in simulated.state_dict().items())
    for engine, (weight, span) in zip(engines, before, strict=True):
        assert torch.equal(engine.weight, weight) and engine.span == span


def test_codes_of_many_bits_are_not_packed(images: Tensor) -> None:
    torch.manual_seed(3)
    config = replace(FAST, execution="simulate", activation_bits=8)
    assert packed_inputs(lowered(quantize(Edges().eval(), [images], config, progress=False), True)) == set()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "densenet", "plain"])
def test_packed_architectures(name: str) -> None:
    batch = architectures.images(2, 64, seed=1)
    net = architectures.ARCHITECTURES[name](num_classes=10, width=0.5)
    net = architectures.calibrate_batch_norm(net, architectures.images(4, 64)).eval()
    simulated = quantize(net, [batch], replace(FAST, execution="simulate"), progress=False)
    unpacked, packed = lowered(simulated, False), lowered(simulated, True)
    assert packed_inputs(packed)
    with torch.no_grad():
        assert torch.equal(packed(batch), unpacked(batch))


class Readers(nn.Module):
    """One layer's output is read with 4 bits and, on request, with 8 bits and as values."""

    def __init__(self, residual: bool, values: bool) -> None:
        super().__init__()
        self.residual, self.values = residual, values
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.first(x))
        y = self.second(x) + x if self.residual else self.second(x)
        return (y, x) if self.values else (y,)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("values", [False, True])
def test_what_a_layer_returns_to_readers_that_disagree(images: Tensor, residual: bool, values: bool) -> None:
    torch.manual_seed(3)
    simulated, integer = both(Readers(residual, values).eval(), images)
    engine = integer.get_submodule("first").engine
    assert isinstance(engine, IntegerConv2d)
    assert engine.has_values == values
    assert (engine.has_values + engine.coded == 2) == (residual or values)
    # Two outputs serve two readers; the third one's codes are made of values.
    steps = list(ptq4cuda.program(integer))
    assert sum(isinstance(step, Quantize) for step in steps) == 1 + (residual and values)
    for expected, found in zip(simulated(images), integer(images), strict=True):
        assert torch.equal(expected, found)


def test_a_residual_operand_has_the_codes_of_a_layer_that_reads_8_bits(images: Tensor) -> None:
    torch.manual_seed(3)
    simulated, integer = both(Readers(True, False).eval(), images, replace(FAST, activation_bits=8))
    engine = integer.get_submodule("first").engine
    assert isinstance(engine, IntegerConv2d)
    assert (engine.has_values, engine.coded) == (False, 1)
    assert torch.equal(simulated(images)[0], integer(images)[0])


def test_residual_operands_have_8_bits_in_both_executions(images: Tensor) -> None:
    torch.manual_seed(3)
    for network in both(Block().eval(), images):
        marked = [module for module in network.modules() if isinstance(module, QuantTensor)]
        assert len(marked) == 1 and marked[0].bits.tolist() == [8] * 8
    simulated = quantize(Block().eval(), [images], QuantConfig.paper(), progress=False)
    assert not any(isinstance(module, QuantTensor) for module in simulated.modules())


def test_a_tensor_that_is_concatenated_with_itself(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.joint, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(18, 8, 3), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(self.first(x), 2)
            return self.last(F.relu(self.joint(torch.concat(tensors=[y, y, y], axis=1))))

    torch.manual_seed(3)
    model = Twice().eval()
    model.joint.weight.data[:, 6:12] *= 10.0  # so that its copies get other bits
    simulated, integer = both(model, images)
    assert executions(integer) == {"integer"}
    assert torch.equal(simulated(images), integer(images))


def test_views_of_what_a_layer_returns(images: Tensor) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.like, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(800, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x))
            z = self.like(x).view(torch.int32).view(torch.float32)
            return self.fc(y.view(x.size(0), -1) + z.view_as(y).view(size=(x.shape[0], -1)))

    torch.manual_seed(3)
    simulated, integer = both(Views().eval(), images)
    assert executions(integer) == {"integer"}
    assert torch.equal(simulated(images), integer(images))


class Sum(nn.Module):
    """A convolution to whose output something is added."""

    def __init__(self, added: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.stem, self.conv, self.pooled = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.channels = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.image = nn.Parameter(torch.randn(1, 8, 12, 12))
        self.register_buffer("whole", torch.arange(8).view(1, 8, 1, 1))
        self.fc = nn.Linear(8, 5)
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.fc(F.relu(self.conv(x) + self.added(self, x)).mean((2, 3)))


ADDED: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "one value": lambda m, x: x.mean(),
    "a size": lambda m, x: x.shape[1],
    "by channel": lambda m, x: m.channels,
    "whole numbers": lambda m, x: m.whole,
    "an image": lambda m, x: m.image * 2,
    "a channel": lambda m, x: x.mean(1, keepdim=True),
    "a mask": lambda m, x: x > 0.5,
    "a pooled layer": lambda m, x: m.pooled(x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("samples", [1, 48])
@pytest.mark.parametrize("added", ADDED.values(), ids=ADDED)
def test_what_is_broadcast_over_a_layer_does_not_travel_as_codes(
    images: Tensor, added: Callable[[nn.Module, Tensor], object], samples: int, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = Sum(added).eval()
    simulated, integer = both(model, images[:samples])
    assert executions(integer) == {"integer"}
    assert not any(m.scale.numel() for m in integer.modules() if isinstance(m, QuantTensor))
    torch.testing.assert_close(integer(images), simulated(images), rtol=1e-6, atol=1e-6)
    ptq4cuda.save(integer, tmp_path / "net.ptq4")
    assert torch.equal(ptq4cuda.load(tmp_path / "net.ptq4", model)(images), integer(images))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_codes_pass_through_a_pooling(images: Tensor, ceil_mode: bool) -> None:
    torch.manual_seed(0)
    pooling = nn.MaxPool2d([3, 2], [2], 1, ceil_mode=ceil_mode)  # type: ignore[arg-type]  # lists are taken, too
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.ReLU(), pooling, nn.Conv2d(8, 6, 3), nn.Flatten(), nn.LazyLinear(4))
    model(images[:1])
    simulated, integer = both(model.eval(), images)
    assert torch.equal(integer(images), simulated(images))
    assert any(isinstance(step, MaxPool) for step in ptq4cuda.program(integer))


def test_what_cannot_run_in_integers_says_why(model: nn.Module, images: Tensor) -> None:
    network = quantize(model, [images], QuantConfig.paper(), progress=False)
    assert executions(network) == {"simulate"}
    assert "not folded" in str(ptq4cuda.report(network))
    with pytest.raises(ValueError, match=r"cannot be executed in integers: .*not folded"):
        quantize(model, [images], replace(QuantConfig.paper(), execution="integer"), progress=False)


def test_auto_asks_no_clock(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = IntegerConv2d.forward

    def slow(self: IntegerConv2d, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.02)  # some twenty times what it takes
        return forward(self, *arguments, **options)

    monkeypatch.setattr(IntegerConv2d, "forward", slow)
    network = quantize(model, [images], FAST, progress=False)
    assert executions(network) == {"integer"}
    assert not re.search(r"\d ms\b", str(ptq4cuda.report(network)))


def test_an_error_of_the_machine_is_no_reason(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Region, "forward", fail)
    with pytest.raises(MemoryError, match="out of memory in a forward in integers"):
        quantize(model, [images], FAST, progress=False)


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), ValueError("two of a kind")])
def test_only_what_lowering_refuses_is_a_reason(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(Layer, "weight", fail)
    with pytest.raises(type(error), match=str(error)):
        quantize(model, [images], FAST, progress=False)


@pytest.mark.parametrize("traced", [True, False])
def test_a_model_that_writes_into_its_input_computes_in_integers(images: Tensor, traced: bool) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x -= 3.0
            if not traced and x.isnan().any():  # what torch.fx cannot follow
                return x
            return self.conv(x)

    torch.manual_seed(0)
    model, kept = InPlace().eval(), images.clone()
    network = quantize(model, [images], FAST, progress=False)
    assert record_of(network).walked_by == ("graph" if traced else "modules")
    assert executions(network) == {"integer"}
    assert torch.equal(images, kept)
    assert sqnr(model(images.clone()).detach(), network(images.clone())) > 30.0


def test_random_numbers_of_a_model_are_no_difference(images: Tensor) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.conv(x), 0.5, training=True)

    torch.manual_seed(0)
    model = Noisy().eval()
    before = torch.get_rng_state()
    network = quantize(model, [images], FAST, progress=False)
    assert executions(network) == {"integer"}
    torch.set_rng_state(before)
    values = network(images)
    torch.set_rng_state(before)
    assert torch.equal(network(images), values)


def test_padding_of_other_modes_stays_simulated(images: Tensor) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    )
    simulated, integer = both(net.eval(), images)
    assert [layer.execution for layer in record_of(integer).layers] == ["integer", "simulate"]
    assert "reflect" in record_of(integer).layers[1].reason
    assert torch.equal(simulated(images), integer(images))


def test_walked_by_modules(model: nn.Module, images: Tensor) -> None:
    simulated, integer = both(Untraceable(model).eval(), images)
    assert record_of(integer).walked_by == "modules"
    assert executions(integer) == {"integer", "float"}  # the BatchNorms, which are not folded then
    assert torch.equal(simulated(images), integer(images))


def test_layers_by_hand() -> None:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 5)
    x, features = torch.rand(2, 3, 9, 9), torch.rand(4, 8)
    bits = torch.full((1,), 4, dtype=torch.uint8)
    unit = QuantParams.from_range(torch.zeros(1), torch.ones(1), bits)
    executable = QuantConv2d.from_float(conv, unit, bias_correction="none")
    expected = executable(x)
    assert ptq4cuda.lower_layers(executable) == {}
    assert torch.equal(executable(x), expected)
    assert torch.equal(executable(x[0]), expected[0]) and executable(x[0]).is_contiguous()
    assert executable(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"must be float32, float16 or bfloat16, got torch\.uint8: convert it"):
        executable((255 * x).to(torch.uint8))  # an image, which is not to be taken for codes

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.corrected = QuantConv2d.from_float(conv, unit, bias_correction="mean")
            self.head = QuantLinear.from_float(linear, replace(unit, axis=-1), bias_correction="none")

    two = Two()
    expected = two.head(features)
    reasons = ptq4cuda.lower_layers(two)
    assert list(reasons) == ["corrected"] and "are no signed bytes" in reasons["corrected"]
    assert two.corrected.engine is None and two.head.engine is not None
    assert torch.equal(two.head(features), expected)


def test_lowering_twice(model: nn.Module, images: Tensor) -> None:
    _, integer = both(model, images)
    expected = integer(images)
    for network in (integer, nn.Sequential(integer)):
        assert ptq4cuda.lower_layers(network) == {}
        assert torch.equal(network(images), expected)


def test_files_copies_and_state(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    simulated, integer = both(model, images)
    expected = integer(images)
    ptq4cuda.save(integer, tmp_path / "integer.ptq4")
    loaded = ptq4cuda.load(tmp_path / "integer.ptq4", model)
    assert executions(loaded) == {"integer"}
    assert torch.equal(loaded(images), expected)
    assert torch.equal(copy.deepcopy(integer)(images), expected)
    state, other = integer.state_dict(), simulated.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert torch.equal(loaded.to(torch.float16).float()(images), expected)  # quantizers and weights keep their dtypes


REFUSED = (
    r"a network in integers loads no state_dict: load it into the network that quantize\(.*lower_layers on that$"
)


@pytest.mark.parametrize("wrap", [lambda net: net, Untraceable], ids=["graph", "modules"])
@pytest.mark.parametrize("make", [Bottlenecks, Block, Edges])
def test_state_dicts_load_before_lowering(
    images: Tensor, make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(3)
    simulated, integer = both(wrap(make()).eval(), images)
    before = integer(images)
    for other in both(wrap(make()).eval(), images):
        expected, state = other(images), other.state_dict()
        assert not torch.equal(before, expected)
        network = copy.deepcopy(simulated)
        network.load_state_dict(state)
        assert torch.equal(network(images), expected)
        assert ptq4cuda.lower_layers(network) == {}
        assert torch.equal(network(images), expected)
        assert executions(network) == {"integer"} and executions(simulated) == {"simulate"}
        kept = copy.deepcopy(integer)
        for refusing in (kept, nn.Sequential(kept), copy.deepcopy(kept)):
            prefix = "0." if isinstance(refusing, nn.Sequential) else ""
            with pytest.raises(RuntimeError, match=REFUSED) as caught:
                refusing.load_state_dict({f"{prefix}{name}": t for name, t in state.items()})
            assert "\n" not in str(caught.value)
            assert torch.equal(refusing(images), before)


def test_packed_codes_after_loading(images: Tensor) -> None:
    torch.manual_seed(3)
    config = replace(FAST, execution="simulate", activation_granularity="per_tensor")
    simulated, other = (quantize(Edges().eval(), [images], config, progress=False) for _ in range(2))
    layers = packed_inputs(lowered(simulated, True))
    simulated.load_state_dict(other.state_dict())
    packed = lowered(simulated, True)
    assert packed_inputs(packed) == layers
    assert torch.equal(packed(images), other(images))


def test_state_dicts_that_do_not_load(model: nn.Module, images: Tensor) -> None:
    simulated, integer = both(model, images)
    expected, state = simulated(images), copy.deepcopy(simulated.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "stem.weight_packed"'):
        simulated.load_state_dict({name: t for name, t in state.items() if name != "stem.weight_packed"})
    found = simulated.load_state_dict({"fc.bias": state["fc.bias"] + 1.0, "more": expected}, strict=False)
    assert found.unexpected_keys == ["more"] and "stem.weight_packed" in found.missing_keys
    torch.testing.assert_close(simulated(images), expected + 1.0)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc.bias"):
        simulated.load_state_dict({**state, "fc.bias": expected[0, :2]})
    corrected = {**state, "stem.weight_offset": state["stem.weight_offset"] + 0.3}
    simulated.load_state_dict(corrected)
    reasons = ptq4cuda.lower_layers(simulated)
    assert list(reasons) == ["stem"] and "are no signed bytes" in reasons["stem"]
    assert [layer.execution for layer in record_of(simulated).layers if layer.name == "stem"] == ["simulate"]
    assert "are no signed bytes" in str(ptq4cuda.report(simulated))
    stem = integer.get_submodule("stem")
    with pytest.raises(RuntimeError, match=REFUSED):
        stem.load_state_dict(stem.state_dict())


def test_a_file_is_the_same_in_both_executions_but_for_the_record(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        ptq4cuda.save(quantize(model, [images], progress=False), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_batch_and_size_and_layout_are_free(model: nn.Module, images: Tensor) -> None:
    _, integer = both(model, images)
    assert torch.equal(integer(images[:5]), integer(images)[:5])
    assert integer(torch.randn(2, 3, 30, 18)).shape == (2, 5)
    assert integer(images[:0]).shape == (0, 5)
    assert torch.equal(integer(images.contiguous(memory_format=torch.channels_last)), integer(images))
    expected = integer(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(integer(images), expected)  # nothing in it is for autocast to change


def test_compiles_to_one_graph(model: nn.Module, images: Tensor) -> None:
    _, integer = both(model, images)
    compiled = torch.compile(integer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (images, images[:7]):
        assert torch.equal(compiled(batch), integer(batch))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other row": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
}


class Outputs(nn.Module):
    """Values that come from convolutions in different ways, of grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        y = F.relu(self.b(x) + x)
        z = self.c(y)
        return y, z.permute(0, 2, 3, 1), F.interpolate(z, scale_factor=2.0), z.flatten(1)


@pytest.mark.parametrize("wrap", [lambda net: net, Untraceable], ids=["graph", "modules"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_outputs_lie_in_memory_as_in_float(
    images: Tensor, layout: Callable[[Tensor], Tensor], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(3)
    model = wrap(Outputs()).eval()
    grey = images[:, :1].contiguous()
    simulated, integer = both(model, grey)
    assert executions(integer) == {"integer"}
    x = layout(grey)
    compiled = torch.compile(integer, dynamic=True, fullgraph=not isinstance(model, Untraceable), backend="aot_eager")
    for network in (simulated, integer, compiled):
        for expected, found, exact in zip(model(x), network(x), simulated(x), strict=True):
            assert found.stride() == expected.stride()
            assert torch.equal(found, exact)


def test_a_view_of_a_layer_walked_by_modules(images: Tensor) -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(800, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x)).view(len(x), -1))  # type: ignore[no-any-return]

    _, integer = both(Untraceable(View()).eval(), images)
    assert executions(integer) == {"integer"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrap", [lambda net: net, Untraceable], ids=["graph", "modules"])
def test_the_dtype_of_a_network_in_integers(
    images: Tensor, dtype: torch.dtype, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(3)
    config = replace(FAST, overrides={"*fc": "float"})
    simulated, integer = both(wrap(Bottlenecks()).eval(), images, config)
    expected = integer(images)
    simulated, integer = simulated.to(dtype), integer.to(dtype)
    assert integer(images.to(dtype)).dtype == dtype
    halved = integer(images.to(dtype))
    assert sqnr(simulated(images.to(dtype)), halved) > 30.0  # simulation rounds to it before sums and pooling, too
    integer = copy.deepcopy(integer)
    assert torch.equal(integer(images.to(dtype)), halved)
    with pytest.raises(TypeError, match=r"returns float32, float16 or bfloat16, not torch\.float64"):
        integer.double()
    assert integer.float()(images).dtype == torch.float32
    assert sqnr(expected, integer(images)) > 30.0  # the head was rounded to half precision


def test_half_precision_model(model: nn.Module, images: Tensor) -> None:
    network = quantize(model.to(torch.bfloat16), [images.to(torch.bfloat16)], FAST, progress=False)
    assert executions(network) == {"integer"}
    assert network(images.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(architectures.ARCHITECTURES))
def test_architectures(name: str) -> None:
    batch = architectures.images(4, 64, seed=1)
    net = architectures.ARCHITECTURES[name](num_classes=10, width=0.25)
    net = architectures.calibrate_batch_norm(net, architectures.images(8, 64)).eval()
    simulated, integer = both(net, batch, replace(FAST, weight_bits=8, activation_bits=8))
    assert "integer" in executions(integer), record_of(integer).layers[0].reason
    with torch.no_grad():
        assert torch.equal(simulated(batch), integer(batch))


def test_weights_in_memory(resnet20: networks.Subject) -> None:
    network = quantize(resnet20.model, [resnet20.calibration[:64]], FAST, progress=False)
    held = sum(b.numel() * b.element_size() for m in network.modules() for b in m._buffers.values() if b is not None)
    assert held <= 0.30 * record_of(network).float_bytes


@pytest.mark.parametrize("subject", ["resnet20", "mobilenet"])
@torch.no_grad()
def test_real_networks(subject: str, request: pytest.FixtureRequest) -> None:
    real: networks.Subject = request.getfixturevalue(subject)
    simulated, integer = both(real.model, real.calibration[:64])
    assert executions(integer) == {"integer"}
    for images, _ in real.test:
        assert torch.equal(simulated(images), integer(images))
