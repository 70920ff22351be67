"""Continuous decoding of a model of recurrent depth: rows iterate at their own pace.

One call of the model is one iteration of its core, for every row on the token that it is at. A row whose token stops
draws the next one and begins with it in the following call, whatever the others do: the time of a batch is that of its
row with the most iterations, where one token at a time waits for the slowest row at each token.
"""

import functools

import jax
import jax.numpy as jnp

from lm.core.head import logits_of
from lm.core.recurrences import FINISHED
from lm.core.sharding import constrain
from lm.core.types import Apply, Array, Params, State
from lm.generate.loop import Loop, Plan, draw, whole
from lm.generate.sampling import SamplingOptions


@functools.partial(jax.jit, static_argnames=("apply", "options", "steps"), donate_argnames=("state", "loop"))
def continuous_steps(apply: Apply, params: Params, state: State, loop: Loop, halted: Array, plan: Plan,
                     options: SamplingOptions, steps: int) -> tuple[State, Loop, Array]:
    """As `lm.generate.loop.decode_steps`: (state, rows, tokens [B, S]). It ends when all rows are done, or when one has
    drawn `steps` tokens and the others have finished those they were at."""
    state, loop, tokens, _ = run(apply, params, state, loop._replace(done=loop.done | halted), plan, options, steps)
    return state, whole(loop), constrain(tokens, None, None)


def run(apply: Apply, params: Params, state: State, loop: Loop, plan: Plan, options: SamplingOptions,
        steps: int) -> tuple[State, Loop, Array, Array]:
    """(state, rows, tokens [B, S], calls of the model)."""
    size = loop.token.shape[0]
    rows = jnp.arange(size)

    def running(carry):
        _, _, loop, count, busy, _ = carry
        return busy.any() | (~loop.done.all() & (count.max() < steps))

    def step(carry):
        calls, state, loop, count, busy, tokens = carry
        begins = ~busy & ~loop.done & (count.max() < steps)
        out = apply(params, loop.token[:, None], state, reset=jnp.zeros((size, 1), bool), weights=begins[:, None])
        finished = out.aux[FINISHED][0]
        drawn = draw(logits_of(out.hidden[:, 0], out.head), loop._replace(done=loop.done | ~finished), plan, options)
        # Rows in the middle of a token are done for this draw alone.
        after = drawn._replace(done=jnp.where(finished, drawn.done, loop.done))
        tokens = tokens.at[rows, jnp.where(finished, count, steps)].set(after.token, mode="drop")
        return calls + 1, out.state, after, count + finished, (busy | begins) & ~finished, tokens

    start = (jnp.int32(0), state, loop, jnp.zeros(size, jnp.int32), jnp.zeros(size, bool),
             jnp.full((size, steps), -1, jnp.int32))
    calls, state, loop, _, _, tokens = jax.lax.while_loop(running, step, start)
    return state, loop, tokens, calls
