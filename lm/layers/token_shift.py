"""The tokens just before each token: token shift (RWKV) and causal convolutions are made of them.

Shape legend: B batch, T time, D width, n lags.
"""

import jax
import jax.numpy as jnp

from lm.core.types import Array, Context
from lm.layers.local import over_shards
from pallas_kernels.sequence import Element, exchange


def lags(x: Array, history: Array, ctx: Context) -> tuple[list[Array], Array]:
    """The n tokens before each token of its document, nearest first, and the history after the last token.

    x [B, T, D]; history [B, n, D]: the n tokens before x, oldest first, zeros where there are fewer. Returns n arrays
    [B, T, D], zeros where the document has no such token, and the new history in history's dtype. Padding (weight 0) is
    never a token before another; what is returned at padding itself means nothing.
    """
    rows = ("batch", "length", "activation_embed")
    per_row = ("batch", None, "activation_embed")
    *before, after = over_shards(
        _lags, _lags_over_sequence, (x, history, ctx.weights != 0, ctx.reset),
        (rows, per_row, ("batch", "length"), ("batch", "length")),
        [rows] * history.shape[1] + [per_row], [x.shape] * history.shape[1] + [history.shape])
    return before, after


def shift(x: Array, last: Array, ctx: Context) -> tuple[Array, Array]:
    """The token before each token, zero at the start of a document, and the last token. last [B, D]; see `lags`."""
    (previous,), after = lags(x, last[:, None], ctx)
    return previous, after[:, 0]


def _lags_over_sequence(x: Array, history: Array, present: Array, reset: Array, axis_name: str) -> tuple[Array, ...]:
    """`_lags` of one device's stretch of time; the history after all of time. XLA's own way to split the slices along
    time gave wrong gradients (jax 0.10.2, CPU)."""
    # What a stretch hands on: its last tokens, how many of them there are (n at most), and whether a
    # document starts in it.
    own = _lags(x, jnp.zeros_like(history), present, reset)[-1]
    later = jnp.cumsum(reset[:, ::-1], axis=1)[:, ::-1] - reset          # documents that start after the position
    count = jnp.minimum(jnp.sum(present & (later == 0), axis=1), history.shape[1]).astype(own.dtype)
    starts = jnp.any(reset, axis=1).astype(own.dtype)
    nothing = jnp.zeros_like(count)
    before, last = exchange((own, count, starts), (history, nothing, nothing), _handed_on, axis_name)
    return *_lags(x, before[0], present, reset)[:-1], last[0]


def _handed_on(first: Element, second: Element) -> Element:
    """What two stretches hand on: the second's tokens, in front of them those of the first that fit and belong."""
    (older, many, _), (newer, count, starts) = first, second
    n = older.shape[1]
    place = jnp.arange(n) + count.astype(jnp.int32)[:, None]
    moved = jnp.take_along_axis(older, jnp.minimum(place, n - 1)[..., None], axis=1)
    of_second = (place >= n) | (starts[:, None] > 0)
    return (jnp.where(of_second[..., None], newer, moved),
            jnp.where(starts > 0, count, jnp.minimum(many + count, n)), jnp.maximum(first[2], starts))


def _lags(x: Array, history: Array, present: Array, reset: Array) -> tuple[Array, ...]:
    """The n arrays of `lags`, and the history after the last token."""
    joined = jnp.concatenate([history.astype(x.dtype), x], axis=1)
    documents = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    before = jnp.zeros((len(x), history.shape[1]), jnp.int32)  # history belongs to what reset has not yet ended
    joined_documents = jnp.concatenate([before, documents], axis=1)
    interior = jnp.any(present[:, 1:] & ~present[:, :-1]) if x.shape[1] > 1 else jnp.zeros((), bool)
    shape = present, joined, documents, joined_documents
    # Rows almost always hold their padding at the end, and then a lag is a slice; the other form gathers.
    outs = jax.lax.cond(interior, _by_rank, _by_position, *shape)
    place = _places(present, history.shape[1])
    last = jnp.sum(present, axis=1, dtype=jnp.int32)[:, None] + jnp.arange(history.shape[1])
    at = jnp.take_along_axis(place, last, axis=1)
    same = jnp.take_along_axis(joined_documents, at, axis=1) == documents[:, -1:]
    after = jnp.where(same[..., None], jnp.take_along_axis(joined, at[..., None], axis=1), 0)
    return *outs, after.astype(history.dtype)


def _places(present: Array, n: int) -> Array:
    """[B, n + T]: where in history and x the tokens stand, history first, then the present ones in order."""
    order = jnp.argsort(~present, axis=1, stable=True)
    history = jnp.broadcast_to(jnp.arange(n), (len(present), n))
    return jnp.concatenate([history, n + order], axis=1)


def _by_position(present, joined, documents, joined_documents):
    T, n = present.shape[1], joined.shape[1] - present.shape[1]
    outs = []
    for lag in range(1, n + 1):
        same = joined_documents[:, n - lag:n - lag + T] == documents
        outs.append(jnp.where(same[..., None], joined[:, n - lag:n - lag + T], 0))
    return tuple(outs)


def _by_rank(present, joined, documents, joined_documents):
    n = joined.shape[1] - present.shape[1]
    place = _places(present, n)
    rank = n - 1 + jnp.cumsum(present, axis=1)
    outs = []
    for lag in range(1, n + 1):
        at = jnp.take_along_axis(place, jnp.maximum(rank - lag, 0), axis=1)
        same = jnp.take_along_axis(joined_documents, at, axis=1) == documents
        outs.append(jnp.where(same[..., None], jnp.take_along_axis(joined, at[..., None], axis=1), 0))
    return tuple(outs)
