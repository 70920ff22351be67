"""What both sides of `lm bench orpo` agree on: the sizes, and pairs of responses to the same prompts."""

from typing import NamedTuple

import numpy as np

PAIRS, ODDS_WEIGHT = 4, 0.1


class Pairs(NamedTuple):
    """prompt [PAIRS, P], chosen and rejected [PAIRS, R] int32, responses with EOS at their ends."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def pairs(seq_len: int, vocab: int, seed: int = 0) -> Pairs:
    """Random tokens: sequences of seq_len, half of them prompt. All are equally long, so that nothing is padded. Of the
    ids the last two are padding and EOS."""
    rng = np.random.default_rng(seed)
    draw = lambda length: rng.integers(0, vocab - 2, (PAIRS, length)).astype(np.int32)
    prompt = seq_len // 2
    ended = lambda tokens: np.concatenate([tokens, np.full((PAIRS, 1), vocab - 1, np.int32)], axis=1)
    return Pairs(draw(prompt), *(ended(draw(seq_len - prompt - 1)) for _ in range(2)))
