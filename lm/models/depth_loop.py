"""Loops over one core: for training, for a given number of iterations, and until each token's prediction settles.

`core(variables, s, e, state, i) -> (s', state', aux)` is iteration i on states s and embedded input e, both [B, T, D];
`state` is what its layers remember of the tokens before. A ring holds m of these, stacked in front, [m, ...]: iteration
i reads number i mod m as it was before the call, and the last iteration to write it stays. With m no less than the
iterations no two share one.

Legend: B batch, T time, D width, r iterations, k of them with a gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core.types import Array, Aux, State

Core = Callable[[Any, Array, Array, State, Array], tuple[Array, State, Aux]]


class Looped(NamedTuple):
    """s: [B, T, D] after the last iteration; ring: states after the call; aux: what the core reports, of the last
    iteration; "tally" over all of them that have a gradient. change: |s_r - s_{r-1}| / |s_r| over the whole call."""

    s: Array
    ring: State
    aux: Aux
    change: Array


def slots(ring: State) -> int:
    """How many states the ring holds; 1 where the layers remember nothing."""
    leaves = jax.tree.leaves(ring)
    return leaves[0].shape[0] if leaves else 1


def read(ring: State, i: Any) -> State:
    """The state that iteration i goes on from."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i % a.shape[0], 0, keepdims=False), ring)


def write(ring: State, i: Any, state: State) -> State:
    """The ring after iteration i left `state`."""
    return jax.tree.map(lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new.astype(a.dtype), i % a.shape[0], 0),
                        ring, state)


def train_loop(core: Core, variables: Any, s: Array, e: Array, ring: State, r: Array, k: int) -> Looped:
    """r iterations, a traced number, of which the last min(k, r) have a gradient (Geiping et al. 2025, 3.3).

    One program for every r: a loop of r - k iterations that is cut off from the gradient, then k steps of a scan, of
    which the first k - r do nothing where r < k. The core sees the embedded input in each, so that the prelude learns
    too.
    """
    stop = jax.lax.stop_gradient
    held, input_, before = stop(variables), stop(e), stop(ring)
    silent = jnp.maximum(r - k, 0)

    def unheard(i, carry):
        s, after = carry
        s, state, _ = core(held, s, input_, read(before, i), i)
        return s, write(after, i, state)

    s, after = stop(jax.lax.fori_loop(0, silent, unheard, (stop(s), before)))

    def heard(carry, step):
        s, after = carry
        i = step - k + r
        counts = i >= 0  # of the k last iterations those that there are
        i = jnp.maximum(i, 0)
        new, state, aux = core(variables, s, e, read(ring, i), i)
        change = relative_change(s, new)
        keep = lambda new, old: jnp.where(counts, new, old)
        after = jax.tree.map(keep, write(after, i, stop(state)), after)
        tally = jax.tree.map(lambda a: jnp.where(counts, a, jnp.zeros_like(a)), aux.get("tally", {}))
        report = {name: value for name, value in aux.items() if name != "tally"}
        return (keep(new, s), after), (report, tally, change)

    (s, after), (report, tally, change) = jax.lax.scan(heard, (s, after), jnp.arange(k))
    aux = jax.tree.map(lambda a: a[-1], report)
    if tally:
        aux["tally"] = jax.tree.map(lambda a: a.sum(0), tally)
    return Looped(s, fill(after, r), aux, change[-1])


def fixed_loop(core: Core, variables: Any, s: Array, e: Array, ring: State, r: Any) -> Looped:
    """r iterations, a number or a traced one; differentiable where it is a number."""
    def body(i, carry):
        s, _, after = carry
        new, state, _ = core(variables, s, e, read(ring, i), i)
        return new, s, write(after, i, state)

    last, before, after = jax.lax.fori_loop(0, r, body, (s, s, ring))
    return Looped(last, fill(after, r), {}, relative_change(before, last))


def fill(ring: State, r: Any) -> State:
    """The ring after r iterations: states that none of them wrote become that of the last one."""
    m = slots(ring)
    if m == 1 or (isinstance(r, int) and r >= m):
        return ring
    at = jnp.minimum(jnp.arange(m), r - 1)
    return jax.lax.cond(r >= m, lambda ring: ring, lambda ring: jax.tree.map(lambda a: a[at], ring), ring)


class Exited(NamedTuple):
    """s: [B, T, D] of each token after its last iteration; steps: [B, T] how many it took; ring as in `Looped`."""

    s: Array
    steps: Array
    ring: State


def exit_loop(core: Core, predict: Callable[[Array], Array], divergence: Callable[[Array, Array], Array],
              variables: Any, s: Array, e: Array, ring: State, r: Any, *, threshold: Any, present: Array) -> Exited:
    """At most r iterations; a token stops after the first that moves its prediction by less than `threshold`, and the
    loop when all have.

    predict: states to whatever `divergence(before, now) -> [B, T]` compares; zeros are the prediction before the first
    iteration, the uniform distribution. present: [B, T], false for padding, which is not waited for. No token stops
    before every state of the ring was written, m iterations: later tokens would find nothing there.

    A token that has stopped is computed again from the input of its last iteration until the others stop too: what it
    shows them is what it showed at that iteration.
    """
    least = jnp.minimum(slots(ring), r)
    first = jnp.zeros_like(jax.eval_shape(predict, s), dtype=s.dtype)

    def running(carry):
        i, _, _, _, done, _, _ = carry
        return (i < r) & ~done.all()

    def body(carry):
        i, s, out, shown, done, steps, after = carry
        new, state, _ = core(variables, s, e, read(ring, i), i)
        out = jnp.where(done[..., None], out, new)
        row = done.all(axis=1)
        after = rows_where(~row, write(after, i, state), after)
        now = predict(out)
        settled = (divergence(shown, now) < threshold) & (i + 1 >= least)
        s = jnp.where((done | settled)[..., None], s, new)
        return i + 1, s, out, now, done | settled, steps + ~done, after

    absent = ~present
    _, _, out, _, _, steps, after = jax.lax.while_loop(
        running, body, (jnp.int32(0), s, s, first, absent, jnp.zeros(absent.shape, jnp.int32), ring))
    return Exited(out, steps, fill(after, r))


def rows_where(which: Array, new: State, old: State) -> State:
    """`new` for the rows [B] that are true, `old` for the others, of arrays [m, R, B, ...]."""
    return jax.tree.map(lambda a, b: jnp.where(which.reshape(1, 1, -1, *(1,) * (b.ndim - 3)), a, b), new, old)


def relative_change(before: Array, after: Array) -> Array:
    """|after - before| / |after|, one number, float32, without gradient."""
    before, after = (jax.lax.stop_gradient(a).astype(jnp.float32) for a in (before, after))
    size = jnp.sqrt(jnp.sum(jnp.square(after)))
    return jnp.sqrt(jnp.sum(jnp.square(after - before))) / jnp.where(size == 0, 1, size)
