"""Work on tokens and rows of experts under a mesh, in one explicit `jax.shard_map`.

Tokens are split as the batch is, heads over `tensor`, rows of a table over `expert`. Every device takes the chosen
experts that it owns, and the parts of a token's output meet in one psum over `expert` and `tensor`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core.sharding import current_mesh, spec
from lm.core.types import Array
from lm.layers.attention_op.sharded import compiler_splits

EXPERT_AXIS = "expert"
CHUNK_BYTES = 1 << 28  # temporaries of a chunk of tokens where the layer does not say how many tokens it has


class Split(NamedTuple):
    """The mesh axes over which each dimension is split; None where it is whole."""

    batch: Any = None
    length: Any = None
    heads: Any = None
    rows: Any = None

    @property
    def tokens(self) -> tuple[str, ...]:
        """The axes over which tokens are split."""
        return axes_of(self.batch, self.length)

    def first_row(self, num_rows: int) -> Array | int:
        """Inside `on_shards`: the number of the first of this device's `num_rows` rows."""
        return 0 if self.rows is None else jax.lax.axis_index(self.rows) * num_rows


def axes_of(*parts: Any) -> tuple[str, ...]:
    """The mesh axes in entries of a PartitionSpec."""
    return tuple(axis for part in parts for axis in ((part,) if isinstance(part, str) else part or ()))


def split_of(shape: Sequence[int], num_heads: int, num_rows: int) -> Split | None:
    """How tokens [B, T], heads and rows are split by the current mesh; None where the compiler has nothing to split."""
    if not compiler_splits():
        return None
    mesh = current_mesh()
    return Split(*spec(("batch", "length"), shape[:2], mesh), *spec(("heads",), (num_heads,), mesh),
                 *spec(("experts",), (num_rows,), mesh))


def on_shards(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`local` on every device's part of its arguments, under the current mesh."""
    return jax.shard_map(local, mesh=current_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def total(tree: Any, *parts: Any) -> Any:
    """The sum over the mesh axes of these entries, inside `on_shards`."""
    axes = axes_of(*parts)
    return jax.lax.psum(tree, axes) if axes else tree


def over_chunks(fn: Callable[..., tuple[Any, Any]], size: int, *arrays: Array) -> tuple[Any, Any]:
    """(y, sums) of fn(*arrays) with at most `size` of their tokens at a time, arrays [1, M, ...]; y is one, or a tree
    of them.

    Only the arrays are kept for the backward pass, which runs each chunk again: temporaries are those of one chunk. The
    sums are added up. What `fn` closes over gets its gradient in one buffer, to which every chunk adds.
    """
    M = arrays[0].shape[1]
    if size >= M:
        return fn(*arrays)
    count = math.ceil(M / size)
    size = math.ceil(M / count)

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, count * size - M)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(count, 1, size, *a.shape[2:])

    parts = tuple(map(cut, arrays))
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, *(part[0] for part in parts))[1])
    run = jax.checkpoint(fn, prevent_cse=False)

    def body(sums, part):
        y, found = run(*part)
        return jax.tree.map(jnp.add, sums, found), y

    sums, y = jax.lax.scan(body, sums, parts)
    return jax.tree.map(lambda a: a.reshape(1, count * size, *a.shape[3:])[:, :M], y), sums


def check_rows(name: str, rows: int, mesh: Mapping[str, int], *, square: bool) -> None:
    """Raises ValueError, with the nearest number that will do, where the axis `expert` does not divide the experts.

    name: of the field, for the message. mesh: sizes of its axes. square: whether the number is to be a square.
    """
    shards = mesh.get(EXPERT_AXIS, 1)
    if rows % shards == 0:
        return
    value = (lambda n: n * n) if square else (lambda n: n)
    root = math.isqrt(rows) if square else rows
    fits = [value(n) for n in range(max(1, root - shards), root + shards + 1) if value(n) % shards == 0]
    near = min(fits, key=lambda n: (abs(n - rows), n))
    raise ValueError(f"{name}={rows} is not divided by the mesh axis {EXPERT_AXIS}={shards}, over which experts are "
                     f"split; nearest that is{' and is a square' if square else ''}: {near}")
