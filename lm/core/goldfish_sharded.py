"""Goldfish masks where time is split over devices: each device hashes its own stretch of the rows.

A window reaches over the start of a stretch, so a device is given the last tokens of the one before (the halo). Left to
itself the compiler would put whole rows together on every device.

Shapes: B batch rows, T time; b and t of one device.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.axes import RULES
from lm.core.batch import Batch
from lm.core.goldfish import Goldfish, dropped
from lm.core.sharding import axis_size, current_mesh, spec
from lm.core.types import Array

(TIME,) = RULES["length"]


def dropped_over_shards(options: Goldfish, batch: Batch, first_row: Any = 0) -> Array:
    """`lm.core.goldfish.dropped` of JAX arrays, with the same result, on the current mesh."""
    shape, shards = batch.targets.shape, axis_size(TIME)
    halo = options.h - 1
    if shards == 1 or shape[1] % shards or options.mask != "hash" or halo == 0:
        return dropped(options, batch, first_row)  # without windows nothing is asked of other devices

    def local(tokens: Array, targets: Array, segment_ids: Array) -> Array:
        before = lambda x: jnp.concatenate([from_before(x, halo, shards), x], axis=1)
        first = jax.lax.axis_index(TIME).astype(jnp.uint32) * jnp.uint32(targets.shape[1])
        # Before the first token of a row numbers wrap; nothing of that part is kept.
        place = jnp.arange(halo + targets.shape[1], dtype=jnp.uint32)[None] - jnp.uint32(halo) + first
        wide = Batch(before(tokens), jnp.pad(targets, ((0, 0), (halo, 0))), None, before(segment_ids), None)
        return dropped(options, wide, place=place)[:, halo:]

    mesh = current_mesh()
    split = spec(("batch", "length"), shape, mesh)
    return jax.shard_map(local, mesh=mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False)(
        batch.tokens, batch.targets, batch.segment_ids)


def from_before(x: Array, halo: int, shards: int) -> Array:
    """[b, halo]: the columns before this device's [b, t], zeros before the row. A halo longer than t comes from several
    devices, one after the other."""
    onward = [(n, n + 1) for n in range(shards - 1)]
    if halo <= x.shape[1]:
        return jax.lax.ppermute(x[:, x.shape[1] - halo:], TIME, onward)
    parts = []
    for _ in range(min(math.ceil(halo / x.shape[1]), shards - 1)):
        x = jax.lax.ppermute(x, TIME, onward)
        parts.insert(0, x)
    found = jnp.concatenate(parts, axis=1)[:, -halo:]
    return jnp.pad(found, ((0, 0), (halo - found.shape[1], 0)))
