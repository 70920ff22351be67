"""Triton kernels, for NVIDIA GPUs of compute capability 8.0 and up: a program has a tile of queries.

M queries, n sub-keys of a half, D their size, k kept. Arrays are [G, M, S, D] and [G, S, n, D]: S heads with sub-keys
of their own, or one where all heads share them, and G what jax.vmap maps over. Sizes are padded to powers of two where
Triton's tensors want them: 64 and 128 need none.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.product_key_topk.gpu_layout import by_group, grouped, padded, parts, ungrouped

Array = jax.Array
QUERIES, KEYS = 16, 64          # of a tile of scores: 32 registers of the one warp, whose rows lie in four threads each
SUM_QUERIES, COLUMNS = 32, 64   # of a trip of the sum over queries, and of a tile of that sum
SLICE_BYTES = 128               # of a query: its scores are summed up slice by slice, so that operands stay small
NONE, LAST = float("-inf"), 2 ** 31 - 1
MOST_KEPT = 64


def unsupported(dtype: str, k: int, platform: str) -> str | None:
    """Why these kernels cannot serve, or None."""
    reason = gpu.no_triton(dtype, platform)
    if reason is None and k > MOST_KEPT:
        return f"it takes k up to {MOST_KEPT}, not {k}: what is kept has to fit into registers"
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


def _forward(k: int, q1: Array, q2: Array, c1: Array, c2: Array) -> tuple[Array, Array]:
    """Scores and ids [G, M, S, k]."""
    (groups, queries, heads, _), n, kept = q1.shape, c1.shape[2], max(2, pl.next_power_of_2(k))
    q1, q2 = (padded(q, {1: QUERIES, 3: "power"}) for q in (q1, q2))
    c1, c2 = (padded(c, {2: KEYS, 3: "power"}) for c in (c1, c2))
    width, most = q1.shape[3], q1.shape[1]
    tile = lambda size: pl.BlockSpec((None, QUERIES, None, size), lambda g, m: (g // heads, m, g % heads, 0))
    keys = pl.BlockSpec((None, None, c1.shape[2], width), lambda g, m: (g // heads, g % heads, 0, 0))
    out = _call(
        functools.partial(_forward_kernel, n, k, kept), "product_key_topk_forward", (groups * heads, most // QUERIES),
        warps=1 if kept <= 16 and q1.dtype == jnp.bfloat16 else 4, in_specs=[tile(width), tile(width), keys, keys],
        out_specs=[tile(kept), tile(kept)],
        out_shape=[gpu.like(q1, groups, most, heads, kept, dtype=dtype) for dtype in (jnp.float32, jnp.int32)],
    )(q1, q2, c1, c2)
    return tuple(x[:, :queries, :, :k] for x in out)


def _forward_kernel(n: int, k: int, kept: int, q1_ref, q2_ref, c1_ref, c2_ref, scores_ref, ids_ref):
    scores_1, ids_1 = _sorted(k, *_best(n, k, kept, q1_ref, c1_ref))
    scores_2, ids_2 = _sorted(k, *_best(n, k, kept, q2_ref, c2_ref))
    scores_ref[...], ids_ref[...] = _merged(n, k, scores_1, ids_1, scores_2, ids_2)


def _best(n: int, k: int, kept: int, q_ref, c_ref) -> tuple[Array, Array]:
    """The k best scores [queries, kept] and their sub-keys, in no order; +inf in what is kept beyond k.

    A score enters for the worst one that is kept, the last of equal ones, when it is larger: later ones of the same
    score do not. Most tiles have few that enter, and what no query wants ends the search of a tile.
    """
    slot, column = _iota(kept), _iota(KEYS)
    size = min(SLICE_BYTES // q_ref.dtype.itemsize, q_ref.shape[1])

    def tile(t, best):
        def add(i, scores):
            at = pl.ds(i * size, size)
            return scores + _product(q_ref[:, at], c_ref[pl.ds(t * KEYS, KEYS), at], (1, 1))

        scores = jax.lax.fori_loop(0, q_ref.shape[1] // size, add, jnp.zeros(column.shape, jnp.float32))
        scores = jnp.where(t * KEYS + column < n, scores, NONE)

        def enter(state):
            scores, top, worst, values, ids, _ = state
            at = jnp.min(jnp.where(scores == top, column, KEYS), axis=1, keepdims=True)
            last = jnp.max(jnp.where(values == worst, ids, -1), axis=1, keepdims=True)
            replaced = (values == worst) & (ids == last) & (top > worst)
            values, ids = jnp.where(replaced, top, values), jnp.where(replaced, t * KEYS + at, ids)
            return searched(jnp.where(column == at, NONE, scores), values, ids)

        state = jax.lax.while_loop(lambda state: state[-1] > 0, enter, searched(scores, *best))
        return state[3:5]

    def searched(scores, values, ids):
        top, worst = (of(x, axis=1, keepdims=True) for of, x in ((jnp.max, scores), (jnp.min, values)))
        return scores, top, worst, values, ids, jnp.max((top > worst).astype(jnp.int32))

    start = jnp.where(slot < k, NONE, -NONE), jnp.where(slot < k, slot, -1)
    return jax.lax.fori_loop(0, pl.cdiv(n, KEYS), tile, start)


def _sorted(k: int, values: Array, ids: Array) -> tuple[Array, Array]:
    """Best first, equal ones by id; -inf beyond k."""
    slot = _iota(values.shape[1])
    values, ids = jnp.where(slot < k, values, NONE), jnp.where(slot < k, ids, LAST)

    def take(r, state):
        values, ids, values_out, ids_out = state
        top = jnp.max(values, axis=1, keepdims=True)
        first = jnp.min(jnp.where(values == top, ids, LAST), axis=1, keepdims=True)
        taken = (values == top) & (ids == first)
        return (jnp.where(taken, NONE, values), jnp.where(taken, LAST, ids), jnp.where(slot == r, top, values_out),
                jnp.where(slot == r, first, ids_out))

    return jax.lax.fori_loop(0, k, take, (values, ids, jnp.full_like(values, NONE), jnp.zeros_like(ids)))[2:]


def _merged(n: int, k: int, scores_1: Array, ids_1: Array, scores_2: Array, ids_2: Array) -> tuple[Array, Array]:
    """The k best sums and their ids: each rank a of the first half has a head, its best sum that is not taken."""
    slot = _iota(scores_1.shape[1])
    at = lambda place, x: jnp.sum(jnp.where(slot == place, x, 0), axis=1, keepdims=True)
    best_at = lambda place: jnp.max(jnp.where(slot == place, scores_2, NONE), axis=1, keepdims=True)

    def take(r, state):
        heads, partner, scores, ids = state
        top = jnp.max(heads, axis=1, keepdims=True)
        a = jnp.min(jnp.where(heads == top, slot, slot.shape[1]), axis=1, keepdims=True)
        b = at(a, partner)
        heads = jnp.where(slot == a, scores_1 + best_at(b + 1), heads)
        return (heads, jnp.where(slot == a, b + 1, partner), jnp.where(slot == r, top, scores),
                jnp.where(slot == r, at(a, ids_1) * n + at(b, ids_2), ids))

    first = jnp.zeros((scores_1.shape[0], 1), jnp.int32)
    state = scores_1 + best_at(first), jnp.zeros_like(ids_1), jnp.zeros_like(scores_1), jnp.zeros_like(ids_1)
    return jax.lax.fori_loop(0, k, take, state)[2:]


def _backward(q1: Array, q2: Array, c1: Array, c2: Array, ids: Array, g: Array) -> tuple[Array, ...]:
    """The gradients of q [G, M, S, D] and c [G, S, n, D]; ids and g [G, M, S, k]."""
    n = c1.shape[2]
    out = [_backward_half(*of) for of in ((q1, c1, ids // n, g), (q2, c2, ids % n, g))]
    return tuple(x for pair in zip(*out, strict=True) for x in pair)


def _backward_half(q: Array, c: Array, chosen: Array, g: Array) -> tuple[Array, Array]:
    (groups, queries, heads, width), n, k = q.shape, c.shape[2], g.shape[3]
    q, chosen, g = (padded(x, {1: SUM_QUERIES}) for x in (q, chosen, g))
    q, c = padded(q, {3: "power"}), padded(c, {2: KEYS, 3: "power"})
    most, wide = q.shape[1], q.shape[3]
    tile = lambda rows, size: pl.BlockSpec((None, rows, None, size), lambda g, m: (g // heads, m, g % heads, 0))
    keys = pl.BlockSpec((None, None, c.shape[2], wide), lambda g, m: (g // heads, g % heads, 0, 0))
    dq = _call(_queries_kernel, "product_key_topk_backward_queries", (groups * heads, most // QUERIES), warps=4,
               in_specs=[keys, tile(QUERIES, k), tile(QUERIES, k)], out_specs=tile(QUERIES, wide),
               out_shape=gpu.like(q))(c, chosen, g)
    columns = min(COLUMNS, wide)
    tiles, trips = (c.shape[2] // KEYS, wide // columns), most // SUM_QUERIES
    split = parts(groups * heads * math.prod(tiles), trips)
    share = lambda size, column: pl.BlockSpec(
        (None, trips // split * SUM_QUERIES, None, size),
        lambda g, t, p: (g // heads, p, g % heads, column(t)))
    first = lambda t: 0
    dc = _call(functools.partial(_keys_kernel, tiles[1]), "product_key_topk_backward_keys",
               (groups * heads, math.prod(tiles), split), warps=4,
               in_specs=[share(columns, lambda t: t % tiles[1]), share(k, first), share(k, first)],
               out_specs=pl.BlockSpec((None, None, None, KEYS, columns), lambda g, t, p: (
                   p, g // heads, g % heads, t // tiles[1], t % tiles[1])),
               out_shape=gpu.like(q, split, groups, heads, c.shape[2], wide, dtype=jnp.float32))(q, chosen, g)
    return dq[:, :queries, :, :width], dc.sum(0)[:, :, :n, :width].astype(c.dtype)


def _queries_kernel(c_ref, chosen_ref, g_ref, dq_ref):
    def add(r, total):
        rows = c_ref[chosen_ref[:, r], :].astype(jnp.float32)
        return total + rows * g_ref[:, r][:, None]

    total = jax.lax.fori_loop(0, g_ref.shape[1], add, jnp.zeros(dq_ref.shape, jnp.float32))
    dq_ref[...] = total.astype(dq_ref.dtype)


def _keys_kernel(across: int, q_ref, chosen_ref, g_ref, dc_ref):
    """The sum over the program's share of the queries, for one tile of dc: at_keys [queries, sub-keys].

    across: tiles along D."""
    key = jax.lax.div(pl.program_id(1), across) * KEYS + _iota(KEYS, SUM_QUERIES)

    def add(m, total):
        here = pl.ds(m * SUM_QUERIES, SUM_QUERIES)

        def put(r, at_keys):
            return at_keys + jnp.where(chosen_ref[here, r][:, None] == key, g_ref[here, r][:, None], 0)

        at_keys = jax.lax.fori_loop(0, g_ref.shape[1], put, jnp.zeros(key.shape, jnp.float32))
        return total + _product(at_keys, q_ref[here, :].astype(jnp.float32), (0, 0))

    zero = jnp.zeros(dc_ref.shape, jnp.float32)
    dc_ref[...] = jax.lax.fori_loop(0, q_ref.shape[0] // SUM_QUERIES, add, zero)


def _iota(size: int, rows: int = QUERIES) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (rows, size), 1)


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """In float32, of float32 factors without rounding them."""
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), precision=jax.lax.Precision.HIGHEST,
                               preferred_element_type=jnp.float32)


def _call(kernel: Callable, name: str, grid: tuple[int, ...], warps: int, **specs):
    from jax.experimental.pallas import triton as plt
    return pl.pallas_call(kernel, grid=grid, name=name, interpret=gpu.interpret_triton(),
                          compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1), **specs)
