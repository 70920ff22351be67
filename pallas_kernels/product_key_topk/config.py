"""Sizes of the chunks and tiles of the forms of this folder."""

# Scores of one half that a chunk may hold: 1 MiB of float32, so that what top-k reads again is still in a cache.
CHUNK_SCORES = 2 ** 18


def chunk_length(scores_a_step: int, length: int) -> int:
    """Steps of time in a chunk."""
    return max(1, min(length, CHUNK_SCORES // scores_a_step))


# TPU kernel: registers of 8 x 128 scores a trip of the loop that looks for the best one.
UNROLL = 8
