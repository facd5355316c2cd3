"""Layers of very many inputs are solved block by block: they lose little, and cost what grows with the inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda import QuantConfig, quantize
from ptq4cuda.calibrate import moments
from ptq4cuda.metrics import Noise
from ptq4cuda.solve import blocks, rounding
from ptq4cuda.solve.blocks import from_blocks, to_blocks

DEFAULT = QuantConfig(execution="simulate")


@pytest.fixture
def images() -> Tensor:
    """More than the linear layer has inputs."""
    return torch.randn(384, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are wide from 100 inputs on, and blocks have 64."""
    for module in (blocks, moments):
        monkeypatch.setattr(module, "WIDEST", 100)
        monkeypatch.setattr(module, "BLOCK", 64)


class Wide(nn.Module):
    """A convolution of 144 inputs in each of two groups, a linear layer of 288."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.fc, self.head = nn.Linear(32 * 9, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        return self.head(F.relu(self.fc(F.avg_pool2d(x, 4).flatten(1))))


def sqnr(images: Tensor, config: QuantConfig) -> float:
    torch.manual_seed(0)
    model = Wide().eval()
    network = quantize(model, list(images.split(128)), config, progress=False)
    test = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    noise = Noise()
    with torch.no_grad():
        noise.add(model(test), network(test))
    assert noise.sqnr is not None
    return noise.sqnr


@pytest.mark.parametrize("width", [96, 97, 100])
def test_blocks_hold_all_inputs_once(width: int) -> None:
    x = torch.arange(2.0 * 3 * width).view(2, 3, width)
    parts = to_blocks(x, 4)
    assert parts.shape == (8, 3, -(-width // 4))
    assert torch.equal(parts[1, :, :3], x[0, :, [1, 5, 9]])
    assert torch.equal(parts[4, :, 0], x[1, :, 0])  # the first block of the second group
    assert torch.equal(from_blocks(parts, 4, width), x)
    assert float(parts.sum()) == float(x.sum())


CONFIGS = {
    "default": DEFAULT,
    "compensated": replace(DEFAULT, target="weights", rounding="compensated"),
    "nearest": replace(DEFAULT, target="output", rounding="nearest"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_blocks_lose_little(images: Tensor, config: QuantConfig, request: pytest.FixtureRequest) -> None:
    whole = sqnr(images, config)
    request.getfixturevalue("narrow")
    assert abs(sqnr(images, config) - whole) < 0.75


def test_blocks_keep_what_rounding_gains(narrow: None) -> None:
    """Judged by all pairs of inputs, of which the blocks see a quarter."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 16, 256, generator=generator)
    u = torch.randn(1, 256, 24, generator=generator) @ torch.randn(24, 2000, generator=generator)
    u = (u + 0.3 * torch.randn(1, 256, 2000, generator=generator)).double()
    parts = to_blocks(u.mT, 4).mT
    bits = torch.full((16,), 4, dtype=torch.uint8)

    def error(covariance: Tensor, how: rounding.Rounding) -> float:
        found = rounding.round_for_output(weight, bits, covariance / 2000, how)
        values = (found.codes + found.offset[:, None]) * found.scale[:, None]
        return float(((values - weight[0]).double() @ u[0]).square().mean())

    whole, blockwise = error(u @ u.mT, "descent"), error(parts @ parts.mT, "descent")
    nearest = error(parts @ parts.mT, "nearest")
    assert whole < blockwise < 0.5 * nearest


def test_rows_at_a_time_are_rows_at_once(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, 130, generator=generator)
    u = torch.randn(2 * 3, 44, 200, generator=generator, dtype=torch.float64)
    u[:, -1, :] = 0.0  # filled up
    bits = torch.tensor([4, 8, 4, 4, 3, 4] * 2, dtype=torch.uint8)
    once = rounding.round_for_output(weight, bits, u @ u.mT / 200, "descent")
    monkeypatch.setattr(rounding, "_VALUES", 6 * 2 * 130)
    rows = rounding.round_for_output(weight, bits, u @ u.mT / 200, "descent")
    assert once.codes.shape == (12, 130) and once.scale.shape == once.offset.shape == (12,)
    assert bool((once.codes <= torch.exp2(bits.float())[:, None] - 1).all())
    assert float((once.codes != rows.codes).float().mean()) < 0.01  # sums of another order
    assert torch.allclose(once.scale, rows.scale, rtol=1e-2)


def test_nothing_is_as_large_as_all_pairs_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes d² numbers and d³ steps is done for blocks alone."""
    largest: list[int] = []
    cholesky = torch.linalg.cholesky

    def recorded(matrix: Tensor, **options: bool) -> Tensor:
        largest.append(matrix.shape[-1])
        return cholesky(matrix, **options)

    monkeypatch.setattr(torch.linalg, "cholesky", recorded)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2592, 4)).eval()
    images = torch.randn(8, 3, 20, 20)
    network = quantize(net, [images], DEFAULT, progress=False)
    assert max(largest) == 864 < blocks.BLOCK < blocks.WIDEST < 2592
    noise = Noise()
    with torch.no_grad():
        noise.add(net(images), network(images))
    assert noise.sqnr is not None and noise.sqnr > 20.0
