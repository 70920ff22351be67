"""Tile sizes of the forms of this folder."""

# Positions of a chunk of the XLA form, a power of two.
CHUNK = 16
