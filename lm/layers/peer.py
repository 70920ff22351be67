"""PEER: single-neuron experts, the best of a million by product keys (He 2024, arXiv:2407.04153).

Shape legend: B batch, T time, D embed_dim, N experts, R rows of an expert (down, up, and gate if R = 3).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.fields import did_you_mean
from lm.core.types import Array, Aux, Context, State
from lm.layers.dropout import dropout
from lm.layers.experts.by_product_keys import ByProductKeys
from lm.layers.experts.numbering import Numbering
from lm.layers.experts.options import declare_usage
from lm.layers.experts.product_keys import Gate, QueryNorm, gate_power
from lm.layers.experts.retrieved import Retrieval
from lm.layers.mlp import ACTIVATIONS
from pallas_kernels.peer_experts.api import peer_experts, peer_experts_with_sink
from pallas_kernels.product_key_topk.api import num_sub_keys

# name -> (nonlinearity, whether a third vector of the expert multiplies it)
EXPERTS: dict[str, tuple[Callable[[Array], Array], bool]] = {"relu": (jax.nn.relu, False), **ACTIVATIONS}


class PEER(ByProductKeys, nn.Module):
    """y = sum over heads and their k best experts i of g_i act(u_i . x) v_i, or g_i act(u_i . x) (w_i . x) v_i.

    num_experts: N, a square; expert i of them is a row (u_i, v_i). num_heads: queries a token. top_k: experts a head.
    key_dim: width of queries and keys, even; None is embed_dim / 4, at least 2.
    query_norm: batch (as published; statistics of the batch in training, running ones else), layer or l2 (of each
      token alone) or none. gate: softmax over a head's k scores, or sigmoid of each.
    activation: relu, gelu (tanh form), gelu_exact, relu2, silu, or with a third vector swiglu, geglu, reglu.
    per_head_keys: sub-keys of each head's own instead of shared ones.
    momentum: of the running statistics of batch; 1 freezes them, and has them used in training too.
    chunk: tokens of a device at a time; None chooses by memory.
    usage_tokens: tokens of a chunk whose choices are counted for the metrics; None is all. dead_after: steps without a
      choice after which an expert counts as dead. dropout: of the output.
    output_scale: multiplies the standard deviation of v at initialisation.
    implementation: of both operations, product_key_topk and peer_experts; None is the best for the platform.
    numbering: of the experts. shell: those of the first n sub-keys come first, whatever N is, so that `lm grow` appends
      rows; grid is i n + j, as other implementations and older runs have it.
    active_keys: the first sub-keys of each half that can be chosen, None is all; experts of the others wait.
    """

    num_experts: int = 65_536
    num_heads: int = 8
    top_k: int = 16
    key_dim: int | None = None
    query_norm: QueryNorm = "batch"
    gate: Gate = "softmax"
    activation: str = "gelu"
    per_head_keys: bool = False
    momentum: float = 0.99
    chunk: int | None = None
    usage_tokens: int | None = None
    dead_after: int = 1000
    dropout: float = 0.0
    output_scale: float | None = None
    implementation: str | None = None
    numbering: Numbering = "shell"
    active_keys: int | None = None

    kind = "peer"
    rows = "num_experts"
    table = "experts"
    table_axes = ("experts", None, "embed")

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit together."""
        super().check(embed_dim)
        n, active = num_sub_keys(self.num_experts), self.active_keys
        if active is not None and not self.top_k <= active <= n:
            raise ValueError(f"peer.active_keys={active} must be from top_k={self.top_k} to {n}, the root of "
                             f"num_experts={self.num_experts}; nearest: {min(max(active, self.top_k), n)}")
        if self.activation not in EXPERTS:
            raise ValueError(f"peer.activation={self.activation!r} is unknown{did_you_mean(self.activation, EXPERTS)}; "
                             f"known: {', '.join(EXPERTS)}")

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: queries, sub-keys, and the chosen experts."""
        rows = 3 if EXPERTS[self.activation][1] else 2
        return self.router(embed_dim).flops_per_token(embed_dim) \
            + 2.0 * rows * self.num_heads * self.top_k * embed_dim

    def active_params(self, embed_dim: int) -> int:
        """Parameters that a token uses: queries, all sub-keys, and the chosen experts."""
        rows = 3 if EXPERTS[self.activation][1] else 2
        return self.router(embed_dim).num_params(embed_dim) + rows * self.granularity * embed_dim

    @nn.compact
    def __call__(self, x: Array, state: State, ctx: Context) -> tuple[Array, State, Aux]:
        D, N = x.shape[-1], self.num_experts
        act, gated = EXPERTS[self.activation]
        spec = self.router(D)
        router = spec.copy(name="router")(D)
        scale = 1.0 if self.output_scale is None else self.output_scale
        # A head's k weights have squares that sum to gate_power, and h heads add up: with this the output has the
        # variance of an MLP with as many active neurons, whose `down` has fan-in variance.
        up = scale * (self.num_heads * gate_power(self.gate, self.top_k)) ** -0.5
        table, sink = self.table_and_sink(row_init(D**-0.5, up), 3 if gated else 2, D)
        if self.is_initializing():  # parameters are all that is wanted, and this costs much to trace
            declare_usage(self, N)
            return x, state, {}
        how = dict(activation=act, implementation=self.implementation)
        retrieval = Retrieval(spec, functools.partial(peer_experts, **how),
                              functools.partial(peer_experts_with_sink, **how),
                              ctx.key is not None, self.chunk, self.usage_tokens, self.dead_after)
        y, tally = retrieval(x, ctx.weights, router, table, sink)
        return dropout(y, self.dropout, ctx.key), state, {"tally": tally}


def row_init(inner: float, up: float) -> Callable:
    """Normal rows [N, R, D]: row 1 of an expert with standard deviation `up`, the others with `inner`."""
    def init(key, shape, dtype=jnp.float32):
        std = jnp.full((shape[1], 1), inner, dtype).at[1].set(up)
        return std * jax.random.normal(key, shape, dtype)
    return init
