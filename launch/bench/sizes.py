"""What both sides of the training benchmarks agree on: sizes that two cores train, the optimizer, and the tokens."""

import numpy as np

VOCAB, WIDTH, LAYERS, HEADS, BATCH = 256, 256, 4, 4, 8
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 3e-4, 0.1, (0.9, 0.95), 1e-8


def tokens(seq_len: int, batch: int = BATCH, seed: int = 0) -> np.ndarray:
    """[batch, seq_len + 1] random tokens: what both sides train on, again and again."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, seq_len + 1)).astype(np.int32)
