"""How the GPU kernels see the arrays: queries [G, M, S, D], sub-keys [G, S, n, D].

M queries share each of S sets of sub-keys: one of every head, or one for all. G is 1, or what jax.vmap maps over.
Nothing is copied for that.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Array = jax.Array
PROGRAMS = 512          # that a sum over queries is split into at least: some for every multiprocessor


def grouped(q1: Array, q2: Array, c1: Array, c2: Array) -> list[Array]:
    """From [B, T, H, D] and [n, D] or [H, n, D]."""
    return [by_group(q1, c1), by_group(q2, c1), *(c[None] if c.ndim == 3 else c[None, None] for c in (c1, c2))]


def by_group(x: Array, c: Array) -> Array:
    """[B, T, H, ...] as [1, M, S, ...]."""
    return x.reshape(1, -1, x.shape[2] if c.ndim == 3 else 1, x.shape[-1])


def ungrouped(x: Array, q: Array) -> Array:
    """[1, M, S, N] as [B, T, H, N]."""
    return x.reshape(*q.shape[:3], x.shape[-1])


def padded(x: Array, to: Mapping[int, int | str]) -> Array:
    """x with zeros at the end of these axes, up to a multiple of that or to a "power" of two, 16 at least."""
    more = [0] * x.ndim
    for axis, size in to.items():
        length = x.shape[axis]
        more[axis] = (max(16, 1 << (length - 1).bit_length()) - length) if size == "power" else -length % size
    return jnp.pad(x, [(0, n) for n in more]) if any(more) else x


def parts(programs: int, trips: int) -> int:
    """Into how many equal parts `trips` are split, so that there are about PROGRAMS programs."""
    wanted = min(trips, max(1, PROGRAMS // programs))
    return next(part for part in range(wanted, 0, -1) if trips % part == 0)
