"""Where in a model a fact is: corrupt the subject, restore one layer at one token, and see what comes back.

Meng et al. 2022 (causal tracing) for any model of the zoo, as RWKV's paper does it for a recurrent one: what is
restored is a block's output at a token and, as the past is carried there too, its state after that token.

B rows, each with a place of its own to restore; T tokens; L layers; D embed_dim.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm.core.head import logits_of
from lm.core.types import Array, Params, State
from lm.layers.block import Block
from lm.layers.linear import Embed


@dataclasses.dataclass(frozen=True)
class Trace:
    """Log-probabilities of the answer, in nats: with the prompt as it is, with a corrupted subject, and with layer l
    restored at prompt token t, [L, T]; the last two as means over the draws of the noise."""

    clean: float
    corrupted: float
    restored: np.ndarray


def trace(model: nn.Module, params: Params, prompt: Sequence[int], subject: tuple[int, int], answer: Sequence[int], *,
          noise: float = 3.0, draws: int = 4, seed: int = 0, rows: int = 64) -> Trace:
    """Traces the answer through a `DecoderLM`.

    prompt, answer: token ids. subject: first token and the one after the last. noise: of the corruption, in standard
    deviations of the prompt's embeddings. draws: of the noise. rows: places restored at a time.
    Raises ValueError for a subject outside of the prompt, and for nothing to predict.
    """
    start, stop = subject
    if not 0 <= start < stop <= len(prompt):
        raise ValueError(f"subject {subject} must be a part of the prompt, which has {len(prompt)} tokens")
    if getattr(model, "depth", None) is not None:
        raise ValueError("a trace restores the layers of a model one by one, and model.recurrent_depth runs its core's "
                         "many times; trace a model without it")
    if not answer or draws < 1 or rows < 1 or not noise > 0:
        raise ValueError(f"trace needs an answer of at least one token, draws and rows of at least 1 and noise above 0;"
                         f" got {len(answer)}, {draws}, {rows} and {noise}")
    model = model.clone(stack=model.stack.clone(scan=False, remat="none"))
    tokens = jnp.asarray([*prompt, *answer], jnp.int32)
    run = jax.jit(lambda *args: _run(model, params, tokens, len(prompt), *args))
    length, layers, width = len(tokens) - 1, model.stack.num_layers, model.embed_dim
    zero = jnp.zeros((length, 1, width))
    clean, records = run(zero, None, None)
    embedded = jax.jit(lambda: _embedding(model, params, tokens[:len(prompt)]))()
    scale = noise * jnp.std(embedded.astype(jnp.float32))

    places = np.stack(np.meshgrid(np.arange(layers), np.arange(len(prompt)), indexing="ij"), axis=-1).reshape(-1, 2)
    places = np.concatenate([[[-1, -1]], places])  # the first restores nothing
    count = min(rows, len(places))
    padded = np.concatenate([places, np.full((-len(places) % count, 2), -1)])
    sums = np.zeros(len(padded))
    for draw in range(draws):
        drawn = scale * jax.random.normal(jax.random.fold_in(jax.random.key(seed), draw), (length, 1, width))
        drawn = drawn * ((jnp.arange(length) >= start) & (jnp.arange(length) < stop))[:, None, None]
        for first in range(0, len(padded), count):
            sums[first:first + count] += np.asarray(run(drawn, records, jnp.asarray(padded[first:first + count]))[0])
    means = sums[:len(places)] / draws
    return Trace(float(clean[0]), float(means[0]), means[1:].reshape(layers, len(prompt)))


def _run(model: nn.Module, params: Params, tokens: Array, prompt: int, noise: Array, records: Any,
         places: Array | None) -> tuple[Array, Any]:
    """(log-probability of tokens[prompt:] [B], what every block gave at every token), token by token."""
    batch = 1 if places is None else places.shape[0]
    steps = jnp.arange(len(tokens) - 1)

    def body(state: State, inputs: Any):
        t, token, target, noise_t, clean = inputs

        def edit(layer: int, out: Any) -> Any:
            if places is None:
                return out
            here = (places[:, 0] == layer) & (places[:, 1] == t)
            pick = lambda new, old: jnp.where(here.reshape(-1, *[1] * (new.ndim - 1)), old, new)
            return jax.tree.map(pick, out, clean[layer])

        out, seen = _with_edits(model, params, jnp.full((batch, 1), token), state, t == 0, noise_t, edit)
        logits = logits_of(out.hidden[:, 0], out.head).astype(jnp.float32)
        return out.state, (jax.nn.log_softmax(logits)[:, target], seen)

    state = model.initial_state(batch, capacity=len(tokens))
    _, (logp, seen) = jax.lax.scan(body, state, (steps, tokens[:-1], tokens[1:], noise, records))
    return jnp.sum(jnp.where(steps[:, None] >= prompt - 1, logp, 0), axis=0), seen


def _with_edits(model: nn.Module, params: Params, tokens: Array, state: State, first: Array, noise: Array,
                edit: Callable[[int, Any], Any]) -> tuple[Any, list[Any]]:
    """The model's output with noise [B, D] added to the embedding and `edit(layer, (output, state))` after each block,
    and what the blocks then gave."""
    seen: list[Any] = []

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name != "__call__":
            return out
        if isinstance(context.module, Embed) and context.module.name == "embed":
            return out[0] + noise[:, None].astype(out[0].dtype), out[1]
        if isinstance(context.module, Block):
            seen.append(edit(len(seen), out[:2]))
            return *seen[-1], out[2]
        return out

    with nn.intercept_methods(intercept):
        out = model.apply(params, tokens, state, reset=jnp.full(tokens.shape, first))
    return out, seen


def _embedding(model: nn.Module, params: Params, tokens: Array) -> Array:
    found = []

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, Embed) and context.module.name == "embed" and context.method_name == "__call__":
            found.append(out[0])
        return out

    with nn.intercept_methods(intercept):
        model.apply(params, tokens[None])
    return found[0]
