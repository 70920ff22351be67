"""What a model says of every token of whole texts."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm.core.batch import Batch
from lm.core.sharding import constrain
from lm.core.types import Apply, Array, Params
from lm.losses.cross_entropy import token_scores

MULTIPLE = 64  # rows are padded to a multiple of it, so that few lengths are compiled


class Scored(NamedTuple):
    """Of every token of a document but the first, [n - 1]: nats, -log p in float64; best, whether it is the most
    probable token."""

    nats: np.ndarray
    best: np.ndarray


def target_nats(apply: Apply, params: Params, documents: Sequence[np.ndarray], batch_size: int) -> list[np.ndarray]:
    """-log p of every token of each document but the first, [n - 1] float64, nats."""
    return [scored.nats for scored in target_scores(apply, params, documents, batch_size)]


def target_scores(apply: Apply, params: Params, documents: Sequence[np.ndarray], batch_size: int) -> list[Scored]:
    """Scores of each document, in their order. Documents of like length share a batch."""
    order = sorted(range(len(documents)), key=lambda n: len(documents[n]), reverse=True)
    out: dict[int, Scored] = {}
    for start in range(0, len(order), batch_size):
        part = order[start:start + batch_size]
        length = -(-len(documents[part[0]]) // MULTIPLE) * MULTIPLE
        tokens, targets, segments = (np.zeros((batch_size, length), np.int32) for _ in range(3))
        for row, ids in enumerate(documents[n] for n in part):
            tokens[row, :len(ids)], targets[row, :len(ids) - 1], segments[row, :len(ids)] = ids, ids[1:], 1
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        nats, best = _scores(apply, params, Batch(tokens, targets, segments, segments, positions))
        nats, best = np.asarray(nats, np.float64), np.asarray(best)
        for row, n in enumerate(part):
            out[n] = Scored(nats[row, :len(documents[n]) - 1], best[row, :len(documents[n]) - 1])
    return [out[n] for n in range(len(documents))]


@functools.partial(jax.jit, static_argnames="apply")
def _scores(apply: Apply, params: Params, batch: Batch) -> tuple[Array, Array]:
    """Nats and whether the target is the most probable token, each [B, T]."""
    batch = Batch(*(constrain(field, "batch", "length") for field in batch))
    out = apply(params, batch.tokens, reset=batch.reset, positions=batch.positions, weights=batch.present)
    scores = token_scores(out.hidden, out.head, batch.targets)
    return constrain(-scores.logp, None, None), constrain(scores.argmax == batch.targets, None, None)
