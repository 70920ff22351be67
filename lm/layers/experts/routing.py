"""Who takes which token, from a router's logits: the token its best experts, or the expert its best tokens.

Shapes: B rows, T tokens, E experts, K experts a token, C tokens an expert of a row. Float32 throughout.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.types import Array, Mean


class Choice(NamedTuple):
    """ids [B, T, K] of experts, -1 for none, and gates; or chosen [B, E, C] of tokens and gates, 0 for none."""

    ids: Array
    gates: Array


def token_choice(probabilities: Array, present: Array, top_k: int, renormalize: bool) -> Choice:
    """The K experts of each token with the largest of its probabilities [B, T, E] (Shazeer et al. 2017).

    gates: these probabilities; renormalize: over their sum.
    """
    gates, ids = jax.lax.top_k(probabilities, top_k)
    if renormalize:
        gates = gates / jnp.sum(gates, -1, keepdims=True)
    here = present[..., None] != 0
    return Choice(jnp.where(here, ids, -1), jnp.where(here, gates, 0))


def expert_choice(probabilities: Array, present: Array, top_k: int) -> tuple[Choice, Array]:
    """The tokens of each row with the largest probabilities [B, T, E] of each expert (Zhou et al. 2022), so many that a
    token has top_k experts on average; and the smallest of them that was taken, [B, E].

    Looks at the whole row: a token's experts depend on the tokens after it.
    """
    B, T, E = probabilities.shape
    here = present != 0
    most = min(T, math.ceil(top_k * T / E))
    gates, tokens = jax.lax.top_k(jnp.where(here[..., None], probabilities, -1).swapaxes(1, 2), most)
    count = -(-top_k * jnp.sum(here, 1) // E)  # of a row with padding, fewer
    taken = (jnp.arange(most) < count[:, None, None]) & (gates >= 0)
    last = jnp.clip(count - 1, 0, most - 1)[:, None, None]
    cutoff = jnp.take_along_axis(gates, jnp.broadcast_to(last, (B, E, 1)), axis=2)[..., 0]
    return Choice(tokens, jnp.where(taken, gates, 0)), cutoff


def above_cutoff(probabilities: Array, present: Array, cutoff: Array, most: int) -> Choice:
    """The experts whose `cutoff` [E] a token's probability [B, T, E] reaches, at most the best `most` of them: expert
    choice for a token that does not know the tokens after it."""
    margin = jnp.where(probabilities >= cutoff, probabilities, -1)
    gates, ids = jax.lax.top_k(margin, most)
    here = (present[..., None] != 0) & (gates >= 0)
    return Choice(jnp.where(here, ids, -1), jnp.where(here, gates, 0))


def load_balance(probabilities: Array, share: Array, present: Array) -> Array:
    """E sum_e f_e P_e (Fedus et al. 2021, eq. 4): share [E] f of the choices that went to each expert, P the mean of
    its probabilities [B, T, E] over tokens present; 1 where both are uniform."""
    weights = (present != 0).astype(probabilities.dtype)
    mean = jnp.einsum("bte,bt->e", probabilities, weights) / jnp.maximum(weights.sum(), 1)
    return probabilities.shape[-1] * jnp.sum(jax.lax.stop_gradient(share) * mean)


def router_z(logits: Array, present: Array) -> Array:
    """The mean over tokens present of logsumexp(logits)^2 (Zoph et al. 2022, eq. 5), logits [B, T, E]."""
    return Mean.of(jnp.square(jax.nn.logsumexp(logits, -1)), (present != 0).astype(logits.dtype)).value


def per_expert(ids: Array, values: Array, num_experts: int) -> Array:
    """[E]: sums of values over the choices ids, of any equal shape, of each expert; -1 is none."""
    flat = jnp.where(ids < 0, num_experts, ids).reshape(-1)
    return jnp.zeros((num_experts,), values.dtype).at[flat].add(values.reshape(-1), mode="drop")
