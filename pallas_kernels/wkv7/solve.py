"""x = (I - a)^-1 y for a strictly lower triangular a, by halving.

The inverse of two neighbouring blocks is that of each and X_2 a_21 X_1 below them, so log2(c) rounds of two products
give the whole inverse, and its entries are never larger on the way than in the end. The product (I + a)(I + a^2)(I +
a^4)..., as many rounds, is not so: where the keys of a chunk are alike, the powers of a grow like binomials, and in
float32 their differences are noise.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.wkv6.halving import places, product, split_at, transposed

Array = jax.Array


@jax.custom_vjp
def solve(a: Array, y: Array) -> Array:
    """(I - a)^-1 y for a [..., c, c], of which only what is below the diagonal counts, and y [..., c, V].

    c must be a power of two.
    """
    return product(inverse(a, a.shape[-1]), y)


def inverse(a: Array, length: int, product=product) -> Array:
    """(I - a)^-1 of each block of `length`, a power of two, along the diagonal of a; places outside of them are 0."""
    row, column = places(*a.shape[-2:])
    level_of = jnp.where(row // length == column // length, split_at(length, row, column), 0)
    out, size = jnp.where(level_of == 1, a, 0) + (row == column).astype(a.dtype), 2
    while size < length:
        below = jnp.where(level_of // size == 1, a, 0)
        out, size = out + product(out, product(below, out)), 2 * size
    return out


def _solve_forward(a, y):
    inverted = inverse(a, a.shape[-1])
    x = product(inverted, y)
    return x, (inverted, x)


def _solve_backward(saved, dx):
    inverted, x = saved
    dy = product(transposed(inverted), dx)
    row, column = places(*inverted.shape[-2:])
    return jnp.where(row > column, product(dy, transposed(x)), 0), dy


solve.defvjp(_solve_forward, _solve_backward)
