"""LayerSpec: what a kind of layer is, for all that folds, weighs, quantizes and executes layers.

Every kind is a convolution over images of `dims` dimensions; a linear layer is one over images of none. Row o of its
weights, [O, C / groups, *kernel], is what output channel o sums up its window with. A kind whose layers hold weights
in another order, or see another window, is a subclass that says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.compat import CONV_FORWARD

if TYPE_CHECKING:
    from ptq4cuda.nn.quant_module import QuantModule

_COMPUTING = ("forward", CONV_FORWARD)  # methods that tell what a layer computes
WINDOW_BITS = 6  # of codes whose windows can be transformed within bytes, at most

_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def per_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return an argument of a convolution for each dimension, as PyTorch reads it: one number counts for all."""
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * dims if len(given) == 1 else given


Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """How the window of a 2-d convolution moves, as in torch.nn.Conv2d; zeros are on both sides.

    Attributes:
        stride, padding, dilation, groups: as in torch.nn.Conv2d.
        phases: the convolution has phases[0] * phases[1] outputs for each of the layer's, a block of pixels of it.
        start: the first of these pixels that the layer returns.
        extra: how many it returns beyond phases times those of the input; None for all.
    """

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    phases: Pair = (1, 1)
    start: Pair = (0, 0)
    extra: Pair | None = None

    def arranged(self, y: Tensor, x: Tensor) -> Tensor:
        """Return images [N, O, H, W] of what the convolution makes of images x, y [N, O * phases, A, B]."""
        if self.extra is None:
            return y
        (n, _, a, b), (v, h), (top, left) = y.shape, self.phases, self.start
        blocks = y.permute(0, 2, 3, 1).reshape(n, a, b, -1, v, h).permute(0, 1, 4, 2, 5, 3)
        height, width = (size * p + e for size, p, e in zip(x.shape[2:], self.phases, self.extra, strict=True))
        pixels = blocks.reshape(n, a * v, b * h, -1)[:, top : top + height, left : left + width]
        return pixels.permute(0, 3, 1, 2)

    def __str__(self) -> str:
        parts = [
            "" if max(self.stride) == 1 else f"stride {pair_text(self.stride)}",
            "" if max(self.padding) == 0 else f"padding {pair_text(self.padding)}",
            "" if max(self.dilation) == 1 else f"dilation {pair_text(self.dilation)}",
            "" if self.groups == 1 else f"{self.groups} groups",
            "" if max(self.phases) == 1 else f"blocks of {pair_text(self.phases)}",
        ]
        return ", ".join(filter(None, parts))


def pair_text(pair: Pair) -> str:
    """Return a pair as text, one number where both are the same."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """A kind of layer.

    Attributes:
        float_class: of torch.nn.
        dims: dimensions of its images; 0 for linear layers, whose input is [*, C] instead of [N, C, *size].
        function: of torch.nn.functional, which computes it.
        arguments: of the function and of the class after input, weight and bias, as the function orders them.
        quantized: the module that takes its place; None for a kind that stays in float.
    """

    float_class: type[nn.Module]
    dims: int
    function: Callable[..., Tensor]
    arguments: str = ""
    quantized: type[QuantModule] | None = None

    @property
    def name(self) -> str:
        """The name of the float class, as files and reports have it."""
        return self.float_class.__name__

    @property
    def axis(self) -> int:
        """The channel axis of input and output, counted from the back."""
        return -1 - self.dims

    @property
    def form(self) -> str:
        """The shape of its input, for people."""
        return ("[*, C]", "[N, C, L]", "[N, C, H, W]", "[N, C, D, H, W]")[self.dims]

    @property
    def adds_codes(self) -> bool:
        """Whether its integer form adds codes of another tensor to its sums, as those of a shortcut."""
        return self.dims > 0

    @property
    def norm(self) -> type[nn.Module]:
        """The BatchNorm for the dimensions of its output."""
        return _NORMS[self.dims]

    def computes(self, module: nn.Module) -> bool:
        """Tell whether a module computes what the class does, as subclasses without a forward of their own do."""
        kind, base = type(module), self.float_class
        return isinstance(module, base) and all(
            getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTING
        )

    def is_single(self, x: Tensor) -> bool:
        """Tell whether a value of a layer is of a single image, without a batch dimension."""
        return self.dims > 0 and x.dim() == self.dims + 1

    # --- weights ----------------------------------------------------------------------------------------------

    def row_shape(self, weight_shape: Sequence[int], groups: int) -> torch.Size:
        """Return the shape [O, C / groups, *kernel] of rows, given that of a layer's weight."""
        return torch.Size(weight_shape)

    def to_rows(self, weight: Tensor, groups: int) -> Tensor:
        """View a layer's weight as rows [O, C / groups, *kernel]."""
        return weight

    def from_rows(self, rows: Tensor, groups: int) -> Tensor:
        """Undo to_rows."""
        return rows

    def groups(self, layer: Any) -> int:
        """Return the number of groups of a layer."""
        return int(getattr(layer, "groups", 1))

    def is_depthwise(self, layer: Any) -> bool:
        """Tell whether each output reads one input channel of several."""
        groups = self.groups(layer)
        return groups > 1 and self.row_shape(layer.weight.shape, groups)[1] == 1

    def rows(self, layer: Any) -> Tensor:
        """Return the weights of a float layer as rows."""
        return self.to_rows(layer.weight.detach(), self.groups(layer))

    def set_rows(self, layer: Any, rows: Tensor, bias: Tensor) -> None:
        """Give a float layer other weights, and a bias."""
        dtype = layer.weight.dtype
        weight = self.from_rows(rows.detach().to(dtype), self.groups(layer))
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def layer_for(self, weight: Tensor, geometry: dict[str, Any]) -> nn.Module:
        """Return a float layer, on the meta device, that computes what the function does with these arguments."""
        rows = self.row_shape(weight.shape, geometry.get("groups", 1))
        inputs, kernel = rows[1] * geometry.get("groups", 1), (tuple(rows[2:]),) if self.dims else ()
        return self.float_class(inputs, rows[0], *kernel, **geometry, device="meta")

    # --- what a layer reads -------------------------------------------------------------------------------------

    def sees_border(self, layer: Any) -> bool:
        """Tell whether a layer sees zeros beyond the border of its input, which a shift would have to move."""
        if not self.dims or layer.padding_mode != "zeros":
            return False
        if isinstance(layer.padding, str):
            return layer.padding == "same" and max(layer.weight.shape[2:]) > 1
        return any(per_dim(layer.padding, self.dims))

    def keeps_size(self, layer: Any) -> bool:
        """Tell whether the output has the size of the input by a kernel of one pixel."""
        if isinstance(layer.padding, str) or any(per_dim(layer.padding, self.dims)):
            return False
        return max(per_dim(layer.stride, self.dims)) == 1 and max(layer.kernel_size) == 1

    def input_cost(self, layer: Any, outputs: Tensor | None = None) -> Tensor:
        """Return what a squared error of each input channel costs, float64 [C], given what one of each output does.

        An input is read once for each position of the kernel that meets it: r·s / (stride²) times.

        Args:
            layer: in float.
            outputs: float64 [O]; None for 1 each.
        """
        squares = self.rows(layer).double().square()
        outputs = squares.new_ones(len(squares)) if outputs is None else outputs
        if not self.dims:
            return outputs @ squares
        groups = self.groups(layer)
        energy = squares.sum(tuple(range(2, squares.dim()))).view(groups, -1, squares.shape[1])  # [G, O / G, C / G]
        cost = (outputs.view(groups, -1, 1) * energy).sum(1).flatten()
        return cost / self.inputs_per_window(layer)

    def inputs_per_window(self, layer: Any) -> int:
        """Return by how many positions of the input its windows move on, in all dimensions."""
        return math.prod(per_dim(layer.stride, self.dims))

    def windows(self, layer: Any, x: Tensor) -> Tensor:
        """View what a quantized layer's outputs read of x [N, C, *size] ([*, C] without dimensions).

        Returns:
            [N, *output size, *kernel, C].
        """
        if not self.dims:
            return x
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padding = layer.explicit_padding
        x = F.pad(x, padding, mode=mode) if any(padding) else x
        return sliding_windows(x, layer.kernel_size, layer.stride, layer.dilation)

    def in_windows(self, layer: Any) -> bool:
        """Tell whether CPUs convolve codes of WINDOW_BITS bits window by window, in half to two thirds of the time.

        csrc/cpu/conv_winograd.h has how, and which layers.
        """
        if self.dims != 2 or layer.groups > 1 or layer.in_channels % 16:
            return False
        kernel, *ones = (per_dim(v, 2) for v in (layer.kernel_size, layer.stride, layer.dilation))
        return kernel == (3, 3) and all(pair == (1, 1) for pair in ones)

    # --- as a 2-d convolution -----------------------------------------------------------------------------------

    def geometry(self, layer: Any) -> Geometry | None:
        """Return the geometry of the 2-d convolution that a quantized layer is; None for one without images.

        Raises:
            ValueError: it is none; the message says why.
        """
        if not self.dims:
            return None
        if layer.padding_mode != "zeros":
            raise ValueError(f"its padding has the mode {layer.padding_mode!r}")
        padding = layer.padding
        if isinstance(padding, str):
            total = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
            if padding == "same" and any(t % 2 for t in total):
                raise ValueError("its padding 'same' is wider on one side, as its kernel has an even size")
            padding = [t // 2 if padding == "same" else 0 for t in total]
        return Geometry(
            self._in_2d(layer.stride, 1), self._in_2d(padding, 0), self._in_2d(layer.dilation, 1), layer.groups
        )

    def _in_2d(self, values: Sequence[int], missing: int) -> Pair:
        above, right = (missing,) * (2 - self.dims) + tuple(values)
        return above, right

    def to_2d(self, layer: Any, weight: Tensor) -> Tensor:
        """Return weights [O, *kernel, C / groups] as those of the 2-d convolution, [O * phases, R, S, C / groups]."""
        outputs, *kernel, inputs = weight.shape
        return weight.reshape(outputs, *self._in_2d(kernel, 1), inputs)

    def from_2d(self, layer: Any, weight: Tensor) -> Tensor:
        """Undo to_2d."""
        return weight.reshape(len(weight), *weight.shape[3 - self.dims : 3], weight.shape[-1])

    def images(self, x: Tensor) -> Tensor:
        """View the input of a layer as images [N, C, H, W]."""
        if not self.dims:
            return x.reshape(-1, x.shape[-1], 1, 1)
        return x.unsqueeze(-2) if self.dims == 1 else x

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """View images as what a layer returns for its input x."""
        if not self.dims:
            return y.view(*x.shape[:-1], y.shape[1])
        return y.squeeze(-2) if self.dims == 1 else y


def sliding_windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """View the windows of a kernel on x [N, C, *size] as [N, *positions, *kernel, C]."""
    x = x.movedim(1, -1).contiguous()
    n, *sizes, channels = x.shape
    of_n, *of_sizes, of_channels = x.stride()
    each = list(zip(sizes, of_sizes, kernel, stride, dilation, strict=True))
    positions = [(size - d * (k - 1) - 1) // s + 1 for size, _, k, s, d in each]
    return x.as_strided(
        (n, *positions, *kernel, channels),
        (of_n, *(step * s for _, step, _, s, _ in each), *(step * d for _, step, _, _, d in each), of_channels),
    )
