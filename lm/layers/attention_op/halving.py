"""Causal attention by halving, for the CPU: the causal triangle is cut into a diagonal of blocks and, at every level
w = block, 2 block, ... T / 2, squares [w, w] below it (the later half of 2 w rows against the earlier half).

All squares of a level are one batched matrix product, so a few large products without a mask take the place of many
strips, and nothing above the diagonal is computed. Each level is a softmax of its own; they merge by their maxima. One
row of the batch and a few heads are worked on at a time (`lax.map`), so that the scores stay in the cache: on two cores
2.1 times the speed of unrolled strips over the whole batch (float32, B 8, H 4, T 1024, K 64, forward and backward).
The operand layouts matter as much: XLA's batched CPU products run at a third of their speed when the left operand is
contracted over its rows, hence the transposed scores of the backward pass.

Shape legend: B batch, T tokens, H heads, G key-value heads, K head_dim, C heads at a time, n blocks or squares.
"""

import functools

import jax
import jax.numpy as jnp

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
    whole = one_document(*documents)
    blocks = 1 << max(0, -(-tokens // BLOCK) - 1).bit_length()
    block = -(-tokens // blocks)
    # Rows added at the end are keys that no real query reaches, and queries with a zero cotangent.
    q, k, v, documents = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, block * blocks - tokens)) + ((0, 0),) * (x.ndim - 2)), (q, k, v, documents))
    out, logsumexp = _attend(float(scale), block, q, k, v, (*documents, whole))
    return out[:, :tokens], logsumexp[:, :, :tokens]


def one_document(q_documents: Array | None, k_documents: Array | None) -> Array | None:
    """[B] bool: the row is a single document without padding, so that the causal order is all of its mask."""
    if k_documents is None:
        return None
    first = q_documents[:, :1]
    return ((q_documents == first) & (k_documents == first)).all(1) & (first[:, 0] >= 0)


def _by_documents(function, documents, *arrays):
    """`function(documents, *arrays)` of one row, told of documents only where there is more than one: comparing them
    takes as long as half of the attention itself (B 8, T 256)."""
    q_documents, k_documents, whole = documents
    if whole is None:
        return function((None, None), *arrays)
    return jax.lax.cond(whole, functools.partial(function, (None, None)),
                        functools.partial(function, (q_documents, k_documents)), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, block, q, k, v, documents):
    return _forward(scale, block, q, k, v, documents)[0]


def _heads_at_a_time(function, heads: int, tokens: int, *arrays):
    """`function` over [H, ...] arrays, as many heads at a time as fit in the cache."""
    fit = max(1, CACHE_BYTES // (tokens * tokens))  # T^2 / 4 scores of 4 bytes a head
    size = max(c for c in range(1, heads + 1) if heads % c == 0 and c <= fit)
    split = [x.reshape(heads // size, size, *x.shape[1:]) for x in arrays]
    results = jax.lax.map(lambda each: function(*each), split)
    return jax.tree.map(lambda x: x.reshape(heads, *x.shape[2:]), results)


def _wide_heads(x, heads):
    """One row [T, G, K] -> [H, T, K] in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.repeat(x.swapaxes(0, 1), heads // x.shape[1], axis=0)


def _forward(scale, block, q, k, v, documents):
    heads, tokens = q.shape[2], q.shape[1]

    def row(inputs):
        q_row, k_row, v_row, row_documents = inputs
        out, logsumexp = _by_documents(
            lambda each, *wide: _heads_at_a_time(
                functools.partial(_forward_heads, block=block, documents=each), heads, tokens, *wide),
            row_documents, _wide_heads(q_row, heads) * scale, _wide_heads(k_row, heads), _wide_heads(v_row, heads))
        return out.swapaxes(0, 1).astype(q.dtype), logsumexp

    out, logsumexp = jax.lax.map(row, (q, k, v, documents))
    return (out, logsumexp), (q, k, v, documents, out, logsumexp)


def _backward(scale, block, saved, cotangents):
    q, k, v, documents, out, logsumexp = saved
    d_out, d_logsumexp = cotangents
    heads, tokens, groups = q.shape[2], q.shape[1], k.shape[2]

    def row(inputs):
        q_row, k_row, v_row, row_documents, out_row, sum_row, d_out_row, d_sum_row = inputs
        d_wide = _wide_heads(d_out_row, heads)
        delta = (_wide_heads(out_row, heads) * d_wide).sum(-1) - d_sum_row
        d_q, d_k, d_v = _by_documents(
            lambda each, *wide: _heads_at_a_time(
                functools.partial(_backward_heads, block=block, documents=each), heads, tokens, *wide),
            row_documents, _wide_heads(q_row, heads) * scale, _wide_heads(k_row, heads), _wide_heads(v_row, heads),
            sum_row, delta, d_wide)
        d_k, d_v = (d.reshape(groups, heads // groups, *d.shape[1:]).sum(1) for d in (d_k, d_v))
        return tuple(d.swapaxes(0, 1).astype(x.dtype) for d, x in ((d_q * scale, q), (d_k, k), (d_v, v)))

    inputs = (q, k, v, documents, out, logsumexp, d_out, d_logsumexp)
    return (*jax.lax.map(row, inputs), (None, None, None))


_attend.defvjp(_forward, _backward)


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


def _cut(x, width, side):
    """[C, T, ...] -> [C, n, width, ...]: all blocks, or one side (0 earlier, 1 later) of every 2 width rows."""
    if side is None:
        return x.reshape(x.shape[0], -1, width, *x.shape[2:])
    return x.reshape(x.shape[0], -1, 2, width, *x.shape[2:])[:, :, side]


def _join(x, side, fill=0.0):
    """The way back: [C, n, width, ...] -> [C, T, ...], `fill` on the other side."""
    if side is not None:
        other = jnp.full_like(x, fill)
        x = jnp.stack([other, x] if side else [x, other], 2)
    return x.reshape(x.shape[0], -1, *x.shape[3 if side is None else 4:])


def _mask(width, later, earlier, documents, keys_first):
    """Bool [1, n or 1, width, width] of the pairs of a level that see each other, or None when all do."""
    keep = None
    if later is None:
        keep = (jnp.arange(width)[:, None] >= jnp.arange(width))[None, None]
    q_documents, k_documents = documents
    if k_documents is not None:
        keys = _cut(k_documents[None], width, earlier)[:, :, None]
        same = (_cut(q_documents[None], width, later)[..., None] == keys) & (keys >= 0)
        keep = same if keep is None else keep & same
    return keep.swapaxes(2, 3) if keep is not None and keys_first else keep


def _forward_heads(q, k, v, *, block, documents):
    """q (scaled), k, v [C, T, K] -> out [C, T, K], log-sum-exp [C, T]."""
    parts = []
    for width, later, earlier in _levels(q.shape[1], block):
        scores = _dot(_cut(q, width, later), _cut(k, width, earlier), 1, 1)
        if (mask := _mask(width, later, earlier, documents, keys_first=False)) is not None:
            scores = jnp.where(mask, scores, EMPTY)
        # Clamped to EMPTY / 2, so that exp gives 0 (not 1) in a row whose every score is EMPTY.
        top = jnp.maximum(jax.lax.stop_gradient(scores.max(-1)), EMPTY / 2)
        weights = jnp.exp(scores - top[..., None])
        parts.append((_join(top, later, EMPTY), _join(weights.sum(-1), later),
                      _join(_dot(weights, _cut(v, width, earlier), 1, 0), later)))
    top = functools.reduce(jnp.maximum, (part_top for part_top, _, _ in parts))
    factors = [jnp.exp(part_top - top) for part_top, _, _ in parts]
    total = sum(factor * part for factor, (_, part, _) in zip(factors, parts, strict=True))
    total = jnp.where(total == 0, 1.0, total)
    out = sum(factor[..., None] * part for factor, (_, _, part) in zip(factors, parts, strict=True))
    return out / total[..., None], top + jnp.log(total)


def _backward_heads(q, k, v, logsumexp, delta, d_out, *, block, documents):
    """Gradients of q (scaled), k and v, each [C, T, K]. Scores are [keys, queries], see above."""
    d_q = d_k = d_v = 0
    for width, later, earlier in _levels(q.shape[1], block):
        queries, sums, part_delta, d_part = (_cut(x, width, later) for x in (q, logsumexp, delta, d_out))
        keys, values = _cut(k, width, earlier), _cut(v, width, earlier)
        scores = _dot(keys, queries, 1, 1) - sums[..., None, :]
        if (mask := _mask(width, later, earlier, documents, keys_first=True)) is not None:
            scores = jnp.where(mask, scores, EMPTY)
        weights = jnp.exp(scores)
        d_scores = weights * (_dot(values, d_part, 1, 1) - part_delta[..., None, :])
        # The barrier keeps XLA from folding this transposition into the product: 56 instead of 149 GFLOP/s on a core.
        part_d_q = jax.lax.optimization_barrier(_dot(keys.swapaxes(-1, -2), d_scores, 1, 0)).swapaxes(-1, -2)
        d_q = d_q + _join(part_d_q, later)
        d_k = d_k + _join(_dot(d_scores, queries, 1, 0), earlier)
        d_v = d_v + _join(_dot(weights, d_part, 1, 0), earlier)
    return d_q, d_k, d_v
