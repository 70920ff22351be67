"""RWKV-5's time mixing (Eagle, in its form 5.2): a matrix state that decays at a rate a channel (Peng et al. 2024).

Shape legend: B batch, T time, D embed_dim = H K, H heads, K head_dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array, Aux, Context
from lm.layers import rwkv_init
from lm.layers.group_norm import HeadNorm
from lm.layers.linear import Dense
from lm.layers.local import over_shards
from lm.layers.token_shift import shift
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv6.sequence import wkv6_over_sequence


class RWKV5State(NamedTuple):
    """shift: [B, D], the last input. wkv: [B, H, K, K] float32, keys by values."""

    shift: Array
    wkv: Array


class RWKV5(nn.Module):
    """out(silu(g) * norm(y)), y_t = (S_{t-1} + (u k_t) v_t^T)^T r_t, S_t = diag(d) S_{t-1} + k_t v_t^T with
    d = exp(-exp(decay)); r, k, v, g project mixtures of a token and the one before (Peng et al. 2024, section 4.1).

    head_dim: K, which must divide embed_dim.
    norm_eps: of the norm of each head. The reference divides y by 8 and takes 1e-5, which is 64e-5 without dividing.
    implementation: of the recurrence; None is the best for the platform, logged once.
    """

    head_dim: int = 64
    norm_eps: float = 64e-5
    implementation: str | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit the width."""
        if self.head_dim < 1 or embed_dim % self.head_dim:
            raise ValueError(f"rwkv5.head_dim={self.head_dim} does not divide embed_dim={embed_dim}")
        if not self.norm_eps > 0:
            raise ValueError(f"rwkv5.norm_eps={self.norm_eps} must be above 0")

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: two per weight of the projections, four per entry of the state."""
        return 10.0 * embed_dim**2 + 4.0 * embed_dim * self.head_dim

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> RWKV5State:
        """No past."""
        heads = (batch_size, embed_dim // self.head_dim, self.head_dim, self.head_dim)
        return RWKV5State(jnp.zeros((batch_size, embed_dim), dtype),
                          jnp.zeros(heads, jnp.promote_types(dtype, jnp.float32)))

    @nn.compact
    def __call__(self, x: Array, state: RWKV5State, ctx: Context) -> tuple[Array, RWKV5State, Aux]:
        D = x.shape[-1]
        r01, r10 = rwkv_init.ratios(ctx.shared)
        before, last = shift(x, state.shift, ctx)

        def project(name: str, mix: rwkv_init.Init, gain: float) -> Array:
            share = rwkv_init.vector(self, f"mix_{name}", mix, D, "activation_embed").astype(x.dtype)
            kernel_init = rwkv_init.orthogonal(gain)
            return Dense(D, ("embed", "heads"), kernel_init=kernel_init, name=name)(x * share + before * (1 - share))

        r = project("receptance", rwkv_init.mix(0.5 * r10), 1.0)
        k = project("key", rwkv_init.mix(r10), 0.1)
        v = project("value", rwkv_init.mix(r10, 0.3 * r01), 1.0)
        g = jax.nn.silu(project("gate", rwkv_init.mix(0.5 * r10), 0.1))
        decay = rwkv_init.vector(self, "decay", rwkv_init.eagle_decay(r01), D, "heads")
        bonus = rwkv_init.vector(self, "bonus", rwkv_init.eagle_bonus(r01), D, "heads")
        y, wkv = recur(r, -jnp.exp(decay), k, v, bonus, state.wkv, ctx, self.head_dim, self.implementation)
        y = HeadNorm(self.norm_eps, name="norm")(y, rwkv_init.norm_scale(ctx.shared)) * g
        y = Dense(D, ("heads", "embed"), kernel_init=rwkv_init.ZEROS, name="out")(y)
        return y, RWKV5State(last, wkv), {}


def recur(r: Array, w: Array, k: Array, v: Array, bonus: Array, wkv: Array, ctx: Context, head_dim: int,
          implementation: str | None) -> tuple[Array, Array]:
    """What RWKV-5 and 6 read from their state, [B, T, H, K], and the state after, over which padding has no say.

    r, k, v [B, T, D]; w [D] or [B, T, D], the logarithm of the decay; bonus [D]; wkv [B, H, K, K].
    """
    B, T, D = r.shape
    heads = lambda a: a.reshape(B, T, D // head_dim, head_dim)
    hold = (ctx.weights != 0)[..., None, None]
    w = jnp.where(hold, heads(jnp.broadcast_to(w, r.shape)), 0.0)  # padding leaves the state as it is
    k = jnp.where(hold, heads(k), 0)
    split, per_state = ("batch", "length", "heads", None), ("batch", "heads", None, None)
    return over_shards(
        partial(wkv6, implementation=implementation), partial(wkv6_over_sequence, implementation=implementation),
        (heads(r), w, k, heads(v), bonus.reshape(-1, head_dim), wkv, ctx.reset),
        (*(split,) * 4, ("heads", None), per_state, ("batch", "length")), (split, per_state), (k.shape, wkv.shape))
