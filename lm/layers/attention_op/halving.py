"""Causal attention by halving, for the CPU: the causal triangle is cut into a diagonal of blocks and, at every level
w = block, 2 block, ... T / 2, squares [w, w] below it (the later half of 2 w rows against the earlier half).

All squares of a level are one batched matrix product, so a few large products without a mask take the place of many
strips, and nothing above the diagonal is computed. Of a square only the corner that documents reach into is computed
where rows hold several (see `reach`). Each level is a softmax of its own; they merge by their maxima. A
few heads of a row, or all heads of a few rows, are worked on at a time, so that the scores stay in the cache: on two
cores 2.1 times the speed of unrolled strips over the whole batch (float32, B 8, H 4, T 1024, K 64, both passes).
The operand layouts matter as much: XLA's batched CPU products run at a third of their speed when the left operand is
contracted over its rows, hence the transposed scores of the backward pass.

Shape legend: B batch, T tokens, H heads, G key-value heads, K head_dim, C rows x heads at a time, n blocks or squares.
"""

import functools

import jax
import jax.numpy as jnp

from lm.layers.attention_op import reach
from lm.layers.attention_op.visibility import EMPTY

Array = jax.Array

BLOCK = 128
CACHE_BYTES = 2 << 20  # scores of one level, about what a core's second-level cache holds
MAX_TOKENS = 8192  # the largest square holds T^2 / 4 scores a head: 64 MiB here


def attend_with_logsumexp(q: Array, k: Array, v: Array, documents: tuple[Array | None, Array | None], *,
                          scale: float) -> tuple[Array, Array]:
    """Aligned causal attention. q [B, T, H, K], k and v [B, T, G, K], documents [B, T] of queries and keys, or None.

    Returns ([B, T, H, K] in q's dtype, log-sum-exp [B, H, T] in float32 or wider; EMPTY / 2 where no key is seen).
    """
    tokens = q.shape[1]
    blocks = 1 << max(0, -(-tokens // BLOCK) - 1).bit_length()
    block = -(-tokens // blocks)
    # Rows added at the end are keys that no real query reaches, and queries with a zero cotangent.
    q, k, v, documents = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, block * blocks - tokens)) + ((0, 0),) * (x.ndim - 2)), (q, k, v, documents))
    # Distinct arrays, and one comparison: XLA's CPU backend (jax 0.10.2) does not vectorise a fused loop that reads
    # one array in two ways, and then takes seven times as long for the masked scores. Negative numbers match nothing.
    q_documents, k_documents = documents
    if k_documents is None:
        documents = None, None, None
    else:
        widths = [width for width, later, _ in _levels(block * blocks, block) if later is not None]
        corners = reach.corners(q_documents, k_documents, widths, block, tokens)
        documents = jnp.where(q_documents < 0, -1, q_documents + 1), jnp.maximum(k_documents, -1) + 1, corners
    out, logsumexp = _attend(float(scale), block, q, k, v, documents)
    return out[:, :tokens], logsumexp[:, :, :tokens]


def at_a_time(rows: int, heads: int, tokens: int, largest: int | None = None) -> tuple[int, int]:
    """(rows, heads) to work on together so that they fit in the cache; several rows only with all of their heads.
    largest: width of the corners of the largest level, None for all of it."""
    widest = tokens // 4 if largest is None else max(tokens // 8, largest ** 2 // tokens)
    fit = max(1, CACHE_BYTES // (4 * tokens * max(BLOCK, widest)))  # the scores of a head in one level, in float32
    return (max((r for r in range(1, rows + 1) if rows % r == 0 and r * heads <= fit), default=1),
            max(c for c in range(1, heads + 1) if heads % c == 0 and c <= fit))


def _map(function, size, *arrays):
    """`function` over `size` of the leading axis at a time; no loop where that is all of it."""
    count = len(arrays[0])
    if size == count:
        return function(*arrays)
    split = [None if x is None else x.reshape(count // size, size, *x.shape[1:]) for x in arrays]
    results = jax.lax.map(lambda each: function(*each), split)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, block, q, k, v, documents):
    return _forward(scale, block, q, k, v, documents)[0]


def _heads_first(x, heads):
    """[R, T, G, K] -> [R H, T, K] in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.repeat(x.swapaxes(1, 2), heads // x.shape[2], axis=1).reshape(-1, x.shape[1], x.shape[3])


def _heads_last(x, rows):
    """The way back: [R G, T, K] -> [R, T, G, K]."""
    return x.reshape(rows, -1, *x.shape[1:]).swapaxes(1, 2)


def _forward(scale, block, q, k, v, documents):
    out, logsumexp = _whole_or_corners(functools.partial(_forward_rows, scale, block), block, documents, q, k, v)
    return (out, logsumexp), (q, k, v, documents, out, logsumexp)


def _backward(scale, block, saved, cotangents):
    q, k, v, documents, out, logsumexp = saved
    grads = _whole_or_corners(functools.partial(_backward_rows, scale, block), block, documents, q, k, v, out,
                              logsumexp, *cotangents)
    return (*grads, (None, None, None))


_attend.defvjp(_forward, _backward)


def _whole_or_corners(function, block, documents, *arrays):
    """`function(largest, documents, *arrays)`: in forms that take corners of width `largest` of the largest level and
    all of the others, and in one where each level chooses. XLA fuses nothing across a choice, which costs more the
    smaller the squares are; and rows of two documents, a pair of responses, need only the largest level cut."""
    corners = documents[2]
    if corners is None or not corners.size:
        return function(None, (*documents[:2], None), *arrays)
    sizes = reach.sizes(block << corners.shape[1] - 1, block)
    form = jnp.where(corners[:, :-1].any(), len(sizes), corners[:, -1].min())
    return jax.lax.switch(form, [*(functools.partial(function, size, (*documents[:2], None)) for size in sizes),
                                 functools.partial(function, None, documents)], *arrays)


def _forward_rows(scale, block, largest, documents, q, k, v):
    tokens, heads = q.shape[1:3]
    rows, together = at_a_time(len(q), heads, tokens, largest)

    def some_rows(q_rows, k_rows, v_rows, *row_documents):
        out, logsumexp = _map(functools.partial(_forward_heads, block, largest, row_documents), together * rows,
                              _heads_first(q_rows, heads) * scale, _heads_first(k_rows, heads),
                              _heads_first(v_rows, heads))
        return _heads_last(out, rows).astype(q.dtype), logsumexp.reshape(rows, heads, tokens)

    return _map(some_rows, rows, q, k, v, *documents)


def _backward_rows(scale, block, largest, documents, q, k, v, out, logsumexp, d_all, d_sums):
    tokens, heads, groups = *q.shape[1:3], k.shape[2]
    rows, together = at_a_time(len(q), heads, tokens, largest)

    def some_rows(q_rows, k_rows, v_rows, out_rows, sum_rows, d_out_rows, d_sum_rows, *row_documents):
        d_out = _heads_first(d_out_rows, heads)
        delta = (_heads_first(out_rows, heads) * d_out).sum(-1) - d_sum_rows.reshape(-1, tokens)
        d_q, d_k, d_v = _map(functools.partial(_backward_heads, block, largest, row_documents), together * rows,
                             _heads_first(q_rows, heads) * scale, _heads_first(k_rows, heads),
                             _heads_first(v_rows, heads), sum_rows.reshape(-1, tokens), delta, d_out)
        d_k, d_v = (d.reshape(rows * groups, -1, *d.shape[1:]).sum(1) for d in (d_k, d_v))
        return tuple(_heads_last(d, rows).astype(x.dtype) for d, x in ((d_q * scale, q), (d_k, k), (d_v, v)))

    return _map(some_rows, rows, q, k, v, out, logsumexp, d_all, d_sums, *documents)


def _dot(a, b, contract_a, contract_b):
    """Product over the leading dimensions; contract_* is 0 or 1, counted in the last two."""
    batch = tuple(range(a.ndim - 2))
    return jax.lax.dot_general(a, b, (((len(batch) + contract_a,), (len(batch) + contract_b,)), (batch, batch)))


def _levels(tokens: int, block: int):
    """(width, later, earlier) of every level: which side of 2 width rows queries and keys are; None on the diagonal."""
    yield block, None, None
    width = block
    while width < tokens:
        yield width, 1, 0
        width *= 2


def _cut(x, width, side, size=None):
    """[C, T, ...] -> [C, n, width, ...]: all blocks, or one side (0 earlier, 1 later) of every 2 width rows. size: only
    so many of a side, those next to the other one."""
    if side is None:
        return x.reshape(x.shape[0], -1, width, *x.shape[2:])
    x = x.reshape(x.shape[0], -1, 2, width, *x.shape[2:])[:, :, side]
    return x if size is None else x[:, :, :size] if side else x[:, :, width - size:]


def _join(x, width, side, fill=0.0):
    """The way back: [C, n, size, ...] -> [C, T, ...], `fill` where nothing was cut out."""
    if side is not None:
        around = [(0, 0)] * x.ndim
        around[2] = (width, width - x.shape[2]) if side else (width - x.shape[2], width)
        x = jnp.pad(x, around, constant_values=fill)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _mask(width, size, later, earlier, documents, keys_first, count):
    """Bool [C or 1, n or 1, size, size] of the pairs of a level that see each other, or None when all do."""
    keep = None
    if later is None:
        order = jnp.arange(width)
        keep = (order[:, None] <= order if keys_first else order[:, None] >= order)[None, None]
    q_documents, k_documents, _ = documents
    if k_documents is not None:
        queries, keys = _cut(q_documents, width, later, size), _cut(k_documents, width, earlier, size)
        first, second = (keys, queries) if keys_first else (queries, keys)
        same = jnp.repeat(first[..., :, None] == second[..., None, :], count // len(queries), axis=0)
        keep = same if keep is None else keep & same
    return keep


def _by_level(function, tokens, block, largest, documents):
    """`function(size, width, later, earlier)` of every level: `size` is the side of the corner of its squares that
    documents reach where the levels have corners; else `largest` for the largest level where given, and all of it."""
    for level, sides in enumerate(_levels(tokens, block)):
        width, later = sides[:2]
        if later is None:
            yield function(width, *sides)
        elif documents[2] is not None:
            choices = [functools.partial(function, size, *sides) for size in reach.sizes(width, block)]
            yield jax.lax.switch(documents[2][:, level - 1].min(), choices)
        else:
            size = largest if largest is not None and 2 * width == tokens else width
            if size:
                yield function(size, *sides)


def _forward_heads(block, largest, documents, q, k, v):
    """q (scaled), k, v [C, T, K], documents [rows, T] -> out [C, T, K], log-sum-exp [C, T]."""
    def part(size, width, later, earlier):
        if not size:
            return jnp.full_like(q[..., 0], EMPTY), jnp.zeros_like(q[..., 0]), jnp.zeros_like(v)
        scores = _dot(_cut(q, width, later, size), _cut(k, width, earlier, size), 1, 1)
        if (mask := _mask(width, size, later, earlier, documents, keys_first=False, count=q.shape[0])) is not None:
            scores = jnp.where(mask, scores, EMPTY)
        # Clamped to EMPTY / 2, so that exp gives 0 (not 1) in a row whose every score is EMPTY.
        top = jnp.maximum(jax.lax.stop_gradient(scores.max(-1)), EMPTY / 2)
        weights = jnp.exp(scores - top[..., None])
        return (_join(top, width, later, EMPTY), _join(weights.sum(-1), width, later),
                _join(_dot(weights, _cut(v, width, earlier, size), 1, 0), width, later))

    parts = list(_by_level(part, q.shape[1], block, largest, documents))
    top = functools.reduce(jnp.maximum, (part_top for part_top, _, _ in parts))
    factors = [jnp.exp(part_top - top) for part_top, _, _ in parts]
    total = sum(factor * part for factor, (_, part, _) in zip(factors, parts, strict=True))
    total = jnp.where(total == 0, 1.0, total)
    out = sum(factor[..., None] * part for factor, (_, _, part) in zip(factors, parts, strict=True))
    return out / total[..., None], top + jnp.log(total)


def _backward_heads(block, largest, documents, q, k, v, logsumexp, delta, d_out):
    """Gradients of q (scaled), k and v, each [C, T, K]. Scores are [keys, queries], see above."""
    def part(size, width, later, earlier):
        if not size:
            return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
        queries, sums, part_delta, d_part = (_cut(x, width, later, size) for x in (q, logsumexp, delta, d_out))
        keys, values = _cut(k, width, earlier, size), _cut(v, width, earlier, size)
        scores = _dot(keys, queries, 1, 1) - sums[..., None, :]
        if (mask := _mask(width, size, later, earlier, documents, keys_first=True, count=q.shape[0])) is not None:
            scores = jnp.where(mask, scores, EMPTY)
        weights = jnp.exp(scores)
        d_scores = weights * (_dot(values, d_part, 1, 1) - part_delta[..., None, :])
        # The barrier keeps XLA from folding this transposition into the product: 56 instead of 149 GFLOP/s on a core.
        d_q = jax.lax.optimization_barrier(_dot(keys.swapaxes(-1, -2), d_scores, 1, 0)).swapaxes(-1, -2)
        return (_join(d_q, width, later), _join(_dot(d_scores, queries, 1, 0), width, earlier),
                _join(_dot(weights, d_part, 1, 0), width, earlier))

    return tuple(map(sum, zip(*_by_level(part, q.shape[1], block, largest, documents), strict=True)))
