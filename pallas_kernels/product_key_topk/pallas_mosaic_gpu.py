"""Mosaic GPU kernels, for Hopper and Blackwell (compute capability 9.x and 10.x): a thread has a query.

G groups of queries with sub-keys of their own, M queries, n sub-keys of a half, D their size, k kept. A thread keeps
the k best of its query in registers, best first, and a score goes through the list where it belongs. The products are
float32 multiply-adds, a row of queries times a number of a sub-key: the matrix unit is not used.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu
from pallas_kernels.arguments import vary_alike
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.product_key_topk.chunked import staircase
from pallas_kernels.product_key_topk.gpu_layout import by_group, grouped, padded, parts, ungrouped

Array = jax.Array
QUERIES = 128       # of a block, one a thread
KEYS = 32           # of a block that the copy engine brings
TOGETHER = 8        # sub-keys that a number of a query is multiplied with at once
SUM_KEYS = 128      # whose gradients are in shared memory
SUM_QUERIES = 32    # of a program of the gradient to queries
MOST_BYTES, MOST_KEPT, MOST_WIDTH = 220 * 2 ** 10, 64, 256
NONE = float("-inf")


def unsupported(dtype: str, k: int, width: int, platform: str) -> str | None:
    """Why these kernels cannot serve, or None."""
    reason = gpu.no_mosaic(dtype, platform)
    if reason is None and (k > MOST_KEPT or width > MOST_WIDTH or _shared_bytes(dtype, k, width) > MOST_BYTES):
        return (f"k={k} and sub-keys of {width} do not fit: it takes k up to {MOST_KEPT} and {MOST_WIDTH} numbers, and "
                f"needs {_shared_bytes(dtype, k, width)} bytes of shared memory, of {MOST_BYTES}")
    return reason


def forward(q1: Array, q2: Array, c1: Array, c2: Array, k: int) -> tuple[Array, Array]:
    """Scores and ids [B, T, H, k]."""
    out = merged_into_batch(functools.partial(_forward, k))(*grouped(q1, q2, c1, c2))
    return tuple(ungrouped(x, q1) for x in out)


def backward(q1: Array, q2: Array, c1: Array, c2: Array, ids: Array, g: Array) -> tuple[Array, Array, Array, Array]:
    """(dq1, dq2, dc1, dc2) from the saved ids and the cotangent of the scores."""
    ids, g = by_group(ids, c1), by_group(jnp.asarray(g, jnp.float32), c1)
    dq1, dq2, dc1, dc2 = merged_into_batch(_backward)(*grouped(q1, q2, c1, c2), ids, g)
    return ungrouped(dq1, q1), ungrouped(dq2, q2), dc1.reshape(c1.shape), dc2.reshape(c2.shape)


def _shared_bytes(dtype: str, k: int, width: int) -> int:
    return QUERIES * (width * jnp.dtype(dtype).itemsize + 16 * k) + 2 * KEYS * width * 4


def _forward(k: int, q1: Array, q2: Array, c1: Array, c2: Array) -> tuple[Array, Array]:
    """Scores and ids [G, M, S, k]."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    (groups, queries, heads, width), n = q1.shape, c1.shape[2]
    lanes = lambda q: padded(q.transpose(0, 2, 3, 1).reshape(groups * heads, width, queries), {2: QUERIES})
    columns = lambda c: padded(jnp.swapaxes(c, 2, 3).reshape(groups * heads, width, n).astype(jnp.float32), {2: KEYS})
    q1, q2, c1, c2 = lanes(q1), lanes(q2), columns(c1), columns(c2)
    ranks = jnp.stack([jnp.asarray(x, jnp.int32) for x in staircase(k)])
    made = [gpu.like(q1, groups * heads, k, q1.shape[2], dtype=dtype) for dtype in (jnp.float32, jnp.int32)]
    kept = [plgpu.SMEM((k, QUERIES), dtype) for dtype in (jnp.float32, jnp.int32)]
    out = _call(
        functools.partial(_forward_kernel, n, k), "product_key_topk_forward", made,
        (groups * heads, q1.shape[2] // QUERIES), q1, q2, c1, c2, ranks,
        scratch=[plgpu.SMEM((width, QUERIES), q1.dtype), plgpu.SMEM((2, width, KEYS), jnp.float32), *kept, *kept,
                 plgpu.Barrier(), plgpu.Barrier(num_barriers=2)])
    return tuple(x.reshape(groups, heads, k, -1)[..., :queries].transpose(0, 3, 1, 2) for x in out)


def _forward_kernel(n: int, k: int, place, q1, q2, c1, c2, ranks, scores_out, ids_out, query, keys, scores_1, ids_1,
                    scores_2, ids_2, arrived, keys_arrived):
    group, tile = place.index
    queries = pl.ds(tile * QUERIES, QUERIES)
    for q, c, scores, ids in ((q1, c1, scores_1, ids_1), (q2, c2, scores_2, ids_2)):
        place.plgpu.commit_smem()           # all threads are done with the other half
        place.plgpu.copy_gmem_to_smem(q.at[group, :, queries], query, arrived)
        best = _best(place, n, k, c.at[group], query, keys, arrived, keys_arrived)
        for r, (value, id) in enumerate(best):
            scores[r], ids[r] = value, id

    def candidate(i, best):
        a, b = ranks[0, i], ranks[1, i]
        return _inserted(best, scores_1[a] + scores_2[b], ids_1[a] * n + ids_2[b])

    best = jax.lax.fori_loop(0, ranks.shape[1], candidate, place.empty(k))
    for r, (value, id) in enumerate(best):
        scores_out[group, r, queries], ids_out[group, r, queries] = value, id


def _best(place, n: int, k: int, c, query, keys, arrived, keys_arrived) -> list[tuple[Array, Array]]:
    """The k best scores of the thread's query and their sub-keys, best first, equal ones by index."""
    blocks, slots = c.shape[1] // KEYS, keys.shape[0]

    def fetch(block, slot):
        place.plgpu.copy_gmem_to_smem(c.at[:, pl.ds(block * KEYS, KEYS)], keys.at[slot], keys_arrived.at[slot])

    def one(block, best):
        slot = jax.lax.rem(block, jnp.int32(slots))
        place.plgpu.barrier_wait(keys_arrived.at[slot])

        def some(i, best):
            first = i * TOGETHER

            def add(d, sums):
                row = query[d].astype(jnp.float32)
                return [total + row * keys[slot, d, first + j] for j, total in enumerate(sums)]

            sums = jax.lax.fori_loop(0, query.shape[0], add, [place.full(0.0)] * TOGETHER)
            for j, score in enumerate(sums):
                key = block * KEYS + first + j
                best = _inserted(best, jnp.where(key < n, score, NONE), place.full(0, jnp.int32) + key)
            return best

        best = jax.lax.fori_loop(0, KEYS // TOGETHER, some, best)
        place.plgpu.commit_smem()           # all threads are done with the slot

        @pl.when(block + slots < blocks)
        def _():
            fetch(block + slots, slot)

        return best

    for block in range(min(slots, blocks)):
        fetch(jnp.int32(block), block)
    place.plgpu.barrier_wait(arrived)
    return jax.lax.fori_loop(0, blocks, one, place.empty(k))


def _inserted(best: Sequence[tuple[Array, Array]], value: Array, id: Array) -> list[tuple[Array, Array]]:
    """The list with a new value where it belongs, after equal ones; what is behind moves on and the last one leaves."""
    larger = [value > kept for kept, _ in best]
    out = [tuple(jnp.where(larger[0], new, old) for new, old in zip((value, id), best[0], strict=True))]
    for r in range(1, len(best)):
        moved = [jnp.where(larger[r - 1], before, new) for before, new in zip(best[r - 1], (value, id), strict=True)]
        out.append(tuple(jnp.where(larger[r], new, old) for new, old in zip(moved, best[r], strict=True)))
    return out


def _backward(q1: Array, q2: Array, c1: Array, c2: Array, ids: Array, g: Array) -> tuple[Array, ...]:
    """The gradients of q [G, M, S, D] and c [G, S, n, D]; ids and g [G, M, S, k]."""
    n = c1.shape[2]
    out = [_backward_half(*of) for of in ((q1, c1, ids // n, g), (q2, c2, ids % n, g))]
    return tuple(x for pair in zip(*out, strict=True) for x in pair)


def _backward_half(q: Array, c: Array, chosen: Array, g: Array) -> tuple[Array, Array]:
    from jax.experimental.pallas import mosaic_gpu as plgpu
    (groups, queries, heads, width), n = q.shape, c.shape[2]
    q, c = padded(q, {3: QUERIES}), padded(c, {2: SUM_KEYS, 3: QUERIES})
    wide = q.shape[3] // QUERIES
    dq, = _call(_queries_kernel, "product_key_topk_backward_queries", [gpu.like(q)],
                (groups * heads, pl.cdiv(queries, SUM_QUERIES), wide), c, chosen, g)
    tiles = c.shape[2] // SUM_KEYS
    split = parts(groups * heads * tiles * wide, queries)
    dc, = _call(_keys_kernel, "product_key_topk_backward_keys", [gpu.like(q, split, *c.shape, dtype=jnp.float32)],
                (groups * heads, tiles * wide, split), q, chosen, g,
                scratch=[plgpu.SMEM((SUM_KEYS + 1, QUERIES), jnp.float32)])
    return dq[..., :width], dc.sum(0)[:, :, :n, :width].astype(c.dtype)


def _queries_kernel(place, c, chosen, g, dq):
    """A thread has a column of dq, and goes through queries and the sub-keys that they chose."""
    at, tile, column = place.index
    group, head = place.split(at, c.shape[1])
    columns = pl.ds(column * QUERIES, QUERIES)

    def one(i, _):
        query = jnp.minimum(tile * SUM_QUERIES + i, chosen.shape[1] - 1)
        total = place.full(0.0)
        for r in range(g.shape[3]):
            row = c[group, head, chosen[group, query, head, r], columns].astype(jnp.float32)
            total = total + row * g[group, query, head, r]
        dq[group, query, head, columns] = total.astype(dq.dtype)
        return 0

    jax.lax.fori_loop(0, SUM_QUERIES, one, 0)


def _keys_kernel(place, q, chosen, g, dc, sums):
    """A thread has a column of `SUM_KEYS` rows of dc, and adds to them in the order of its share of the queries.

    What was chosen elsewhere goes into one row more.
    """
    at, tile, part = place.index
    group, head = place.split(at, dc.shape[2])
    wide = dc.shape[4] // QUERIES
    columns, first = pl.ds(jax.lax.rem(tile, wide) * QUERIES, QUERIES), jax.lax.div(tile, wide) * SUM_KEYS
    share = q.shape[1] // dc.shape[0]

    def clear(i, _):
        sums[i] = place.full(0.0)
        return 0

    def one(i, _):
        query = part * share + i
        row = q[group, query, head, columns].astype(jnp.float32)
        for r in range(g.shape[3]):
            key = chosen[group, query, head, r] - first
            key = jnp.where((key >= 0) & (key < SUM_KEYS), key, SUM_KEYS)
            sums[key] += row * g[group, query, head, r]
        return 0

    def write(i, _):
        dc[part, group, head, first + i, columns] = sums[i]
        return 0

    jax.lax.fori_loop(0, SUM_KEYS + 1, clear, 0)
    jax.lax.fori_loop(0, share, one, 0)
    jax.lax.fori_loop(0, SUM_KEYS, write, 0)


class _Place:
    """Where a warpgroup is in the grid, and rows of its 128 threads."""

    def __init__(self, plgpu, names: Sequence[str]):
        self.plgpu, self.index = plgpu, [jax.lax.axis_index(name) for name in names]

    def full(self, value, dtype=jnp.float32) -> Array:
        """A row of one value that loops can carry."""
        layout = self.plgpu.Layout.WG_STRIDED((QUERIES,), 1)
        return self.plgpu.layout_cast(jnp.full((QUERIES,), value, dtype), layout)

    def empty(self, k: int) -> list[tuple[Array, Array]]:
        return [(self.full(NONE), self.full(r, jnp.int32)) for r in range(k)]

    def split(self, index: Array, heads: int) -> tuple[Array, Array]:
        return jax.lax.div(index, jnp.int32(heads)), jax.lax.rem(index, jnp.int32(heads))


def _call(kernel: Callable, name: str, made: Sequence, grid: Sequence[int], *given: Array,
          scratch: Sequence = ()) -> list[Array]:
    from jax.experimental.pallas import mosaic_gpu as plgpu
    names = ("first", "second", "third")[:len(grid)]

    def named(*refs):
        kernel(_Place(plgpu, names), *refs)

    named.__name__ = name
    # A thread reads and writes its own lane of rows alone; where the copy engine writes, the kernels say who waits.
    out = plgpu.kernel(
        named, out_type=list(made), grid=tuple(grid), grid_names=names, scratch_types=list(scratch),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True,
                                             lowering_semantics=plgpu.LoweringSemantics.Lane), **gpu.interpret_mosaic(),
    )(*given)
    return list(vary_alike(*given, *out)[len(given):])      # `plgpu.kernel` forgets the axes of jax.shard_map
