"""Networks that many tests use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """BatchNorm, a residual sum, pooling, depthwise and grouped layers, activations as functions and as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn1 = nn.BatchNorm2d(8)
        self.leaky = nn.LeakyReLU(0.1)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=1, groups=2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.stem(x))))
        x = x + self.pointwise(self.leaky(self.bn1(self.depthwise(x))))
        x = F.relu(self.grouped(F.relu6(x)))
        return self.fc(x.mean((2, 3)))


class Deep(nn.Module):
    """Layers of one kind; the channels of one of them differ so much that a single scale hurts it."""

    def __init__(self, bad: int | None = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6))
        self.fc = nn.Linear(8, 5)
        for layer in self.layers:  # so that the signal does not fade on the way
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if bad is not None:
            with torch.no_grad():  # one output channel of huge weights that the next layer hardly reads
                self.layers[bad].weight[:, 0] *= 0.005
                self.layers[bad - 1].weight[0] *= 200.0
                self.layers[bad - 1].bias[0] *= 200.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.fc(x.mean((2, 3)))


class Writes(nn.Module):
    """Normalizes its input in place, and branches on values: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.25).sub_(0.125)
        x = self.first(x).relu()
        return self.third(self.second(x).relu() if x.sum() > -1.0 else x)


def calibrate_batch_norm(model: nn.Module, x: Tensor) -> nn.Module:
    """Give random BatchNorms statistics that fit, and weights that differ by channel."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 2.0)
            nn.init.normal_(module.bias)
            module.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()
