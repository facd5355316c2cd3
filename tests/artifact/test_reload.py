"""What quantize() and save() make, load() reads in another process, and the outputs are the same bit for bit."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import ptq4cuda
from execute import test_lowering
from graph import test_tracing
from pipeline import test_models
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.bench import architectures
from small_networks import Residual

FAST = QuantConfig.fast()


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that is written as a function, with a check of the dimensions, and its activation."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return F.relu(x)


class Unfolded(nn.Module):
    """Functional BatchNorms that stay: before a convolution that pads with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = NormAct(3), nn.Conv2d(3, 8, 3, padding=1)
        self.between, self.last = NormAct(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(x))
        return self.last(self.between(y) + y)  # type: ignore[no-any-return]


class Versioned(nn.Module):
    """Modules with a state of their own kind: extra state, buffers that are None or not saved, plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=True)
        self.norm.num_batches_tracked = None
        self.register_buffer("nothing", None)
        self.register_buffer("ramp", torch.linspace(0.5, 1.0, 4).view(1, 4, 1, 1), persistent=False)
        self.factor, self.step = torch.tensor(1.5), 7
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(self.norm(y) * self.ramp + y * self.factor)  # type: ignore[no-any-return]


class ByModules(nn.Module):
    """What torch.fx cannot trace around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x if x.sum() > -1e9 else x * 0)


def networks() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Return every architecture that the tests build, with inputs."""
    found: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {}
    for name in architectures.ARCHITECTURES:
        model, x = test_models.build(name)
        found[name] = model, (x[:2],)
    x = architectures.images(4, 12)
    for model in (
        *(Residual(), Unfolded(), Versioned(), ByModules(Unfolded()), ByModules(Versioned())),
        *(test_lowering.Block(), test_lowering.Bottlenecks(), test_lowering.Edges()),
        *(test_lowering.Readers(residual, values) for residual in (False, True) for values in (False, True)),
        *(test_tracing.Outer(), test_tracing.around(test_tracing.Opaque())),
        *(test_models.Pattern(forward) for forward in test_models.PATTERNS),
    ):
        found[f"{type(model).__name__} {len(found)}"] = model.eval(), (x,)
    converted = test_tracing.around(test_tracing.Opaque())
    graph = test_tracing.LeafTracer().trace(converted)
    for node in graph.nodes:
        node.type = None  # torch.fx cannot pickle annotations that are strings
    found["GraphModule"] = fx.GraphModule(converted, graph).eval(), (x,)
    model, *inputs = test_models.everything()
    found["everything"] = model, tuple(inputs)
    return found


SCRIPT = """
import sys
import torch
import ptq4cuda
sys.path[:0] = sys.argv[2:]
torch.set_grad_enabled(False)
for name, (file, model, inputs, expected) in torch.load(sys.argv[1], weights_only=False).items():
    found = ptq4cuda.load(file, model)(*(x.clone() for x in inputs))
    found = torch.utils._pytree.tree_leaves(found)
    assert len(found) == len(expected), name
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    print(name)
"""


def test_files_are_read_in_another_process(tmp_path: Path) -> None:
    cases: dict[str, Any] = {}
    for name, (model, inputs) in networks().items():
        batch = dict(zip(inspect.signature(model.forward).parameters, (x.clone() for x in inputs), strict=False))
        network = quantize(model, [batch], FAST, progress=False)
        file = tmp_path / f"{len(cases)}.ptq4"
        ptq4cuda.save(network, file)
        with torch.no_grad():
            expected = tree_leaves(network(*(x.clone() for x in inputs)))
        other = copy.deepcopy(model)
        if not isinstance(other, fx.GraphModule):
            architectures.randomize(other, seed=5)
        cases[name] = file, other, inputs, expected
    torch.save(cases, tmp_path / "cases.pt")
    paths = [str(Path(__file__).parents[1]), *(p for p in sys.path if p)]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "cases.pt", *paths], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:-1] == list(cases)
