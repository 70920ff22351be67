"""What a chunk is computed with inside a TPU kernel: two-dimensional operations whose transposes Mosaic has as well.

The kernels' backward is jax.vjp of their chunk, taken inside the kernel. JAX would transpose a slice to a pad and a
product to one with its operands the other way round, which the compiler may lack or do slowly; so these have
derivatives of their own, each made of the others.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
SUBLANES = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(form: str, exact: bool, x: Array, y: Array) -> Array:
    """x y, x y^T or x^T y for form "nn", "nt" or "tn", summed in float32.

    exact: of the float32 operands, in six passes of the matrix unit; else of the operands rounded to bfloat16, in one.
    The gradient is made of products alike.
    """
    contracted = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[form]
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=(contracted, ((), ())),
                            preferred_element_type=jnp.float32)
    if exact:
        return dot(x, y, precision=jax.lax.Precision.HIGHEST)
    return dot(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), precision=jax.lax.Precision.DEFAULT)


def _product_backward(form, exact, saved, g):
    x, y = saved
    if form == "nn":
        return product("nt", exact, g, y), product("tn", exact, x, g)
    if form == "nt":
        return product("nn", exact, g, y), product("tn", exact, g, x)
    return product("nt", exact, y, g), product("nn", exact, x, g)


product.defvjp(lambda form, exact, x, y: (product(form, exact, x, y), (x, y)), _product_backward)


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
def second_halves(size: int, x: Array) -> Array:
    """[n / 2, N]: of each two neighbouring blocks of `size` rows of x [n, N], the second. size: 8 at least."""
    return jnp.concatenate([x[start:start + size] for start in range(size, x.shape[0], 2 * size)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def as_second_halves(size: int, x: Array) -> Array:
    """[2 n, N]: zeros before each block of `size` rows of x [n, N]. The transpose of `second_halves`."""
    zeros = jnp.zeros((size, x.shape[1]), x.dtype)
    return jnp.concatenate([part for start in range(0, x.shape[0], size) for part in (zeros, x[start:start + size])])


second_halves.defvjp(lambda size, x: (second_halves(size, x), None), lambda size, _, g: (as_second_halves(size, g),))
as_second_halves.defvjp(lambda size, x: (as_second_halves(size, x), None),
                        lambda size, _, g: (second_halves(size, g),))


def pairs_between_halves(size: int, exact: bool, heads: int, rows: Array, before: Array, columns: Array) -> Array:
    """Scores of (rows before), a head after the other, with columns. First halves have none."""
    if size < SUBLANES:
        return product("nt", exact, apart(heads, rows * before), columns)
    rows = second_halves(size, rows) * second_halves(size, before)
    return as_second_halves(size, product("nt", exact, apart(heads, rows), columns))


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
