"""Quantized networks on a GPU. What needs none of one runs elsewhere, in the execution model of CUDA."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.bench import architectures
from ptq4cuda.execute.engines import IntegerConv2d
from ptq4cuda.metrics import Noise

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def batch() -> Tensor:
    return architectures.images(4, 64, seed=1)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    net = architectures.build_resnet18(num_classes=10, width=0.5)
    return architectures.calibrate_batch_norm(net, architectures.images(8, 64)).eval()


@pytest.fixture(scope="module")
def network(net: nn.Module, batch: Tensor) -> nn.Module:
    config = QuantConfig(execution="integer")
    return quantize(copy.deepcopy(net).cuda(), [batch.cuda()], config, progress=False)


def sqnr(expected: Tensor, found: Tensor) -> float:
    noise = Noise()
    noise.add(expected.cpu(), found.cpu())
    return 200.0 if noise.sqnr is None else noise.sqnr


def test_codes_travel_packed(network: nn.Module) -> None:
    layers = [module for module in network.modules() if isinstance(module, IntegerConv2d)]
    assert sum(layer.low_bytes > 0 for layer in layers) >= 8
    assert {layer.execution for layer in record_of(network).layers} == {"integer"}


@torch.no_grad()
def test_both_devices_compute_the_same(network: nn.Module, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
    ptq4cuda.save(network, tmp_path / "network.ptq4")
    on_cpu = ptq4cuda.load(tmp_path / "network.ptq4", net)
    on_gpu = ptq4cuda.load(tmp_path / "network.ptq4", copy.deepcopy(net).cuda())
    found = network(batch.cuda())
    assert torch.equal(on_gpu(batch.cuda()), found)
    # The pooled average, in float, rounds otherwise: it can move a code of the last layer's input.
    assert sqnr(on_cpu(batch), found) > 40.0
    moved = copy.deepcopy(on_cpu).to("cuda")
    packed = [engine.low_bytes for engine in network.modules() if isinstance(engine, IntegerConv2d)]
    assert [engine.low_bytes for engine in moved.modules() if isinstance(engine, IntegerConv2d)] == packed
    assert torch.equal(moved(batch.cuda()), found)
    assert torch.equal(moved.cpu()(batch), on_cpu(batch))


@torch.no_grad()
def test_a_network_is_captured(network: nn.Module, batch: Tensor) -> None:
    x = batch.cuda()
    expected = network(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        network(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = network(x)
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)
    x.copy_(batch.flip(0))
    graph.replay()
    assert torch.equal(found, network(x))


@pytest.mark.timeout(150)
@torch.no_grad()
def test_a_network_compiles_to_one_graph(network: nn.Module, batch: Tensor) -> None:
    compiled = torch.compile(network, fullgraph=True, dynamic=True)
    for x in (batch.cuda(), batch[:3].cuda()):
        assert sqnr(network(x), compiled(x)) > 40.0


@torch.no_grad()
def test_batch_and_size_and_autocast(network: nn.Module, batch: Tensor) -> None:
    x = batch.cuda()
    expected = network(x)
    assert sqnr(expected[:2], network(x[:2])) > 40.0
    assert network(torch.randn(2, 3, 50, 70, device="cuda")).shape == (2, 10)
    with torch.autocast("cuda", dtype=torch.float16):
        assert sqnr(expected, network(x)) > 30.0
