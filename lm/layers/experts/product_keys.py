"""Routing by product keys: queries of each head, normalised, and the k best of n * n keys (Lample et al. 2019).

Shape legend: B batch, T time, D embed_dim, H heads, Q key_dim, n sub-keys of a half, N = n^2, k top_k.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.low_rank import column_scale
from lm.core.tally import Moments
from lm.core.tree import STATS
from lm.core.types import Array
from lm.layers.experts.numbering import Numbering, numbered
from lm.layers.linear import Dense
from pallas_kernels.product_key_topk.api import num_sub_keys, product_key_topk

QueryNorm = Literal["batch", "layer", "l2", "none"]
Gate = Literal["softmax", "sigmoid"]
EPS = 1e-5


class RouterArrays(NamedTuple):
    """kernel [D, H, Q]; adapter (a [D, r], b [r, H, Q]) or None; scale, bias [H, Q], None where the norm has none;
    keys [2, n, Q / 2] of all heads or [2, H, n, Q / 2]; mean, var [H, Q], running, None without a batch norm."""

    kernel: Array
    adapter: tuple[Array, Array] | None
    scale: Array | None
    bias: Array | None
    keys: Array
    mean: Array | None
    var: Array | None


class ProductKeys(nn.Module):
    """Names the parameters of the router, and what it does with them: `queries`, then `choose`.

    num_keys: N, a square. query_norm: batch (mean and variance of each feature over the tokens), layer (of each head's
    query), l2 (halves of queries and sub-keys of length 1, times a learned scale) or none. gate: softmax over the k
    scores of a head, or sigmoid of each. per_head_keys: sub-keys of each head's own. momentum: of running statistics.
    numbering: of the N keys. active_keys: the first sub-keys of each half that can be chosen, None is all.
    """

    num_keys: int
    num_heads: int
    top_k: int
    key_dim: int
    query_norm: QueryNorm
    gate: Gate
    per_head_keys: bool
    momentum: float
    implementation: str | None = None
    numbering: Numbering = "grid"
    active_keys: int | None = None

    @nn.compact
    def __call__(self, embed_dim: int) -> RouterArrays:
        H, Q, n = self.num_heads, self.key_dim, num_sub_keys(self.num_keys)
        query = Dense(H * Q, ("embed", "heads"), name="query")
        kernel, _ = query.weights(embed_dim)
        adapter = None
        if query.has_variable("lora", "a"):
            a, b = query.get_variable("lora", "a"), query.get_variable("lora", "b")
            if query.has_variable("lora", "magnitude"):
                by_column = column_scale(kernel, a, b, query.get_variable("lora", "magnitude"))
                kernel, b = kernel * by_column, b * by_column
            adapter = a, b.reshape(-1, H, Q)

        def vector(name: str, init: Any) -> Array:
            return self.param(name, nn.with_logical_partitioning(init, ("heads", None)), (H, Q))

        # l2: the initial scores have the variance, 2/3, that normal queries have with the other norms.
        first = math.sqrt(Q / 6) if self.query_norm == "l2" else 1.0
        scale = vector("scale", nn.initializers.constant(first)) if self.query_norm != "none" else None
        bias = vector("bias", nn.initializers.zeros) if self.query_norm != "l2" else None
        bound = (Q / 2) ** -0.5
        draw = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        own = (H,) if self.per_head_keys else ()
        axes = (None, "heads", None, "embed") if own else (None, None, "embed")
        keys = self.param("keys", nn.with_logical_partitioning(draw, axes), (2, *own, n, Q // 2))
        mean = var = None
        if self.query_norm == "batch":
            running = self.variable(STATS, "queries", lambda: {
                "mean": nn.LogicallyPartitioned(jnp.zeros((H * Q,)), ("heads",)),
                "var": nn.LogicallyPartitioned(jnp.ones((H * Q,)), ("heads",)),
                "steps": nn.LogicallyPartitioned(jnp.zeros(()), ())}).value
            mean, var = running["mean"].reshape(H, Q), running["var"].reshape(H, Q)
        return RouterArrays(kernel.reshape(embed_dim, H, Q), adapter, scale, bias, keys, mean, var)

    def flops_per_token(self, embed_dim: int) -> float:
        """Forward FLOPs a token: queries, and their products with the sub-keys of both halves."""
        return 2.0 * self.num_heads * self.key_dim * (embed_dim + num_sub_keys(self.num_keys))

    def num_params(self, embed_dim: int) -> int:
        """Parameters of the router, all of which every token uses."""
        features = self.num_heads * self.key_dim
        vectors = {"batch": 2, "layer": 2, "l2": 1, "none": 1}[self.query_norm]
        own = self.num_heads if self.per_head_keys else 1
        return features * (embed_dim + vectors) + own * num_sub_keys(self.num_keys) * self.key_dim


def queries(x: Array, router: RouterArrays) -> Array:
    """Float32 queries [B, T, H, Q] of x [B, T, D] before their norm."""
    D, H, Q = router.kernel.shape
    q = x @ router.kernel.reshape(D, H * Q).astype(x.dtype)
    if router.adapter is not None:
        a, b = router.adapter
        q = q + (x @ a.astype(x.dtype)) @ b.reshape(-1, H * Q).astype(x.dtype)
    return q.reshape(*x.shape[:-1], H, Q).astype(jnp.promote_types(x.dtype, jnp.float32))


def query_moments(x: Array, present: Array, router: RouterArrays, momentum: float) -> Moments:
    """Of the queries' features, [H * Q], over the tokens of x [B, T, D] where present [B, T]."""
    q = queries(x, router)
    return Moments.of(q.reshape(*q.shape[:2], -1), present, momentum)


def normalised(q: Array, router: RouterArrays, query_norm: QueryNorm) -> Array:
    """Queries [B, T, H, Q] after their norm, scaled and moved."""
    if query_norm == "batch":
        q = (q - router.mean) * jax.lax.rsqrt(router.var + EPS)
    elif query_norm == "layer":
        q = q - jnp.mean(q, -1, keepdims=True)
        q = q * jax.lax.rsqrt(jnp.mean(jnp.square(q), -1, keepdims=True) + EPS)
    elif query_norm == "l2":
        q = unit(q.reshape(*q.shape[:-1], 2, -1)).reshape(q.shape)
    q = q if router.scale is None else q * router.scale
    return q if router.bias is None else q + router.bias


def unit(v: Array) -> Array:
    """v over its length along the last axis; its gradient is finite at 0 too."""
    return v * jax.lax.rsqrt(jnp.sum(jnp.square(v), -1, keepdims=True) + 1e-12)


def choose(x: Array, present: Array, router: RouterArrays, spec: ProductKeys) -> tuple[Array, Array, Array]:
    """(ids, gates, entropy): ids [B, T, H, k] int32, -1 for tokens that are not present; gates likewise; entropy
    [B, T, H] of the gates, as shares of their sum, in nats."""
    q = normalised(queries(x, router), router, spec.query_norm)
    first, second = jnp.split(q, 2, -1)
    # The sub-keys that wait are left out before anything is computed: scores and ids are those of the smaller layer.
    keys = router.keys[..., :spec.active_keys, :].astype(q.dtype)
    keys = unit(keys) if spec.query_norm == "l2" else keys
    scores, ids = product_key_topk(first, second, keys[0], keys[1], spec.top_k, implementation=spec.implementation)
    ids = numbered(ids, keys.shape[-2], router.keys.shape[-2], spec.numbering)
    here = present[..., None, None] != 0
    gates = jax.nn.softmax(scores, -1) if spec.gate == "softmax" else jax.nn.sigmoid(scores)
    share = jax.lax.stop_gradient(gates / jnp.sum(gates, -1, keepdims=True))
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-30)), -1)
    return jnp.where(here, ids, -1), jnp.where(here, gates, 0), entropy


def gate_power(gate: Gate, top_k: int) -> float:
    """About the sum over a head's k gates of their squares at initialisation, where gates of one head are alike:
    1 / k under softmax. Under sigmoid the best scores are well above 0, where it is about 0.75."""
    return 1 / top_k if gate == "softmax" else 0.75**2 * top_k


def check_keys(name: str, num_keys: int, field: str, heads: int, top_k: int, key_dim: int, gate: str) -> None:
    """Raises ValueError, with what would do, for sizes that product keys cannot have."""
    try:
        n = num_sub_keys(num_keys)
    except ValueError as error:
        raise ValueError(f"{name}.{str(error).replace('num_experts', field)}") from None
    if heads < 1:
        raise ValueError(f"{name}.num_heads={heads} must be at least 1")
    if not 1 <= top_k <= n:
        raise ValueError(f"{name}.top_k={top_k} must be from 1 to {n}, the root of {field}={num_keys}: the best k lie "
                         f"among k sub-keys of each half; nearest: {min(max(top_k, 1), n)}, or {field}={top_k ** 2}")
    if key_dim < 2 or key_dim % 2:
        raise ValueError(f"{name}.key_dim={key_dim} must be even, since a key has two halves; nearest: "
                         f"{max(2, key_dim + 1)}")
    if top_k == 1 and gate == "softmax":
        raise ValueError(f"{name}.top_k=1 with gate='softmax' gives every expert the weight 1, so that the router "
                         f"would not learn; set gate='sigmoid', or top_k to at least 2")
