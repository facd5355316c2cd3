"""Wide layers are solved block by block: the moments of d inputs take d² numbers, and solving for them d³ steps.

Of k blocks the first has the inputs 0, k, 2k, ..., so that each has some of all kernel positions and channels. Blocks
are laid out as groups are, [G * k, ..., d / k].
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

WIDEST = 2560  # inputs of a layer that is solved as a whole
BLOCK = 1024  # inputs of a block, at most


def block_count(width: int) -> int:
    """Return the number of blocks of a layer."""
    return 1 if width <= WIDEST else -(-width // BLOCK)


def to_blocks(x: Tensor, blocks: int) -> Tensor:
    """Part the inputs of [G, ..., d], filled up with zeros, into blocks [G * blocks, ..., d / blocks]."""
    if blocks == 1:
        return x
    parts: Tensor = F.pad(x, (0, -x.shape[-1] % blocks)).unflatten(-1, (-1, blocks))
    return parts.movedim(-1, 1).flatten(0, 1)


def from_blocks(x: Tensor, blocks: int, width: int) -> Tensor:
    """Undo to_blocks."""
    if blocks == 1:
        return x
    parts: Tensor = x.unflatten(0, (-1, blocks))
    return parts.movedim(1, -1).flatten(-2)[..., :width]
