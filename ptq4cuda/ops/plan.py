"""How conv2d_integer cuts a convolution into blocks on CUDA, to be looked at: the rule itself is csrc/conv_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from ptq4cuda import _native


class ConvPlan(NamedTuple):
    """The blocks of one launch.

    Attributes:
        tile: outputs and pixels of a block.
        splits: shares that the sums are computed in; more than one takes a second kernel, which adds them up.
        blocks: all of them.
        busiest: blocks of the multiprocessor that has most.
        cycles: what the rule counts.
    """

    tile: tuple[int, int]
    splits: int
    blocks: int
    busiest: int
    cycles: float

    def fill(self, multiprocessors: int) -> float:
        """Return the share of the multiprocessors' time that blocks fill, when each takes as long."""
        return self.blocks / (self.busiest * multiprocessors)

    def describe(self, multiprocessors: int) -> str:
        """Say it in a line."""
        shares = f", {self.splits} shares" if self.splits > 1 else ""
        return (
            f"{self.tile[0]} x {self.tile[1]}{shares}: {self.blocks} blocks, at most {self.busiest} on a "
            f"multiprocessor, {self.fill(multiprocessors):.0%} full"
        )


def conv_plan(
    pixels: int, outputs: int, groups: int, chunks: int, packed: bool, vectors: bool, multiprocessors: int
) -> ConvPlan:
    """Return the plan of a convolution.

    Args:
        pixels: of the output, of all images.
        outputs: channels of a group.
        groups: of the convolution, which is not depthwise.
        chunks: of 64 columns, a column for each tap and input channel of a group or nibble.
        packed: the codes are packed.
        vectors: the channels of a group, or the nibbles of a section, fill 16 bytes.
        multiprocessors: of the device.

    Raises:
        ImportError: the native library is missing.
    """
    if _native.library is None:
        raise ImportError(_native.cpu_reason)
    arguments = (pixels, outputs, groups, chunks, packed, vectors, multiprocessors)
    found = (ctypes.c_double * 6)()
    _native.library.ptq4cuda_conv_plan((ctypes.c_int64 * len(arguments))(*arguments), found)
    *whole, cycles = found
    tile_outputs, tile_pixels, splits, blocks, busiest = map(int, whole)
    return ConvPlan((tile_outputs, tile_pixels), splits, blocks, busiest, cycles)
