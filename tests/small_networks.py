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
