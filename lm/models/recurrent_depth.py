"""Recurrent depth: a decoder whose middle blocks are run r times (Geiping et al. 2025, arXiv:2502.05171, Huginn).

    e = prelude(sqrt(D) embed[x]),  s_0 random,  s_i = core(adapter [s_{i-1}; e]),  p = head norm coda(norm s_r)

r is drawn at each training step, and at will otherwise. Shape legend: B batch, T time, D embed_dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.head import logits_of
from lm.core.recurrences import DEPTH, FINISHED, NOT_PARALLEL, STEPS
from lm.core.sharding import constrain
from lm.core.types import Array, Aux, Context, Head, Mean, State
from lm.layers.block import Block
from lm.layers.fam_block import ONWARD
from lm.layers.linear import Dense
from lm.layers.stack import REMAT, Stack, StackState, merge
from lm.models.decoder import DecoderLM, DecoderState
from lm.models.depth_draws import draw_iterations, mean_iterations, random_state
from lm.models.depth_loop import Core, exit_loop, fixed_loop, slots, train_loop
from lm.models.depth_measures import kl, last_of, mean_cosine
from lm.models.depth_options import RecurrentDepthOptions
from lm.models.depth_slices import Doing, advance, begin, idle

PRELUDE, CORE, CODA, ITERATIONS, STATE = range(5)  # what the key is folded by
ADAPTER_AXES = ("mlp", "embed")
AT_ONCE = 2**25  # logits


class DepthState(NamedTuple):
    """prelude, coda: states of their blocks. core: a ring of states of the core's, arrays [m, R, B, ...]. latent:
    [B, D], s_r of the last token. doing: what each row is at, of a sliced model."""

    prelude: State
    core: State
    coda: State
    latent: Array
    doing: Doing | None = None


class RecurrentDepthLM(DecoderLM):
    """`DecoderLM` with `stack` as its core, between `prelude` and `coda`.

    final_norm is one norm for two places, before the coda and before the head. Where `apply` is given a key (training),
    the iterations and the first states are drawn from it; else the iterations are those of the variables' collection
    `depth` (see `lm.core.recurrences`) or of the options, and the first states a function of the position alone.

    sliced: a call with one token a row (T = 1) is a single iteration: rows of weight 1 begin with their token, the
    others go on with theirs, and `Output.aux[FINISHED]` says which are through (see `lm.generate.continuous`).
    """

    prelude: Stack = None
    coda: Stack = None
    depth: RecurrentDepthOptions = None
    sliced: bool = False

    def initial_state(self, batch_size: int, *, capacity: int = 0) -> DecoderState:
        """State before the first token. Without room to go on (`capacity` 0) there is one state for all iterations."""
        dtype = jnp.dtype(self.dtype)
        make = lambda stack: stack.initial_state(batch_size, self.embed_dim, dtype, capacity=capacity)
        m = self.depth.slots if capacity else 1
        ring = jax.tree.map(lambda a: jnp.broadcast_to(a, (m, *a.shape)), make(self.stack).pattern)
        latent = jnp.zeros((batch_size, self.embed_dim), dtype)
        doing = idle(batch_size, self.embed_dim, dtype, ring) if self.sliced and capacity else None
        return DecoderState(jnp.zeros((batch_size,), jnp.int32),
                            DepthState(make(self.prelude), ring, make(self.coda), latent, doing))

    def blocks(self) -> list[tuple[str, Block, int, float]]:
        """As of any decoder; the core's are run as often as training does on average."""
        loops = mean_iterations(self.depth.mean, self.depth.sigma)
        return [(f"prelude/prefix_{n}", block, 1, 1.0) for n, block in enumerate(self.prelude.prefix)] \
            + [(f"stack/pattern_{n}", block, self.stack.repeats, loops) for n, block in enumerate(self.stack.pattern)] \
            + [(f"coda/prefix_{n}", block, 1, 1.0) for n, block in enumerate(self.coda.prefix)]

    def flops_per_token(self, seq_len: int, iterations: float | None = None) -> float:
        """Forward FLOPs a token with so many iterations, by default the mean of training."""
        if iterations is None:
            iterations = mean_iterations(self.depth.mean, self.depth.sigma)
        once = sum(stack.flops_per_token(self.embed_dim, seq_len) for stack in (self.prelude, self.coda))
        core = self.stack.flops_per_token(self.embed_dim, seq_len) + 4.0 * self.embed_dim**2
        return once + iterations * core + 2.0 * self.embed_dim * self.padded_vocab

    def passes(self, seq_len: int, backward: float = 2.0) -> float:
        """As of any decoder; the backward pass goes through the last `backprop` iterations only."""
        heard = mean_iterations(self.depth.mean, self.depth.sigma, self.depth.backprop)
        return 1.0 + backward * self.flops_per_token(seq_len, heard) / self.flops_per_token(seq_len)

    def layers(self, x: Array, state: DepthState, ctx: Context,
               head: Callable[[Array], tuple[Array, Head]]) -> tuple[Array, State, Aux]:
        """From the embedded input to normed hidden states."""
        if self.depth.scale_embeddings:
            x = x * jnp.asarray(self.embed_dim**0.5, x.dtype)
        e, prelude, before = self.prelude(x, state.prelude, folded(ctx, PRELUDE))
        s = self._first(state.latent, e, ctx)
        if self.sliced and state.doing is not None and e.shape[1] == 1:
            return self._slice(s, e, state._replace(prelude=prelude), ctx, head)
        looped, ring, inner = self._loop(s, e, state, ctx, head)
        s = constrain(looped, "batch", "length", "activation_embed")
        hidden, coda, after = self.coda(self.final_norm(s), state.coda, folded(ctx, CODA))
        parts = {"prelude": before, "stack": inner, "coda": after}
        aux = merge([{k: v for k, v in part.items() if k not in ("tally", "depth")} for part in parts.values()])
        tally = {name: part["tally"] for name, part in parts.items() if "tally" in part}
        tally |= {"depth": inner["depth"]} if "depth" in inner else {}
        aux = {**aux, **({"tally": tally} if tally else {})}
        return self.final_norm(hidden), DepthState(prelude, ring, coda, last_of(s, state.latent, ctx), state.doing), aux

    def _first(self, latent: Array, e: Array, ctx: Context) -> Array:
        """s_0: [B, T, D]."""
        key = jax.random.key(0) if ctx.key is None else jax.random.fold_in(ctx.key, STATE)
        s = random_state(key, ctx.positions, self.embed_dim, self.depth.state_std, e.dtype,
                         by_row=ctx.key is not None)
        if self.depth.warm_start and e.shape[1] == 1:
            s = jnp.where((ctx.positions == 0)[..., None], s, latent[:, None].astype(s.dtype))
        return constrain(s, "batch", "length", "activation_embed")

    def _loop(self, s: Array, e: Array, state: DepthState, ctx: Context, head: Any) -> tuple[Array, State, Aux]:
        """s_r, the ring after it, and what there is to report."""
        if self.is_initializing():  # the parameters are made outside of any loop
            z = Dense(self.embed_dim, ADAPTER_AXES, name="adapter")(jnp.concatenate([s, e], axis=-1))
            return self.stack(z, StackState((), jax.tree.map(lambda a: a[0], state.core)), ctx)[0], state.core, {}
        # What flows up from layer to layer is learned: loops without a gradient must stop that of it too.
        core, variables = self._core(ctx), (*self._variables(), {k: v for k, v in ctx.shared.items() if k == ONWARD})
        if ctx.key is not None:
            r = draw_iterations(jax.random.fold_in(ctx.key, ITERATIONS), self.depth.mean, self.depth.sigma)
            found = train_loop(core, variables, s, e, state.core, constrain(r), self.depth.backprop)
            depth = {"recurrences": Mean(r.astype(jnp.float32), jnp.float32(1)),
                     "change": Mean(found.change, jnp.float32(1)),
                     "cosine": Mean(mean_cosine(found.s, ctx.weights), jnp.float32(1))}
            return found.s, found.ring, {**found.aux, "depth": depth}
        r, threshold = self._limits()
        shared = isinstance(r, int) and slots(state.core) < r
        alone = {NOT_PARALLEL: jnp.ones(1)} if shared or self.depth.warm_start or threshold is not None else {}
        if threshold is None:
            found = fixed_loop(core, variables, s, e, state.core, r)
            return found.s, found.ring, alone
        predict = lambda s: self._predict(s, state.coda, ctx)[0]
        found = exit_loop(core, predict, divergence_of(head), variables, s, e, state.core, r, threshold=threshold,
                          present=ctx.weights != 0)
        return found.s, found.ring, {STEPS: found.steps[None], **alone}

    def _slice(self, s: Array, e: Array, state: DepthState, ctx: Context,
               head: Callable[[Array], tuple[Array, Head]]) -> tuple[Array, State, Aux]:
        """`layers` of a sliced model: one iteration of each row."""
        predict = lambda s, inner: self._predict(s, state.coda, inner)
        doing = begin(state.doing, state.core, e, s, ctx)
        found = advance(self._core, predict, divergence_of(head), self._variables(), doing, state.core, *self._limits(),
                        ctx)
        keep = lambda new, old: jnp.where(found.finished.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
        latent = keep(found.doing.s.astype(state.latent.dtype), state.latent)
        after = DepthState(state.prelude, found.ring, jax.tree.map(keep, found.coda, state.coda), latent, found.doing)
        return found.hidden, after, {FINISHED: found.finished[None]}

    def _limits(self) -> tuple[Any, Any]:
        """Iterations and threshold outside of training."""
        said = self.variables.get(DEPTH, {})
        return said.get("recurrences", self.depth.iterations), said.get("exit_kl", self.depth.exit_kl)

    def _variables(self) -> Any:
        """What `_core` is called with."""
        return own(self.variables, "adapter"), own(self.variables, "stack")

    def _core(self, ctx: Context) -> Core:
        """One iteration as a function of arrays alone, which loops of JAX can call."""
        adapter, stack = Dense(self.embed_dim, ADAPTER_AXES, parent=None), free(self.stack)

        def core(variables, s, e, state, i):
            z = adapter.apply(variables[0], jnp.concatenate([s, e], axis=-1))
            inner = folded(folded(ctx, CORE), i)
            for flowing in variables[2:]:
                inner = inner._replace(shared={**inner.shared, **flowing})
            z, after, aux = stack.apply(variables[1], z, StackState((), state), inner)
            return z, after.pattern, aux

        if REMAT[self.stack.remat] is not None:
            # Of an iteration only s is kept. The blocks inside are not cut up further.
            stack = stack.clone(remat="none")
            core = jax.checkpoint(core, prevent_cse=False, policy=REMAT[self.stack.remat])
        return core

    def _predict(self, s: Array, state: State, ctx: Context) -> tuple[Array, State]:
        """Hidden states that predict from states, and the coda's state after them; of arrays alone like `_core`."""
        norm, variables = free(self.final_norm), own(self.variables, "final_norm")
        hidden, after, _ = free(self.coda).apply(own(self.variables, "coda"), norm.apply(variables, s), state,
                                                 folded(ctx, CODA))
        return norm.apply(variables, hidden), after


def check_recurrent(model: nn.Module, what: str) -> None:
    """Raises ValueError where `what`, an option of recurrent depth, is said of another model."""
    if not isinstance(model, RecurrentDepthLM):
        raise ValueError(f"{what} is about a model of recurrent depth, and this model loops nothing; "
                         f"model.recurrent_depth makes the pattern a core that is looped")


def divergence_of(head: Callable[[Array], tuple[Array, Head]]) -> Callable[[Array, Array], Array]:
    """KL(before || now) of what hidden states [B, T, D] predict, [B, T]; logits exist for a part of the time only."""
    def divergence(before, now):
        one = lambda pair: kl(*(logits_of(*head(hidden)) for hidden in pair))
        at_once = max(1, AT_ONCE // (before.shape[0] * head(before)[1].kernel.shape[0]))
        if before.shape[1] <= at_once:
            return one((before, now))
        over_time = (before.swapaxes(0, 1), now.swapaxes(0, 1))
        return jax.lax.map(one, over_time, batch_size=at_once).swapaxes(0, 1)

    return divergence


def folded(ctx: Context, by: Any) -> Context:
    """The context with a key of its own."""
    return ctx if ctx.key is None else ctx._replace(key=jax.random.fold_in(ctx.key, by))


def free(module: nn.Module) -> nn.Module:
    """The module bound to nothing."""
    return module.clone(parent=None, name=None)


def own(variables: Any, name: str) -> dict[str, Any]:
    """The variables of the part of this name, collection by collection."""
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}
