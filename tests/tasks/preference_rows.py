"""Rows of pairs for tests, and the smallest language model."""

import jax.numpy as jnp
import numpy as np

from lm.core.batch import Batch
from lm.core.types import Head, Output

VOCAB, WIDTH = 11, 6


def draw_pairs(seed: int, n: int, *, mismatched: bool = False, longest: int = 5) -> list[dict[int, tuple]]:
    """n groups: kind -> (prompt ids, response ids); chosen and rejected share their prompt."""
    rng = np.random.default_rng(seed)
    ids = lambda least: rng.integers(0, VOCAB, rng.integers(least, longest + 1))
    groups = []
    for _ in range(n):
        prompt = ids(1)
        groups.append({0: (prompt, ids(1)), 1: (prompt, ids(1)), **({2: (prompt, ids(1))} if mismatched else {})})
    return groups


def rows_of(groups: list[list[dict[int, tuple]]], length: int) -> Batch:
    """A batch of these rows, each a list of groups; the last token of a document is predicted and never read."""
    shape = (len(groups), length)
    batch = Batch(*(np.zeros(shape, kind) for kind in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    for row, inside in enumerate(groups):
        at = 0
        for number, group in enumerate(inside):
            for kind, (prompt, response) in group.items():
                stream = np.concatenate([prompt, response])
                n = len(stream) - 1
                part = slice(at, at + n)
                batch.tokens[row, part], batch.targets[row, part] = stream[:-1], stream[1:]
                batch.weights[row, part] = np.arange(n) >= len(prompt) - 1
                batch.segment_ids[row, part] = 3 * number + kind + 1
                batch.positions[row, part] = np.arange(n)
                at += n
        assert at <= length
        batch.positions[row, at:] = np.arange(length - at)
    return batch


def table_params(seed: int = 0, scale: float = 1.0) -> dict:
    """Variables of `table_apply`, float32."""
    rng = np.random.default_rng(seed)
    return {"params": {"table": jnp.asarray(scale * rng.normal(size=(VOCAB, WIDTH)), jnp.float32),
                       "kernel": jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)}}


def table_apply(params, tokens, state=None, **_):
    """A table of hidden states by token, and a head; adapters add to the table."""
    table = params["params"]["table"] + (params["lora"]["table"] if "lora" in params else 0)
    return Output(table[tokens], Head(params["params"]["kernel"], None, VOCAB, None), (), {})


def table_logp(params, tokens, targets) -> np.ndarray:
    """Log-probabilities of the targets, in numpy."""
    hidden = np.asarray(params["params"]["table"], np.float64)[tokens]
    logits = hidden @ np.asarray(params["params"]["kernel"], np.float64).T
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
