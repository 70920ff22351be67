"""Many blocks: a prefix, then a pattern of blocks repeated, scanned or unrolled over the same parameters.

Parameters of the repeated pattern are stacked on a leading axis [R, ...] in both forms, so a checkpoint does not know
which of the two ran. Blocks are initialised one by one with a key folded by the layer's index and then stacked: the
values agree between a prefix and a pattern too.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.tables import SINKS, take_out, with_tables
from lm.core.tree import STATS
from lm.core.types import Array, Aux, Context, State, context
from lm.layers.block import Block

REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


NOT_REPORTED = ("publish", "tally", "onward")  # what a block's aux holds besides reports


class StackState(NamedTuple):
    """prefix: one state a block, arrays [B, ...]; pattern: one a block of the pattern, arrays [R, B, ...]; or as
    `apart` gives it, and then the blocks run one by one and give it back so."""

    prefix: tuple[State, ...]
    pattern: tuple[State, ...] | list[tuple[State, ...]]

    def apart(self) -> "StackState":
        """The same state with the pattern's as a list of R, arrays [B, ...] of their own, which a loop over tokens can
        change in place where stacked ones are copied for every token. The stacked arrays are given up."""
        leaves, treedef = jax.tree.flatten(self.pattern)
        if isinstance(self.pattern, list) or not leaves:
            return self
        parts = []
        for leaf in leaves:  # one after the other, so that never more than one array is there twice
            parts.append(jax.block_until_ready(_split(leaf)))
            leaf.delete()
        return self._replace(pattern=[treedef.unflatten(part) for part in zip(*parts, strict=True)])


@jax.jit
def _split(leaf: Array) -> list[Array]:
    return unstack(leaf, leaf.shape[0])


def unstack(tree: Any, length: int) -> list[Any]:
    """The R slices of a tree of [R, ...] arrays. Split, not indexed: its transpose is one concatenation, where R
    indexings would add R zero-padded arrays."""
    leaves, treedef = jax.tree.flatten(tree)
    split = [jax.lax.split(leaf, (1,) * length, 0) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [jnp.squeeze(parts[r], 0) for parts in split]) for r in range(length)]


class Stack(nn.Module):
    """prefix blocks, then `pattern` x `repeats`.

    scan: one compiled body for all repeats (fast to compile) or unrolled (XLA may optimise across layers).
    remat: what a block's backward pass recomputes: none (nothing), minimal (all but matrix products without batch
      dimensions), dots (all but matrix products), full (everything).
    """

    prefix: tuple[Block, ...]
    pattern: tuple[Block, ...]
    repeats: int
    scan: bool = True
    remat: Literal["none", "full", "dots", "minimal"] = "none"

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.prefix) + len(self.pattern) * self.repeats

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> StackState:
        """The states of all blocks before the first token."""
        def one(block):
            return block.initial_state(batch_size, embed_dim, dtype, capacity=capacity)
        pattern = tuple(one(block) for block in self.pattern)
        return StackState(tuple(one(block) for block in self.prefix),
                          jax.tree.map(lambda a: jnp.broadcast_to(a, (self.repeats, *a.shape)), pattern))

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token."""
        return sum(b.flops_per_token(embed_dim, seq_len) for b in self.prefix) \
            + self.repeats * sum(b.flops_per_token(embed_dim, seq_len) for b in self.pattern)

    def _variables(self, name: str, init: Callable[[], Any]) -> dict[str, Any]:
        """The collections {"params": ..., "lora": ..., "state": ..., "stats": ..., "sinks": ...} of the block(s) called
        `name`; parameters and statistics are initialised if they are new, the others taken where they are."""
        if self.is_initializing() and not self.has_variable("params", name):
            for collection, value in init().items():
                self.put_variable(collection, name, value)
        out = {"params": nn.meta.unbox(self.get_variable("params", name))}
        for beside in ("lora", "state", STATS, SINKS):
            if self.has_variable(beside, name):
                out[beside] = nn.meta.unbox(self.get_variable(beside, name))
        return out

    @nn.compact
    def __call__(self, x: Array, state: StackState, ctx: Context) -> tuple[Array, StackState, Aux]:
        D, first = x.shape[-1], len(self.prefix)
        base = self.make_rng("params") if self.is_initializing() else None

        def init_block(block: Block, depth: Array) -> Any:
            probe = context(1, 1)._replace(shared={"depth": depth, "num_layers": self.num_layers})
            return block.init(jax.random.fold_in(base, depth), jnp.zeros((1, 1, D), x.dtype),
                              block.initial_state(1, D, x.dtype), probe)

        def init_repeated(block: Block, offset: int) -> Any:
            depths = first + offset + len(self.pattern) * jnp.arange(self.repeats)
            stacked = jax.vmap(lambda depth: init_block(block, depth))(depths)
            boxed = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
            return jax.tree.map(lambda leaf: leaf.add_axis(0, {nn.PARTITION_NAME: "layers"}) if boxed(leaf) else leaf,
                                stacked, is_leaf=boxed)

        def run(block: Block, variables: Any, x: Array, state: State, ctx: Context, depth: Any):
            key = None if ctx.key is None else jax.random.fold_in(ctx.key, depth)
            inner = ctx._replace(key=key, shared={**ctx.shared, "depth": depth, "num_layers": self.num_layers})
            return block.apply(variables, x, state, inner)

        # What goes from block to block beside x, across repeats too; a block returns it changed, or not at all.
        onward = ctx.shared.get("onward", {})

        def under(ctx: Context, onward: Aux) -> Context:
            return ctx._replace(shared={**ctx.shared, "onward": onward}) if onward else ctx

        prefix_states, reports, tally = [], [], {}
        for n, (block, before) in enumerate(zip(self.prefix, state.prefix, strict=True)):
            variables = self._variables(f"prefix_{n}", lambda b=block, n=n: init_block(b, jnp.int32(n)))
            body = self._remat(lambda v, x, s, ctx, d, b=block: run(b, v, x, s, ctx, d))
            x, after, aux = body(variables, x, before, under(ctx, onward), jnp.int32(n))
            onward = aux.get("onward", onward)
            ctx = ctx._replace(shared={**aux.get("publish", {}), **ctx.shared})
            prefix_states.append(after)
            reports.append({k: v[None] for k, v in aux.items() if k not in NOT_REPORTED})
            if "tally" in aux:
                tally[f"prefix_{n}"] = aux["tally"]
        if not self.repeats:
            return x, StackState(tuple(prefix_states), state.pattern), merge(reports, tally)

        stacked, tables = zip(*(take_out(self._variables(f"pattern_{k}", lambda b=block, k=k: init_repeated(b, k)))
                                for k, block in enumerate(self.pattern)), strict=True)

        def group(carry: tuple[Array, Aux], variables: Any, states: Any, depth: Array):
            """One repeat of the pattern. What its layers publish is seen inside this repeat only."""
            (x, onward), inner, afters, report, tally = carry, ctx, [], [], {}
            for k, (block, v, s) in enumerate(zip(self.pattern, variables, states, strict=True)):
                v = with_tables(v, tables[k], (depth - first) // len(self.pattern))
                x, after, aux = run(block, v, x, s, under(inner, onward), depth + k)
                onward = aux.get("onward", onward)
                inner = inner._replace(shared={**aux.get("publish", {}), **inner.shared})
                afters.append(after)
                report.append({name: value[None] for name, value in aux.items() if name not in NOT_REPORTED})
                if "tally" in aux:
                    tally[f"pattern_{k}"] = aux["tally"]
            return (x, onward), (tuple(afters), merge(report), tally)

        group = self._remat(group)
        depths = first + len(self.pattern) * jnp.arange(self.repeats, dtype=jnp.int32)
        apart = isinstance(state.pattern, list)
        if self.scan and not apart:
            (x, _), (pattern_states, report, repeated) = jax.lax.scan(
                lambda carry, inputs: group(carry, *inputs), (x, onward), (stacked, state.pattern, depths))
        else:
            outs = []
            states = state.pattern if apart else unstack(state.pattern, self.repeats)
            for (variables, depth), before in zip(unstack((stacked, depths), self.repeats), states, strict=True):
                (x, onward), out = group((x, onward), variables, before, depth)
                outs.append(out)
            afters, rest = [out[0] for out in outs], [out[1:] for out in outs]
            together = lambda *leaves: jnp.stack(leaves)
            report, repeated = jax.tree.map(together, *rest)
            pattern_states = afters if apart else jax.tree.map(together, *afters)
        reports.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), report))
        return x, StackState(tuple(prefix_states), pattern_states), merge(reports, {**tally, **repeated})

    def _remat(self, fn: Callable) -> Callable:
        if REMAT[self.remat] is None:
            return fn
        return jax.checkpoint(fn, prevent_cse=not self.scan, policy=REMAT[self.remat])


def merge(reports: list[Aux], tally: Aux | None = None) -> Aux:
    """One mapping; values of the same name are concatenated on the layer axis, in order of depth. `tally` goes beside
    them where there is one: blocks by their names, [R, ...] of a pattern."""
    names = dict.fromkeys(name for report in reports for name in report)
    merged = {name: jnp.concatenate([r[name] for r in reports if name in r]) for name in names}
    return {**merged, "tally": tally} if tally else merged
