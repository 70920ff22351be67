"""Block-causal attention in plain XLA: blocks of query rows, each against only the keys its rows can see.

The blocks above the diagonal and outside the window are never computed. The backward pass recomputes the scores from
the saved log-sum-exp (Dao et al. 2022, FlashAttention, section 3.1, equations of appendix B.2). The loop is unrolled,
so every block has its own static width. XLA may keep the scores of several blocks at once, so on a CPU one row of the
batch is worked on at a time; and without a window `halving`, which is faster there, does the work, and for one query
`one_query`.

Shape legend: B batch, T queries, S keys, H heads, G key-value heads, R = H / G, K head_dim.
"""

import functools

import jax
import jax.numpy as jnp

from lm.core.sharding import platform
from lm.layers.attention_op import halving, one_query
from lm.layers.attention_op.sharded import compiler_splits
from lm.layers.attention_op.visibility import EMPTY, Visibility

Array = jax.Array

MAX_BLOCKS = 16  # unrolled: the compiled program grows with the number of blocks


def block_size(num_queries: int) -> int:
    """Rows of a query block: 128, more where that would make over MAX_BLOCKS blocks."""
    return max(128, -(-num_queries // MAX_BLOCKS))


def attend(q: Array, k: Array, v: Array, see: Visibility, *, scale: float, block: int | None = None) -> Array:
    """softmax(scale q k^T) v over the visible keys. q [B, T, H, K], k and v [B, S, G, K] -> [B, T, H, K]."""
    return attend_with_logsumexp(q, k, v, see, scale=scale, block=block)[0]


def attend_with_logsumexp(q: Array, k: Array, v: Array, see: Visibility, *, scale: float,
                          block: int | None = None) -> tuple[Array, Array]:
    """As `attend`, and the log-sum-exp of every query's visible scores, float32 [B, H, T]; EMPTY / 2 for none visible.

    Two results over disjoint keys can be merged with it (ring attention does).
    """
    batch, rows, heads, dim = q.shape
    groups = k.shape[2]
    split = q.reshape(batch, rows, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    arrays = (see.q_positions, see.k_positions, see.q_documents, see.k_documents)
    row_by_row = platform() == "cpu" and not compiler_splits()
    triangle = see.aligned and not see.offset and see.window is None
    if row_by_row and triangle and block is None and rows <= halving.MAX_TOKENS:
        return halving.attend_with_logsumexp(q, k, v, (see.q_documents, see.k_documents), scale=scale)
    if row_by_row and rows == 1 and block is None and groups <= one_query.MOST_GROUPS:
        return one_query.attend_with_logsumexp(q, k, v, see, scale=scale)
    order = (see.aligned, see.offset, see.window)
    block = block or block_size(rows)
    inputs = (split, k.swapaxes(1, 2), v.swapaxes(1, 2), arrays)
    if row_by_row and batch > 1 and rows > block:
        one = lambda row: _attend(order, float(scale), block, *jax.tree.map(lambda x: x[None], row))
        out, logsumexp = jax.tree.map(lambda x: x[:, 0], jax.lax.map(one, inputs))
    else:
        out, logsumexp = _attend(order, float(scale), block, *inputs)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape), logsumexp.reshape(batch, heads, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(order, scale, block, q, k, v, arrays):
    return _forward(order, scale, block, q, k, v, arrays)[0]


def _strips(see: Visibility, num_queries: int, num_keys: int, block: int):
    """(rows, columns) of every query block: half-open ranges, columns possibly empty."""
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        yield (start, stop), see.columns(start, stop, num_keys)


def _scores(q, k, see, rows, columns, scale):
    """Float32 scores [B, G, R, rows, columns], EMPTY where masked."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=wide) * scale
    mask = see.mask(rows, columns)
    return scores if mask is None else jnp.where(mask[:, None, None], scores, EMPTY)


def _forward(order, scale, block, q, k, v, arrays):
    see = Visibility(*order, *arrays)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    outs, sums = [], []
    for rows, columns in _strips(see, q.shape[3], k.shape[2], block):
        q_block = q[:, :, :, rows[0]:rows[1]]
        if columns[0] >= columns[1]:
            outs.append(jnp.zeros_like(q_block))
            sums.append(jnp.full(q_block.shape[:4], EMPTY / 2, wide))
            continue
        scores = _scores(q_block, k[:, :, columns[0]:columns[1]], see, rows, columns, scale)
        # Clamped to EMPTY / 2, so that exp gives 0 (not 1) in a row whose every score is EMPTY.
        top = jnp.maximum(jax.lax.stop_gradient(scores.max(-1)), EMPTY / 2)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(-1)
        total = jnp.where(total == 0, 1.0, total)
        out = jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(v.dtype), v[:, :, columns[0]:columns[1]],
                         preferred_element_type=wide)
        outs.append((out / total[..., None]).astype(q.dtype))
        sums.append(top + jnp.log(total))
    out, logsumexp = jnp.concatenate(outs, 3), jnp.concatenate(sums, 3)
    return (out, logsumexp), (q, k, v, arrays, out, logsumexp)


def _backward(order, scale, block, saved, cotangents):
    q, k, v, arrays, out, logsumexp = saved
    d_out, d_logsumexp = cotangents
    see = Visibility(*order, *arrays)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    delta = (out.astype(wide) * d_out.astype(wide)).sum(-1) - d_logsumexp
    d_qs, d_k, d_v = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for rows, columns in _strips(see, q.shape[3], k.shape[2], block):
        i, j = slice(*rows), slice(*columns)
        if columns[0] >= columns[1]:
            d_qs.append(jnp.zeros_like(q[:, :, :, i]))
            continue
        q_block, k_strip, d_block = q[:, :, :, i], k[:, :, j], d_out[:, :, :, i]
        scores = _scores(q_block, k_strip, see, rows, columns, scale)
        weights = jnp.exp(scores - logsumexp[:, :, :, i, None])
        d_v = d_v.at[:, :, j].add(jnp.einsum("bgrts,bgrtk->bgsk", weights.astype(v.dtype), d_block,
                                             preferred_element_type=wide))
        d_weights = jnp.einsum("bgrtk,bgsk->bgrts", d_block, v[:, :, j], preferred_element_type=wide)
        d_scores = (weights * (d_weights - delta[:, :, :, i, None]) * scale).astype(k.dtype)
        d_qs.append(jnp.einsum("bgrts,bgsk->bgrtk", d_scores, k_strip, preferred_element_type=wide).astype(q.dtype))
        d_k = d_k.at[:, :, j].add(jnp.einsum("bgrts,bgrtk->bgsk", d_scores, q_block, preferred_element_type=wide))
    return jnp.concatenate(d_qs, 3), d_k.astype(k.dtype), d_v.astype(v.dtype), (None,) * 4


_attend.defvjp(_forward, _backward)
