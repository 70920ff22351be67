"""The protocols that everything else is written against.

Shape legend, used in every signature: B batch, T time, D embed_dim, V vocab_size, H heads, K head_dim, L layers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lm.core.batch import Batch

Array = jax.Array
PyTree = Any
Params = PyTree  # the variables of a model: {"params": ...}, with {"lora": ...} (adapters), {"state": ...} (learned)
State = PyTree  # what a layer remembers: a NamedTuple of arrays with a leading batch axis; () for stateless layers
Aux = Mapping[str, Any]
Carry = PyTree  # what outlives a train step without being a parameter
Key = Array
Metrics = Mapping[str, Any]  # name to Mean; "tally", where it is, to the `aux["tally"]` of all forward passes added up
UNSCORED = "unscored"  # in metrics: bool [B, G], groups of a row whose scores are not finite, see `lm.train.unscored`


class Context(NamedTuple):
    """What every layer may know about the positions it is given, besides the activations.

    reset: [B, T] bool, true where a document starts: state from before must not be seen from here on.
    positions: [B, T] int32, position inside the document.
    weights: [B, T] bool or float, 0 marks padding: it must not change any state nor be seen by other positions.
    key: PRNG key for dropout, or None when deterministic. It is folded by layer before a layer sees it.
    shared: values that an earlier layer published for later ones; `shared["depth"]` is the layer's index (int32) and
      `shared["num_layers"]` their number, for initialisers that depend on both.
    """

    reset: Array
    positions: Array
    weights: Array
    key: Key | None
    shared: Mapping[str, Any]


def context(batch_size: int, length: int, *, start: int = 0, key: Key | None = None) -> Context:
    """The context of `batch_size` single documents without padding, from position `start` on."""
    positions = jnp.broadcast_to(jnp.arange(start, start + length, dtype=jnp.int32), (batch_size, length))
    present = jnp.ones((batch_size, length), bool)
    return Context(positions == 0, positions, present, key, {"depth": jnp.zeros((), jnp.int32), "num_layers": 1})


class Layer(Protocol):
    """A token mixer or channel mixer. Training, prefill, chunked prefill and one-token decoding are this one path."""

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the layer's fields do not fit together or the width."""

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token in rows of seq_len."""

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> State:
        """State before the first token. `capacity` is how many tokens the state must be able to look back to;
        0, as in training, means that the state after the call will not be used to go on."""

    def __call__(self, x: Array, state: State, ctx: Context) -> tuple[Array, State, Aux]:
        """x, y: [B, T, D]. Returns (y, state after the last token, aux)."""


class Head(NamedTuple):
    """The output projection, given back beside the hidden states so that losses choose how to chunk it.

    kernel: [V, D] in the parameters' dtype; V is the padded vocabulary. bias: [V] or None.
    vocab_size: static number of real entries; logits of the padding beyond it are minus infinity.
    softcap: static; logits become softcap * tanh(logits / softcap) where it is not None.
    """

    kernel: Array
    bias: Array | None
    vocab_size: int
    softcap: float | None


class Output(NamedTuple):
    """What a language model gives back. hidden: [B, T, D] after the final norm; head: see `Head`; state: after the
    last token; aux: arrays that layers report, keyed `layer/name`, each with a leading axis over the layers that
    report it, and "tally" where layers take sums over tokens (see `lm.core.tally`)."""

    hidden: Array
    head: Head
    state: State
    aux: Aux


jax.tree_util.register_pytree_node(
    Head,
    lambda h: ((h.kernel, h.bias), (h.vocab_size, h.softcap)),
    lambda static, arrays: Head(*arrays, *static),
)


class Apply(Protocol):
    """A model as a pure function of its variables. `state=None` starts fresh documents; `reset`, `positions` and
    `weights` default to one document a row without padding, going on from `state`."""

    def __call__(self, params: Params, tokens: Array, state: State = None, *, reset: Array | None = None,
                 positions: Array | None = None, weights: Array | None = None, key: Key | None = None) -> Output: ...


class Mean(NamedTuple):
    """A weighted mean carried as (total, count) to the last moment: exact under masks, microbatches and devices."""

    total: Array
    count: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> "Mean":
        """Sum of `values * weights`, and of `weights`, in float32 or wider."""
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        weights = weights.astype(dtype)
        # where, not only a product: an infinite or NaN value at a position of weight 0 must not count.
        return cls(jnp.sum(jnp.where(weights == 0, 0, values.astype(dtype) * weights)), jnp.sum(weights))

    @property
    def value(self) -> Array:
        """total / count; 0 where nothing was counted."""
        return self.total / jnp.where(self.count == 0, 1, self.count)


class TokenScores(NamedTuple):
    """What losses see of the model's predictions, each [B, T] float32 (argmax int32): log-probability of the target,
    log of the partition function (before normalising), and the most probable token."""

    logp: Array
    logsumexp: Array
    argmax: Array


Loss = Callable[[TokenScores, Batch], Array]  # -> [B, T], unreduced


class Objective(Protocol):
    """What is minimised: sum over terms of weight(step) * term.total / term.count.

    `weights` maps each term's name to a number or to a function of the step. `counts(batch)` gives each term's count
    from the batch alone: with it the gradient of a microbatch is divided by the count of the whole batch, which makes
    accumulation exact. A term whose value does not add up over microbatches is listed in `not_additive`.
    `carry_per_row`: the carry belongs to the rows of the batch, so each microbatch has its own, stacked on a leading
    axis of every leaf; False hands one carry from microbatch to microbatch.
    """

    weights: Mapping[str, Any]
    not_additive: tuple[str, ...]
    carry_per_row: bool

    def counts(self, batch: Batch) -> Mapping[str, Array]: ...

    def __call__(self, apply: Apply, params: Params, carry: Carry, batch: Batch,
                 key: Key | None) -> tuple[Mapping[str, Mean], Carry, Metrics]: ...
