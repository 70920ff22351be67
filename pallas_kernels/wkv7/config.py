"""Tile sizes of the forms of this folder."""

from pallas_kernels.wkv6.config import Tiles

# Positions of a chunk of the XLA form, a power of two.
CHUNK = 16

TPU = Tiles(256, 64)
