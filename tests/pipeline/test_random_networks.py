"""Random CNNs keep what every network is promised: through quantize, save, load, simulation, integers and export.

PTQ4CUDA_EXAMPLES says how many; `tools/dev fuzz networks 1000` sets it.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig

EXAMPLES = int(os.environ.get("PTQ4CUDA_EXAMPLES", "0"))
# Without a wish, the same few networks every time.
settings_here = settings(
    max_examples=EXAMPLES or 12,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

Draw = Callable[[Any], Any]
Made = tuple[nn.Module, list[Tensor]]
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Tanh,
    nn.ELU,
    nn.PReLU,
    lambda: nn.LeakyReLU(0.1),
    lambda: nn.ReLU(inplace=True),
)
PADDING_MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")


class Sum(nn.Module):
    """A residual block: x + body(x), the shortcut perhaps a layer of its own."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.shortcut(x) + self.body(x))


class Branches(nn.Module):
    """Branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Twice(nn.Module):
    """A layer that is called two times."""

    def __init__(self, layer: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.layer, self.between = layer, between

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.between(self.layer(x)))


class Heads(nn.Module):
    """Several outputs: the trunk's, and those of heads."""

    def __init__(self, trunk: nn.Module, **heads: nn.Module) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {name: head(x) for name, head in self.heads.items()}


class Mean(nn.Module):
    """Global average pooling."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.over = tuple(range(-dims, 0))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.over)


class Networks:
    """Draws a network for images or sequences, part by part; `size` is that of its tensors so far."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.dims = draw(st.sampled_from((2, 2, 2, 1)))
        self.channels = draw(st.integers(1, 4))
        self.size = [draw(st.integers(7, 13)) for _ in range(self.dims)]

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def layer_class(self, kind: str) -> Any:
        return getattr(nn, f"{kind}{self.dims}d")

    def activation(self) -> nn.Module:
        made: nn.Module = self.one_of(*ACTIVATIONS)()
        return made

    def convolution(self, channels: int | None = None, keep: bool = False) -> list[nn.Module]:
        """A convolution, perhaps with BatchNorm, and an activation; `keep` the size."""
        before = self.channels
        kernel = [self.one_of(1, 3, 3, 2 if not keep else 3) for _ in range(self.dims)]
        dilation = [self.one_of(1, 1, 2) for _ in range(self.dims)]
        stride = [1 if keep else self.one_of(1, 1, 2) for _ in range(self.dims)]
        wide = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
        padding = wide if keep else [self.one_of(0, k // 2) for k in kernel]
        moved = [
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(self.size, padding, dilation, kernel, stride, strict=True)
        ]
        if min(moved) < 3:
            kernel, dilation, stride, padding = ([v] * self.dims for v in (1, 1, 1, 0))
            moved = self.size
        kind = self.one_of("whole", "whole", "whole", "depthwise", "grouped")
        after = channels or self.one_of(2, 3, 4, 6, 8, 16)
        groups = 1
        if kind == "depthwise":
            groups, after = before, channels or before * self.one_of(1, 2)
        elif kind == "grouped" and before % 2 == 0 and after % 2 == 0:
            groups = 2
        if after % groups or before % groups:
            groups = 1
        mode = self.one_of(*PADDING_MODES) if all(p < s for p, s in zip(padding, self.size, strict=True)) else "zeros"
        layer = self.layer_class("Conv")(
            before, after, kernel, stride, padding, dilation, groups, self.draw(st.booleans()), mode
        )
        self.channels, self.size = after, moved
        return self.normalized(layer)

    def normalized(self, layer: nn.Module) -> list[nn.Module]:
        parts = [layer]
        if self.draw(st.booleans()):
            norm = self.layer_class("BatchNorm")(self.channels)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            parts.append(norm)
        return [*parts, self.activation()]

    def part(self, depth: int) -> list[nn.Module]:
        kinds = ["convolution"] * 3 + ["pool", "twice", "transposed", "shuffle"]
        kind = self.one_of(*kinds, *(["sum", "sum", "branches"] if depth else []))
        if kind == "sum":
            before = self.channels
            body = nn.Sequential(*self.convolution(keep=True), *self.convolution(before, keep=True)[:-1])
            shortcut: nn.Module = nn.Identity()
            if self.draw(st.booleans()):
                shortcut = self.layer_class("Conv")(before, before, 1)
            return [Sum(body, shortcut, self.activation())]
        if kind == "branches":
            before, branches, channels = self.channels, [], 0
            for _ in range(self.one_of(2, 3)):
                self.channels = before
                branches.append(nn.Sequential(*self.convolution(keep=True)))
                channels += self.channels
            self.channels = channels
            return [Branches(*branches)]
        if kind == "twice":
            layer = self.layer_class("Conv")(self.channels, self.channels, 3, padding=1)
            return [Twice(layer, self.activation())]
        if kind == "transposed" and max(self.size) < 13:
            after = self.one_of(2, 4, 8)
            layer = self.layer_class("ConvTranspose")(self.channels, after, self.one_of(2, 3), stride=2)
            self.channels, self.size = after, [2 * (s - 1) + layer.kernel_size[0] for s in self.size]
            return self.normalized(layer)
        if kind == "shuffle" and self.dims == 2 and max(self.size) < 13:
            before = self.convolution(8, keep=True)
            self.channels, self.size = self.channels // 4, [2 * s for s in self.size]
            return [*before, nn.PixelShuffle(2)]
        if kind == "pool" and min(self.size) >= 6:
            self.size = [s // 2 for s in self.size]
            return [self.layer_class(self.one_of("MaxPool", "AvgPool"))(2)]
        return self.convolution()

    def head(self) -> nn.Module:
        kind = self.one_of("linear", "linear", "flatten", "image")
        if kind == "image":
            return self.layer_class("Conv")(self.channels, self.one_of(1, 3), 1)
        if kind == "flatten":
            features = self.channels
            for size in self.size:
                features *= size
            return nn.Sequential(nn.Flatten(), nn.Linear(features, 5))
        return nn.Sequential(Mean(self.dims), nn.Linear(self.channels, self.one_of(1, 5)))

    def network(self) -> tuple[nn.Module, list[Tensor]]:
        """Return a network in evaluation mode, and batches for it."""
        seed, batch = self.draw(st.integers(0, 99)), self.draw(st.integers(1, 3))
        torch.manual_seed(seed)
        shape = (batch, self.channels, *self.size)
        # The memory format of one channel is in the eye of the beholder.
        channels_last = self.dims == 2 and self.channels > 1 and self.draw(st.booleans())
        trunk = [*self.convolution()]
        for _ in range(self.draw(st.integers(0, 4))):
            trunk += self.part(1)
        count = self.one_of(1, 1, 2)
        model: nn.Module
        if count == 1:
            model = nn.Sequential(*trunk, self.head())
        else:
            model = Heads(nn.Sequential(*trunk), **{f"head{i}": self.head() for i in range(count)})
        batches = [torch.randn(shape) for _ in range(2)]
        if channels_last:
            batches = [b.contiguous(memory_format=torch.channels_last) for b in batches]
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.eval(), batches


@st.composite
def networks(draw: Draw) -> Made:
    return Networks(draw).network()


@st.composite
def configurations(draw: Draw) -> QuantConfig:
    preset = draw(st.sampled_from(("default", "fast", "naive", "paper", "w8a4", "w4a8")))
    config = QuantConfig() if preset == "default" else getattr(QuantConfig, preset)()
    if preset in ("default", "fast"):
        config = replace(
            config,
            weight_bits=draw(st.sampled_from((2, 3, 4, 4, 5, 8))),
            activation_bits=draw(st.sampled_from((2, 4, 4, 6, 8))),
            first_last_bits=draw(st.sampled_from((4, 8))),
            activation_granularity=draw(st.sampled_from(("per_channel", "per_tensor"))),
        )
    return config


def leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output.values())


def laid_out(x: Tensor) -> list[int]:
    """The strides that matter."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def as_wanted(output: Tensor, model: nn.Module, x: Tensor) -> Tensor:
    """A float output in the memory format of the quantized one: that of x, which circular padding forgets."""
    if output.dim() == 4 and any(getattr(m, "padding_mode", "") == "circular" for m in model.modules()):
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return output


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@settings_here
@given(made=networks(), config=configurations(), exported=st.integers(1, 4))
def test_random_networks(tmp_path: Path, made: Made, config: QuantConfig, exported: int) -> None:
    model, batches = made
    note(f"{model}\n{[b.shape for b in batches]}\n{config}")
    x, before = batches[0], copy.deepcopy(model.state_dict())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network = ptq4cuda.quantize(model, batches, config, progress=False)
        wanted, found = model(x), network(x)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        for a, b in zip(leaves(wanted), leaves(found), strict=True):
            a = as_wanted(a, model, x)
            assert (a.shape, a.dtype, laid_out(a)) == (b.shape, b.dtype, laid_out(b))
            assert bool(torch.isfinite(b).all())
        assert same(network(x), found)
        file, again = tmp_path / "net.ptq4", tmp_path / "again.ptq4"
        ptq4cuda.save(network, file)
        loaded = ptq4cuda.load(file, model)
        assert same(loaded(x), found)
        ptq4cuda.save(loaded, again)
        assert file.read_bytes() == again.read_bytes()
        assert same(ptq4cuda.load(file, model, execution="simulate")(x), found)
        assert same(copy.deepcopy(network)(x), found)
        if exported == 1:
            program = torch.export.export(network, (x,), strict=False)
            assert same(program.module()(x), found)


def test_the_networks_are_of_many_kinds() -> None:
    """The few that are drawn here have what the strategy is there for."""
    seen: set[str] = set()

    @settings(settings_here, max_examples=200, derandomize=True)
    @given(made=networks())
    def look(made: Made) -> None:
        seen.update(type(m).__name__ for m in made[0].modules())

    look()
    wanted = {"Conv1d", "Conv2d", "ConvTranspose2d", "Linear", "Sum", "Branches", "Twice", "Heads", "PixelShuffle"}
    assert wanted - seen == set()
