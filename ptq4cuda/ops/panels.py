"""How the weights of integer convolutions lie in memory, and how far their products can be summed in 16 bits.

A panel is what a kernel streams through: 16 output channels side by side, so that one 32-bit word of four input
channels meets 16 words of weights. Panels follow each other by group, then by output channel; the words of a panel
by tap (row by row), then by input channel. What is missing to fill a panel or a word is zero.

    [O, R, S, C / groups]  ->  [groups * ceil(O / groups / 16), R * S * ceil(C / groups / 4), 16, 4]

A depthwise convolution has nothing to sum over channels; its weights are one row of channels a tap: [R * S, C].
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUTS = 16  # output channels in a panel
CHANNELS = 4  # input channels in a word
OCTET = 8  # channels whose codes are packed together, see ops.nibbles
NIBBLES = -8  # the span that holds for all codes and weights: 8 pairs of products with numbers up to 15


def is_depthwise(out_channels: int, channels_per_group: int, groups: int) -> bool:
    """Tell whether every output channel reads the one input channel of its number."""
    return groups > 1 and channels_per_group == 1 and out_channels == groups


def whole_octets(out_channels: int, channels_per_group: int, groups: int) -> bool:
    """Tell whether the outputs that are computed together are whole octets, so that they can be packed."""
    together = out_channels if is_depthwise(out_channels, channels_per_group, groups) else out_channels // groups
    return groups == 1 or together % OCTET == 0


def shape_of_panels(
    out_channels: int, kernel: tuple[int, int], channels_per_group: int, groups: int
) -> tuple[int, ...]:
    """Return the shape of the weights of a convolution in panels, or in rows if it is depthwise."""
    taps = kernel[0] * kernel[1]
    if is_depthwise(out_channels, channels_per_group, groups):
        return taps, out_channels
    panels = groups * -(-(out_channels // groups) // OUTPUTS)
    return panels, taps * -(-channels_per_group // CHANNELS), OUTPUTS, CHANNELS


def weight_panels(weight: Tensor, groups: int) -> Tensor:
    """Bring int8 weights [O, R, S, C / groups] into panels, or into rows [R * S, C] if they are depthwise."""
    out_channels, rows, columns, channels = weight.shape
    if is_depthwise(out_channels, channels, groups):
        return weight.view(out_channels, -1).t().contiguous()
    weight = weight.reshape(groups, -1, rows * columns, channels)
    weight = torch.nn.functional.pad(weight, (0, -channels % CHANNELS, 0, 0, 0, -weight.shape[1] % OUTPUTS))
    weight = weight.reshape(-1, OUTPUTS, rows * columns * weight.shape[-1] // CHANNELS, CHANNELS)
    return weight.transpose(1, 2).contiguous()


def weight_of_panels(
    panels: Tensor, out_channels: int, kernel: tuple[int, int], channels: int, groups: int
) -> Tensor:
    """Return the weights [O, R, S, C / groups] that weight_panels arranged; channels is C / groups."""
    rows, columns = kernel
    if is_depthwise(out_channels, channels, groups):
        return panels.t().reshape(out_channels, rows, columns, 1)
    weight = panels.transpose(1, 2).reshape(
        groups, -1, rows * columns, panels.shape[1] * CHANNELS // (rows * columns)
    )
    weight = weight[:, : out_channels // groups, :, :channels]
    return weight.reshape(out_channels, rows, columns, channels)


def span_of_sums(panels: Tensor, largest_code: Tensor, kernel: tuple[int, int], groups: int) -> int:
    """Return how many products can be added up in 16 bits before they must be widened.

    The processor multiplies pairs of neighbouring channels of a word and adds the two products in 16 bits,
    saturating. It may go on adding such pairs while no sum can leave 16 bits, whatever the codes are: which sums can
    is told by the weights that are really there. Depthwise convolutions, whose sums are short, do not ask.

    Args:
        panels: as weight_panels returns them.
        largest_code: int [C], the largest code of every input channel.
        kernel: R, S.
        groups: of the convolution.

    Returns:
        The number of consecutive pairs, a power of two. If even two can be too much, the two nibbles of a code are
        taken one after the other, and the number, which is 8 or more, is that for nibbles, negative.
    """
    if panels.dim() == 2:
        return NIBBLES
    span = _span(panels, largest_code, kernel, groups)
    if span >= 2:
        return span
    return -_span(panels, largest_code.clamp_max(15), kernel, groups)


def _span(panels: Tensor, largest_code: Tensor, kernel: tuple[int, int], groups: int) -> int:
    codes = largest_code.to(torch.int32)
    codes = torch.nn.functional.pad(codes.view(groups, -1), (0, -codes.numel() // groups % CHANNELS))
    codes = codes.view(groups, 1, 1, -1, 1, CHANNELS)
    taps = kernel[0] * kernel[1]
    products = panels.view(groups, -1, taps, codes.shape[3], OUTPUTS, CHANNELS).to(torch.int32) * codes
    products = products.flatten(2, 3).movedim(2, 0).unflatten(-1, (-1, 2)).movedim(-1, 1)  # [steps, 2, ...]
    # The largest and the least value that the sum of a pair can take: its positive and its negative products.
    ends = torch.stack([products.clamp_min(0).sum(1), products.clamp_max(0).sum(1)], dim=1)  # [steps, 2, ...]
    span, width = 0, 1
    while bool((ends <= 32767).all() and (ends >= -32768).all()):
        span, width = width, 2 * width
        if len(ends) == 1:
            return max(span, 8)  # these are all there are
        if len(ends) % 2:
            ends = torch.cat([ends, torch.zeros_like(ends[:1])])
        ends = ends.unflatten(0, (-1, 2)).sum(1)
    return span
