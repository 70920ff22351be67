"""Product key memory: values read from a large table, the best of a million by product keys (Lample et al. 2019).

Shape legend: B batch, T time, D embed_dim, N values.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from lm.core.types import Array, Aux, Context, State
from lm.layers.dropout import dropout
from lm.layers.experts.options import check_counts, check_momentum, declare_usage
from lm.layers.experts.product_keys import Gate, ProductKeys, QueryNorm, check_keys, gate_power
from lm.layers.experts.retrieved import Retrieval
from lm.layers.experts.shards import check_rows
from lm.layers.experts.values import weighted_rows

# E[gelu(a)^2] of a normal a: the variance of an MLP's output, whose `down` has fan-in variance.
GELU_POWER = 0.425


class PKM(nn.Module):
    """y = sum over heads and their k best values i of g_i m_i: PEER without a neuron.

    num_values: N, a square, of vectors m_i as wide as the model. num_heads: queries a token. top_k: values a head.
    key_dim: width of queries and keys, even; None is embed_dim / 4, at least 2.
    query_norm: batch (as published; statistics of the batch in training, running ones else), layer or l2 (of each
      token alone) or none. gate: softmax over a head's k scores, or sigmoid of each.
    per_head_keys: sub-keys of each head's own (as published), or shared ones.
    momentum: of the running statistics of batch; 1 freezes them, and has them used in training too.
    chunk: tokens of a device at a time; None chooses by memory.
    usage_tokens: tokens of a chunk whose choices are counted for the metrics; None is all. dead_after: steps without a
      choice after which a value counts as dead. dropout: of the output.
    output_scale: multiplies the standard deviation of the values at initialisation.
    implementation: of product_key_topk; None is the best for the platform.
    """

    num_values: int = 65_536
    num_heads: int = 4
    top_k: int = 32
    key_dim: int | None = None
    query_norm: QueryNorm = "batch"
    gate: Gate = "softmax"
    per_head_keys: bool = True
    momentum: float = 0.99
    chunk: int | None = None
    usage_tokens: int | None = None
    dead_after: int = 1000
    dropout: float = 0.0
    output_scale: float | None = None
    implementation: str | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit together."""
        check_keys("pkm", self.num_values, "num_values", self.num_heads, self.top_k, self.dim(embed_dim), self.gate)
        check_counts("pkm", chunk=self.chunk, usage_tokens=self.usage_tokens, dead_after=self.dead_after)
        check_momentum("pkm", self.momentum)

    def check_mesh(self, mesh: Mapping[str, int]) -> None:
        """Raises ValueError where the mesh cannot split the values."""
        check_rows("pkm.num_values", self.num_values, mesh, square=True)

    @property
    def not_additive(self) -> tuple[str, ...]:
        """What makes a batch more than the sum of its microbatches."""
        return ("pkm.query_norm='batch'",) if self.query_norm == "batch" and self.momentum < 1 else ()

    def dim(self, embed_dim: int) -> int:
        """Width of a query."""
        return max(2, embed_dim // 8 * 2) if self.key_dim is None else self.key_dim

    def router(self, embed_dim: int) -> ProductKeys:
        """The template of the router."""
        return ProductKeys(self.num_values, self.num_heads, self.top_k, self.dim(embed_dim), self.query_norm, self.gate,
                           self.per_head_keys, self.momentum, self.implementation, parent=None)

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: queries, sub-keys, and the sum of the chosen values."""
        return self.router(embed_dim).flops_per_token(embed_dim) + 2.0 * self.num_heads * self.top_k * embed_dim

    def active_params(self, embed_dim: int) -> int:
        """Parameters that a token uses: queries, all sub-keys, and the chosen values."""
        return self.router(embed_dim).num_params(embed_dim) + self.granularity * embed_dim

    @property
    def granularity(self) -> int:
        """Values that a token reads."""
        return self.num_heads * self.top_k

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> State:
        """Stateless."""
        return ()

    @nn.compact
    def __call__(self, x: Array, state: State, ctx: Context) -> tuple[Array, State, Aux]:
        D = x.shape[-1]
        spec = self.router(D)
        router = spec.copy(name="router")(D)
        scale = 1.0 if self.output_scale is None else self.output_scale
        std = scale * (GELU_POWER / (self.num_heads * gate_power(self.gate, self.top_k))) ** 0.5
        table = self.param("values", nn.with_logical_partitioning(nn.initializers.normal(std), ("experts", "embed")),
                           (self.num_values, D))
        if self.is_initializing():  # parameters are all that is wanted, and this costs much to trace
            declare_usage(self, self.num_values)
            return x, state, {}

        def combine(x: Array, ids: Array, gates: Array, table: Array) -> Array:
            return weighted_rows(ids, gates, table).astype(x.dtype)

        retrieval = Retrieval(spec, combine, ctx.key is not None, self.chunk, self.usage_tokens, self.dead_after)
        y, tally = retrieval(x, ctx.weights, router, table)
        return dropout(y, self.dropout, ctx.key), state, {"tally": tally}
