"""From logits to the next token: pure functions on logits [B, V] in float32.

Filters set what may not be drawn to minus infinity and leave the rest; they compose by being applied one after another.
`sample` applies them in the usual order: repetition penalty, temperature, top-k, top-p, min-p.

Shape legend: B batch, V padded vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lm.core.fields import option
from lm.core.types import Array, Key


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn."""

    temperature: float = option(1.0, "logits are divided by it; 0 is greedy")
    top_k: int | None = option(None, "draw from the top_k most probable tokens; None for all")
    top_p: float | None = option(None, "draw from the fewest tokens that make this probability; None for all")
    min_p: float | None = option(None, "draw from tokens at least min_p times as probable as the best; None for all")
    repetition_penalty: float = option(1.0, "above 1, tokens of the row so far become less probable; 1 is none")

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be at least 0 and finite; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, or None for all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be from 0 to 1, or None for all tokens")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0 and finite; 1 is none")


GREEDY = SamplingOptions(temperature=0.0)


def penalize_repetition(logits: Array, seen: Array, penalty: float) -> Array:
    """Logits of tokens where `seen` [B, V] is true, divided by the penalty where positive and multiplied where negative
    (Keskar et al. 2019, CTRL, section 4.1)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Array, k: int) -> Array:
    """The k largest logits of each row, the rest minus infinity (Fan et al. 2018). Of equal ones the lower ids stay, so
    that k = 1 is greedy. k beyond V keeps all."""
    if k >= logits.shape[-1]:
        return logits
    _, chosen = jax.lax.top_k(logits, k)
    return _keep(logits, chosen, jnp.ones(chosen.shape, bool))


def keep_top_p(logits: Array, p: float) -> Array:
    """The fewest tokens, most probable first, whose probability together is at least p; the rest minus infinity
    (Holtzman et al. 2020). The most probable one always stays; of equal ones the lower ids do. p = 1 keeps all."""
    if p >= 1:
        return logits
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    return _keep(logits, order, (before < p).at[:, 0].set(True))


def keep_min_p(logits: Array, p: float) -> Array:
    """The tokens at least p times as probable as the most probable one, the rest minus infinity (Nguyen et al.
    2024)."""
    if p <= 0:
        return logits
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + math.log(p), logits, -jnp.inf)


def _keep(logits: Array, ids: Array, kept: Array) -> Array:
    """Logits of `ids` [B, n] where `kept`, the rest minus infinity."""
    rows = jnp.arange(logits.shape[0])[:, None]
    mask = jnp.zeros(logits.shape, bool).at[rows, ids].set(kept)
    return jnp.where(mask, logits, -jnp.inf)


def filtered(logits: Array, options: SamplingOptions, seen: Array | None = None) -> Array:
    """Logits [B, V] after penalty, temperature and filters, float32: their softmax is what `sample` draws from.

    seen: [B, V] bool, tokens of each row so far; needed with a repetition penalty. At temperature 0 only the most
    probable token is left.
    """
    logits = logits.astype(jnp.float32)
    if options.repetition_penalty != 1:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen`, the tokens of each row so far")
        logits = penalize_repetition(logits, seen, options.repetition_penalty)
    if options.temperature == 0:
        return keep_top_k(logits, 1)
    # The peak goes first: a small temperature would make large logits infinite, and infinity - infinity is NaN.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / options.temperature
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p is not None:
        logits = keep_min_p(logits, options.min_p)
    return logits


def row_keys(key: Key, rows: Array, positions: Array) -> Key:
    """One key a row [B], from the row's number and the position of the token to be drawn (both [B] int32): what a row
    draws does not depend on the rows beside it, nor on how many tokens are drawn in one call."""
    return jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(rows, positions)


def sample(logits: Array, options: SamplingOptions, keys: Key, seen: Array | None = None) -> Array:
    """One token a row, [B] int32, of logits [B, V] with keys [B] (see `row_keys`); `seen` as in `filtered`."""
    if options.temperature == 0 and options.repetition_penalty == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filtered(logits, options, seen)
    if options.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
