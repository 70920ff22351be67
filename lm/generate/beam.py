"""Beam search: of all continuations, the most probable that a search of some width finds.

Every prompt has K beams, which are rows of one batch. Each step extends all beams by all tokens, keeps the K best sums
of log-probabilities, and brings the states of the beams that go on to their places. The width is what an attack on a
memorised text may spend; with K = 1 it is greedy decoding.

Shape legend: B prompts, K beams, V padded vocabulary, N new tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.head import logits_of
from lm.core.types import Apply, Array, Params, State
from lm.generate.loop import empty_state
from lm.generate.prefill import check_prompts, chunks, prefill_chunk, room


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One continuation. tokens: [n] int32, with the stop token where one ended it. logp: sum of the log-probabilities
    of these tokens, nats. score: what hypotheses are ranked by. ended: by a stop token."""

    tokens: np.ndarray
    logp: float
    score: float
    ended: bool


class Search(NamedTuple):
    """logp: [B, K] sums, minus infinity where a beam is empty. tokens: [B, K, N], -1 where a beam has none. length:
    [B, K] int32. done: [B, K] bool. broken: [B] bool, NaN logits were met."""

    logp: Array
    tokens: Array
    length: Array
    done: Array
    broken: Array


def beam_search(apply: Apply, params: Params, initial_state: Callable[..., State], prompts: Sequence[Sequence[int]], *,
                beams: int, max_new_tokens: int, stop_tokens: Collection[int] = (), length_penalty: float = 0.0,
                bos: int | None = None, capacity: int | None = None,
                prefill_chunk_size: int = 512) -> list[list[Hypothesis]]:
    """Up to `beams` continuations of each prompt, the best first.

    apply, initial_state, prompts, bos, capacity: as `lm.generate.decode.generate` takes them; the state has
      len(prompts) * beams rows. stop_tokens: ids that end a hypothesis, which then keeps its place among the beams.
    length_penalty: hypotheses are ranked by logp / length^length_penalty; 0 is the probability of the whole, 1 its mean
      a token. It does not steer the search.

    Raises ValueError for sizes and prompts that cannot be; FloatingPointError where the logits become NaN.
    """
    for name, value in (("beams", beams), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if length_penalty < 0:
        raise ValueError(f"length_penalty={length_penalty} must be at least 0")
    prompts = check_prompts(prompts, bos)
    capacity = room([len(p) for p in prompts], max_new_tokens, capacity)
    state, logits = empty_state(initial_state, len(prompts), capacity), None
    for tokens, present in chunks(prompts, prefill_chunk_size):
        reset = np.zeros(tokens.shape, bool)
        reset[:, 0] = logits is None
        state, now = prefill_chunk(apply, params, state, tokens, present, reset)
        logits = now if logits is None else jnp.where(present.any(axis=1)[:, None], now, logits)
    axes = row_axes(initial_state, len(prompts), capacity)
    stop = np.array(sorted(stop_tokens), np.int32)
    found = jax.device_get(search(apply, params, state, logits, stop, axes, beams, max_new_tokens))
    if (broken := np.flatnonzero(found.broken)).size:
        raise FloatingPointError(f"the logits of prompt {int(broken[0])} became NaN: the parameters are not finite, or "
                                 f"the compute dtype overflows")
    return [_ranked(found, row, length_penalty) for row in range(len(prompts))]


def _ranked(found: Search, row: int, penalty: float) -> list[Hypothesis]:
    out = []
    for logp, tokens, length, done in zip(found.logp[row], found.tokens[row], found.length[row], found.done[row],
                                          strict=True):
        if np.isfinite(logp):
            out.append(Hypothesis(tokens[:length].astype(np.int32), float(logp), float(logp) / length**penalty,
                                  bool(done)))
    return sorted(out, key=lambda hypothesis: -hypothesis.score)


def row_axes(initial_state: Callable[..., State], rows: int, capacity: int) -> tuple[int | None, ...]:
    """For every leaf of the state, which axis counts the rows; None for a leaf that all rows share."""
    some, more = (jax.eval_shape(functools.partial(initial_state, n, capacity=capacity)) for n in (rows, rows + 1))
    differ = [[axis for axis, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b]
              for x, y in zip(jax.tree.leaves(some), jax.tree.leaves(more), strict=True)]
    return tuple(axes[0] if axes else None for axes in differ)


def take_rows(state: State, rows: Array, axes: tuple[int | None, ...]) -> State:
    """The state of these rows, in this order."""
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [leaf if axis is None else jnp.take(leaf, rows, axis=axis)
                                     for leaf, axis in zip(leaves, axes, strict=True)])


@functools.partial(jax.jit, static_argnames=("apply", "axes", "beams", "steps"))
def search(apply: Apply, params: Params, state: State, logits: Array, stop: Array, axes: Any, beams: int,
           steps: int) -> Search:
    """The search from the state after the prompts and their logits [B, V]; ends early when all beams are done."""
    B, K = logits.shape[0], beams
    state = take_rows(state, jnp.repeat(jnp.arange(B), K), axes)
    empty = jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)  # the beams start equal, so that only one may be extended
    start = Search(jnp.broadcast_to(empty, (B, K)), jnp.full((B, K, steps), -1, jnp.int32),
                   jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K), bool), jnp.zeros(B, bool))
    here, parent = extend(start, jnp.repeat(logits, K, axis=0), 0, stop)

    def going_on(carry):
        n, _, here, _ = carry
        return (n < steps) & ~(here.done | jnp.isinf(here.logp)).all()

    def step(carry):
        n, state, here, parent = carry
        state = take_rows(state, (jnp.arange(B)[:, None] * K + parent).reshape(-1), axes)
        token = jax.lax.dynamic_index_in_dim(here.tokens, n - 1, axis=2, keepdims=False).reshape(-1)
        live = (~here.done).reshape(-1)
        out = apply(params, jnp.maximum(token, 0)[:, None], state, reset=jnp.zeros((B * K, 1), bool),
                    weights=live[:, None])
        here, parent = extend(here, logits_of(out.hidden[:, 0], out.head), n, stop)
        return n + 1, out.state, here, parent

    return jax.lax.while_loop(going_on, step, (jnp.int32(1), state, here, parent))[2]


def extend(here: Search, logits: Array, n: Any, stop: Array) -> tuple[Search, Array]:
    """(the K best of all beams and their next tokens, the beam that each goes on from [B, K]), with token number n.

    logits: [B * K, V] of each beam's next token. A beam that is done competes as it is.
    """
    B, K, _ = here.tokens.shape
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).reshape(B, K, -1)
    V = logp.shape[-1]
    broken = here.broken | (jnp.isnan(logp).any(axis=-1) & ~here.done & jnp.isfinite(here.logp)).any(axis=-1)
    as_it_is = jnp.where(jnp.arange(V) == 0, 0.0, -jnp.inf)
    logp = jnp.where(here.done[..., None], as_it_is, logp) + here.logp[..., None]
    best, place = jax.lax.top_k(jnp.where(jnp.isnan(logp), -jnp.inf, logp).reshape(B, K * V), K)
    parent, token = place // V, (place % V).astype(jnp.int32)
    mine = lambda field: jnp.take_along_axis(field, parent.reshape(B, K, *(1,) * (field.ndim - 2)), axis=1)
    done = mine(here.done)
    token = jnp.where(done, -1, token)
    ended = (token[..., None] == stop).any(axis=-1)
    tokens = mine(here.tokens).at[:, :, n].set(token)
    return Search(best, tokens, mine(here.length) + ~done, done | ended, broken), parent
