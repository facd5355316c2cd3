"""Folding BatchNorm keeps a network's outputs and leaves the model alone; what is not folded has a reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4cuda import QuantConv2d, graph


def test_folding_keeps_the_outputs(model: nn.Module, images: Tensor) -> None:
    traced, reason = graph.trace(model)
    assert traced is not None, reason
    assert graph.fold_batch_norm(traced) == 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in traced.modules())
    with torch.no_grad():
        torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


def test_the_model_is_not_touched(model: nn.Module) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    traced, _ = graph.trace(model)
    assert traced is not None
    graph.fold_batch_norm(traced)
    assert model.relu.inplace
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Shared(nn.Module):
    """A convolution with a second reader, whose BatchNorm must not be folded; or one that is called twice."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.twice = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(self.conv(y)) if self.twice else self.bn(y) + y


def test_a_convolution_with_another_reader_is_not_folded(images: Tensor) -> None:
    model = Shared(twice=False).eval()
    traced, _ = graph.trace(model)
    assert traced is not None
    assert graph.fold_batch_norm(traced) == 0
    torch.testing.assert_close(traced(images), model(images))


def test_each_call_of_a_shared_convolution_folds_for_itself(images: Tensor) -> None:
    model = Shared(twice=True).eval()
    nn.init.uniform_(model.bn.weight, 0.3, 2.0)
    traced, _ = graph.trace(model)
    assert traced is not None
    assert graph.fold_batch_norm(traced) == 1
    torch.testing.assert_close(traced(images), model(images))
    torch.testing.assert_close(traced.conv.weight, model.conv.weight)  # the first call has no BatchNorm
    assert not torch.allclose(traced.conv_call2.weight, model.conv.weight)


def test_linear_batch_norm_is_folded() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    traced, _ = graph.trace(model.eval())
    assert traced is not None
    x = torch.randn(9, 4)
    assert graph.fold_batch_norm(traced) == 1  # the second has no running statistics
    torch.testing.assert_close(traced(x), model(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_gives_a_reason() -> None:
    traced, reason = graph.trace(Branching().eval())
    assert traced is None
    assert "torch.fx cannot trace it" in reason


def test_a_trace_that_computes_something_else_is_noticed() -> None:
    class Random(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Random.calls += 1
            return x * Random.calls

    model = Random().eval()
    traced, _ = graph.trace(model)
    assert traced is not None
    assert "something else" in graph.why_different(model, traced, (torch.ones(2),), {})


def test_activations_are_recognised(model: nn.Module) -> None:
    traced, _ = graph.trace(model)
    assert traced is not None
    found = [a for n in traced.graph.nodes if (a := graph.activation_of(n, traced)) is not None]
    inf = float("inf")
    assert sorted((a.negative_slope, a.upper) for a in found) == [(0.0, 6.0), (0.0, inf), (0.0, inf), (0.1, inf)]


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Renamed(nn.Conv2d):
        pass

    assert graph.quantized_spec(Standardized(1, 1, 1)) is None
    assert "forward of its own" in str(graph.why_float(Standardized(1, 1, 1)))
    assert graph.quantized_spec(Renamed(1, 1, 1)) is QuantConv2d.spec
    assert "ConvTranspose3d" in str(graph.why_float(nn.ConvTranspose3d(1, 1, 1)))
