"""Pieces of the bfloat16 kernels: two heads of at most 64 side by side along the 128 lanes, a chunk of 64 positions.

A chunk is worked on in eighths: [8, 128] float32 values, one register each.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
CHUNK, EIGHTHS, HALF = 64, range(8), 64
REGISTER = (8, 128)


def place(axis: int) -> Array:
    """The row or the lane of every element of a register."""
    return jax.lax.broadcasted_iota(jnp.int32, REGISTER, axis)


def dot(form: str, x: Array, y: Array) -> Array:
    """x y, x y^T or x^T y for form "nn", "nt" or "tn": operands rounded to bfloat16, summed in float32."""
    contracted = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[form]
    return jax.lax.dot_general(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), (contracted, ((), ())),
                               preferred_element_type=jnp.float32)


def registers(x: Array) -> list[Array]:
    """[8 n, 128] as n arrays."""
    return [x[start:start + 8] for start in range(0, x.shape[0], 8)]


def packed(parts: list[Array]) -> Array:
    """Below each other, in bfloat16."""
    return jnp.concatenate(parts).astype(jnp.bfloat16)


def together(x: Array) -> Array:
    """[n, 128] from [2 n, 128]: the left lanes of the first head's rows, the right ones of the second's."""
    length = x.shape[0] // 2
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (length, 128), 1) < HALF, x[:length], x[length:])


def apart(x: Array) -> Array:
    """The transpose of `together`: the rows of x [n, 128] once a head, zeros in the other head's lanes."""
    left = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < HALF
    return jnp.concatenate([jnp.where(left, x, 0), jnp.where(left, 0, x)])


def apart_packed(x: Array) -> Array:
    """`apart` of bfloat16 rows that come from memory, two to a 32-bit element, by masks."""
    bits = pltpu.bitcast(x, jnp.int32)
    left = jnp.where(jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1) < HALF, -1, 0)
    return jnp.concatenate([pltpu.bitcast(bits & mask, jnp.bfloat16) for mask in (left, ~left)])


def joined_packed(x: Array) -> Array:
    """The inverse of `apart_packed`."""
    bits = pltpu.bitcast(x, jnp.int32)
    return pltpu.bitcast(bits[:bits.shape[0] // 2] | bits[bits.shape[0] // 2:], jnp.bfloat16)


def sums_to_end(x: Array) -> Array:
    """Running sums over each eight rows of x [8 n, 128], from each row to the last."""
    x = x.reshape(-1, *REGISTER)
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    for shift in (1, 2, 4):
        x = x + jnp.where(row < 8 - shift, pltpu.roll(x, 8 - shift, 1), 0)
    return x.reshape(-1, REGISTER[1])
