"""RWKV-7's time mixing: a matrix state under a generalised delta rule (Peng et al. 2025).

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
from lm.layers.rwkv_init import slope, table
from lm.layers.token_shift import shift
from pallas_kernels.wkv7.api import wkv7
from pallas_kernels.wkv7.sequence import wkv7_over_sequence

PUBLISHED = "rwkv7_value"  # the first layer's values, which later layers mix with theirs


class RWKV7State(NamedTuple):
    """shift: [B, D], the last input. wkv: [B, H, K, K] float32, keys by values."""

    shift: Array
    wkv: Array


class RWKV7(nn.Module):
    """Gated, normalised reading of S_t = S_{t-1} (diag(d_t) - kappa (alpha kappa)^T) + v k^T (Peng et al. 2025, eq. 3).

    head_dim: K, which must divide embed_dim.
    decay_rank: inner width of the low-rank map of the decay (w); None is near 2.5 sqrt(embed_dim), as all four are.
    rate_rank: of the in-context learning rate (a); None is near 2.5 sqrt(embed_dim).
    value_rank: of the mixing with the first layer's values (v); None is near 1.7 sqrt(embed_dim).
    gate_rank: of the gate (g); None is near 5 sqrt(embed_dim).
    value_residual: mix values with those of the first RWKV-7 layer. That layer itself has it off, and stands in the
      model's `prefix`: prefix=("rwkv7_first/channel_mix",), rwkv7_first=dict(kind="rwkv7", value_residual=False).
    implementation: of the recurrence; None is the best for the platform, logged once.
    """

    head_dim: int = 64
    decay_rank: int | None = None
    rate_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    value_residual: bool = True
    implementation: str | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit the width."""
        if self.head_dim < 1 or embed_dim % self.head_dim:
            raise ValueError(f"rwkv7.head_dim={self.head_dim} does not divide embed_dim={embed_dim}")
        for name in ("decay_rank", "rate_rank", "value_rank", "gate_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"rwkv7.{name}={getattr(self, name)} must be at least 1 (or None for the default)")

    def ranks(self, embed_dim: int) -> dict[str, int]:
        """Inner widths of the low-rank maps: multiples of 32 near 2.5, 2.5, 1.7 and 5 times the root of the width."""
        def size(given, factor):
            return max(32, round(factor * embed_dim ** 0.5 / 32) * 32) if given is None else given
        return {"decay": size(self.decay_rank, 2.5), "rate": size(self.rate_rank, 2.5),
                "value": size(self.value_rank, 1.7), "gate": size(self.gate_rank, 5.0)}

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: two per weight of the projections, eight per entry of the state."""
        ranks = self.ranks(embed_dim)
        low = sum(r for name, r in ranks.items() if name != "value" or self.value_residual)
        return 8.0 * embed_dim**2 + 4.0 * embed_dim * low + 8.0 * embed_dim * self.head_dim

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> RWKV7State:
        """No past."""
        heads = (batch_size, embed_dim // self.head_dim, self.head_dim, self.head_dim)
        return RWKV7State(jnp.zeros((batch_size, embed_dim), dtype),
                          jnp.zeros(heads, jnp.promote_types(dtype, jnp.float32)))

    @nn.compact
    def __call__(self, x: Array, state: RWKV7State, ctx: Context) -> tuple[Array, RWKV7State, Aux]:
        B, T, D = x.shape
        H, K, ranks = D // self.head_dim, self.head_dim, self.ranks(D)
        r01, r10 = rwkv_init.ratios(ctx.shared)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        before, last = shift(x, state.shift, ctx)
        change = before - x
        present = (ctx.weights != 0)[..., None]

        def mixed(name: str, power: float) -> Array:
            share = rwkv_init.vector(self, f"mix_{name}", rwkv_init.unmix(power * r10), D, "activation_embed")
            return x + change * share.astype(x.dtype)

        def project(name: str, given: Array, gain: float) -> Array:
            return Dense(D, ("embed", "heads"), kernel_init=rwkv_init.orthogonal(gain), name=name)(given)

        def low_rank(name: str, given: Array, inner) -> Array:
            hidden = Dense(ranks[name], ("embed", None), kernel_init=rwkv_init.ZEROS, name=f"{name}_in")(given)
            init = rwkv_init.one_by_one(nn.initializers.orthogonal(0.1))
            return Dense(D, (None, "heads"), kernel_init=init, name=f"{name}_out")(inner(hidden))

        def offset(name: str, function) -> Array:
            return rwkv_init.vector(self, name, table(function), D, "heads")

        identity = lambda y: y
        linear = lambda n: slope(n) - 0.5
        r = project("receptance", mixed("receptance", 0.2), 1.0)
        k = project("key", mixed("key", 0.7), 0.1)
        x_value = mixed("value", 0.7)
        v = project("value", x_value, 1.0)
        bent = lambda n: _bent(n, K)
        decay = offset("decay", lambda n: -6 + 6 * slope(n) ** (1 + r01**0.3) + 0.5 + 2.5 * bent(n))
        w = low_rank("decay", mixed("decay", 0.9), jnp.tanh).astype(wide) + decay
        w = -jnp.exp(-0.5) * jax.nn.sigmoid(w)  # the logarithm of a decay between 0.545 and 1
        rate = offset("rate", lambda n: -0.19 + 0.3 * bent(n) + 0.4 * linear(n))
        a = jax.nn.sigmoid(low_rank("rate", mixed("rate", 0.9), identity).astype(wide) + rate).astype(x.dtype)
        g = low_rank("gate", mixed("gate", 0.2), jax.nn.sigmoid)

        aux: Aux = {}
        if not self.value_residual:
            aux = {"publish": {PUBLISHED: v}}
        elif PUBLISHED not in ctx.shared and not self.is_initializing():  # blocks are initialised one by one
            raise ValueError('no layer before this rwkv7 gave its values: put one with value_residual=False in the '
                             'model\'s prefix, as prefix=("rwkv7_first/channel_mix",), '
                             'rwkv7_first=dict(kind="rwkv7", value_residual=False)')
        else:
            share = offset("value_mix", lambda n: 0.73 - 0.4 * linear(n))
            share = jax.nn.sigmoid(low_rank("value", x_value, identity).astype(wide) + share).astype(x.dtype)
            v = v + (ctx.shared.get(PUBLISHED, v) - v) * share

        removal = offset("key_removal", lambda n: 0.71 - 0.1 * linear(n)).astype(x.dtype)
        heads = lambda y: y.reshape(B, T, H, K)
        kappa = heads(k * removal).astype(wide)
        # k / max(|k|, 1e-12), in the form whose gradient is finite at k = 0.
        kappa = kappa * jax.lax.rsqrt(jnp.maximum(jnp.sum(kappa * kappa, axis=-1, keepdims=True), 1e-24))
        k = k * (1 + (a - 1) * offset("key_rate", lambda n: jnp.full(n, 1.02)).astype(x.dtype))
        hold = present[..., None]
        w_held = jnp.where(hold, heads(w), 0.0)  # padding leaves the state as it is
        kappa = jnp.where(hold, kappa, 0.0).astype(x.dtype)
        split, per_state = ("batch", "length", "heads", None), ("batch", "heads", None, None)
        y, wkv = over_shards(
            partial(wkv7, implementation=self.implementation),
            partial(wkv7_over_sequence, implementation=self.implementation),
            (heads(r), w_held, jnp.where(hold, heads(k), 0), heads(v), -kappa, kappa * heads(a), state.wkv, ctx.reset),
            (split,) * 6 + (per_state, ("batch", "length")), (split, per_state), ((B, T, H, K), state.wkv.shape))
        y = HeadNorm(name="norm")(y, rwkv_init.norm_scale(ctx.shared))
        start = nn.with_logical_partitioning(nn.initializers.constant(-0.04), ("heads", None))
        bonus = self.param("bonus", start, (H, K))
        now = jnp.sum(heads(r).astype(wide) * heads(k) * bonus, axis=-1, keepdims=True) * heads(v)
        y = (y + now.reshape(B, T, D).astype(x.dtype)) * g
        y = Dense(D, ("heads", "embed"), kernel_init=rwkv_init.ZEROS, name="out")(y)
        return y, RWKV7State(last, wkv), aux


def _bent(size: int, head_dim: int) -> Array:
    """s |s| of s running from -1 to 1 over each head."""
    half = (head_dim - 1) / 2
    s = (jnp.arange(size) % head_dim - half) / max(half, 0.5)
    return (s * jnp.abs(s)).astype(jnp.float32)
