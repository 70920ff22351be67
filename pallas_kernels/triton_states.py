"""What Triton kernels of matrix states share: a program has one row and head, all or some of its values, and goes
through time with the state [K, V] in registers.

Steps go in groups, whose rows are read before the chain of the group. The state before every span of groups is saved;
the backward computes the states before the groups of a span again, into memory of its own, and goes through the groups
from the end: the states inside of a group are computed again and stay in registers.

B batch, T time, H heads, K key size, V value size; arrays are [B, T, H, N] as they lie.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu

Array = jax.Array
GROUP = 2           # steps, whose states the backward has in registers; compilers choke on 4
SPAN = 32           # groups between saved states: at K = V = 64 these are twice as large as one bfloat16 array
VALUES = 16         # of a program of the forward: many small programs hide each other's waits
MOST_SIZE = 64      # of keys and of values


def unsupported(dtype: str, keys: int, values: int, platform: str) -> str | None:
    """Why such kernels cannot serve, or None."""
    reason = gpu.no_triton(dtype, platform)
    if reason is None and max(keys, values) > MOST_SIZE:
        return f"it takes heads of up to {MOST_SIZE} keys and values, not {keys} and {values}: registers hold the state"
    return reason


def padded(x: Array) -> Array:
    """[B, T, H, N] with zeros up to whole groups, and N up to a power of two: log-decay 0 and key 0 change no state."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % GROUP), (0, 0), (0, size(x.shape[3]) - x.shape[3])))


def padded_state(x: Array) -> Array:
    """[B, H, K, V], with both up to a power of two."""
    return jnp.pad(x, ((0, 0), (0, 0), *((0, size(n) - n) for n in x.shape[2:])))


def size(n: int) -> int:
    """The power of two that n is padded to."""
    return max(VALUES, pl.next_power_of_2(n))


def spans(length: int) -> int:
    """How many states are saved of a padded length."""
    return pl.cdiv(length, GROUP * SPAN)


def call(kernel: Callable, name: str, warps: int, tile: int | None, by_key: Sequence[Array], by_value: Sequence[Array],
         others: Sequence[Array], words: Sequence[Array], made_by_key: Sequence, made_by_value: Sequence,
         made_others: Sequence) -> list[Array]:
    """kernel(refs) for each row, head and `tile` of values (None: all of them in one program).

    by_key [B, T, H, K] is seen as [T, K], by_value [B, T, H, V] as [T, tile]; others [B, H, ..., V] as [..., tile] if
    their last axis is values, and else ([B, H, K]) as they are.
    """
    from jax.experimental.pallas import triton as plt
    batch, _, heads, values = by_value[0].shape
    tile = tile or values
    through = lambda x, n, at: pl.BlockSpec((None, x.shape[1], None, n), lambda b, h, v: (b, 0, h, at(v)))
    keys = lambda x: through(x, x.shape[3], lambda v: 0)
    part = lambda x: through(x, tile, lambda v: v)

    def own(x):
        if len(x.shape) == 3:
            return pl.BlockSpec((None, None, x.shape[2]), lambda b, h, v: (b, h, 0))
        middle = x.shape[2:-1]
        return pl.BlockSpec((None, None, *middle, tile), lambda b, h, v: (b, h, *[0] * len(middle), v))

    row = lambda x: pl.BlockSpec((None, x.shape[1]), lambda b, h, v: (b, 0))
    return pl.pallas_call(
        kernel, grid=(batch, heads, values // tile), name=name, interpret=gpu.interpret_triton(),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        in_specs=[*map(keys, by_key), *map(part, by_value), *map(own, others), *map(row, words)],
        out_specs=[*map(keys, made_by_key), *map(part, made_by_value), *map(own, made_others)],
        out_shape=[*made_by_key, *made_by_value, *made_others],
    )(*by_key, *by_value, *others, *words)


def read(refs: Sequence, start) -> list[list[Array]]:
    """The rows of a group's steps in float32, one list a step."""
    return [[ref[start + j].astype(jnp.float32) for ref in refs] for j in range(GROUP)]


def down(x: Array) -> Array:
    """[K, 1] of a row of keys."""
    return x[:, None]


def across(x: Array) -> Array:
    """[1, V] of a row of values."""
    return x[None, :]


def forwards(length: int, group: Callable, save: Callable, state: Array) -> Array:
    """state = group(start, state) over all groups; save(span, state) before each span."""
    groups = length // GROUP

    def span(s, state):
        save(s, state)
        last = jnp.minimum(groups - s * SPAN, SPAN)
        return jax.lax.fori_loop(0, last, lambda i, state: group((s * SPAN + i) * GROUP, state), state)

    return jax.lax.fori_loop(0, spans(length), span, state)


def backwards(length: int, group: Callable, pull: Callable, saved, scratch, carry):
    """carry = pull(start, state, carry) from the last group to the first; state: the one before the group.

    saved [spans, K, V]; scratch [SPAN, K, V] takes the states of a span, which group(start, state) computes again.
    """
    groups = length // GROUP

    def span(n, carry):
        s = spans(length) - 1 - n
        last = jnp.minimum(groups - s * SPAN, SPAN)

        def again(i, state):
            scratch[i] = state
            return group((s * SPAN + i) * GROUP, state)

        def back(i, carry):
            at = last - 1 - i
            return pull((s * SPAN + at) * GROUP, scratch[at], carry)

        _wait()                         # the states of the span before have been read
        jax.lax.fori_loop(0, last, again, saved[s])
        _wait()                         # those of this one are written, by whatever thread
        return jax.lax.fori_loop(0, last, back, carry)

    return jax.lax.fori_loop(0, spans(length), span, carry)


def _wait() -> None:
    """All threads of the program are here, and see what the others wrote."""
    if not gpu.interpret_triton():
        from jax.experimental.pallas import triton as plt
        plt.debug_barrier()
