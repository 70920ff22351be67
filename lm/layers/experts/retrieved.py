"""Rows of a table that every token retrieves by product keys, and what is made of them: PEER and product key memory.

Shape legend: B batch, T time, M tokens of a device, D embed_dim, H heads, Q key_dim, k top_k, N rows of the table.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm.core.sharding import current_mesh
from lm.core.tables import RowSink, StackedTable, deliver
from lm.core.tally import Moments, Usage
from lm.core.types import Array, Aux, Mean
from lm.layers.experts.product_keys import ProductKeys, RouterArrays, choose, query_moments
from lm.layers.experts.shards import CHUNK_BYTES, Split, on_shards, over_chunks, split_of, total
from pallas_kernels.peer_experts.rows import TouchedRows

Sink = RowSink | StackedTable | Array | None

OVERLAP_TOKENS = 256  # of a chunk, over which the overlap of heads is measured: it sorts every token's ids


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """spec: the router. combine: (x [1, M, D], ids, gates [1, M, H, k], table) -> [1, M, D], where ids outside of the
    table choose nothing. combine_rows: the same of (..., sink), with the touched rows, as
    `pallas_kernels.peer_experts.peer_experts_with_sink` gives them. training: a batch norm takes the batch's statistics
    (with a momentum of 1 always the running ones). chunk: tokens at a time, None by memory. usage_tokens: of a device's
    chunk, whose choices are counted; None is all. window: see `Usage`."""

    spec: ProductKeys
    combine: Callable[[Array, Array, Array, Array], Array]
    combine_rows: Callable[[Array, Array, Array, Array, Array], tuple[Array, TouchedRows]]
    training: bool
    chunk: int | None
    usage_tokens: int | None
    window: int

    def __call__(self, x: Array, present: Array, router: RouterArrays, table: Array,
                 sink: Sink = None) -> tuple[Array, Aux]:
        """(y [B, T, D], tally) of x [B, T, D], present [B, T] and the table [N, ...], or with a `StackedTable` as sink
        those of all layers [L, N, ...]. sink: see `lm.core.tables`."""
        split = split_of(x.shape, self.spec.num_heads, self.spec.num_keys)
        if split is None:
            return self.local(Split(), x, present, router, table, sink)
        tokens, head = P(split.batch, split.length), P(split.heads)
        keys = P(None, split.heads) if self.spec.per_head_keys else P()
        arrays = RouterArrays(P(None, split.heads), (P(), P(None, split.heads)), head, head, keys, head, head)
        arrays = RouterArrays(*(None if given is None else one for given, one in zip(router, arrays, strict=True)))
        tally = {"usage": Usage(P(split.rows), self.window), "entropy": Mean(P(), P()), "overlap": Mean(P(), P())}
        if self.counts_moments:
            tally["router"] = {"queries": Moments(P(), head, head, self.spec.momentum)}
        others = tuple(axis for axis in current_mesh().axis_names if axis != split.rows)
        parts = P(others, split.rows)
        rows, sinks = P(split.rows), None if sink is None else P(split.rows)
        if isinstance(sink, RowSink):
            sinks = RowSink(parts, parts, parts)
        elif isinstance(sink, StackedTable):
            rows, sinks = P(None, split.rows), StackedTable(P(None, split.rows), P(), RowSink(parts, parts, parts))
        run = on_shards(lambda *args: self.local(split, *args), (tokens, tokens, arrays, rows, sinks), (tokens, tally))
        return run(x, present, router, table, sink)

    @property
    def counts_moments(self) -> bool:
        """Whether the tokens of a call are what the running statistics of the queries are made from."""
        return self.training and self.spec.query_norm == "batch" and self.spec.momentum < 1

    def local(self, split: Split, x: Array, present: Array, router: RouterArrays, table: Array,
              sink: Sink) -> tuple[Array, Aux]:
        """One device's part: its tokens, the heads and rows that it owns; outputs and sums are whole."""
        B, T, D = x.shape
        x, present = x.reshape(1, B * T, D), present.reshape(1, B * T)
        size = self.chunk or max(1, CHUNK_BYTES // self.token_bytes(router))
        moments = None
        if self.counts_moments:
            _, moments = over_chunks(lambda x, here: (x[..., :0], query_moments(x, here, router, self.spec.momentum)),
                                     size, x, present)
            moments = total(moments, *split.tokens)
            shape = router.kernel.shape[1:]
            mean, var = (value.reshape(shape) for value in moments.mean_and_var())
            router = router._replace(mean=mean, var=var)
        rows = table.shape[isinstance(sink, StackedTable)]
        first, into_rows = split.first_row(rows), isinstance(sink, (RowSink, StackedTable))

        def some(x, here):
            ids, gates, entropy = choose(x, here, router, self.spec)
            own = jnp.where((ids >= first) & (ids < first + rows), ids - first, -1)
            sums = self.measured(split, here, ids, own, gates, entropy, rows)
            if into_rows:
                return (own, gates), sums
            y = self.combine(x, own, gates, table)
            if sink is not None:
                y = deliver(y, sink, jnp.zeros_like(sink).at[jnp.where(own < 0, rows, own)].add(1, mode="drop"))
            return y, sums

        y, sums = over_chunks(some, size, x, present)
        if into_rows:  # rows of all tokens have places in one sink; sorting pairs takes no more memory
            y = self.into_rows(x, *y, table, sink)
        y = total(y, split.rows, split.heads).reshape(B, T, D)
        over = {"usage": (split.tokens, split.heads), "entropy": (split.tokens, split.heads),
                "overlap": (split.tokens,)}
        tally = {name: total(value, *over[name]) for name, value in sums.items()}
        if moments is not None:
            tally["router"] = {"queries": jax.lax.stop_gradient(moments)}
        return y, tally

    def into_rows(self, x: Array, ids: Array, gates: Array, table: Array, sink: RowSink | StackedTable) -> Array:
        """y [1, M, D], whose gradient with respect to the table goes into this device's part of the sink."""
        first = 0
        if isinstance(sink, StackedTable):
            first, table = sink.layer * table.shape[1], table.reshape(-1, *table.shape[2:])
            ids, sink = jnp.where(ids < 0, ids, ids + first), sink.sink
        mine = jax.tree.map(lambda a: a[0, 0], sink)
        y, touched = self.combine_rows(x, ids, gates, table, mine.rows)
        found = jnp.where(touched.ids < table.shape[0], touched.ids - first + 1, 0)
        return deliver(y, (mine.ids, mine.uses), (found.astype(mine.ids.dtype), jnp.ones_like(mine.uses)))

    def token_bytes(self, router: RouterArrays) -> int:
        """Bytes of temporaries a token, about: float32 queries and their gradients, and a few numbers a chosen row."""
        return 16 * router.kernel[0].size + 48 * router.kernel.shape[1] * self.spec.top_k

    def measured(self, split: Split, present: Array, ids: Array, own: Array, gates: Array, entropy: Array,
                 num_rows: int) -> Aux:
        """The sums of a chunk over its tokens. own: ids relative to this device's rows, -1 elsewhere."""
        count = ids.shape[1] if self.usage_tokens is None else min(self.usage_tokens, ids.shape[1])
        own = jnp.where(own >= 0, own, num_rows)[:, :count].reshape(-1)
        wide = jax.lax.stop_gradient(gates[:, :count]).astype(jnp.float32).reshape(-1)
        scores = jnp.zeros((num_rows,), jnp.float32).at[own].add(wide, mode="drop")
        here = (present != 0).astype(jnp.float32)
        few = slice(0, min(OVERLAP_TOKENS, ids.shape[1]))
        return {"usage": Usage(scores, self.window),
                "entropy": Mean.of(entropy, jnp.broadcast_to(here[..., None], entropy.shape)),
                "overlap": Mean.of(overlap(every_head(ids[:, few], split)), here[:, few])}


def every_head(ids: Array, split: Split) -> Array:
    """Ids [1, M, H, k] of all heads, where a device has some of them."""
    return ids if split.heads is None else jax.lax.all_gather(ids, split.heads, axis=2, tiled=True)


def overlap(ids: Array) -> Array:
    """[1, M]: the share of a token's H * k choices that another of its heads has made too, so that it counts twice."""
    flat = jnp.sort(ids.reshape(*ids.shape[:2], -1), -1)
    return jnp.mean(flat[..., 1:] == flat[..., :-1], -1, dtype=jnp.float32) * (flat.shape[-1] - 1) / flat.shape[-1]
