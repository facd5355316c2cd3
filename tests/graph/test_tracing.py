"""What torch.fx would trace is traced, node for node, and no other thread notices."""

from __future__ import annotations

import math
import sys
import threading
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.bench import architectures
from ptq4cuda.graph.shapes import Shapes
from ptq4cuda.graph.trace import own_copy, trace
from ptq4cuda.graph.tracer import Tracer
from ptq4cuda.metrics import Noise

FAST = QuantConfig.fast()


def padding_for(size: Any, stride: int) -> Any:
    return ceil(size / stride) * stride - size


def halves(x: Tensor) -> Tensor:
    """A leaf: torch.fx cannot trace through it."""
    return x[:, : x.shape[1] // 2] if len(x) else x


fx.wrap("halves")
fx.wrap("len")


class Scaled(nn.Module):
    """Functions of math, functions that torch.fx is told to record, helpers, parameters that code reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((1,), 2.0))])
        self.weight, self.plain = nn.Parameter(torch.ones(1, 8, 1, 1)), torch.full((1,), 0.5)
        self.register_buffer("shift", torch.zeros(1))
        self.same = self.conv
        self.helper = padding_for

    @torch.no_grad()
    def scaled(self, x: Tensor) -> Tensor:
        return x / math.sqrt(x.shape[1]) * self.weight.abs() + self.shift

    def forward(self, x: Tensor, *, flag: Tensor | None = None) -> Tensor:
        pad = self.helper(x.shape[-1], 4)
        x = self.scaled(F.relu(self.conv(F.pad(x, (0, pad)))))
        x = x * self.scales[1] + self.scales[0] + len(x)
        return self.last(halves(x)) * self.plain


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.tail = Scaled(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)
        y = self.tail[1](self.tail[0](y)) + self.inner.scales[0]
        y += 1
        return self.tail(y), torch.arange(3)


def nodes_of(graph: fx.Graph) -> list[tuple[str, ...]]:
    return [
        (n.op, str(n.target), n.name, str(n.args), str(n.kwargs), str(n.meta.get("nn_module_stack")), str(n.type))
        for n in graph.nodes
    ]


@pytest.mark.parametrize("name", [*architectures.ARCHITECTURES, "outer"])
def test_the_graph_is_that_of_torch_fx(name: str) -> None:
    model = (Outer() if name == "outer" else architectures.ARCHITECTURES[name](num_classes=4, width=0.125)).eval()
    ours, theirs = Tracer(), Tracer()
    theirs.shapes = Shapes(model)
    found = ours.trace(own := own_copy(model))
    assert nodes_of(found) == nodes_of(fx.Tracer.trace(theirs, own_copy(model)))
    attributes = {"_compiled_call_impl", "forward", "scaled", "helper"}
    for a, b in zip(own.modules(), model.modules(), strict=True):  # as they were
        assert attributes & vars(a).keys() == attributes & vars(b).keys()
        assert type(vars(a)["_parameters"]) is dict


def test_recorded_functions_are_in_the_graph() -> None:
    network, reason = trace(Outer().eval())
    assert network is not None, reason
    assert {math.sqrt, halves, len, ceil} <= {node.target for node in network.graph.nodes}
    model, x = Outer().eval(), torch.randn(2, 3, 6, 6)
    network, _ = trace(model)
    assert network is not None
    with torch.no_grad():
        assert torch.equal(network(x)[0], model(x)[0])


def test_parts_of_a_sequence_are_called() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return nn.ReLU()(self.layers[:2](x))  # type: ignore[no-any-return]

    network, reason = trace(Parts().eval())
    assert network is not None, reason
    assert [node.op for node in network.graph.nodes].count("call_module") == 2


class Witness(nn.Module):
    """Sees what torch.fx.Tracer.trace would change for everyone."""

    seen: tuple[Any, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        Witness.seen = shared()
        return self.conv(x) * math.sqrt(x.shape[1])


def shared() -> tuple[Any, ...]:
    found: list[Any] = []

    def look() -> None:
        own = vars(sys.modules[__name__])
        found.extend((nn.Module.__call__, nn.Module.__getattr__, vars(math)["sqrt"], own["halves"], own.get("len")))
        found.append(_symbolic_trace.is_fx_symbolic_tracing())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return tuple(found)


def test_nothing_that_is_shared_changes() -> None:
    before = shared()
    network, reason = trace(Witness().eval())
    assert network is not None, reason
    assert Witness.seen == before


def test_threads_go_on_while_others_quantize_and_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Outer().eval(), torch.randn(4, 3, 6, 6)
    network = quantize(model, [x], FAST, progress=False)
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    with torch.no_grad():
        expected = [net(x)[0] for net in (model, network)]
    working, calls, errors = threading.Event(), [0, 0], []
    working.set()

    def serve(index: int) -> None:
        net = (model, network)[index]
        while working.is_set() or not calls[index]:
            try:
                with torch.no_grad():
                    assert torch.equal(net(x)[0], expected[index])
                calls[index] += 1
            except Exception as error:
                errors.append(error)
                return

    def work(index: int) -> None:
        try:
            for _ in range(3):
                made = (
                    ptq4cuda.load(tmp_path / "net.ptq4", model)
                    if index
                    else quantize(model, [x], FAST, progress=False)
                )
                with torch.no_grad():
                    assert torch.equal(made(x)[0], expected[1])
                assert record_of(made).walked_by == "graph", record_of(made).reason
        except Exception as error:
            errors.append(error)

    servers = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 1)]
    for thread in servers + workers:
        thread.start()
    for thread in workers:
        thread.join()
    working.clear()
    for thread in servers:
        thread.join()
    assert not errors
    assert all(calls)


# --- modules that cannot be traced ----------------------------------------------------------------------------------


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.abs().sum() > 0 else x


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if x.abs().sum() > 0 else x


class Around(nn.Module):
    """A module that cannot be traced amid layers."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(F.relu(self.bn(self.conv(x)))))


def around(inside: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = Around(inside).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2.0)
    return model


class LeafTracer(fx.Tracer):
    """Leaves modules whole, as converters do."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Opaque, Branching)) or super().is_leaf_module(m, module_qualified_name)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.abs().sum() > 0 else x


def test_a_module_without_layers_that_cannot_be_traced_is_a_node() -> None:
    model = around(nn.Sequential(Opaque(), nn.Sequential(Opaque(), nn.ReLU())))
    network = quantize(model, [architectures.images(8, 12)], FAST, progress=False)
    record = record_of(network)
    assert (record.walked_by, record.folded) == ("graph", 1)
    assert {layer.name: layer.execution for layer in record.layers} == {"conv": "integer", "last": "integer"}


def test_one_with_layers_is_walked_by_its_modules() -> None:
    record = record_of(quantize(around(Branching()), [architectures.images(8, 12)], FAST, progress=False))
    assert record.walked_by == "modules"
    assert {layer.name for layer in record.layers if layer.execution == "integer"} == {"conv", "last", "inside.conv"}


def test_a_node_that_writes_into_its_input_is_noticed() -> None:
    model, x = around(Writes()), architectures.images(8, 12)
    network = quantize(model, [x], QuantConfig.naive(8, 8), progress=False)
    assert record_of(network).reason == (
        "its module 'inside', which torch.fx cannot trace, changes its input in place"
    )


@pytest.mark.parametrize("inside", [Opaque(), Branching()], ids=["without layers", "with layers"])
def test_graph_modules_keep_their_leaves(inside: nn.Module) -> None:
    model = around(inside)
    model = fx.GraphModule(model, LeafTracer().trace(model)).eval()
    network = quantize(model, [architectures.images(8, 12)], FAST, progress=False)
    record = record_of(network)
    assert (record.walked_by, record.folded) == ("graph", 1)
    reasons = {layer.name: layer.reason for layer in record.layers if layer.execution == "float"}
    assert reasons == ({} if isinstance(inside, Opaque) else {"inside": "Branching is not supported"})


class ChangesAView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.flatten(1).mul_(2.0)
        return x


def test_a_graph_module_whose_graph_cannot_be_walked(tmp_path: Path) -> None:
    model, x = fx.symbolic_trace(around(ChangesAView())).eval(), architectures.images(8, 12)
    network = quantize(model, [x], FAST, progress=False)
    record = record_of(network)
    assert record.walked_by == "modules"
    assert "it changes 'relu' or a view of it in place" in record.reason
    assert {layer.execution for layer in record.layers if layer.kind == "Conv2d"} == {"integer"}
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    loaded = ptq4cuda.load(tmp_path / "net.ptq4", model)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))
        noise = Noise()
        noise.add(model(x), network(x))
    assert noise.sqnr is not None
    assert noise.sqnr > 10
    simulated = ptq4cuda.load(tmp_path / "net.ptq4", model, execution="simulate")
    simulated.load_state_dict(network.state_dict())
