"""Tile sizes of the TPU kernels of this folder."""

from typing import NamedTuple

# Steps of a block and, because the backward computes a block again from the state before it, between saved states:
# these then are 3% of k, v and y, and what is computed again fits into VMEM.
TIME = 128
LANES, SUBLANES = 128, 8
BITS = 32           # resets travel as bits: one lane broadcast for 32 steps


class Tiles(NamedTuple):
    """A block has `rows` batch rows and `chains` x `groups` x 128 channels; rows x groups fill 8 sublanes."""
    rows: int
    groups: int
    chains: int

    @property
    def width(self) -> int:
        """Channels of a block."""
        return self.chains * self.groups * LANES


def tiles(batch: int, width: int, chains: int) -> Tiles:
    """As many batch rows as fill the sublanes; what they leave free is filled with groups of channels.

    chains: registers of channels at most. They go evenly into the blocks: 6 with at most 4 are twice 3.
    """
    rows = next(size for size in (1, 2, 4, SUBLANES) if size >= min(batch, SUBLANES))
    groups = SUBLANES // rows
    registers = -(-width // (groups * LANES))
    return Tiles(rows, groups, -(-registers // -(-registers // chains)))


def forward_chains(itemsize: int) -> int:
    """k, v and y, double-buffered: 6 MiB of the 16 that a kernel gets by default on the smallest TPU."""
    return 8 // itemsize


def backward_chains(itemsize: int) -> int:
    """Five arrays, double-buffered, and what the backward computes again: 9 MiB in bf16, 7.5 in float32."""
    return 4 // itemsize
