"""Mixture of experts: MLPs of which a token uses a few, chosen by the token or by the experts.

Shape legend: B batch, T time, D embed_dim, E experts, K top_k, F mlp_dim.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from lm.core.fields import did_you_mean
from lm.core.sharding import current_mesh, spec
from lm.core.tally import Moments, Usage
from lm.core.tree import STATS
from lm.core.types import Array, Aux, Context, Mean, State
from lm.layers.dropout import dropout
from lm.layers.experts import routing
from lm.layers.experts.dispatch import Experts, by_expert, by_token, over_devices
from lm.layers.experts.options import check_counts, check_momentum, declare_usage
from lm.layers.experts.routing import Choice
from lm.layers.experts.shards import CHUNK_BYTES, check_rows, on_shards, over_chunks, split_of, total
from lm.layers.linear import Dense
from lm.layers.mlp import ACTIVATIONS, MLP

FEW = 4  # experts that a token may have outside of training under expert choice, as a multiple of top_k


class MoE(nn.Module):
    """y = sum over a token's experts e of g_e MLP_e(x), with g from softmax(router(x)).

    num_experts: MLPs. top_k: experts a token; of routing="expert" on average.
    routing: token (each token takes its best experts) or expert (each expert takes its best tokens of a row, of whom
      there are top_k T / E; outside of training, where tokens must not depend on later ones, those that reach its mean
      cut-off in training).
    mlp_dim: hidden width of an expert, None as in mlp. activation: of an expert, as in mlp.
    renormalize: of routing="token", a token's weights sum to 1.
    momentum: of the running cut-offs of routing="expert". chunk: tokens of a device at a time; None chooses by memory.
    dead_after: steps without a choice after which an expert counts as dead. dropout: of the output.
    output_scale: multiplies the standard deviation of `down` at initialisation.
    """

    num_experts: int = 8
    top_k: int = 2
    routing: Literal["token", "expert"] = "token"
    mlp_dim: int | None = None
    activation: str = "gelu"
    renormalize: bool = True
    momentum: float = 0.99
    chunk: int | None = None
    dead_after: int = 1000
    dropout: float = 0.0
    output_scale: float | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit together."""
        check_counts("moe", num_experts=self.num_experts, chunk=self.chunk, dead_after=self.dead_after,
                     mlp_dim=self.mlp_dim)
        check_momentum("moe", self.momentum)
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"moe.top_k={self.top_k} must be from 1 to num_experts={self.num_experts}; nearest: "
                             f"{min(max(self.top_k, 1), self.num_experts)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"moe.activation={self.activation!r} is unknown"
                             f"{did_you_mean(self.activation, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}")
        if self.top_k == 1 and self.renormalize and self.routing == "token" and self.num_experts > 1:
            raise ValueError("moe.top_k=1 with renormalize=True gives every expert the weight 1, so that the router "
                             "would not learn; set renormalize=False, or top_k to at least 2")

    def check_mesh(self, mesh: Mapping[str, int]) -> None:
        """Raises ValueError where the mesh cannot split the experts."""
        check_rows("moe.num_experts", self.num_experts, mesh, square=False)

    def expert(self) -> MLP:
        """An MLP like one expert."""
        return MLP(self.mlp_dim, self.activation, parent=None)

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: router, and top_k experts."""
        return 2.0 * embed_dim * self.num_experts + self.top_k * self.expert().flops_per_token(embed_dim, seq_len)

    def active_params(self, embed_dim: int) -> int:
        """Parameters that a token uses: router, and top_k experts."""
        matrices = 3 if ACTIVATIONS[self.activation][1] else 2
        return embed_dim * self.num_experts + self.top_k * matrices * embed_dim * self.expert().hidden_dim(embed_dim)

    @property
    def granularity(self) -> int:
        """Experts that a token uses."""
        return self.top_k

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> State:
        """Stateless."""
        return ()

    @nn.compact
    def __call__(self, x: Array, state: State, ctx: Context) -> tuple[Array, State, Aux]:
        D, E = x.shape[-1], self.num_experts
        F, (act, gated) = self.expert().hidden_dim(D), ACTIVATIONS[self.activation]
        # TPUs and GPUs would round float32 factors; a choice between experts that are close hangs on the last digits.
        router = Dense(E, ("embed", None), precision=jax.lax.Precision.HIGHEST, name="router")
        logits = router(x.astype(jnp.promote_types(x.dtype, jnp.float32)))

        def matrices(name: str, shape: tuple[int, int], axes: tuple[str, str], scale: float = 1.0) -> Array:
            init = nn.initializers.variance_scaling(scale * scale, "fan_in", "truncated_normal", batch_axis=(0,))
            return self.param(name, nn.with_logical_partitioning(init, ("experts", *axes)), (E, *shape))

        scale = 1.0 if self.output_scale is None else self.output_scale
        experts = Experts(matrices("experts_up", (D, F), ("embed", "mlp")),
                          matrices("experts_gate", (D, F), ("embed", "mlp")) if gated else None,
                          matrices("experts_down", (F, D), ("mlp", "embed"), scale), jax.checkpoint(act))
        cutoff = None
        if self.routing == "expert":
            cutoff = self.variable(STATS, "cutoff", lambda: {
                "mean": nn.LogicallyPartitioned(jnp.full((E,), 1 / E), (None,)),
                "var": nn.LogicallyPartitioned(jnp.zeros((E,)), (None,)),
                "steps": nn.LogicallyPartitioned(jnp.zeros(()), ())}).value["mean"]
        if self.is_initializing():  # parameters are all that is wanted, and this costs much to trace
            declare_usage(self, E)
            return x, state, {}

        probabilities = jax.nn.softmax(logits, -1)
        chooses = self.routing == "expert" and ctx.key is not None
        tally = {"entropy": Mean.of(-jnp.sum(probabilities * jnp.log(jnp.maximum(probabilities, 1e-30)), -1),
                                    ctx.weights != 0)}
        if chooses:
            choice, lowest = routing.expert_choice(probabilities, ctx.weights, self.top_k)
            tally["cutoff"] = Moments.of(lowest, jnp.any(ctx.weights != 0, 1), self.momentum)
            scores, count = jnp.sum(choice.gates, (0, 2)), jnp.sum(choice.gates > 0, (0, 2))
        else:
            if cutoff is None:
                choice = routing.token_choice(probabilities, ctx.weights, self.top_k, self.renormalize)
            else:
                choice = routing.above_cutoff(probabilities, ctx.weights, cutoff, min(E, FEW * self.top_k))
            scores = routing.per_expert(choice.ids, choice.gates, E)
            count = routing.per_expert(choice.ids, (choice.ids >= 0).astype(jnp.float32), E)
        tally["usage"] = Usage(scores, self.dead_after)
        share = count / jnp.maximum(jnp.sum(count), 1)
        aux = {"load_balance": routing.load_balance(probabilities, share, ctx.weights),
               "router_z": routing.router_z(logits, ctx.weights), "tally": jax.lax.stop_gradient(tally)}
        y = self.mixed(x, choice, experts, chooses)
        return dropout(y, self.dropout, ctx.key), state, aux

    def mixed(self, x: Array, choice: Choice, experts: Experts, chooses: bool) -> Array:
        """y [B, T, D] of what the experts make of their tokens. chooses: the choice is the experts'."""
        arrays = Experts(experts.up, experts.gate, experts.down, None)
        run = self.per_row if chooses else self.per_token
        split = split_of(x.shape, 1, self.num_experts)
        if split is None:
            return run(x, *choice, arrays, experts.activation, None, ())
        mlp = spec(("mlp",), experts.up.shape[2:], current_mesh())[0]
        length = None if chooses else split.length  # an expert looks at whole rows
        tokens, up = P(split.batch, length), P(split.rows, None, mlp)
        chosen = P(split.batch, split.rows) if chooses else tokens
        local = lambda x, ids, gates, arrays: run(x, ids, gates, arrays, experts.activation, split.rows, (mlp,))
        return on_shards(local, (tokens, chosen, chosen, Experts(up, None if experts.gate is None else up,
                                                                 P(split.rows, mlp), None)), tokens)(x, *choice, arrays)

    def per_token(self, x: Array, ids: Array, gates: Array, arrays: Experts, act: Any, rows: str | None,
                  parts: tuple[Any, ...]) -> Array:
        """A device's tokens through the experts that they chose; over mesh axis `rows` by all-to-all."""
        experts = arrays._replace(activation=act)
        B, T, D = x.shape
        one = lambda a: a.reshape(1, B * T, a.shape[-1])

        def some(x, ids, gates):
            args = (x[0], ids[0], gates[0], experts)
            y = by_token(*args) if rows is None else over_devices(*args, rows)
            return y[None], ()

        size = self.chunk or max(1, CHUNK_BYTES // (ids.shape[-1] * (12 * experts.up.shape[2] + 16 * D)))
        y, _ = over_chunks(some, size, one(x), one(ids), one(gates))
        return total(y, *parts).reshape(B, T, D)

    def per_row(self, x: Array, chosen: Array, gates: Array, arrays: Experts, act: Any, rows: str | None,
                parts: tuple[Any, ...]) -> Array:
        """A device's rows, of which its experts work on the tokens that they chose."""
        experts = arrays._replace(activation=act)
        _, T, D = x.shape

        def some(x, chosen, gates):
            return by_expert(x[0], chosen[0], gates[0], experts)[None], ()

        size = self.chunk or CHUNK_BYTES // (self.top_k * (12 * experts.up.shape[2] + 16 * D))
        y, _ = over_chunks(some, max(1, size // T), x[None], chosen[None], gates[None])
        return total(y[0], rows, *parts)
