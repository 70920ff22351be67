"""Tile sizes of the kernels of this folder, one line a device that differs."""

from typing import NamedTuple


class Tiles(NamedTuple):
    """time: rows of a block, a multiple of 128. width: channels of a block, a multiple of 128."""
    time: int
    width: int

    def fitted(self, time: int, width: int) -> "Tiles":
        """Not larger than the array needs."""
        return Tiles(min(self.time, -(-time // 128) * 128), min(self.width, -(-width // 128) * 128))


# 512 x 512: the backward's five float32 arrays, double-buffered, take 10 of the 16 MiB that a kernel gets by default on
# the smallest TPU, and 256 groups of 8 x 128 a block hide the ~100 cycles that a block costs before its loop.
TPU = Tiles(512, 512)
# Gates in registers need many: with 512 channels they spill.
TPU_GATED = Tiles(512, 256)
