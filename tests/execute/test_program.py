"""LayerProgram: it says what is computed, for any target, and codes pass through what only moves them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, ops, quantize
from ptq4cuda.bench import architectures
from ptq4cuda.compat import tree_map
from ptq4cuda.execute import program as steps
from ptq4cuda.execute.engines import packed_values
from ptq4cuda.execute.program import LayerProgram, Value, map_values
from ptq4cuda.quantizer import QuantParams

FAST = QuantConfig.fast()
PER_TENSOR = replace(FAST, activation_granularity="per_tensor")


def quantized(model: nn.Module, batch: Tensor, config: QuantConfig = FAST) -> tuple[nn.Module, nn.Module]:
    """Return a network simulated and in integers."""
    simulate, integer = (replace(config, execution=execution) for execution in ("simulate", "integer"))
    return quantize(model, [batch], simulate, progress=False), quantize(model, [batch], integer, progress=False)


def interpret(program: LayerProgram, network: nn.Module, *inputs: Tensor) -> Any:
    """Execute a program by the letter, in floating point of 64 bits, as a target that knows nothing of ours would."""
    found: dict[Value, Any] = {}
    given = list(inputs)

    def vector(p: Tensor, axis: int, dims: int) -> Tensor:
        return p.view([-1 if d == axis % dims else 1 for d in range(dims)]) if p.numel() > 1 else p

    def values(value: Value) -> Tensor:
        q, codes = value.quantizer, found[value]
        assert q is not None
        return (codes.float() - vector(q.zero_point, 1, codes.dim()).float()) * vector(q.scale, 1, codes.dim())

    def layer(step: steps.Layer) -> None:
        source = step.source.quantizer
        assert source is not None
        x, (weight, scale) = found[step.source].double(), step.weight()
        x = x - vector(source.zero_point, 1 if step.geometry else -1, x.dim())
        if step.geometry is None:
            y = F.linear(x, weight.double())
        else:
            g, flat = step.geometry, x.dim() == 3
            x = x.unsqueeze(2) if flat else x  # a sequence is an image of height one
            y = torch.conv2d(x, weight.double().movedim(-1, 1), None, g.stride, g.padding, g.dilation, g.groups)
            if g.extra is not None:  # outputs are blocks of pixels
                y = y.unflatten(1, (-1, *g.phases)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
                for dim, (size, p, e, first) in enumerate(zip(x.shape[2:], g.phases, g.extra, g.start, strict=True)):
                    y = y.narrow(2 + dim, first, size * p + e)
            y = y.squeeze(2) if flat else y
        axis = 1 if step.geometry else -1
        y = y.float() * vector(scale, axis, y.dim())
        y = y if step.bias is None else y + vector(step.bias, axis, y.dim())
        y = y if step.residual is None else y + values(step.residual)
        y = step.activation(y)
        for output in step.outputs:
            q = output.quantizer
            found[output] = y if q is None else ops.quantize(y, q.scale, q.zero_point, q.bits, axis)

    for step in program:
        sources, output = [found[source] for source in step.sources], step.outputs[0]
        if isinstance(step, steps.Input):
            found[output] = given.pop(0) if given else step.default[0]
        elif isinstance(step, steps.Layer):
            layer(step)
        elif isinstance(step, steps.Quantize):
            assert output.quantizer is not None
            found[output] = output.quantizer.quantize(sources[0])
        elif isinstance(step, steps.MaxPool):
            window = (step.kernel_size, step.stride, step.padding, step.dilation, step.ceil_mode)
            x = sources[0].unsqueeze(2) if sources[0].dim() == 3 else sources[0]
            y = F.max_pool2d(x.float(), *window).to(torch.uint8)
            found[output] = y.squeeze(2) if x is not sources[0] else y
        elif isinstance(step, steps.Concatenate):
            found[output] = torch.cat(sources, 1)
        elif isinstance(step, steps.Reshape):
            found[output] = getattr(sources[0], step.kind)(step.dim)
        elif isinstance(step, steps.PixelShuffle):
            found[output] = F.pixel_shuffle(sources[0], step.factor)
        else:
            args, kwargs = map_values(found.__getitem__, (step.args, step.kwargs))
            target: Any = step.target
            if step.kind == "method":
                target, args = getattr(args[0], target), args[1:]
            elif step.kind == "module":
                target = network.get_submodule(target)
            found[output] = network.get_parameter(target) if step.kind == "attribute" else target(*args, **kwargs)
    return map_values(found.__getitem__, program.result)


@pytest.mark.parametrize("name", [*sorted(architectures.ARCHITECTURES), "audio"])
@torch.no_grad()
def test_a_program_is_all_that_a_target_needs(name: str) -> None:
    make, size = (architectures.waves, 2000) if name == "audio" else (architectures.images, 64)
    build = architectures.build_audio if name == "audio" else architectures.ARCHITECTURES[name]
    batch, net = make(2, size, seed=1), build(num_classes=10, width=0.25)
    net = architectures.calibrate_batch_norm(net, make(4, size)).eval()
    network = quantize(net, [batch], FAST, progress=False)
    expected = network(batch)
    found = interpret(ptq4cuda.program(network), network, batch)
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), expected, found)


def kinds(program: LayerProgram) -> list[str]:
    return [type(step).__name__ for step in program]


def test_a_program_prints_a_line_a_step(images: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.up, self.fc = nn.Conv3d(1, 1, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            x = F.max_pool2d(F.relu6(self.a(x)), 2)
            x = F.leaky_relu(self.b(x) + x, 0.1)
            return self.fc(self.up(x[:, None])[:, 0].mean((2, 3)) * scale)

    torch.manual_seed(0)
    _, integer = quantized(Net().eval(), images)
    assert str(ptq4cuda.program(integer)).split("\n") == [
        "x = input",
        "x_codes [8 bits each] = quantize(x)",
        "scale = input, 1.0 where there is none",
        "relu6_codes [8 bits each], relu6_codes_2 [4 bits each] = a(x_codes): Conv2d 3 → 8, 5x5, stride 2, "
        "padding 2, weights of 8 bits, relu6",
        "max_pool2d_codes [8 bits each] = max_pool(relu6_codes): 2, stride 2",
        "max_pool2d_codes_2 [4 bits each] = max_pool(relu6_codes_2): 2, stride 2",
        "leaky_relu = b(max_pool2d_codes_2): Conv2d 8 → 8, 3x3, padding 1, 2 groups, weights of 4 bits, "
        "+ max_pool2d_codes, leaky_relu 0.1",
        "getitem = float getitem(leaky_relu, (:, None))",
        "up = float Conv3d(getitem): Conv3d is not supported",
        "getitem_1 = float getitem(up, (:, 0))",
        "mean = float mean(getitem_1, (2, 3))",
        "mul = float mul(mean, scale)",
        "mul_codes [8 bits each] = quantize(mul)",
        "fc = fc(mul_codes): Linear 8 → 4, weights of 8 bits",
        "return fc",
    ]


class Moves(nn.Module):
    """Convolutions with something between that only moves values."""

    def __init__(self, move: Callable[[Tensor], Tensor], channels: int, last: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, channels, 1), last
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.first(x))))
        return self.last(self.move(y))  # type: ignore[no-any-return]


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int, Callable[[], nn.Module], list[str]]] = {
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), 16, lambda: nn.Conv2d(4, 5, 3), ["PixelShuffle"]),
    "module": (nn.PixelShuffle(3), 18, lambda: nn.Conv2d(2, 5, 3), ["PixelShuffle"]),
    "shuffled and pooled": (
        lambda x: F.max_pool2d(F.pixel_shuffle(x, 2), 2),
        8,
        lambda: nn.Conv2d(2, 5, 1),
        ["PixelShuffle", "MaxPool"],
    ),
    "put side by side": (
        lambda x: torch.cat([F.pixel_shuffle(x, 2), F.pixel_shuffle(x, 2)], 1),
        8,
        lambda: nn.Conv2d(4, 5, 1),
        ["PixelShuffle", "PixelShuffle", "Concatenate"],
    ),
    "one row": (
        lambda x: F.max_pool2d(x, (12, 1)).squeeze(2).unsqueeze(2),
        8,
        lambda: nn.Conv2d(8, 5, (1, 3)),
        ["MaxPool", "Reshape", "Reshape"],
    ),
    "one column": (
        lambda x: torch.unsqueeze(torch.squeeze(F.max_pool2d(x, (1, 12)), -1), dim=-2),
        8,
        lambda: nn.Conv2d(8, 5, (1, 3)),
        ["MaxPool", "Reshape", "Reshape"],
    ),
    "one pixel": (
        lambda x: F.max_pool2d(x, 12).squeeze(3).squeeze(2),
        8,
        lambda: nn.Linear(8, 5),
        ["MaxPool", "Reshape", "Reshape"],
    ),
}
FLATTENS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(start_dim=1, end_dim=3),
    "module": nn.Flatten(),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape((x.shape[0], -1)),
}


def moves(network: nn.Module) -> list[str]:
    """Return the steps after the last layer but one, and assert that codes alone pass from there to the last."""
    program = ptq4cuda.program(network)
    layers = [i for i, step in enumerate(program) if isinstance(step, steps.Layer)]
    between = program.steps[layers[-2] + 1 : layers[-1]]
    assert not any(isinstance(step, steps.Quantize) for step in between)
    return [type(step).__name__ for step in between]


@pytest.mark.parametrize("config", [FAST, PER_TENSOR], ids=["per channel", "per tensor"])
@pytest.mark.parametrize(("move", "channels", "last", "expected"), MOVES.values(), ids=MOVES)
def test_codes_pass_through_what_moves_them(
    images: Tensor,
    move: Callable[[Tensor], Tensor],
    channels: int,
    last: Callable[[], nn.Module],
    expected: list[str],
    config: QuantConfig,
) -> None:
    torch.manual_seed(3)
    model = Moves(move, channels, last()).eval()
    model.second.weight.data *= torch.linspace(0.1, 3.0, channels).view(-1, 1, 1, 1)  # so that quantizers differ
    simulated, integer = quantized(model, images, config)
    assert moves(integer) == expected
    assert torch.equal(simulated(images), integer(images))
    assert torch.equal(interpret(ptq4cuda.program(integer), integer, images), integer(images))
    compiled = torch.compile(integer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(images[:7]), integer(images[:7]))


@pytest.mark.parametrize("flatten", FLATTENS.values(), ids=FLATTENS)
def test_codes_are_flattened(images: Tensor, flatten: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(3)
    simulated, integer = quantized(Moves(flatten, 4, nn.Linear(576, 5)).eval(), images, PER_TENSOR)
    assert "Reshape" in moves(integer)
    assert torch.equal(simulated(images), integer(images))
    assert integer(images[:0]).shape == (0, 5)


def test_features_with_quantizers_of_their_own_are_quantized_after_flattening(images: Tensor) -> None:
    """576 features of four channels, whose places have other ranges."""
    torch.manual_seed(3)
    simulated, integer = quantized(Moves(nn.Flatten(), 4, nn.Linear(576, 5)).eval(), images)
    assert kinds(ptq4cuda.program(integer))[-3:] == ["Float", "Quantize", "Layer"]
    assert torch.equal(simulated(images), integer(images))


def test_a_linear_layer_along_another_axis_reads_no_codes_of_channels(images: Tensor) -> None:
    """As many columns as channels: a quantizer of columns must not be taken along the channels."""

    class Along(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x)))  # type: ignore[no-any-return]

    torch.manual_seed(3)
    weighted = images[:16] * torch.linspace(0.1, 4.0, 12)  # columns have other ranges
    simulated, integer = quantized(Along().eval(), weighted)
    assert kinds(ptq4cuda.program(integer))[-3:] == ["Layer", "Quantize", "Layer"]
    assert torch.equal(simulated(weighted), integer(weighted))


def test_a_program_travels_with_its_network(images: Tensor, model: nn.Module) -> None:
    _, integer = quantized(model, images)
    text = str(ptq4cuda.program(integer))
    for other in (copy.deepcopy(integer), pickle.loads(pickle.dumps(integer))):
        found = ptq4cuda.program(other)
        assert str(found) == text
        modules = dict(other.named_modules())
        for step in found:
            if isinstance(step, steps.Layer):
                assert step.module is modules[step.name]
        assert torch.equal(interpret(found, other, images), integer(images))


def test_a_program_holds_nothing_of_torch_fx(images: Tensor, model: nn.Module) -> None:
    _, integer = quantized(model, images)
    seen: set[int] = set()
    waiting: list[Any] = [ptq4cuda.program(integer)]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (nn.Module, Tensor, type, str)):
            continue
        seen.add(id(item))
        assert not isinstance(item, (fx.Node, fx.Graph)) and not type(item).__module__.startswith("torch.fx"), item
        waiting += (
            list(item.values()) if isinstance(item, dict) else list(item) if isinstance(item, (tuple, list)) else []
        )
        waiting += list(getattr(item, "__dict__", {}).values()) if not callable(item) else []


def test_networks_without_a_program(images: Tensor, model: nn.Module) -> None:
    simulated, _ = quantized(model, images)
    for network in (simulated, nn.Conv2d(3, 4, 1)):
        with pytest.raises(TypeError, match=r"has no program: it does not compute in integers as a whole"):
            ptq4cuda.program(network)


def test_what_a_gpu_packs(images: Tensor) -> None:
    """From convolutions to convolutions without groups, of few bits."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1, groups=2)
            self.d = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))  # type: ignore[no-any-return]

    torch.manual_seed(3)
    config = replace(PER_TENSOR, first_last_bits=4)
    _, integer = quantized(Net().eval(), images, config)
    program = ptq4cuda.program(integer)
    made = {value: step for step in program for value in step.outputs}
    assert sorted(made[value].name for value in packed_values(program)) == ["a", "c"]  # type: ignore[union-attr]
    assert all(isinstance(value.quantizer, QuantParams) for value in packed_values(program))
