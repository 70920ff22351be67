"""What a chunk is computed with inside a TPU kernel: two-dimensional operations whose transposes Mosaic has as well.

The kernels' backward is jax.vjp of their chunk, taken inside the kernel. JAX would transpose a slice to a pad and a
product to one with its operands the other way round, which the compiler may lack or do slowly; so these have
derivatives of their own, each made of the others.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
SUBLANES = 8


class Parts(NamedTuple):
    """How many bfloat16 numbers an operand of a product is the sum of: one rounds it, two keep 16 bits, three all."""
    x: int
    y: int


EXACT = None                # float32 operands, which the matrix unit takes in six passes
ROUNDED = Parts(1, 1)       # one pass
WIDE = Parts(2, 2)          # three passes, error 2^-17
WIDE_X = Parts(2, 1)        # two passes, for a y that was bfloat16 anyway
STORED = Parts(1, 3)        # three passes, for an x that was: the whole float32 y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(form: str, parts: Parts | None, x: Array, y: Array) -> Array:
    """x y, x y^T or x^T y for form "nn", "nt" or "tn", in float32.

    The gradient of one that is not EXACT is made of ROUNDED products: what rounds it does not accumulate.
    """
    contracted = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[form]
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=(contracted, ((), ())),
                            preferred_element_type=jnp.float32)
    if parts is EXACT:
        return dot(x, y, precision=jax.lax.Precision.HIGHEST)
    pieces = itertools.product(enumerate(_apart(x, parts.x)), enumerate(_apart(y, parts.y)))
    return sum(dot(a, b, precision=jax.lax.Precision.DEFAULT) for (i, a), (j, b) in pieces if i + j < max(parts))


def _apart(x: Array, parts: int) -> list[Array]:
    pieces = [x.astype(jnp.bfloat16)]
    while len(pieces) < parts:
        x = x - pieces[-1].astype(jnp.float32)
        pieces.append(x.astype(jnp.bfloat16))
    return pieces


def _product_backward(form, parts, saved, g):
    x, y = saved
    parts = EXACT if parts is EXACT else ROUNDED
    if form == "nn":
        return product("nt", parts, g, y), product("tn", parts, x, g)
    if form == "nt":
        return product("nn", parts, g, y), product("tn", parts, g, x)
    return product("nt", parts, y, g), product("nn", parts, x, g)


product.defvjp(lambda form, parts, x, y: (product(form, parts, x, y), (x, y)), _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def swap_blocks(x: Array, size: int) -> Array:
    """x [c, N] with neighbouring blocks of `size` rows exchanged."""
    length, width = x.shape
    if size >= SUBLANES:
        parts = [x[start:start + size] for start in range(0, length, size)]
        return jnp.concatenate([parts[i ^ 1] for i in range(len(parts))])
    registers = x.reshape(-1, SUBLANES, width)
    up, down = (pltpu.roll(registers, shift, 1) for shift in (size, SUBLANES - size))
    row = jax.lax.broadcasted_iota(jnp.int32, registers.shape, 1)
    return jnp.where((row & size) != 0, up, down).reshape(x.shape)


swap_blocks.defvjp(lambda x, size: (swap_blocks(x, size), None), lambda size, _, g: (swap_blocks(g, size),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apart(heads: int, x: Array) -> Array:
    """[heads c, N]: x [c, N] once a head, with zeros in the columns of the other heads."""
    return jnp.concatenate([of_head(x, h, heads) for h in range(heads)]) if heads > 1 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def together(heads: int, x: Array) -> Array:
    """[c, N] from x [heads c, N]: of each head's rows its own columns. The transpose of `apart`."""
    length = x.shape[0] // heads
    return sum(of_head(x[h * length:(h + 1) * length], h, heads) for h in range(heads)) if heads > 1 else x


apart.defvjp(lambda heads, x: (apart(heads, x), None), lambda heads, _, g: (together(heads, g),))
together.defvjp(lambda heads, x: (together(heads, x), None), lambda heads, _, g: (apart(heads, g),))


@jax.custom_vjp
def first_row(x: Array) -> Array:
    """[1, N] of x [c, N]."""
    return x[:1]


def _first_row_backward(shape, g):
    return (jnp.where(jax.lax.broadcasted_iota(jnp.int32, shape, 0) == 0, jnp.broadcast_to(g, shape), 0),)


first_row.defvjp(lambda x: (first_row(x), x.shape), _first_row_backward)


def of_head(x: Array, head: int, heads: int) -> Array:
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(column // (x.shape[1] // heads) == head, x, 0)


def own_blocks(heads: int, x: Array) -> Array:
    """x [heads V, heads K] with zeros where the rows are of one head and the columns of another."""
    if heads == 1:
        return x
    row, column = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) // (x.shape[axis] // heads) for axis in (0, 1))
    return jnp.where(row == column, x, 0)


@jax.custom_vjp
def halves(x: Array) -> tuple[Array, Array]:
    """The left and the right half of the columns."""
    middle = x.shape[1] // 2
    return x[:, :middle], x[:, middle:]


halves.defvjp(lambda x: (halves(x), None), lambda _, g: (jnp.concatenate(g, axis=1),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_blocks(heads: int, x: Array) -> Array:
    """[heads c, heads c], block-diagonal, from x [heads c, c]."""
    return own_blocks(heads, jnp.concatenate([x] * heads, axis=1))


def _in_blocks_backward(heads, _, g):
    length, g = g.shape[1] // heads, own_blocks(heads, g)
    return (sum(g[:, h * length:(h + 1) * length] for h in range(heads)),)


in_blocks.defvjp(lambda heads, x: (in_blocks(heads, x), None), _in_blocks_backward)
