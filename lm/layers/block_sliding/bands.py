"""Attention of chunks of queries, each to a band of keys before and beside it: work and memory linear in the length.

What a query sees is data: its document and the first token number in reach. Static is only how many chunks before its
own any query may look into. The scores of a chunk are computed again in the backward pass.

Shape legend: B batch, T queries, H heads, G key-value heads, K head_dim, N chunks, w tokens of one, Z keys of a part.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.layers.attention_op.visibility import EMPTY

Array = jax.Array

SCORES = 2**24  # scores that exist at a time, where one chunk alone does not have more


class Keys(NamedTuple):
    """keys, values: [B, Z, G, K]. order: [B, Z] token number in the row. document: [B, Z], negative where empty."""

    keys: Array
    values: Array
    order: Array
    document: Array


class Queries(NamedTuple):
    """queries: [B, T, H, K]. order, document: [B, T] as of keys. first: [B, T], the first token number that is seen.
    block: [B, T], the token number with which the query's own block begins."""

    queries: Array
    order: Array
    document: Array
    first: Array
    block: Array


class Columns(NamedTuple):
    """Further keys of each chunk. keys, values: [N, B, Z, G, K]; seen: [N, B, w, Z] bool."""

    keys: Array
    values: Array
    seen: Array


def chunking(num_tokens: int, block: int) -> tuple[int, int]:
    """(number of chunks N, tokens of one w) of a call with so many tokens."""
    width = min(block, num_tokens)
    return -(-num_tokens // width), width


def in_chunks(x: Array, width: int) -> Array:
    """[B, N * w, ...] as [N, B, w, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, width, *x.shape[2:]), 1, 0)


def padded(x: Array, length: int, value: int = 0) -> Array:
    """[B, T, ...] with `value` behind it up to `length`."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)), constant_values=value)


def nothing(like: Keys, size: int) -> Keys:
    """So many empty keys."""
    empty = lambda x, value=0: jnp.full((x.shape[0], size, *x.shape[2:]), value, x.dtype)
    return Keys(*map(empty, like[:3]), empty(like.document, -1))


def attend(q: Queries, new: Keys, past: Keys, columns: Columns | None = None, *, block: int, behind: int,
           stop_gradient: bool, fused: bool) -> Array:
    """The operation of `dispatch.block_sliding_attention` on one device; fused: each chunk by cuDNN."""
    T = q.queries.shape[1]
    count, width = chunking(T, block)
    one = functools.partial(_chunk, stop_gradient, fused)
    if count == 1:
        parts = tuple(p for p in (past, new) if p.keys.shape[1])
        return one(q, parts, None if columns is None else Columns(*(x[0] for x in columns)))
    whole = count * width
    q = Queries(*(in_chunks(padded(x, whole), width) for x in q))
    new = Keys(*(padded(x, whole) for x in new[:3]), padded(new.document, whole, -1))
    past = past if past.order.shape[1] else nothing(past, behind * width)
    band = Keys(*(in_chunks(jnp.concatenate([p.astype(n.dtype), n], axis=1), width)
                  for p, n in zip(past, new, strict=True)))
    parts = tuple(jax.tree.map(lambda x, i=i: x[i:i + count], band) for i in range(behind + 1))
    inputs = (q, parts, columns)
    keys = (behind + 1) * width + (0 if columns is None else columns.keys.shape[2])
    together = max(1, SCORES // (q.order[0].size * q.queries.shape[3] * keys))
    if fused or together >= count:  # chunks are rows of one larger batch
        y = one(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), inputs))
        y = y.reshape(count, -1, *y.shape[1:])
    else:
        y = jax.lax.map(lambda chunk: one(*chunk), inputs, batch_size=together)
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], whole, *y.shape[3:])[:, :T]


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _chunk(stop_gradient: bool, fused: bool, q: Queries, parts: tuple[Keys, ...], columns: Columns | None) -> Array:
    """Attention of the queries of one chunk to every part of its band and to its columns."""
    def sees(part: Keys) -> Array:
        order, document = part.order[:, None], part.document[:, None]
        return ((document == q.document[..., None]) & (document >= 0) & (order >= q.first[..., None])
                & (order <= q.order[..., None]))

    dtype = q.queries.dtype
    keys, values, seen = [p.keys for p in parts], [p.values for p in parts], [sees(p) for p in parts]
    still = [p.order[:, None] < q.block[..., None] if stop_gradient else None for p in parts]
    if columns is not None:
        keys, values, seen = [columns.keys, *keys], [columns.values, *values], [columns.seen, *seen]
        still = [None, *still]
    keys, values = [k.astype(dtype) for k in keys], [v.astype(dtype) for v in values]
    if not fused:
        return weighted(q.queries, keys, values, seen, still)
    mask = jnp.concatenate(seen, -1)
    y = jax.nn.dot_product_attention(q.queries, jnp.concatenate(keys, 1), jnp.concatenate(values, 1),
                                     mask=mask[:, None], implementation="cudnn")
    return jnp.where(mask.any(-1)[..., None, None], y, 0)


def weighted(q: Array, keys: list[Array], values: list[Array], seen: list[Array],
             still: list[Array | None] | None = None) -> Array:
    """One softmax over several lists of keys: q [B, w, H, K] -> the same, in float32 inside. A query that sees nothing
    gives 0, with zero gradient.

    seen: [B, w, Z] each. still: pairs [B, w, Z] through which no gradient reaches key and value, or None.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    heads = q.reshape(*q.shape[:2], keys[0].shape[2], -1, q.shape[3])
    still = [None] * len(keys) if still is None else still
    each = lambda pairs: pairs[:, None, None]

    def product(k):
        return jnp.einsum("btgrk,bsgk->bgrts", heads, k, preferred_element_type=wide) * q.shape[3] ** -0.5

    def scores(k, mask, held):
        s = product(k)
        s = s if held is None else jnp.where(each(held), product(jax.lax.stop_gradient(k)), s)
        return jnp.where(each(mask), s, EMPTY)

    def total(p, v):
        return jnp.einsum("bgrts,bsgk->btgrk", p.astype(v.dtype), v, preferred_element_type=wide)

    joined = jnp.concatenate([scores(*part) for part in zip(keys, seen, still, strict=True)], -1)
    probabilities = jnp.where(each(jnp.concatenate(seen, -1)), jax.nn.softmax(joined, -1), 0.0)
    out, start = 0.0, 0
    for v, held in zip(values, still, strict=True):
        p, start = probabilities[..., start:start + v.shape[1]], start + v.shape[1]
        out += total(p, v) if held is None else (
            total(jnp.where(each(held), 0, p), v) + total(jnp.where(each(held), p, 0), jax.lax.stop_gradient(v)))
    return out.reshape(q.shape).astype(q.dtype)
