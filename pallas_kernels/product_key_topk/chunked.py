"""Fast form for every backend of XLA: both halves' k best, then the staircase, a chunk of tokens at a time.

B batch, T tokens, H heads, K size of a sub-key, n sub-keys of each half, k kept.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chunks import over_time, scan_time
from pallas_kernels.dispatch import current_platform
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

    batch, length, heads, _ = q1.shape
    return over_time(chunk, chunk_length(batch * heads * n, length), q1, q2)


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

    def chunk(sums, q1, q2, ids, g):
        dq1, dc1 = half(q1, c1, ids // n, g)
        dq2, dc2 = half(q2, c2, ids % n, g)
        return (sums[0] + dc1, sums[1] + dc2), (dq1.astype(q1.dtype), dq2.astype(q2.dtype))

    batch, length, heads, _ = q1.shape
    zeros = (jnp.zeros_like(c1, g.dtype), jnp.zeros_like(c2, g.dtype))
    (dc1, dc2), (dq1, dq2) = scan_time(chunk, chunk_length(batch * heads * n, length), zeros, q1, q2, ids, g)
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
