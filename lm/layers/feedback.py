"""The recurrence of the feedback memory over the blocks of a call (Hwang et al. 2024, section 3 and appendix A).

A block ends at most once in each chunk of a call, wherever documents begin, so a scan over chunks with one update each
is all that runs in order; the tokens' own attention follows for all of them at once.

Shape legend: B batch, T tokens of a call, N chunks, w tokens of one, f slots, H heads, G key-value heads, K head_dim, D
embed_dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.sharding import constrain
from lm.core.types import Array, Key
from lm.layers.block_sliding import Columns, Keys, chunking, in_chunks, padded, weighted
from lm.layers.segments import Places


class Memory(NamedTuple):
    """slots: [B, f, D] float32. q: [B, f, H, K], k and v: [B, f, G, K] of them, rotated. document: [B] that they are
    of, -1 for none. end: [B], position of the last slot."""

    slots: Array
    q: Array
    k: Array
    v: Array
    document: Array
    end: Array


class Ends(NamedTuple):
    """The last token of the block that ends in each chunk, [N, B] each. here: whether one does. order, document, end:
    its number, document and position. before: the position just before its document."""

    here: Array
    order: Array
    document: Array
    end: Array
    before: Array


class Steps(NamedTuple):
    """What a block's parameters do, as pure functions. heads: ([B, f, D], end [B]) -> q, k, v. attended: (heads'
    results [B, f, H, K], what they add to [B, f, D], key) -> the memory after its attention, mixed: (that, key) ->
    after its channel mixer; both float32."""

    heads: Callable[[Array, Array], tuple[Array, Array, Array]]
    attended: Callable[[Array, Array, Key | None], Array]
    mixed: Callable[[Array, Key | None], Array]


def ends(where: Places, positions: Array, block: int) -> Ends:
    """The block ends of a call, of which each chunk has one at most."""
    count, width = chunking(where.order.shape[1], block)
    whole = count * width
    there = in_chunks(padded(where.present, whole), width)
    flags = in_chunks(padded(where.index % block == block - 1, whole), width) & there
    at = jnp.argmax(jnp.where(flags.any(-1, keepdims=True), flags, there), axis=-1)[..., None]  # else its first token
    pick = lambda x: jnp.take_along_axis(in_chunks(padded(x, whole), width), at, axis=-1)[..., 0]
    order, end = pick(where.order), pick(positions)
    return Ends(flags.any(-1), order, pick(where.document), end, end - (order - pick(where.start)) - 1)


def update(memory: Memory, flow: Memory, chunk: Ends, keys: tuple[Keys, ...], steps: Steps, block: int,
           key: Key | None) -> Memory:
    """The memory after a chunk: of the rows in which a block ends, compressed from it and the memory before.

    flow: what stands in for the memory of a document that has none yet. It is attended to, and not added to.
    """
    old = chunk.document == memory.document
    known = lambda a, b: jnp.where(old.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    q, k, v = (known(a, b) for a, b in ((memory.q, flow.q), (memory.k, flow.k), (memory.v, flow.v)))
    residual = known(memory.slots, jnp.zeros_like(memory.slots))

    def sees(part: Keys) -> Array:
        one = ((part.document == chunk.document[:, None]) & (part.document >= 0)
               & (part.order > chunk.order[:, None] - block) & (part.order <= chunk.order[:, None]))
        return jnp.broadcast_to(one[:, None], (one.shape[0], q.shape[1], one.shape[1]))

    own = jnp.ones((*q.shape[:2], q.shape[1]), bool)
    y = weighted(q, [k, *(p.keys.astype(q.dtype) for p in keys)], [v, *(p.values.astype(q.dtype) for p in keys)],
                 [own, *map(sees, keys)])
    slots = steps.mixed(steps.attended(y, residual, key), key)
    after = Memory(slots, *steps.heads(slots, chunk.end), chunk.document, chunk.end)
    return chosen(chunk.here, after, memory)


def chosen(rows: Array, yes: Memory, no: Memory) -> Memory:
    """`yes` in the rows where `rows` [B] is true."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b).astype(b.dtype), yes, no)


def over_chunks(memory: Memory, flow: Memory, found: Ends, keys: tuple[Keys, ...], steps: Steps, block: int,
                key: Key | None) -> tuple[Memory, Memory]:
    """(memory before every chunk [N, ...], memory after every chunk [N, ...]); flow, found and keys are [N, ...]."""
    count = found.here.shape[0]

    @jax.checkpoint
    def one(memory, chunk):
        n, flow, at, keys = chunk
        folded = None if key is None else jax.random.fold_in(key, n)
        after = update(memory, flow, at, keys, steps, block, folded)
        return after, (memory, after)

    chunks = (jnp.arange(count), *jax.tree.map(_whole_chunks, (flow, found, keys)))
    if count > 1:
        return jax.lax.scan(one, memory, chunks)[1]
    first = jax.tree.map(lambda x: x[0], chunks)
    return jax.tree.map(lambda x: x[None], one(memory, first)[1])


def _whole_chunks(x: Array) -> Array:
    """`x` [N, B, ...] with its chunks whole on every device, which takes one of them a step: the partitioner may split
    them, and gather them all for every step."""
    heads = ("kv_heads", "head_dim") if x.ndim == 5 else ()
    return constrain(x, None, "batch", *[None] * (x.ndim - 2 - len(heads)), *heads)


def columns(where: Places, found: Ends, flow: Memory, learned: Array, before: Memory, after: Memory,
            block: int) -> Columns:
    """What the tokens of each chunk see of the memory: that before the block which ends there, or after it; and in the
    first block of a document the flow, where it is the learned start."""
    count, width = chunking(where.order.shape[1], block)
    order, document = (in_chunks(padded(x, count * width), width) for x in (where.order, where.document))
    late = found.here[..., None] & (order > found.order[..., None])
    of_before = (document == before.document[..., None]) & ~late
    of_after = (document == after.document[..., None]) & late
    seen = [learned & ~of_before & ~of_after, of_before, of_after]
    slots = flow.k.shape[2]
    join = lambda *parts: jnp.concatenate(parts, axis=2)
    return Columns(join(flow.k, before.k, after.k), join(flow.v, before.v, after.v),
                   jnp.repeat(jnp.stack(seen, -1), slots, axis=-1))
