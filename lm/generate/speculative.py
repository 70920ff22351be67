"""Self-speculative decoding: a model drafts with few iterations and verifies all drafted tokens at once with many.

What is drawn is distributed as the many iterations say (Leviathan et al. 2023, theorem 3.5; Chen et al. 2023): with q
the distribution that drafted a token and p that of the verification, the token stays with probability min(1, p / q),
and else another is drawn from max(p - q, 0), normalised. At temperature 0 both are a single token, and the text is that
of greedy decoding. B batch, N lookahead, V padded vocabulary.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.head import logits_of
from lm.core.recurrences import NOT_PARALLEL, check_recurrences, with_recurrences
from lm.core.sharding import constrain
from lm.core.types import Apply, Array, Params, State
from lm.generate.loop import Loop, Plan, whole
from lm.generate.sampling import SamplingOptions, filtered, row_keys

DRAFT, KEEP, INSTEAD = range(1, 4)  # what a token's key is folded by


@dataclasses.dataclass(frozen=True)
class Speculation:
    """recurrences: iterations of a draft. lookahead: tokens of a draft."""

    recurrences: int
    lookahead: int = 4

    def check(self, options: SamplingOptions) -> None:
        """Raises ValueError for values out of range, and for a penalty, which depends on the tokens before."""
        check_recurrences(self.recurrences, "draft")
        if self.lookahead < 1:
            raise ValueError(f"lookahead={self.lookahead} must be at least 1")
        if options.repetition_penalty != 1:
            raise ValueError(f"repetition_penalty={options.repetition_penalty} changes the distribution inside of a "
                             f"draft; leave it at 1, or decode without drafts")


class Round(NamedTuple):
    """tokens: [B, N + 1], drafted tokens that stay and the one after them, then -1. kept: [B] how many stay."""

    tokens: Array
    kept: Array


def accept(drafted: Array, q: Array, p: Array, uniform: Array, instead: Array) -> Round:
    """Which of the drafted tokens [B, N] stay. q: [B, N, V], p: [B, N + 1, V] probabilities; uniform: [B, N] in [0, 1);
    instead: [B, N + 1] keys of what is drawn where a token does not stay, or after the last."""
    N = drafted.shape[1]
    at = lambda probability: jnp.take_along_axis(probability[:, :N], drafted[..., None], axis=-1)[..., 0]
    stays = uniform * at(q) < at(p)
    kept = jnp.sum(jnp.cumprod(stays, axis=1, dtype=jnp.int32), axis=1)
    rest = jnp.maximum(p[:, :N] - q, 0)
    # Where p and q agree to rounding nothing is left; a token then never fails to stay but by rounding.
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p[:, :N])
    rest = jnp.concatenate([rest, p[:, N:]], axis=1)
    here = jnp.take_along_axis(rest, kept[:, None, None], axis=1)[:, 0]
    keys = instead[jnp.arange(len(kept)), kept]
    last = jax.vmap(jax.random.categorical)(keys, jnp.log(here)).astype(jnp.int32)
    place = jnp.arange(N + 1)
    tokens = jnp.concatenate([drafted, last[:, None]], axis=1)
    tokens = jnp.where(place == kept[:, None], last[:, None], tokens)
    return Round(jnp.where(place <= kept[:, None], tokens, -1), kept)


@functools.partial(jax.jit, static_argnames=("apply", "options", "steps", "speculation"),
                   donate_argnames=("state", "loop"))
def speculative_steps(apply: Apply, params: Params, state: State, loop: Loop, halted: Array, plan: Plan,
                      options: SamplingOptions, steps: int, speculation: Speculation
                      ) -> tuple[State, Loop, Array, Array]:
    """(state, rows, tokens [B, S], [drafted, kept]) after rounds that together draw at most `steps` tokens of a row, at
    least one round. tokens is -1 where a row drew nothing, and these come between others."""
    size, N = loop.token.shape[0], speculation.lookahead
    fast, rounds, place = with_recurrences(params, speculation.recurrences), max(1, steps // (N + 1)), jnp.arange(N + 1)

    def keys(position, what):
        made = row_keys(plan.key, plan.rows, position)
        return jax.vmap(lambda key: jax.random.fold_in(key, what))(made)

    def probabilities(out):  # [B, T, V]
        logits = logits_of(out.hidden, out.head)
        flat = filtered(logits.reshape(-1, logits.shape[-1]), options)
        return jax.nn.softmax(flat, axis=-1).reshape(logits.shape), jnp.isnan(logits).any(axis=(1, 2))

    def one_round(carry):
        n, state, loop, tokens, counts = carry
        live = ~loop.done

        def draft(carry, position):
            state, token = carry
            out = apply(fast, token[:, None], state, reset=jnp.zeros((size, 1), bool), weights=live[:, None])
            q = probabilities(out)[0][:, 0]
            token = jax.vmap(jax.random.categorical)(keys(position, DRAFT), jnp.log(q)).astype(jnp.int32)
            return (out.state, token), (token, q)

        positions = loop.position[:, None] + place
        _, (drafted, q) = jax.lax.scan(draft, (state, loop.token), positions.T[:N])
        drafted, q = drafted.T, jnp.moveaxis(q, 0, 1)
        given = jnp.concatenate([loop.token[:, None], drafted], axis=1)
        again = functools.partial(apply, params, given, state, reset=jnp.zeros(given.shape, bool))
        out = again(weights=jnp.broadcast_to(live[:, None], given.shape))
        if NOT_PARALLEL in out.aux:
            raise ValueError("speculation verifies several tokens at once, which gives this model other predictions "
                             "than one at a time: it starts warm, stops by a threshold, or its iterations share states "
                             "(model.recurrent_depth.warm_start, exit_kl, cache)")
        p, nan = probabilities(out)
        uniform = jax.vmap(jax.vmap(jax.random.uniform))(jax.vmap(lambda at: keys(at, KEEP))(positions.T[:N])).T
        instead = jax.vmap(lambda at: keys(at, INSTEAD), in_axes=1, out_axes=1)(positions)
        found = accept(drafted, q, p, uniform, instead)
        # A row ends with its first stop token, or at its last position; what comes after that was not drawn.
        ends = (found.tokens[..., None] == plan.stop).any(-1) | (positions + 1 >= plan.end[:, None])
        drawn = jnp.where(live[:, None] & (jnp.cumsum(ends, axis=1) - ends == 0), found.tokens, -1)
        count = jnp.sum(drawn >= 0, axis=1)
        last = jnp.take_along_axis(drawn, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        after = Loop(jnp.where(live, last, loop.token), loop.position + count,
                     loop.done | (live & nan) | (ends & (drawn >= 0)).any(1), loop.broken | (live & nan), loop.seen)
        # Into the state goes what was given up to the last token that stays; the newest is in it with the next round.
        stays = live[:, None] & (place <= found.kept[:, None])
        state = jax.lax.cond(jnp.all(stays.all(1) | ~live), lambda: out.state, lambda: again(weights=stays).state)
        tokens = jax.lax.dynamic_update_slice(tokens, drawn, (0, n * (N + 1)))
        counts = counts + jnp.stack([live.sum() * N, jnp.sum(jnp.where(live, found.kept, 0))])
        return n + 1, state, after, tokens, counts

    start = (jnp.int32(0), state, loop._replace(done=loop.done | halted),
             jnp.full((size, rounds * (N + 1)), -1, jnp.int32), jnp.zeros(2, jnp.int32))
    _, state, loop, tokens, counts = jax.lax.while_loop(
        lambda carry: (carry[0] < rounds) & ~carry[2].done.all(), one_round, start)
    return state, whole(loop), constrain(tokens, None, None), constrain(counts, None)
