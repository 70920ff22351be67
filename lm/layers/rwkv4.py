"""RWKV-4's time mixing: an exponentially decaying average of values, weighted by keys (Peng et al. 2023).

Shape legend: B batch, T time, D embed_dim, C attention width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array, Aux, Context
from lm.layers import rwkv_init
from lm.layers.linear import Dense
from lm.layers.local import over_shards
from lm.layers.rwkv_init import slope, table, zigzag
from lm.layers.token_shift import shift
from pallas_kernels.wkv4.api import initial_state, wkv4
from pallas_kernels.wkv4.sequence import wkv4_over_sequence

NOTHING = -1e38  # the key of padding: no weight in any average


class RWKV4State(NamedTuple):
    """shift: [B, D], the last input. wkv: [B, 2, C] float32, average and log weight of the past."""

    shift: Array
    wkv: Array


class RWKV4(nn.Module):
    """out(sigmoid(r) * wkv(k, v)) with r, k, v projections of mixtures of a token and the one before.

    attention_dim: C; None is embed_dim.
    implementation: of the recurrence; None is the best for the platform, logged once.
    """

    attention_dim: int | None = None
    implementation: str | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit."""
        if self.attention_dim is not None and self.attention_dim < 1:
            raise ValueError(f"rwkv4.attention_dim={self.attention_dim} must be at least 1 (or None for embed_dim)")

    def width(self, embed_dim: int) -> int:
        """C for this embed_dim."""
        return embed_dim if self.attention_dim is None else self.attention_dim

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: two per weight of the projections."""
        return 8.0 * embed_dim * self.width(embed_dim)

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> RWKV4State:
        """No past."""
        return RWKV4State(jnp.zeros((batch_size, embed_dim), dtype),
                          initial_state(batch_size, self.width(embed_dim), jnp.promote_types(dtype, jnp.float32)))

    @nn.compact
    def __call__(self, x: Array, state: RWKV4State, ctx: Context) -> tuple[Array, RWKV4State, Aux]:
        D, C = x.shape[-1], self.width(x.shape[-1])
        r01, r10 = rwkv_init.ratios(ctx.shared)
        before, last = shift(x, state.shift, ctx)
        change = x - before

        def project(name: str, init: rwkv_init.Init, kernel_init: rwkv_init.Init) -> Array:
            share = rwkv_init.vector(self, f"mix_{name}", init, D, "activation_embed").astype(x.dtype)
            return Dense(C, ("embed", "heads"), kernel_init=kernel_init, name=name)(before + change * share)

        k = project("key", rwkv_init.mix(r10), rwkv_init.ZEROS)
        v = project("value", rwkv_init.mix(r10, 0.3 * r01), rwkv_init.orthogonal(1.0))
        r = project("receptance", rwkv_init.mix(0.5 * r10), rwkv_init.ZEROS)
        decay = rwkv_init.vector(self, "decay", table(lambda n: -5 + 8 * slope(n) ** (0.7 + 1.3 * r01)), C, "heads")
        bonus = rwkv_init.vector(self, "bonus", table(lambda n: jnp.log(0.3) + 0.5 * zigzag(n)), C, "heads")

        rate, present = jnp.exp(decay), ctx.weights != 0
        skipped = padding_before(present, ctx.reset).astype(rate.dtype)  # [B, T + 1]
        # The operation decays over padding as over any token. Keys after it shrink alike, so that averages stay.
        k = jnp.where(present[..., None], k - skipped[:, :-1, None] * rate, NOTHING).astype(k.dtype)
        rows = ("batch", "length", "heads")
        y, wkv = over_shards(
            partial(wkv4, implementation=self.implementation),
            partial(wkv4_over_sequence, implementation=self.implementation),
            (rate, bonus, k, v, state.wkv, ctx.reset),
            (("heads",), ("heads",), rows, rows, ("batch", None, "heads"), ("batch", "length")),
            (rows, ("batch", None, "heads")), (k.shape, state.wkv.shape))
        wkv = wkv.at[:, 1].add(skipped[:, -1:] * rate)
        y = Dense(D, ("heads", "embed"), kernel_init=rwkv_init.ZEROS, name="out")(jax.nn.sigmoid(r) * y)
        return y, RWKV4State(last, wkv), {}


def padding_before(present: Array, reset: Array) -> Array:
    """[B, T + 1] int32: paddings before each position in its document, and at the end those of the last document."""
    count = jnp.pad(jnp.cumsum(~present, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    began = jax.lax.cummax(jnp.where(reset, count[:, :-1], 0), axis=1)
    return count - jnp.concatenate([began, began[:, -1:]], axis=1)
