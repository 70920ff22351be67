"""Tables of which a step uses few rows, and the sinks that take their gradient as these rows alone.

A sink stands in the collection `sinks` of a model's variables, under the name of its table. It is zeros and changes no
result; a layer that finds one there sends the gradient of its table into the sink's own. Two kinds:

- `RowSink`: its gradient is (ids, rows), the rows that were chosen; nothing as large as the table is made, and the
  table itself gets no gradient. Each device of the mesh has a part of its own, so that nothing is summed on the way
  where ids of two parts differ. Under a scan over layers the sinks have a leading axis like the tables.
- a plain array [N]: the table's gradient comes as usual, dense, and that of the array is how often each row was chosen.

Shapes: N rows of a table, L layers of a stack (left out where there is none), P parts, S shards of the table's rows,
U rows of a part; B batch, T time.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core.axes import RULES
from lm.core.sharding import axis_size, spec
from lm.core.types import Array

SINKS = "sinks"
DENSE_SHARE = 4          # more choices a step than rows / DENSE_SHARE: a dense gradient costs less
LARGEST_ID = 2**24 - 2   # ids leave through a gradient, as float32, which holds every integer up to here


class RowSink(NamedTuple):
    """ids [P, S, U], rows [P, S, U, ...], uses [P, S], float32. Of their gradients: ids are those of the shard's rows
    plus 1, and 0 where a slot is not used; rows the sums over all tokens of the part; uses how often the layer ran."""

    ids: Array
    rows: Array
    uses: Array


class StackedTable(NamedTuple):
    """What a layer of a stack finds in the place of its sink: the tables of all layers [L, N, ...], which of them is
    its own, and its sink. A slice of them, which a scan over layers would make, costs as much as the table is large."""

    tables: Array
    layer: Array | int
    sink: RowSink


@dataclasses.dataclass(frozen=True)
class Table:
    """num_rows: N. num_heads, top_k: a token chooses num_heads * top_k rows. axes: logical axes of [N, ...]. runs: how
    often the layer is run in one pass of the model."""

    num_rows: int
    num_heads: int
    top_k: int
    axes: tuple[str | None, ...]
    runs: float = 1.0

    def parts(self, mesh: Any) -> tuple[tuple[str, ...], str | None]:
        """(mesh axes whose devices have parts of a sink of their own, the axis that splits the rows or None)."""
        if mesh is None:
            return (), None
        rows = spec(self.axes[:1], (self.num_rows,), mesh)[0]
        return tuple(axis for axis in mesh.axis_names if axis != rows), rows

    def choices(self, tokens: tuple[int, int], mesh: Any) -> int:
        """Rows that the tokens [B, T] of one device choose, with its heads."""
        split = () if mesh is None else (*spec(("batch", "length"), tokens, mesh),
                                         *spec(("heads",), (self.num_heads,), mesh))
        axes = [axis for part in split for axis in ((part,) if isinstance(part, str) else part or ())]
        return math.prod(tokens) * self.num_heads * self.top_k // math.prod(mesh.shape[axis] for axis in axes)

    def shards(self, mesh: Any) -> int:
        """S."""
        rows = self.parts(mesh)[1]
        return 1 if rows is None else mesh.shape[rows]

    def is_dense(self, tokens: tuple[int, int], mesh: Any) -> bool:
        """Whether a step over tokens [B, T], of all microbatches, chooses so often that a device of its rows sums them
        up densely."""
        return math.prod(tokens) * self.num_heads * self.top_k * DENSE_SHARE > self.num_rows // self.shards(mesh)

    def sink(self, shape: tuple[int, ...], tokens: tuple[int, int], mesh: Any) -> RowSink:
        """A sink for one forward pass over tokens [B, T]; shape: of the table, [N, ...] or [L, N, ...]."""
        others, _ = self.parts(mesh)
        lead, row = shape[:-len(self.axes)], shape[len(shape) - len(self.axes) + 1:]
        shards = self.shards(mesh)
        places = (*lead, math.prod(mesh.shape[axis] for axis in others) if others else 1, shards)
        slots = min(self.choices(tokens, mesh), self.num_rows // shards)
        return RowSink(jnp.zeros((*places, slots)), jnp.zeros((*places, slots, *row)), jnp.zeros(places))


def ids_of(sink: RowSink, num_rows: int) -> Array:
    """Ids [..., U] int32 of the gradient of a sink, num_rows (of a shard) where there is none."""
    return jnp.where(sink.ids > 0, sink.ids.astype(jnp.int32) - 1, num_rows)


Path = tuple[str, ...]


def take_out(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Path, Array]]:
    """The variables of a stack of blocks without the tables whose gradients are rows, and these by their places.

    Where the mesh splits tables by their width they stay: gathered whole, all layers' would be there at a time.
    """
    found: dict[Path, Array] = {}

    def walk(params: Mapping[str, Any], sinks: Mapping[str, Any], place: Path) -> dict[str, Any]:
        out = dict(params)
        for key, sink in sinks.items():
            if isinstance(sink, RowSink):
                found[*place, key] = out.pop(key)
            elif isinstance(sink, Mapping):
                out[key] = walk(out[key], sink, (*place, key))
        return out

    if SINKS not in variables or axis_size(*RULES["embed"]) > 1:
        return dict(variables), {}
    return {**variables, "params": walk(variables["params"], variables[SINKS], ())}, found


def with_tables(variables: Mapping[str, Any], tables: Mapping[Path, Array], layer: Array | int) -> dict[str, Any]:
    """The variables of one layer of a stack, with a `StackedTable` for each of the tables that `take_out` took."""
    def put(sinks: Any, place: Path) -> Any:
        if place in tables:
            return StackedTable(tables[place], layer, sinks)
        if isinstance(sinks, Mapping):
            return {key: put(below, (*place, key)) for key, below in sinks.items()}
        return sinks
    return {**variables, SINKS: put(variables[SINKS], ())} if tables else dict(variables)


@jax.custom_vjp
def deliver(y: Array, slots: Any, values: Any) -> Array:
    """y; the gradient of `slots` is `values`, float arrays of the same shapes, whatever that of y is."""
    return y


def _deliver_forward(y, slots, values):
    return y, values


def _deliver_backward(values, dy):
    return dy, values, jax.tree.map(jnp.zeros_like, values)


deliver.defvjp(_deliver_forward, _deliver_backward)
