"""RWKV-6's time mixing (Finch): the decay and the mixing of tokens depend on the data (Peng et al. 2024).

Shape legend: B batch, T time, D embed_dim = H K, H heads, K head_dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array, Aux, Context
from lm.layers import rwkv_init
from lm.layers.group_norm import HeadNorm
from lm.layers.linear import Dense
from lm.layers.rwkv5 import recur
from lm.layers.token_shift import shift

MIXED = ("decay", "key", "value", "receptance", "gate")  # in the order of the parts of `mix_in`


class RWKV6State(NamedTuple):
    """shift: [B, D], the last input. wkv: [B, H, K, K] float32, keys by values."""

    shift: Array
    wkv: Array


class RWKV6(nn.Module):
    """RWKV-5 with d_t = exp(-exp(decay + tanh(x_decay A) B)) and each mixture x_* = x + (before - x)(mix_* + delta_*),
    delta = tanh(x_all A) B of the mixture x_all (ddlerp; Peng et al. 2024, section 4.2). `mix_*` is the share of the
    token before.

    head_dim: K, which must divide embed_dim.
    mix_rank: inner width of the five low-rank maps of the mixtures; None is 32, from embed_dim 4096 on 64.
    decay_rank: of that of the decay; None is twice the default of mix_rank.
    norm_eps: of the norm of each head.
    implementation: of the recurrence; None is the best for the platform, logged once.
    """

    head_dim: int = 64
    mix_rank: int | None = None
    decay_rank: int | None = None
    norm_eps: float = 64e-5
    implementation: str | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit the width."""
        if self.head_dim < 1 or embed_dim % self.head_dim:
            raise ValueError(f"rwkv6.head_dim={self.head_dim} does not divide embed_dim={embed_dim}")
        for name in ("mix_rank", "decay_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"rwkv6.{name}={getattr(self, name)} must be at least 1 (or None for the default)")
        if not self.norm_eps > 0:
            raise ValueError(f"rwkv6.norm_eps={self.norm_eps} must be above 0")

    def ranks(self, embed_dim: int) -> tuple[int, int]:
        """Inner widths of the maps of the mixtures and of the decay."""
        small = 32 if embed_dim < 4096 else 64
        return (small if self.mix_rank is None else self.mix_rank,
                2 * small if self.decay_rank is None else self.decay_rank)

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: two per weight of the projections, four per entry of the state."""
        mix, decay = self.ranks(embed_dim)
        return 10.0 * embed_dim**2 + 4.0 * embed_dim * (len(MIXED) * mix + decay) + 4.0 * embed_dim * self.head_dim

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> RWKV6State:
        """No past."""
        heads = (batch_size, embed_dim // self.head_dim, self.head_dim, self.head_dim)
        return RWKV6State(jnp.zeros((batch_size, embed_dim), dtype),
                          jnp.zeros(heads, jnp.promote_types(dtype, jnp.float32)))

    @nn.compact
    def __call__(self, x: Array, state: RWKV6State, ctx: Context) -> tuple[Array, RWKV6State, Aux]:
        D, (mix_rank, decay_rank) = x.shape[-1], self.ranks(x.shape[-1])
        r01, r10 = rwkv_init.ratios(ctx.shared)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        before, last = shift(x, state.shift, ctx)
        change = before - x

        def share(name: str, init: rwkv_init.Init) -> Array:
            return rwkv_init.vector(self, f"mix_{name}", init, D, "activation_embed").astype(x.dtype)

        def narrow(rank: int, name: str, given: Array) -> Array:
            return jnp.tanh(Dense(rank, ("embed", None), kernel_init=rwkv_init.ZEROS, name=name)(given))

        def widen(name: str, given: Array, axis: str) -> Array:
            return Dense(D, (None, axis), kernel_init=rwkv_init.uniform(0.01), name=name)(given)

        all_mixed = x + change * share("all", rwkv_init.unmix(r10))
        parts = jnp.split(narrow(len(MIXED) * mix_rank, "mix_in", all_mixed), len(MIXED), axis=-1)
        shares = {"decay": rwkv_init.unmix(r10), "key": rwkv_init.unmix(r10),
                  "value": rwkv_init.unmix(r10, 0.3 * r01), "receptance": rwkv_init.unmix(0.5 * r10),
                  "gate": rwkv_init.unmix(0.5 * r10)}
        mixed = {name: x + change * (share(name, shares[name]) + widen(f"mix_{name}_out", part, "embed"))
                 for name, part in zip(MIXED, parts, strict=True)}

        def project(name: str, gain: float) -> Array:
            return Dense(D, ("embed", "heads"), kernel_init=rwkv_init.orthogonal(gain), name=name)(mixed[name])

        r, k, v = project("receptance", 1.0), project("key", 0.1), project("value", 1.0)
        g = jax.nn.silu(project("gate", 0.1))
        decay = rwkv_init.vector(self, "decay", rwkv_init.eagle_decay(r01), D, "heads")
        bonus = rwkv_init.vector(self, "bonus", rwkv_init.eagle_bonus(r01), D, "heads")
        change_of_decay = widen("decay_out", narrow(decay_rank, "decay_in", mixed["decay"]), "heads")
        w = -jnp.exp(decay + change_of_decay.astype(wide))
        y, wkv = recur(r, w, k, v, bonus, state.wkv, ctx, self.head_dim, self.implementation)
        y = HeadNorm(self.norm_eps, name="norm")(y, rwkv_init.norm_scale(ctx.shared)) * g
        y = Dense(D, ("heads", "embed"), kernel_init=rwkv_init.ZEROS, name="out")(y)
        return y, RWKV6State(last, wkv), {}
