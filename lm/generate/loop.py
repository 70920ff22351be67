"""The part of decoding that runs on the device: draw a token for every row, feed it, again, N times in one call.

Shape legend: B batch, V padded vocabulary, S steps of a call.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.head import logits_of
from lm.core.sharding import constrain
from lm.core.types import Apply, Array, Key, Params, State
from lm.generate.sampling import SamplingOptions, row_keys, sample


class Loop(NamedTuple):
    """Where the rows are. token: [B] int32, drawn and not yet in the state. position: [B] of the next token to draw.
    done: [B] bool. broken: [B] bool, NaN logits were met. seen: [B, V] bool, tokens of the row so far, or None."""

    token: Array
    position: Array
    done: Array
    broken: Array
    seen: Array | None


class Plan(NamedTuple):
    """What does not change: rows [B] numbers for the keys; end: [B], position after the last token allowed; stop: [n]
    token ids that end a row; key."""

    rows: Array
    end: Array
    stop: Array
    key: Key


def draw(logits: Array, loop: Loop, plan: Plan, options: SamplingOptions) -> Loop:
    """The next token of every row that is not done, from its logits [B, V]."""
    token = sample(logits, options, row_keys(plan.key, plan.rows, loop.position), loop.seen)
    token = jnp.where(loop.done, loop.token, token)
    broken = loop.broken | (~loop.done & jnp.isnan(logits).any(axis=-1))
    done = loop.done | broken | (token[:, None] == plan.stop).any(axis=-1) | (loop.position + 1 >= plan.end)
    seen = None if loop.seen is None else loop.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return Loop(token, loop.position + ~loop.done, done, broken, seen)


def whole(loop: Loop) -> Loop:
    """The rows' numbers whole on every device and host: each host reads all of them, and so decides alike to go on."""
    small = {name: constrain(getattr(loop, name), None) for name in ("token", "position", "done", "broken")}
    return loop._replace(**small)


@functools.partial(jax.jit, static_argnames=("options",))
def first_token(logits: Array, position: Array, seen: Array | None, plan: Plan, options: SamplingOptions) -> Loop:
    """The rows after the first new token, from the logits that the prefill gave."""
    no = jnp.zeros(position.shape, bool)
    return whole(draw(logits, Loop(jnp.zeros_like(position), position, no, no, seen), plan, options))


@functools.partial(jax.jit, static_argnames=("apply", "options", "steps"), donate_argnames=("state", "loop"))
def decode_steps(apply: Apply, params: Params, state: State, loop: Loop, halted: Array, plan: Plan,
                 options: SamplingOptions, steps: int) -> tuple[State, Loop, Array]:
    """(state, rows, tokens [B, S]) after at most `steps` tokens; ends early when all rows are done.

    halted: [B] bool, rows that the host has stopped. tokens is -1 where a row drew nothing. Rows that are done go
    through the model as padding, which changes no state.
    """
    size = loop.token.shape[0]

    def running(carry):
        n, _, loop, _ = carry
        return (n < steps) & ~loop.done.all()

    def step(carry):
        n, state, loop, tokens = carry
        live = ~loop.done
        out = apply(params, loop.token[:, None], state, reset=jnp.zeros((size, 1), bool), weights=live[:, None])
        after = draw(logits_of(out.hidden[:, 0], out.head), loop, plan, options)
        return n + 1, out.state, after, tokens.at[:, n].set(jnp.where(live, after.token, -1))

    start = (jnp.int32(0), state, loop._replace(done=loop.done | halted), jnp.full((size, steps), -1, jnp.int32))
    _, state, loop, tokens = jax.lax.while_loop(running, step, start)
    return state, whole(loop), constrain(tokens, None, None)


@functools.partial(jax.jit, static_argnames=("initial_state", "batch_size", "capacity"))
def empty_state(initial_state: Callable[..., State], batch_size: int, capacity: int) -> State:
    """The state before the prompts, made on the devices."""
    # Weak types (`jnp.full(shape, 0.0)`) would not survive the first chunk, and the second would compile again.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), initial_state(batch_size, capacity=capacity))
