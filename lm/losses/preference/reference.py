"""The reference model: which variables make it, and how far a model has moved from it.

Shape legend: B rows, T time, D embed_dim, V padded vocabulary.
"""

import math

import jax
import jax.numpy as jnp

from lm.core.head import logits_of
from lm.core.types import Array, Head, Output, Params

COPY, CACHED, ADAPTERS_OFF = REFERENCES = ("copy", "cached", "adapters_off")
REFERENCE = "reference"  # of variables: those of a copy beside the model's own
BESIDE = ("lora", "state")  # collections that adapt a model; without them it is the reference
CHUNK_ELEMENTS = 1 << 21  # logits of each model held at a time


def reference_kind(given: str | None, adapters: bool) -> str:
    """Where reference log-probabilities come from: as given, else the model without its adapters, else a copy of the
    parameters before the first step."""
    return given or (ADAPTERS_OFF if adapters else COPY)


def without_adapters(params: Params) -> Params:
    """The variables of the model that adapters were put beside."""
    return {name: part for name, part in params.items() if name not in (*BESIDE, REFERENCE)}


def split_reference(params: Params) -> tuple[Params, Params | None]:
    """(the model's variables, those of its reference): a copy that stands beside them, else the model without its
    adapters, else None."""
    own = {name: part for name, part in params.items() if name != REFERENCE}
    if REFERENCE in params:
        return own, params[REFERENCE]
    return own, without_adapters(params) if any(name in params for name in BESIDE) else None


def divergence(model: Output, reference: Output) -> Array:
    """KL(model || reference) of the next token at every position, nats, [B, T]; exact over the vocabulary, in chunks
    that hold at most CHUNK_ELEMENTS logits of each."""
    B, T, _ = model.hidden.shape
    chunk = max(1, min(T, CHUNK_ELEMENTS // (B * model.head.kernel.shape[0])))
    count = math.ceil(T / chunk)

    def cut(hidden):
        hidden = jnp.pad(hidden, ((0, 0), (0, count * chunk - T), (0, 0)))
        return hidden.reshape(B, count, chunk, -1).swapaxes(0, 1)

    def one(part):
        log_p, log_q = _log_probabilities(part[0], model.head), _log_probabilities(part[1], reference.head)
        return jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isfinite(log_p), log_p - log_q, 0), axis=-1)

    found = jax.lax.map(one, (cut(model.hidden), cut(reference.hidden)))
    return found.swapaxes(0, 1).reshape(B, count * chunk)[:, :T]


def _log_probabilities(hidden: Array, head: Head) -> Array:
    return jax.nn.log_softmax(logits_of(hidden, head), axis=-1)
