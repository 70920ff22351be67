"""One iteration of the core for every row of a batch, each on its own token and at its own iteration.

With it a row whose token has stopped goes on to the next token while the others still iterate (continuous batching over
depth, Geiping et al. 2025, section 6.1). B batch, D width, m states in the ring.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core.types import Array, Context, State
from lm.models.depth_loop import Core, rows_where, slots


class Doing(NamedTuple):
    """What each row is at. e, s, shown: [B, D] embedded token, state, and hidden state of the last prediction; step:
    [B] iterations done; position, reset: [B] of the token; busy: [B] whether there is one; ring: states of the core
    with what the token has written so far."""

    e: Array
    s: Array
    shown: Array
    step: Array
    position: Array
    reset: Array
    busy: Array
    ring: State


def idle(batch_size: int, width: int, dtype: Any, ring: State) -> Doing:
    """No row is at a token."""
    zeros, number = jnp.zeros((batch_size, width), dtype), jnp.zeros((batch_size,), jnp.int32)
    return Doing(zeros, zeros, zeros, number, number, number != 0, number != 0, jax.tree.map(jnp.zeros_like, ring))


def begin(doing: Doing, ring: State, e: Array, s: Array, ctx: Context) -> Doing:
    """Rows whose weight is not 0 begin with a token: its embedded input and first state, [B, 1, D]."""
    new = ctx.weights[:, 0] != 0
    pick = lambda new_, old: jnp.where(new.reshape(-1, *(1,) * (old.ndim - 1)), new_, old)
    return Doing(pick(e[:, 0], doing.e), pick(s[:, 0], doing.s), pick(jnp.zeros_like(doing.shown), doing.shown),
                 pick(0, doing.step), pick(ctx.positions[:, 0], doing.position), pick(ctx.reset[:, 0], doing.reset),
                 doing.busy | new, rows_where(new, ring, doing.ring))


class Advanced(NamedTuple):
    """finished: [B] rows whose token is through with this iteration. hidden: [B, 1, D], what each row predicts now;
    coda: the coda's state after it."""

    doing: Doing
    ring: State
    finished: Array
    hidden: Array
    coda: State


def advance(core: Callable[[Context], Core], predict: Callable[[Array, Context], tuple[Array, State]],
            divergence: Callable[[Array, Array], Array], variables: Any, doing: Doing, ring: State, r: Any,
            threshold: Any | None, ctx: Context) -> Advanced:
    """One iteration of every busy row. A token is through after r iterations, or the first that moves its prediction by
    less than the threshold; then the ring takes over what it wrote.

    core: an iteration in a context. predict: hidden states and the coda's state after them.
    """
    m, rows = slots(ring), jnp.arange(doing.step.shape[0])
    at = doing.step % m
    inner = ctx._replace(reset=doing.reset[:, None], positions=doing.position[:, None], weights=doing.busy[:, None])
    # Two indices with a slice between them: the rows come first, and go back behind the repeats.
    before = jax.tree.map(lambda a: jnp.moveaxis(a[at, :, rows], 0, 1), ring)
    new, after, _ = core(inner)(variables, doing.s[:, None], doing.e[:, None], before, 0)
    written = jax.tree.map(lambda a, b: a.at[at, :, rows].set(jnp.moveaxis(b, 1, 0).astype(a.dtype)), doing.ring, after)
    written = rows_where(doing.busy, written, doing.ring)
    hidden, coda = predict(new, inner)
    step = doing.step + doing.busy
    through = step >= r
    if threshold is not None:
        settled = divergence(doing.shown[:, None], hidden)[:, 0] < threshold
        through |= settled & (step >= jnp.minimum(m, r))
    finished = doing.busy & through
    doing = doing._replace(s=jnp.where(doing.busy[:, None], new[:, 0], doing.s), shown=hidden[:, 0], step=step,
                           busy=doing.busy & ~finished, ring=written)
    return Advanced(doing, rows_where(finished, written, ring), finished, hidden, coda)
