"""Transposed convolutions: convolutions of an image between whose pixels zeros were put."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.nn.conv import misfit_of_images
from ptq4cuda.nn.quant_module import QuantModule
from ptq4cuda.nn.spec import Geometry, LayerSpec, per_dim, sliding_windows

if TYPE_CHECKING:
    from typing_extensions import Self


class TransposedSpec(LayerSpec):
    """A transposed convolution, whose layers hold weights [C, O / groups, *kernel].

    With stride - 1 zeros between the pixels it is a convolution of stride 1 with the kernel turned around.
    """

    @property
    def adds_codes(self) -> bool:
        """False: its outputs come in an order of their own."""
        return False

    def row_shape(self, weight_shape: Sequence[int], groups: int) -> torch.Size:
        """Return the shape [O, C / groups, *kernel] of rows, given that of a layer's weight."""
        inputs, per_group, *kernel = weight_shape
        return torch.Size((per_group * groups, inputs // groups, *kernel))

    def to_rows(self, weight: Tensor, groups: int) -> Tensor:
        """Return a layer's weight as rows [O, C / groups, *kernel], the kernel turned around."""
        rows: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return rows.flip(tuple(range(2, rows.dim())))

    def from_rows(self, rows: Tensor, groups: int) -> Tensor:
        """Undo to_rows."""
        return self.to_rows(rows, groups)  # it changes places, and turns again

    def sees_border(self, layer: Any) -> bool:
        """Return True: zeros are beyond the border and between the pixels."""
        return True

    def keeps_size(self, layer: Any) -> bool:
        """Return False."""
        return False

    def inputs_per_window(self, layer: Any) -> int:
        """Return 1: each input meets all of the kernel."""
        return 1

    def windows(self, layer: Any, x: Tensor) -> Tensor:
        """View what a quantized layer's outputs read of x [N, C, *size], zeros between the pixels included.

        Returns:
            [N, *output size, *kernel, C].
        """
        sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], layer.stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        pixels: Any = (..., *(slice(None, None, s) for s in layer.stride))
        spread[pixels] = x
        padding: list[int] = []
        each = zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True)
        for k, d, p, more in reversed(list(each)):
            before = d * (k - 1) - p
            padding += [before, before + more]
        return sliding_windows(F.pad(spread, padding), layer.kernel_size, (1,) * self.dims, layer.dilation)

    # An output at j sums up x[i] * w[k] over all i * stride + k * dilation = j + padding. Of j + padding = stride * m
    # + r, phase r reads k * dilation = stride * t + r, that is the taps t of a convolution of x: x[m - t].

    def geometry(self, layer: Any) -> Geometry:
        """Return the geometry of the 2-d convolution whose outputs are the pixels of blocks of the stride's size."""
        padding, start, extra = [], [], []
        each = zip(layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation, strict=True)
        for k, s, p, more, d in each:
            reach = d * (k - 1)
            around = max(0, reach // s - p // s, (reach + more - p) // s)
            padding.append(around)
            start.append(p - s * (reach // s - around))
            extra.append(reach + more + 1 - 2 * p - s)
        return Geometry(
            padding=self._in_2d(padding, 0),
            dilation=self._in_2d([d if s == 1 else 1 for s, d in zip(layer.stride, layer.dilation, strict=True)], 1),
            groups=layer.groups,
            phases=self._in_2d(layer.stride, 1),
            start=self._in_2d(start, 0),
            extra=self._in_2d(extra, 0),
        )

    def _taps(self, layer: Any) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Yield each position in the kernel of a row, the phase that it belongs to, and its position there."""
        sizes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        each = []
        for k, s, d in sizes:
            d = d if s > 1 else 1
            last = d * (k - 1) // s
            each.append([(k - 1 - i, i * d % s, last - i * d // s) for i in range(k)])
        for taps in itertools.product(*each):
            row, phase, tap = zip(*taps, strict=True)
            yield self._in_2d(row, 0), self._in_2d(phase, 0), self._in_2d(tap, 0)

    def to_2d(self, layer: Any, weight: Tensor) -> Tensor:
        """Return weights [O, *kernel, C / groups] as those of the 2-d convolution, [O * phases, R, S, C / groups]."""
        rows = super().to_2d(layer, weight)
        taps = list(self._taps(layer))
        size = [1 + max(tap[i] for _, _, tap in taps) for i in range(2)]
        of_phases = rows.new_zeros(len(rows), *self._in_2d(layer.stride, 1), *size, rows.shape[-1])
        for row, phase, tap in taps:
            of_phases[:, phase[0], phase[1], tap[0], tap[1]] = rows[:, row[0], row[1]]
        return of_phases.flatten(0, 2)

    def from_2d(self, layer: Any, weight: Tensor) -> Tensor:
        """Undo to_2d."""
        of_phases = weight.unflatten(0, (-1, *self._in_2d(layer.stride, 1)))
        rows = weight.new_empty(len(of_phases), *self._in_2d(layer.kernel_size, 1), weight.shape[-1])
        for row, phase, tap in self._taps(layer):
            rows[:, row[0], row[1]] = of_phases[:, phase[0], phase[1], tap[0], tap[1]]
        return super().from_2d(layer, rows)


class QuantConvTransposeNd(QuantModule):
    """What the transposed convolutions share; the constructor takes the arguments of torch.nn's."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        *,
        quantized_input: bool = True,
        folded: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        # A float layer without memory checks the arguments.
        geometry: Any = self.spec.float_class(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias=False,
            dilation=dilation,
            device="meta",
        )
        rows = self.spec.row_shape(geometry.weight.shape, groups)
        super().__init__(tuple(rows), groups, bias, quantized_input, folded, device)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size: tuple[int, ...] = geometry.kernel_size
        self.stride: tuple[int, ...] = geometry.stride
        self.padding: tuple[int, ...] = geometry.padding
        self.output_padding: tuple[int, ...] = geometry.output_padding
        self.dilation: tuple[int, ...] = geometry.dilation
        self.padding_mode = "zeros"

    @classmethod
    def like(cls, layer: Any, *, quantized_input: bool = True, folded: bool = True) -> Self:
        """Return a layer that computes as this one does when it is called, on the same device, with weights zero."""
        out_channels, per_group, *kernel_size = cls.spec.row_shape(layer.weight.shape, layer.groups)
        dims = cls.spec.dims
        quantized = cls(
            per_group * layer.groups,
            out_channels,
            tuple(kernel_size),
            per_dim(layer.stride, dims),
            per_dim(layer.padding, dims),
            per_dim(layer.output_padding, dims),
            layer.groups,
            layer.bias is not None,
            per_dim(layer.dilation, dims),
            quantized_input=quantized_input,
            folded=folded,
            device=layer.weight.device,
        )
        quantized.dtype = layer.weight.dtype
        return quantized

    def forward(self, input: Tensor) -> Tensor:
        """Return the transposed convolution of the quantized input with the quantized weights."""
        return self._call(input, self._convolve)

    def _misfit(self, x: Tensor) -> str:
        return misfit_of_images(self, x)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.spec.function(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def extra_repr(self) -> str:
        """Describe geometry and bits, as `print(module)` shows them."""
        return f"{nn.ConvTranspose2d.extra_repr(self)}, {super().extra_repr()}"  # type: ignore[arg-type]


class QuantConvTranspose1d(QuantConvTransposeNd):
    """A 1-d transposed convolution, drop-in for torch.nn.ConvTranspose1d; input [N, C, L] (or [C, L])."""


class QuantConvTranspose2d(QuantConvTransposeNd):
    """A 2-d transposed convolution, drop-in for torch.nn.ConvTranspose2d, but for the argument output_size of calls.

    The constructor takes nn.ConvTranspose2d's arguments and makes a layer whose weights are zero, to load a
    state_dict into; from_float quantizes a trained layer. Input [N, C, H, W] (or [C, H, W]) float32, float16 or
    bfloat16; the output has the input's dtype.
    """


_ARGUMENTS = "stride padding output_padding groups dilation"
QuantConvTranspose1d.spec = TransposedSpec(
    nn.ConvTranspose1d, 1, F.conv_transpose1d, _ARGUMENTS, QuantConvTranspose1d
)
QuantConvTranspose2d.spec = TransposedSpec(
    nn.ConvTranspose2d, 2, F.conv_transpose2d, _ARGUMENTS, QuantConvTranspose2d
)
CONV_TRANSPOSE_3D = TransposedSpec(nn.ConvTranspose3d, 3, F.conv_transpose3d, _ARGUMENTS)
