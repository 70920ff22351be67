"""Fast form for every backend of XLA: both halves' k best, then the staircase, a chunk of tokens at a time.

B batch, T tokens, H heads, K size of a sub-key, n sub-keys of each half, k kept.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cpu_rows
from pallas_kernels.chunks import over_time, scan_time
from pallas_kernels.dispatch import automatic_axes, current_platform
from pallas_kernels.product_key_topk import extraction
from pallas_kernels.product_key_topk.config import chunk_length
from pallas_kernels.product_key_topk.reference import sub_scores

Array = jax.Array


def staircase(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (a, b) that can be among the k best sums of two sorted lists: (a + 1)(b + 1) <= k; by a, then b."""
    a, b = np.indices((k, k))
    a, b = a.reshape(-1), b.reshape(-1)
    possible = (a + 1) * (b + 1) <= k
    return a[possible].astype(np.int32), b[possible].astype(np.int32)


def forward(q1: Array, q2: Array, c1: Array, c2: Array, k: int) -> tuple[Array, Array]:
    """Scores and ids [B, T, H, k]."""
    n = c1.shape[-2]
    first, second = staircase(k)

    def chunk(q1, q2):
        s1, i = jax.lax.top_k(sub_scores(q1, c1), k)
        s2, j = jax.lax.top_k(sub_scores(q2, c2), k)
        scores, best = jax.lax.top_k(s1[..., first] + s2[..., second], k)
        chosen = lambda ids, ranks: jnp.take_along_axis(ids, jnp.asarray(ranks)[best], axis=-1)
        return scores, chosen(i, first) * n + chosen(j, second)

    def by_extraction(q1, q2):
        """The same for tokens of one row, with loops that XLA's CPU backend compiles well."""
        s1, i = extraction.largest(_scores_of_heads(q1, c1), k)
        s2, j = extraction.largest(_scores_of_heads(q2, c2), k)
        scores, place = extraction.largest_sums(s1, s2)
        ids = jnp.take_along_axis(i, place // k, axis=1) * n + jnp.take_along_axis(j, place % k, axis=1)
        of_tokens = lambda x: x.reshape(heads, -1, k).swapaxes(0, 1)[None]
        return of_tokens(scores), of_tokens(ids)

    batch, length, heads, _ = q1.shape
    if _tokens_alone(batch) and extraction.serves(jnp.promote_types(q1.dtype, jnp.float32), k):
        return over_time(by_extraction, chunk_length(heads * n, length, few=True), q1, q2)
    return over_time(chunk, chunk_length(batch * heads * n, length), q1, q2)


def _tokens_alone(batch: int) -> bool:
    """On CPUs, all tokens in one row that no mesh splits."""
    return current_platform() == "cpu" and batch == 1 and automatic_axes() is None


def _scores_of_heads(q: Array, c: Array) -> Array:
    """[H * t, n] of q [1, t, H, K]: `sub_scores` in the order in which products of heads leave it."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("thd,hnd->htn" if c.ndim == 3 else "thd,nd->htn", q[0], c, preferred_element_type=wide,
                      precision=jax.lax.Precision.HIGHEST).reshape(-1, c.shape[-2])


def backward(q1: Array, q2: Array, c1: Array, c2: Array, ids: Array, g: Array) -> tuple[Array, Array, Array, Array]:
    """(dq1, dq2, dc1, dc2) from the saved ids and the cotangent of the scores: README.md derives it."""
    n, keys = c1.shape[-2], "hnd" if c1.ndim == 3 else "nd"
    product = lambda spec, *of: jnp.einsum(spec, *of, preferred_element_type=g.dtype,
                                           precision=jax.lax.Precision.HIGHEST)

    def half(q, c, chosen, g):
        """The gradients of one half: the cotangents, put where the chosen sub-keys are, times keys and queries."""
        at_keys = _put(chosen, g, n)
        dq = product(f"bthn,{keys}->bthd", at_keys, c.astype(g.dtype))
        return dq, product(f"bthn,bthd->{keys}", at_keys, q.astype(g.dtype))

    def half_beside(q, c, chosen, g):
        """The same without the zeros of the cotangents for the queries, and with tokens side by side for the keys."""
        heads, length = q.shape[2], q.shape[1]
        head = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, 2)
        row = chosen + (head * n if c.ndim == 3 else 0)
        dq = cpu_rows.combine(c.reshape(-1, c.shape[-1]), row.reshape(-1, row.shape[-1]),
                              g.reshape(-1, g.shape[-1])).reshape(q.shape)
        place = ((head * n + chosen) * length + jax.lax.broadcasted_iota(jnp.int32, chosen.shape, 1)).reshape(-1)
        at_keys = jnp.zeros_like(g, shape=(heads * n * length,)).at[place].add(g.reshape(-1), mode="promise_in_bounds")
        return dq, product(f"hnt,thd->{keys}", at_keys.reshape(heads, n, length), q[0].astype(g.dtype))

    def chunk(sums, q1, q2, ids, g):
        dq1, dc1 = half(q1, c1, ids // n, g)
        dq2, dc2 = half(q2, c2, ids % n, g)
        return (sums[0] + dc1, sums[1] + dc2), (dq1.astype(q1.dtype), dq2.astype(q2.dtype))

    batch, length, heads, _ = q1.shape
    size = chunk_length(batch * heads * n, length)
    if _tokens_alone(batch) and cpu_rows.serves(c1.size // c1.shape[-1], c1.shape[-1]):
        half, size = half_beside, chunk_length(heads * n, length, few=True)
    zeros = (jnp.zeros_like(c1, g.dtype), jnp.zeros_like(c2, g.dtype))
    (dc1, dc2), (dq1, dq2) = scan_time(chunk, size, zeros, q1, q2, ids, g)
    return dq1, dq2, dc1.astype(c1.dtype), dc2.astype(c2.dtype)


def _put(places: Array, values: Array, size: int) -> Array:
    """[..., size] of zeros with values [..., k] added at places [..., k]."""
    if current_platform() == "cpu":
        put = jax.vmap(lambda place, value: jnp.zeros(size, values.dtype).at[place].add(value))
        k = places.shape[-1]
        return put(places.reshape(-1, k), values.reshape(-1, k)).reshape(*places.shape[:-1], size)
    every = jnp.arange(size, dtype=places.dtype)
    parts = [jnp.where(places[..., r, None] == every, values[..., r, None], 0) for r in range(places.shape[-1])]
    return functools.reduce(jnp.add, parts)
