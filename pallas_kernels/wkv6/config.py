"""Tile sizes of the forms of this folder."""

from typing import NamedTuple

# Positions of a chunk of the XLA form, a power of two.
CHUNK = 16

# Below so many positions the XLA form, which does not pad them to a block of 128, is taken first on a TPU too.
SHORT = 16


class Tiles(NamedTuple):
    """tile: positions of a block, a multiple of 128. chunk: positions of a chunk, a power of two that divides it."""
    tile: int
    chunk: int

    def fitted(self, length: int) -> "Tiles":
        """Not larger than the array needs."""
        return self._replace(tile=min(self.tile, -(-length // 128) * 128))


# The backward saves one state a block, as large as one of the block's float32 arrays at 128 positions.
TPU = Tiles(256, 64)
