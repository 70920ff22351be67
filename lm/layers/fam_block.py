"""The block of TransformerFAM: attention and channel mixer, through which its feedback memory passes as tokens do.

Layer by layer, not block by block: queries, keys and values of all tokens are one product, then the memory goes over
the blocks in order (`feedback`), then all tokens attend at once and pass through the channel mixer.

Shape legend: B batch, T time, N chunks, f slots, D embed_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.sharding import constrain
from lm.core.tables import SINKS
from lm.core.types import Array, Aux, Context
from lm.layers import feedback
from lm.layers.block_sliding import Columns, Keys, block_sliding_attention, chunking, in_chunks, nothing, padded
from lm.layers.dropout import dropout
from lm.layers.fam import UNPLACED, FAMState
from lm.layers.feedback import Memory, Steps
from lm.layers.segments import Places, chunks_behind, places, scattered

ONWARD = "onward"  # of ctx.shared: what goes from block to block beside the activations


def memory_shape(blocks: Any, num_tokens: int) -> tuple[int, int] | None:
    """(N, f) of the memory that flows up through these blocks in a call of so many tokens, None without one. Raises
    ValueError where two disagree."""
    fams = [block.layers[0] for block in blocks if isinstance(block, FAMBlock)]
    sizes = {(fam.block, fam.slots) for fam in fams if fam.slots}
    if len(sizes) > 1:
        raise ValueError(f"the learned start of the feedback memory flows through all fam blocks, so these must agree "
                         f"in block and slots; got {', '.join(f'block={c}, slots={f}' for c, f in sorted(sizes))}")
    return next(((chunking(num_tokens, c)[0], f) for c, f in sizes), None)


class FAMBlock(nn.Module):
    """x + attention(norm0(x)), then + mixer(norm1(x)), with feedback memory. layers: the `FAM` and the mixer, whose
    positions must not depend on each other; names, norm and sandwich as of `Block`.

    The memory of a document before its first whole block is `ctx.shared["onward"]["memory"]` [B, N, f, D], the learned
    start in the first block of this kind (`["learned"]` is then true) and what the block below made of the document's
    first block of tokens in the others; zeros where there is none. What this block makes of it goes on in
    `aux["onward"]`.
    """

    layers: tuple[nn.Module, ...]
    names: tuple[str, ...]
    norm: nn.Module
    sandwich: bool = False

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> FAMState:
        """That of its attention."""
        return self.layers[0].initial_state(batch_size, embed_dim, dtype, capacity=capacity)

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token, with the memory's share of the mixer."""
        fam, mixer = self.layers
        return (fam.flops_per_token(embed_dim, seq_len)
                + (1 + fam.slots / fam.block) * mixer.flops_per_token(embed_dim, seq_len))

    @nn.compact
    def __call__(self, x: Array, state: FAMState, ctx: Context) -> tuple[Array, FAMState, Aux]:
        (fam, mixer), D = self.layers, x.shape[-1]
        key = lambda n: None if ctx.key is None else jax.random.fold_in(ctx.key, n)
        heads, mix = fam.copy(name=self.names[0]), mixer.copy(name=self.names[1])
        where = places(state.ring, ctx, fam.cut)
        q, k, v = heads(self.norm.copy(name="norm0")(x), ctx.positions)
        new = where.keys(k, v)

        (count, _), slots = chunking(x.shape[1], fam.block), state.order.shape[1]
        aligned = fam.cut == "row" and slots == 0  # then chunks are blocks
        behind, several = chunks_behind(fam.memory, count, slots, aligned), count > 1
        past = state.ring.in_order(behind * fam.block) if several and slots else state.ring.as_it_lies()
        seen, onward = None, ctx.shared.get(ONWARD)
        if fam.slots and not self.is_initializing():
            seen, state, flow = self._remember(state, where, ctx, new, past, onward, key(2))
            onward = None if onward is None else {"memory": flow, "learned": jnp.zeros((), bool)}
        y = block_sliding_attention(
            where.queries(q, fam.block, fam.memory, fam.same_reach), new, past, block=fam.block, behind=behind,
            stop_gradient=fam.stop_gradient, columns=seen, implementation=fam.implementation)
        if several:
            y = jnp.where(scattered(where.present)[:, None, None, None], jnp.nan, y).astype(y.dtype)
        state = state._replace(**state.ring.after(new, where)._asdict())

        x = constrain(x + dropout(heads(y, embed_dim=D), fam.dropout, key(0)), "batch", "length", "activation_embed")
        x = self.norm.copy(name="norm0_after")(x) if self.sandwich else x
        y, _, aux = mix(self.norm.copy(name="norm1")(x), (), ctx._replace(key=key(1)))
        x = constrain(x + y, "batch", "length", "activation_embed")
        x = self.norm.copy(name="norm1_after")(x) if self.sandwich else x
        report = {f"{self.names[1]}/{name}": value for name, value in aux.items() if name not in ("publish", "tally")}
        report |= {"publish": aux["publish"]} if "publish" in aux else {}
        report |= {"tally": {self.names[1]: aux["tally"]}} if "tally" in aux else {}
        return x, state, report if onward is None else {**report, ONWARD: onward}

    def _remember(self, state: FAMState, where: Places, ctx: Context, new: Keys, past: Keys, onward: Any,
                  key: Any) -> tuple[Columns, FAMState, Array]:
        """(what tokens see of the memory, the state with the memory after the call, the flow [B, N, f, D] to the block
        above)."""
        fam, steps = self.layers[0], self._steps(new.keys.dtype, ctx)
        B, T, D, f = *where.order.shape, state.memory.shape[-1], fam.slots
        count, width = chunking(T, fam.block)
        found = feedback.ends(where, ctx.positions, fam.block)
        start = jnp.zeros((B, count, f, D)) if onward is None else onward["memory"]
        learned = jnp.zeros((), bool) if onward is None else onward["learned"]
        start = jnp.moveaxis(start, 1, 0)
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        apart = lambda x: x.reshape(count, B, *x.shape[1:])

        def flowing():
            return tuple(map(apart, steps.heads(flat(start), flat(found.before))))

        if T == 1:  # decoding: only where a block ends, or a learned start is seen
            seen_now = learned & jnp.any(found.document[0] != state.memory_document)
            empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(flowing))
            qkv = jax.lax.cond(seen_now | jnp.any(found.here), flowing, lambda: empty)
        else:
            qkv = flowing()
        flow = Memory(start, *qkv, found.document, found.before)

        if count == 1:
            keys = tuple(jax.tree.map(lambda x: x[None], p) for p in (past, new) if p.order.shape[1])
        else:
            whole = count * width
            filled = Keys(*(padded(x, whole) for x in new[:3]), padded(new.document, whole, -1))
            keys = (Keys(*(in_chunks(x, width) for x in filled)),)
            if past.order.shape[1] or fam.cut == "document":  # a block may have begun in the chunk before
                past = past if past.order.shape[1] else nothing(past, width)
                shifted = (jnp.concatenate([p[:, -width:].astype(n.dtype), n[:, :-width]], axis=1)
                           for p, n in zip(past, filled, strict=True))
                keys = (Keys(*(in_chunks(x, width) for x in shifted)), *keys)

        def run():
            end = jnp.where(state.memory_end == UNPLACED, found.before[0], state.memory_end)
            memory = Memory(state.memory, *steps.heads(state.memory, end), state.memory_document, end)
            return feedback.over_chunks(memory, flow, found, keys, steps, fam.block, key)

        def same():
            held = Memory(state.memory, jnp.zeros_like(flow.q[0]), state.memory_keys.astype(flow.k.dtype),
                          state.memory_values.astype(flow.v.dtype), state.memory_document, state.memory_end)
            return (jax.tree.map(lambda x: x[None], held),) * 2

        before, after = jax.lax.cond(jnp.any(found.here), run, same) if T == 1 else run()
        last = jax.tree.map(lambda x: x[-1], after)
        state = state._replace(memory=last.slots, memory_keys=last.k.astype(jnp.float32),
                               memory_values=last.v.astype(jnp.float32), memory_document=last.document,
                               memory_end=last.end)
        new_flow = jnp.where(found.here[..., None, None], after.slots, start)
        return feedback.columns(where, found, flow, learned, before, after, fam.block), state, jnp.moveaxis(
            new_flow, 0, 1)

    def _steps(self, dtype: Any, ctx: Context) -> Steps:
        """The block's own parameters on the memory's slots."""
        (fam, mixer), B = self.layers, ctx.reset.shape[0]

        def of(name, template):
            own = {collection: nn.meta.unbox(tree[name]) for collection, tree in self.variables.items()
                   if name in tree and collection != SINKS}
            return lambda *args, **kwargs: template.apply(own, *args, **kwargs)

        def after(name, x):
            return of(name, self.norm)(x.astype(dtype)).astype(jnp.float32) if self.sandwich else x

        def heads(slots, end):
            place = end[:, None] - fam.slots + 1 + jnp.arange(fam.slots)
            place = jnp.zeros_like(place) if fam.slot_position == "zero" else place
            return of(self.names[0], fam)(of("norm0", self.norm)(slots.astype(dtype)), place)

        def attended(y, residual, key):
            y = of(self.names[0], fam)(y, embed_dim=residual.shape[-1])
            key = None if key is None else jax.random.fold_in(key, 0)
            return after("norm0_after", dropout(y, fam.dropout, key).astype(jnp.float32) + residual)

        def mixed(slots, key):
            inner = ctx._replace(reset=jnp.zeros((B, fam.slots), bool), weights=jnp.ones((B, fam.slots), bool),
                                 positions=jnp.zeros((B, fam.slots), jnp.int32),
                                 key=None if key is None else jax.random.fold_in(key, 1))
            y = of(self.names[1], mixer)(of("norm1", self.norm)(slots.astype(dtype)), (), inner)[0]
            return after("norm1_after", slots + y.astype(jnp.float32))

        return Steps(heads, attended, mixed)
