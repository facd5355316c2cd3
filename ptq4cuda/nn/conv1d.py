"""QuantConv1d: torch.nn.Conv1d with packed integer weights and a quantized input."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from ptq4cuda.nn.conv import QuantConvNd
from ptq4cuda.nn.spec import LayerSpec


class QuantConv1d(QuantConvNd):
    """A 1-d convolution, drop-in for torch.nn.Conv1d; as QuantConv2d, for input [N, C, L] (or [C, L])."""


QuantConv1d.spec = LayerSpec(nn.Conv1d, 1, F.conv1d, "stride padding dilation groups", QuantConv1d)
