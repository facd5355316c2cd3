"""What benchmarks/models.py says about networks beside their times."""

from __future__ import annotations

import models
import torch
from torch import nn


@torch.no_grad()
def test_peak_of_activations() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    assert models.peak_bytes(net, torch.zeros(2, 3, 4, 4)) == 2 * (
        2 * 8 * 16 * 4
    )  # of the ReLU; flattening is a view
    assert models.peak_bytes(nn.ReLU(inplace=True), torch.zeros(2, 3)) == 0


def test_layers_and_networks() -> None:
    rows = models.measure_layers("mobilenet_v2", 1, 32, 1)
    assert len(rows) == 53
    assert rows[0]["kernel"] == "3x3/2, 8-bit codes"
    assert rows[0]["in"] == [1, 3, 32, 32]
    assert "depthwise" in rows[1]["kernel"]
    assert any("2 outputs" in row["kernel"] for row in rows)
    float32, integer = models.measure("mobilenet_v2", [1], 32, False, False, 1)
    assert (float32["way"], integer["way"]) == ("float32", models.INTEGER)
    assert integer["runs_as"] == ["integer"]
    assert integer["peak_activation_bytes"] < float32["peak_activation_bytes"] / 3
    assert integer["held_bytes"] < float32["held_bytes"] / 3
