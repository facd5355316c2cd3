"""Serving: many threads, changing sizes, others that quantize, and processes that are forked."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import serving
import torch
from torch import Tensor, nn

from ptq4cuda import QuantConfig, quantize


def test_many_threads_are_served_alike() -> None:
    told: list[str] = []
    result = serving.serve(2.0, 3, told.append)
    assert result.calls > 20
    assert result.quantized > 0
    assert result.wrong == 0
    assert len(result.curve) == len(told) > 3
    assert all(len(points) == 4 and points == sorted(points) for points in result.milliseconds.values())


@pytest.mark.parametrize(("after", "growth"), [(100.0, 0.0), (130.0, 0.3)])
def test_growth_is_that_of_the_second_half(after: float, growth: float) -> None:
    curve = [(0.0, 50.0), *[(float(i), 100.0) for i in range(1, 9)], *[(float(i), after) for i in range(9, 12)]]
    assert replace(serving.Result(12, 1), curve=curve).growth == pytest.approx(growth)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked")
def test_a_forked_process_with_one_thread() -> None:
    """As a DataLoader's worker has it; with more, also operators of torch hang in it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 40, 40)
    network = quantize(model, [x], QuantConfig.fast(), progress=False)
    expected = network(x)
    context = multiprocessing.get_context("fork")
    found: multiprocessing.Queue[bool] = context.Queue()

    def work(x: Tensor) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            found.put(torch.equal(network(x), expected))

    process = context.Process(target=work, args=(x,))
    process.start()
    try:
        assert found.get(timeout=60)
    finally:
        process.kill()
        process.join()
