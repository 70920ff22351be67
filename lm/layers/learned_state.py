"""Initial states that are learned: state tuning (Peng et al. 2024, RWKV-5 and 6, as practised for RWKV).

A layer whose variables hold a `state` collection begins documents from those arrays where it would begin from nothing.
Legend: B batch, T time, D embed_dim.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array, Aux, Context, State

# Fields of states that are memory. What token shift and convolutions hold is a token before the first: it stays zero.
LEARNED = ("wkv", "hidden")
# RWKV-4's averages have weights, none before the first token, through which no gradient would reach them: the log of
# the weight starts here, that of a token with this key.
LOG_WEIGHT = -3.0


def initial(layer: nn.Module, embed_dim: int) -> dict[str, Array]:
    """The arrays of a layer that can be learned, float32 and without an axis of rows, before they are: no past. Empty
    for layers without such a memory."""
    state = layer.initial_state(1, embed_dim, jnp.float32)
    fields = {name: getattr(state, name)[0] for name in getattr(state, "_fields", ()) if name in LEARNED}
    return {name: jnp.maximum(value, LOG_WEIGHT) for name, value in fields.items()}


def run_from(layer: Callable[..., Any], learned: Mapping[str, Array], x: Array, before: State,
             ctx: Context) -> tuple[Array, State, Aux]:
    """`layer(x, before, ctx)` with rows that start a document at their first position starting from `learned`.

    The operations know one place to go back to at a reset, and that is zero. So the state is put in before the first
    position, and a document that starts later in a row cannot be served: such a row's output is NaN, never wrong.
    """
    B, _, D = x.shape
    none = layer.initial_state(B, D, x.dtype)
    fresh = none._replace(**{name: jnp.broadcast_to(value, (B, *value.shape)).astype(getattr(none, name).dtype)
                             for name, value in learned.items()})
    y, after, aux = layer(x, _pick(ctx.reset[:, 0], fresh, before), ctx._replace(reset=jnp.zeros_like(ctx.reset)))
    later = jnp.cumsum(ctx.reset.at[:, 0].set(False), axis=1) > 0
    lost = jnp.any(later & (ctx.weights != 0), axis=1)
    y = jnp.where(lost[:, None, None], jnp.nan, y).astype(y.dtype)
    return y, _pick(later[:, -1], fresh, after), aux  # a reset in the padding tail leaves a row that begins afresh


def _pick(rows: Array, yes: State, no: State) -> State:
    """`yes` for the rows where `rows` [B] is True."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)
