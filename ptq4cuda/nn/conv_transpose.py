"""Transposed convolutions: convolutions of an image between whose pixels zeros were put."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.nn.spec import LayerSpec


class TransposedSpec(LayerSpec):
    """A transposed convolution, whose layers hold weights [C, O / groups, *kernel].

    With stride - 1 zeros between the pixels it is a convolution of stride 1 with the kernel turned around.
    """

    def row_shape(self, weight_shape: Sequence[int], groups: int) -> torch.Size:
        """Return the shape [O, C / groups, *kernel] of rows, given that of a layer's weight."""
        inputs, per_group, *kernel = weight_shape
        return torch.Size((per_group * groups, inputs // groups, *kernel))

    def to_rows(self, weight: Tensor, groups: int) -> Tensor:
        """Return a layer's weight as rows [O, C / groups, *kernel], the kernel turned around."""
        return self._turned(weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1))

    def from_rows(self, rows: Tensor, groups: int) -> Tensor:
        """Undo to_rows."""
        return self.to_rows(rows, groups)

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.flip(tuple(range(2, 2 + self.dims)))

    def sees_border(self, layer: Any) -> bool:
        """Return True: zeros are beyond the border and between the pixels."""
        return True

    def keeps_size(self, layer: Any) -> bool:
        """Return False."""
        return False


_GEOMETRY = "stride padding output_padding groups dilation"
CONV_TRANSPOSE_1D = TransposedSpec(nn.ConvTranspose1d, 1, F.conv_transpose1d, _GEOMETRY)
CONV_TRANSPOSE_2D = TransposedSpec(nn.ConvTranspose2d, 2, F.conv_transpose2d, _GEOMETRY)
CONV_TRANSPOSE_3D = TransposedSpec(nn.ConvTranspose3d, 3, F.conv_transpose3d, _GEOMETRY)
