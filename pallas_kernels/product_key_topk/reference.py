"""The definition: the scores of all n * n keys, differentiated by JAX. B batch, T time, H heads, K sub-key size."""

import jax
import jax.numpy as jnp

Array = jax.Array


def forward(q1: Array, q2: Array, c1: Array, c2: Array, k: int) -> tuple[Array, Array]:
    """Scores and ids [B, T, H, k]. Both halves are sorted first, so that ties among sums go by rank."""
    n = c1.shape[-2]
    s1, i = jax.lax.top_k(sub_scores(q1, c1), n)
    s2, j = jax.lax.top_k(sub_scores(q2, c2), n)
    sums = s1[..., :, None] + s2[..., None, :]
    ids = i[..., :, None] * n + j[..., None, :]
    scores, best = jax.lax.top_k(sums.reshape(*s1.shape[:-1], n * n), k)
    return scores, jnp.take_along_axis(ids.reshape(*s1.shape[:-1], n * n), best, axis=-1)


def sub_scores(q: Array, c: Array) -> Array:
    """[B, T, H, n] in float32 at least, from products that are not rounded below the inputs' precision."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bthd,hnd->bthn" if c.ndim == 3 else "bthd,nd->bthn", q, c, preferred_element_type=wide,
                      precision=jax.lax.Precision.HIGHEST)
