"""RWKV's channel mixing: a squared-ReLU MLP of a mixture of each token with the one before it.

Shape legend: B batch, T time, D embed_dim.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array, Aux, Context
from lm.layers import rwkv_init
from lm.layers.linear import Dense
from lm.layers.token_shift import shift


class ChannelMixState(NamedTuple):
    """shift: [B, D], the last input."""

    shift: Array


class ChannelMix(nn.Module):
    """sigmoid(R x_r) * V relu(K x_k)^2 of mixtures x_r, x_k of a token and the one before; RWKV-7 has no R.

    version: whose form and initial values: 4 and 5 (Peng et al. 2023; 2024), 6 (2024), 7 (2025). In 4 and 5 `mix_*` is
      the share of the present token, in 6 and 7 that of the token before.
    mlp_dim: hidden width; None is 4 * embed_dim, in 5 and 6 3.5 * embed_dim rounded down to a multiple of 32.
    """

    version: Literal[4, 5, 6, 7] = 4
    mlp_dim: int | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit."""
        if self.mlp_dim is not None and self.mlp_dim < 1:
            raise ValueError(f"channel_mix.mlp_dim={self.mlp_dim} must be at least 1 (or None for the default)")

    def hidden_dim(self, embed_dim: int) -> int:
        """The hidden width for this embed_dim."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        return max(32, int(embed_dim * 3.5 // 32 * 32)) if self.version in (5, 6) else 4 * embed_dim

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: two per weight of the projections."""
        return 2.0 * embed_dim * (2 * self.hidden_dim(embed_dim) + (embed_dim if self.version < 7 else 0))

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> ChannelMixState:
        """No token before."""
        return ChannelMixState(jnp.zeros((batch_size, embed_dim), dtype))

    @nn.compact
    def __call__(self, x: Array, state: ChannelMixState, ctx: Context) -> tuple[Array, ChannelMixState, Aux]:
        D, hidden = x.shape[-1], self.hidden_dim(x.shape[-1])
        _, r10 = rwkv_init.ratios(ctx.shared)
        before, last = shift(x, state.shift, ctx)
        change = x - before

        def mixed(name: str) -> Array:
            if self.version < 6:
                share = rwkv_init.vector(self, f"mix_{name}", rwkv_init.mix(r10), D, "activation_embed").astype(x.dtype)
                return before + change * share
            power = r10**3 if self.version == 6 else r10**4
            share = rwkv_init.vector(self, f"mix_{name}", rwkv_init.unmix(power), D, "activation_embed")
            return x - change * share.astype(x.dtype)

        k = Dense(hidden, ("embed", "mlp"), kernel_init=rwkv_init.orthogonal(1.0), name="key")(mixed("key"))
        y = Dense(D, ("mlp", "embed"), kernel_init=rwkv_init.ZEROS, name="value")(jnp.square(jax.nn.relu(k)))
        if self.version < 7:
            r = Dense(D, ("embed", "mlp"), kernel_init=rwkv_init.ZEROS, name="receptance")(mixed("receptance"))
            y = jax.nn.sigmoid(r) * y
        return y, ChannelMixState(last), {}
