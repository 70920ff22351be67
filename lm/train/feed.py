"""From rows on a host to a global array on the mesh."""

from collections.abc import Callable, Iterable, Iterator

import jax
from jax.sharding import Mesh, NamedSharding

from lm.core.batch import Batch
from lm.core.sharding import batch_sharding


def data_shard(mesh: Mesh, batch_size: int, seq_len: int) -> tuple[int, int]:
    """(index, count): this process reads the index-th of `count` equal runs of the rows of every batch.

    Processes that differ only in `context`, `tensor` or `expert` coordinates read the same rows.
    """
    indices = batch_sharding(mesh, (batch_size, seq_len)).addressable_devices_indices_map((batch_size, seq_len))
    bounds = [rows.indices(batch_size)[:2] for rows, _ in indices.values()]
    low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)
    size = high - low
    if low % size or batch_size % size:
        raise ValueError(f"rows {low} to {high} of {batch_size} that this process's devices hold are not one equal "
                         f"share; order the mesh so that data and fsdp vary slowest over processes")
    return low // size, batch_size // size


def to_device(batch: Batch, mesh: Mesh, index: int, count: int) -> Batch:
    """The global batch as sharded arrays, from this process's rows."""
    rows, length = batch.tokens.shape
    shape = (rows * count, length)
    sharding: NamedSharding = batch_sharding(mesh, shape)
    if count == 1 and sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)  # one call for all fields
    low = index * rows

    def put(leaf):
        def local(where):
            start, stop, _ = where[0].indices(shape[0])
            return leaf[start - low:stop - low, where[1]]
        return jax.make_array_from_callback((*shape, *leaf.shape[2:]), sharding, local)

    return jax.tree.map(put, batch)


def feed(batches: Iterable[tuple[int, Batch]], put: Callable[[Batch], Batch]) -> Iterator[tuple[int, Batch]]:
    """(step, batch on the devices), always one batch ahead of the one being used: the copy overlaps the step."""
    waiting = None
    for step, batch in batches:
        ready, waiting = waiting, (step, put(batch))
        if ready is not None:
            yield ready
    if waiting is not None:
        yield waiting
