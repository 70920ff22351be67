"""Sizes of the chunks and tiles of the forms of this folder."""

# Scores of one half that a chunk may hold: 1 MiB of float32, so that what top-k reads again is still in a cache.
CHUNK_SCORES = 2 ** 18

# The same on CPUs where `extraction.py` goes through most scores once: 4 MiB, for few and large loops and products.
FEW_CHUNKS_SCORES = 2 ** 20


def chunk_length(scores_a_step: int, length: int, few: bool = False) -> int:
    """Steps of time in a chunk."""
    return max(1, min(length, (FEW_CHUNKS_SCORES if few else CHUNK_SCORES) // scores_a_step))


# TPU kernel: registers of 8 x 128 scores a trip of the loop that looks for the best one.
UNROLL = 8
