"""Product key memory: values read from a large table, the best of a million by product keys (Lample et al. 2019).

Shape legend: B batch, T time, D embed_dim, N values.
"""

from flax import linen as nn

from lm.core.types import Array, Aux, Context, State
from lm.layers.dropout import dropout
from lm.layers.experts.by_product_keys import ByProductKeys
from lm.layers.experts.options import declare_usage
from lm.layers.experts.product_keys import Gate, QueryNorm, gate_power
from lm.layers.experts.retrieved import Retrieval
from lm.layers.experts.values import weighted_rows, weighted_rows_with_sink
from pallas_kernels.peer_experts.rows import TouchedRows

# E[gelu(a)^2] of a normal a: the variance of an MLP's output, whose `down` has fan-in variance.
GELU_POWER = 0.425


class PKM(ByProductKeys, nn.Module):
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

    kind = "pkm"
    rows = "num_values"
    table = "values"
    table_axes = ("experts", "embed")

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: queries, sub-keys, and the sum of the chosen values."""
        return self.router(embed_dim).flops_per_token(embed_dim) + 2.0 * self.num_heads * self.top_k * embed_dim

    def active_params(self, embed_dim: int) -> int:
        """Parameters that a token uses: queries, all sub-keys, and the chosen values."""
        return self.router(embed_dim).num_params(embed_dim) + self.granularity * embed_dim

    @nn.compact
    def __call__(self, x: Array, state: State, ctx: Context) -> tuple[Array, State, Aux]:
        D = x.shape[-1]
        spec = self.router(D)
        router = spec.copy(name="router")(D)
        scale = 1.0 if self.output_scale is None else self.output_scale
        std = scale * (GELU_POWER / (self.num_heads * gate_power(self.gate, self.top_k))) ** 0.5
        table, sink = self.table_and_sink(nn.initializers.normal(std), D)
        if self.is_initializing():  # parameters are all that is wanted, and this costs much to trace
            declare_usage(self, self.num_values)
            return x, state, {}

        def combine(x: Array, ids: Array, gates: Array, table: Array) -> Array:
            return weighted_rows(ids, gates, table).astype(x.dtype)

        def combine_rows(x: Array, ids: Array, gates: Array, table: Array, sink: Array) -> tuple[Array, TouchedRows]:
            y, touched = weighted_rows_with_sink(ids, gates, table, sink)
            return y.astype(x.dtype), touched

        retrieval = Retrieval(spec, combine, combine_rows, ctx.key is not None, self.chunk, self.usage_tokens,
                              self.dead_after)
        y, tally = retrieval(x, ctx.weights, router, table, sink)
        return dropout(y, self.dropout, ctx.key), state, {"tally": tally}
