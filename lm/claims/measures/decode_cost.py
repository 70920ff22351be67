"""What one more token costs after a context of N tokens: bytes of state, and time.

The state is that of the layers themselves (`initial_state` with room for N tokens); the model is not trained, as its
numbers do not change what they cost.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.types import State
from lm.models.build import build_model, init_params, make_apply

TOKENS = 16  # of a measured call, so that what a call itself costs is shared
CALLS = 9  # at least, and for SECONDS: a call of RWKV takes a millisecond, and another process takes it as long
SECONDS = 2.0
VOCAB = 256


def state_bytes(model: Any, capacity: int) -> int:
    """Bytes of the state of one row with room for `capacity` tokens."""
    shapes = jax.eval_shape(lambda: model.initial_state(1, capacity=capacity))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def full_state(model: Any, capacity: int) -> State:
    """A state in which every slot is taken: one call over `capacity` tokens would give the same sizes. Slots of a
    key-value cache hold the tokens of one document in order; recurrent states are as at the start."""
    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[-1]
        if name == "documents":
            return jnp.zeros_like(leaf)
        if name == "order":
            return jnp.broadcast_to(jnp.arange(leaf.shape[-1], dtype=leaf.dtype), leaf.shape)
        return jnp.full_like(leaf, capacity) if name in ("length", "positions") else leaf
    return jax.tree_util.tree_map_with_path(fill, model.initial_state(1, capacity=capacity))


def decode_cost(config: Any) -> dict[str, float]:
    """`state_bytes` (counted), `seconds_per_token` (median of calls) and its quartiles, after `train.seq_len` tokens of
    one row."""
    model, capacity = build_model(config.model.to_dict(), VOCAB), config.train.seq_len
    apply, params = make_apply(model), init_params(model, jax.random.key(config.train.seed))

    def one(carry, _):
        state, token = carry
        out = apply(params, token[:, None], state, reset=jnp.zeros((1, 1), bool))
        logits = out.hidden[:, 0].astype(jnp.float32) @ out.head.kernel.astype(jnp.float32).T
        return (out.state, jnp.argmax(logits[:, :VOCAB], axis=-1).astype(jnp.int32)), None

    # The state is given away and comes back in the same memory: a copy of the cache is not what decoding costs.
    step = jax.jit(lambda state, token: jax.lax.scan(one, (state, token), None, length=TOKENS)[0], donate_argnums=0)
    state, token = full_state(model, capacity), jnp.zeros((1,), jnp.int32)
    state, token = jax.block_until_ready(step(state, token))
    seconds, started = [], time.perf_counter()
    while len(seconds) < CALLS or time.perf_counter() - started < SECONDS:
        begin = time.perf_counter()
        state, token = jax.block_until_ready(step(state, token))
        seconds.append((time.perf_counter() - begin) / TOKENS)
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"state_bytes": state_bytes(model, capacity), "seconds_per_token": statistics.median(seconds),
            "seconds_low": low, "seconds_high": high, "tokens": capacity}
