"""Tables through the train step: sinks out, gradients in as rows (or dense where rows would be more), updates in place.

In a step's order: `open` makes the sinks and says which parameters the loss is differentiated by; `collect` merges what
came out of them, of microbatches and devices; `squares` is what they add to the square of the gradient's norm, exact as
the ids of a merged set differ; `update` changes parameters and states.

Under a mesh everything here runs where the rows are: each device gathers the parts that all others have of its rows, of
its share of the width, and updates these. Shapes: L layers of a stack (1 without), P parts, S shards, N rows, U slots.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from lm.core.sharding import current_mesh, spec
from lm.core.tables import RowSink, Table, ids_of
from lm.core.tree import is_stacked, map_named, named_leaves
from lm.core.types import Array
from lm.optim.rules import Row
from lm.optim.sparse.row_wise import Rows, RowWise, merged

log = logging.getLogger(__name__)


class WithTables(NamedTuple):
    """An optimizer's state. rest: of all other parameters. tables: of these, in trees like the parameters."""

    rest: Any
    tables: Any


class DenseRows(NamedTuple):
    """values [L, N, ...] of all rows of a table; touched [L, N] bool."""

    values: Array
    touched: Array


@dataclasses.dataclass(frozen=True)
class SparseTables:
    """tables, rows: by the parameter's name, what it is and what the rules say of it. wise: their optimizer."""

    tables: Mapping[str, Table]
    rows: Mapping[str, Row]
    wise: RowWise

    def init(self, params: Any) -> Any:
        """The state of every table, as one tree of the optimizer's arrays, each a tree like the parameters."""
        state = {}
        for name, table in self._of(params).items():
            flat = table.reshape(-1, *table.shape[len(self._lead(name, table)) + 1:])
            lead = (*self._lead(name, table), self.tables[name].num_rows)
            state[name] = jax.tree.map(lambda a, lead=lead: a.reshape(*lead, *a.shape[1:]), self.wise.init(flat))
        kind = jax.tree.structure(next(iter(state.values())))
        arrays = [self._tree(params, {name: jax.tree.leaves(one)[n] for name, one in state.items()})
                  for n in range(kind.num_leaves)]
        return jax.tree.unflatten(kind, arrays)

    def open(self, params: Any, mask: Any, tokens: tuple[int, int], microbatches: int) -> tuple[Any, Any]:
        """(sinks, mask): a sink for each table, for one microbatch of the batch [B, T], and the parameters to
        differentiate by: those of `mask` but the tables whose gradients come as rows."""
        mesh = current_mesh()
        part = (tokens[0] // microbatches, tokens[1])
        dense, sinks = set(), {}
        for name, leaf in self._of(params).items():
            table = self.tables[name]
            choices = math.prod(tokens) * table.num_heads * table.top_k
            of = f"{name}: {choices:,} choices a step among {table.num_rows // table.shards(mesh):,} rows of a device"
            if table.is_dense(tokens, mesh):
                dense.add(name)
                sinks[name] = jnp.zeros(leaf.shape[:len(self._lead(name, leaf)) + 1])
                log.info("%s: more than a quarter, so their gradient is summed up densely", of)
            else:
                sinks[name] = table.sink(leaf.shape, part, mesh)
                log.info("%s: their gradient is the rows that are chosen", of)
        tree: dict[str, Any] = {}
        for name, sink in sinks.items():
            *path, last = name.split("/")
            functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[last] = sink
        return tree, map_named(lambda name, keep: keep and (name not in self.tables or name in dense), mask)

    def without(self, params: Any) -> Any:
        """The parameters, or gradients, without the tables: empty nodes stand there."""
        return map_named(lambda name, leaf: optax.MaskedNode() if name in self.tables else leaf, params,
                         is_leaf=_is_leaf)

    def collect(self, grads: Any, sinks: Any) -> tuple[dict[str, Rows | DenseRows], Array]:
        """(gradients by name, the sum of their squares). sinks: their gradients, stacked over microbatches [m, ...];
        grads: hold those of dense tables.

        The ids of `Rows` are [L, S, U] and their values [L, S, U, ...], ids relative to a shard's first row.
        """
        out: dict[str, Rows | DenseRows] = {}
        twice = jnp.zeros((), bool)
        for name, sink in named_leaves_of(sinks).items():
            stacked = is_stacked(name)
            if not isinstance(sink, RowSink):
                dense = named_leaves(grads)[name]
                values, touched = (a if stacked else a[None] for a in (dense, sink.sum(0) > 0))
                if self._held(name):
                    free = jnp.arange(touched.shape[1]) >= self._held(name)
                    values = jnp.where(free.reshape(-1, *[1] * (values.ndim - 2)), values, 0)
                    touched &= free
                out[name] = DenseRows(values, touched)
                continue
            sink = sink if stacked else jax.tree.map(lambda a: a[:, None], sink)  # [m, L, P, S, ...]
            owned = self.tables[name].num_rows // self.tables[name].shards(current_mesh())
            ids = jnp.where((sink.uses == 1)[..., None], ids_of(sink, owned), owned)
            rows = self._join(name, ids, sink.rows, owned)
            if self._held(name):
                held = rows.ids + owned * jnp.arange(rows.ids.shape[1])[:, None] < self._held(name)
                held = held.reshape(*held.shape, *[1] * (rows.values.ndim - 3))
                rows = Rows(jnp.where(held.reshape(rows.ids.shape), owned, rows.ids), jnp.where(held, 0, rows.values))
            out[name] = rows
            twice |= jnp.max(sink.uses) > 1
        squares = sum((jnp.sum(jnp.square(rows.values)) for rows in out.values()), jnp.zeros(()))
        # A layer that ran twice added up ids: the step counts as not finite rather than change wrong rows.
        return out, jnp.where(twice, jnp.nan, squares)

    def update(self, rest: Any, params: Any, state: Any, found: Mapping[str, Rows | DenseRows], *, scale: Array,
               rate: Array, ok: Array) -> tuple[Any, Any]:
        """(parameters, state) after a step with the gradients `scale * found` at the learning rate `rate`; tables and
        their state are as they were where not `ok`. rest: all other parameters after the step; params: before it."""
        arrays, kind = jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, dict))
        trees = [named_leaves(tree) for tree in arrays]
        tables = self._of(params)
        for name, rows in found.items():
            row = self.rows[name]
            run = functools.partial(self._update_one, name, rows, row.lr_multiplier, row.weight_decay)
            tables[name], after = run(tables[name], [tree[name] for tree in trees], kind, scale, rate, ok)
            for tree, array in zip(trees, after, strict=True):
                tree[name] = array
        return self._put(rest, tables), jax.tree.unflatten(kind, [
            self._tree(params, {name: tree[name] for name in tables}) for tree in trees])

    def _update_one(self, name: str, rows: Rows | DenseRows, multiplier: float, decay: float, table: Array,
                    arrays: list[Array], kind: Any, scale: Array, rate: Array, ok: Array) -> tuple[Array, list[Array]]:
        lead = self._lead(name, table)
        dense = isinstance(rows, DenseRows)
        first = jnp.where(ok, rows.touched, False) if dense else rows.ids  # values of a dense gradient come second

        def local(first, values, table, arrays, scale, rate, ok):
            owned = table.shape[len(lead)]
            flat = lambda a: a.reshape(-1, *a.shape[len(lead) + 1:])
            states = jax.tree.unflatten(kind, [flat(a) for a in arrays])
            if dense:
                new, after = self.wise.update_dense(flat(table), states, values.reshape(flat(table).shape),
                                                    first.reshape(-1), scale, rate, decay)
            else:
                layers = first.shape[0]
                ids = first[:, 0] + owned * jnp.arange(layers, dtype=jnp.int32)[:, None]
                ids = jnp.where((first[:, 0] < owned) & ok, ids, layers * owned).reshape(-1)
                touched = Rows(ids, values.reshape(-1, *values.shape[3:]))
                new, after = self.wise.update_rows(flat(table), states, touched, scale, rate, decay)
            return new.reshape(table.shape), [a.reshape(old.shape) for a, old in
                                              zip(jax.tree.leaves(after), arrays, strict=True)]

        mesh = current_mesh()
        rate = multiplier * rate
        if mesh is None:
            return local(first, rows.values, table, arrays, scale, rate, ok)
        whole = self._spec(name, table.shape, lead)
        cut = lambda a: PartitionSpec(*whole[:a.ndim])
        axis, width = whole[len(lead)], tuple(whole[len(lead) + 1:])
        ids_spec = PartitionSpec(None, axis)
        values_spec = PartitionSpec(None, axis, *([] if dense else [None]), *width)
        states = [cut(a) for a in arrays]
        none = PartitionSpec()
        run = jax.shard_map(local, mesh=mesh, in_specs=(ids_spec, values_spec, whole, states, none, none, none),
                            out_specs=(whole, states), check_vma=False)
        return run(first, rows.values, table, arrays, scale, rate, ok)

    def _join(self, name: str, ids: Array, values: Array, owned: int) -> Rows:
        """The parts ids [m, L, P, S, U] and values [m, L, P, S, U, ...] as one set of each layer and shard."""
        def local(ids: Array, values: Array, gather: Callable[[Array], Array] = lambda a: a) -> Rows:
            together = lambda a: jnp.moveaxis(a, (0, 2), (2, 3)).reshape(*a.shape[1:2], a.shape[3], -1, *a.shape[4:])
            return jax.vmap(jax.vmap(lambda i, v: merged(i, v, owned)))(together(gather(ids)), together(gather(values)))

        mesh = current_mesh()
        if mesh is None:
            return local(ids, values)
        shard, *width = spec(self.tables[name].axes, self.rows[name].layer_shape, mesh)
        others = self.tables[name].parts(mesh)[0]
        split = {axis: n for n, axis in enumerate(width, 5) if axis}

        def gather(a: Array) -> Array:
            """All parts, on axis 2 in one order for ids and values, of this device's share of the width."""
            for axis, n in split.items():
                a = jax.lax.all_to_all(a, axis, n, 2, tiled=True) if a.ndim > 5 else \
                    jax.lax.all_gather(a, axis, axis=2, tiled=True)
            return jax.lax.all_gather(a, tuple(axis for axis in others if axis not in split), axis=2, tiled=True)

        parts = PartitionSpec(None, None, others, shard)
        return jax.shard_map(lambda i, v: local(i, v, gather), mesh=mesh, in_specs=(parts, parts), check_vma=False,
                             out_specs=Rows(PartitionSpec(None, shard), PartitionSpec(None, shard, None, *width)))(
                                 ids, values)

    def _spec(self, name: str, shape: tuple[int, ...], lead: tuple[int, ...]) -> PartitionSpec:
        return PartitionSpec(*[None] * len(lead), *spec(self.tables[name].axes, shape[len(lead):], current_mesh()))

    def _held(self, name: str) -> int:
        """The first rows, which stay as they are."""
        return self.rows[name].held[0] if self.rows[name].held else 0

    def _lead(self, name: str, table: Any) -> tuple[int, ...]:
        return table.shape[:1] if is_stacked(name) else ()

    def _of(self, params: Any) -> dict[str, Any]:
        leaves = named_leaves(params)
        return {name: leaves[name] for name in self.tables}

    def _put(self, params: Any, tables: Mapping[str, Any]) -> Any:
        return map_named(lambda name, leaf: tables.get(name, leaf), params, is_leaf=_is_leaf)

    def _tree(self, params: Any, leaves: Mapping[str, Any]) -> Any:
        """A tree of dicts like the parameters, of these leaves alone."""
        return self._put(self._prune(params), leaves)

    def _prune(self, params: Any) -> Any:
        def keep(node: Any, path: str) -> Any:
            if not isinstance(node, Mapping):
                return node if path in self.tables else None
            below = {key: keep(child, f"{path}/{key}" if path else key) for key, child in node.items()}
            return {key: child for key, child in below.items() if child is not None} or None
        return {"params": keep(params["params"], "")}


def named_leaves_of(sinks: Any) -> dict[str, Any]:
    """The sinks by the names of their tables."""
    found = jax.tree_util.tree_leaves_with_path(sinks, is_leaf=lambda node: isinstance(node, RowSink))
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in found}


def _is_leaf(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
