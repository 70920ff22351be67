"""What the layers that retrieve rows of a table by product keys share: PEER's experts and PKM's values."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import linen as nn

from lm.core.tables import SINKS, StackedTable
from lm.core.types import Array, State
from lm.layers.experts.numbering import Numbering
from lm.layers.experts.options import check_counts, check_momentum
from lm.layers.experts.product_keys import ProductKeys, check_keys
from lm.layers.experts.shards import check_rows


class ByProductKeys:
    """Mixed into a layer with the fields of `ProductKeys`. kind: its name; rows: its field with the number of rows;
    table: its parameter that has them, with the logical axes table_axes."""

    kind: ClassVar[str]
    rows: ClassVar[str]
    table: ClassVar[str]
    table_axes: ClassVar[tuple[str | None, ...]]
    numbering: ClassVar[Numbering] = "grid"
    active_keys: ClassVar[int | None] = None

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return getattr(self, self.rows)

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit together."""
        check_keys(self.kind, self.num_rows, self.rows, self.num_heads, self.top_k, self.dim(embed_dim), self.gate)
        check_counts(self.kind, chunk=self.chunk, usage_tokens=self.usage_tokens, dead_after=self.dead_after)
        check_momentum(self.kind, self.momentum)

    def check_mesh(self, mesh: Mapping[str, int]) -> None:
        """Raises ValueError where the mesh cannot split the rows."""
        check_rows(f"{self.kind}.{self.rows}", self.num_rows, mesh, square=True)

    @property
    def not_additive(self) -> tuple[str, ...]:
        """What makes a batch more than the sum of its microbatches."""
        return (f"{self.kind}.query_norm='batch'",) if self.query_norm == "batch" and self.momentum < 1 else ()

    def dim(self, embed_dim: int) -> int:
        """Width of a query."""
        return max(2, embed_dim // 8 * 2) if self.key_dim is None else self.key_dim

    def router(self, embed_dim: int) -> ProductKeys:
        """The template of the router."""
        return ProductKeys(self.num_rows, self.num_heads, self.top_k, self.dim(embed_dim), self.query_norm, self.gate,
                           self.per_head_keys, self.momentum, self.implementation, self.numbering, self.active_keys,
                           parent=None)

    def table_and_sink(self, init: Callable, *row: int) -> tuple[Array, Any]:
        """The table [N, *row] and what its gradient goes into (`lm.core.tables`), or None; of a layer of a stack the
        tables of all may be given instead, [L, N, *row]."""
        sink = self.get_variable(SINKS, self.table) if self.has_variable(SINKS, self.table) else None
        if isinstance(sink, StackedTable):
            return sink.tables, sink
        return self.param(self.table, nn.with_logical_partitioning(init, self.table_axes), (self.num_rows, *row)), sink

    @property
    def granularity(self) -> int:
        """Rows that a token uses."""
        return self.num_heads * self.top_k

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> State:
        """Stateless."""
        return ()
