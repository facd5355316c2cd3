"""Where statistics are all that counts, batches go through the network one by one, and the same network comes out."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda.pipeline as pipeline
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import LayerRecord, record_of
from ptq4cuda.calibrate import by_batches, histograms


class Net(nn.Module):
    """Known and unknown activations, a pooled one, a sum, a concatenation, and two readers of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.down, self.a, self.b = nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.point(F.relu6(self.depthwise(x)))
        x = F.max_pool2d(F.relu(self.down(x)), 2)
        x = torch.cat([self.a(x), F.silu(self.b(x))], 1)
        return self.head(x.mean((2, 3)))


CONFIGS = {
    "naive": QuantConfig.naive(),
    "paper": QuantConfig.paper(),
    "per tensor": QuantConfig.w8a4(activation_granularity="per_tensor", activation_allocation="uniform"),
    "in float": QuantConfig.paper(overrides={"down": "float"}),
}


def made(batches: list[Tensor], config: QuantConfig) -> tuple[str, dict[str, Any]]:
    network = quantize(Net().eval(), batches, config, progress=False)
    return pipeline.fingerprint(network), {**record_of(network).to_dict(), "seconds": 0.0}


@pytest.mark.parametrize(("name", "broken"), [*((name, False) for name in CONFIGS), ("paper", True)])
def test_the_network_is_that_of_all_batches_together(
    name: str, broken: bool, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images[:20].clone()
    if broken:
        images[13, 0, 2, 3] = 1e4
    batches = list(images.split(3))
    network, record = made(batches, CONFIGS[name])
    monkeypatch.setattr(pipeline, "can_walk_batches", lambda *_: False)
    other, its_record = made(batches, CONFIGS[name])
    assert network == other
    assert record.pop("frontier_bytes") < 0.5 * its_record.pop("frontier_bytes")
    assert record == its_record
    assert broken == ("clipped there" in record["layers"][0]["reason"])


def test_more_batches_take_no_more_memory(images: Tensor) -> None:
    held = [made([images[:4]] * count, QuantConfig.paper())[1]["frontier_bytes"] for count in (3, 12)]
    assert held[0] == held[1] > 0


def test_little_is_kept_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Python's objects, of which each layer had 700 bytes for each batch; tensors are held in one block."""
    monkeypatch.setattr(histograms, "_VALUES", 64)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 1) for _ in range(7))).eval()

    held: list[int] = []

    def finished_records(walk: by_batches._BatchWalk) -> list[LayerRecord]:
        # What is garbage depends on when Python last looked for it: what is held does not.
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        return finished(walk)

    finished = by_batches._BatchWalk.finished_records
    monkeypatch.setattr(by_batches._BatchWalk, "finished_records", finished_records)
    for count in (3, 6, 30):  # the first makes what is made once
        tracemalloc.start()
        quantize(network, [torch.ones(1, 3, 4, 4)] * count, QuantConfig.naive(), progress=False)
        tracemalloc.stop()
    assert 0 < held[2] - held[1] < 24 * 8 * 350
