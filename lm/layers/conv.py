"""Causal depthwise convolution along time, with the state that decoding needs."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array, Context
from lm.layers.token_shift import lags


class CausalConv(nn.Module):
    """y_t = sum_j taps_j * x_{t-j} over the last `width` tokens of the document, each channel by itself.

    The Conv4 of minGRU models and Mamba (Gu & Dao 2023). history: [B, width - 1, D], see `lm.layers.token_shift.lags`.
    """

    width: int = 4

    @nn.compact
    def __call__(self, x: Array, history: Array, ctx: Context) -> tuple[Array, Array]:
        def init(key, shape):
            bound = self.width ** -0.5  # torch's default for a depthwise convolution: uniform by fan in
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        taps = self.param("taps", nn.with_logical_partitioning(init, (None, "embed")), (self.width, x.shape[-1]))
        taps = taps.astype(x.dtype)
        before, after = lags(x, history, ctx)
        return sum((row * token for row, token in zip(taps, [x, *before], strict=True)), jnp.zeros_like(x)), after
