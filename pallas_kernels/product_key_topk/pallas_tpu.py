"""TPU kernels. G groups of queries with sub-keys of their own, M queries, n sub-keys of a half, K their size, k kept.

A block is 128 queries, on the lanes; sub-keys lie along sublanes, so that a maximum over them is that of registers.
The scores [n, 128] of a half are one product of the matrix unit and stay in VMEM, where k rounds take the best each.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.product_key_topk.chunked import staircase
from pallas_kernels.product_key_topk.config import UNROLL

Array = jax.Array
QUERIES = 128      # of a block
ROWS = 8           # sublanes of a register
NONE = float("-inf")
MOST_KEYS = 8192   # 4 MiB of VMEM for the scores of a half


def unsupported(dtype: str, n: int, platform: str) -> str | None:
    """Why these kernels cannot serve, or None."""
    if platform != "tpu":
        return f"it needs a TPU and this is {platform}"
    if dtype not in ("float32", "bfloat16"):
        return f"it takes float32 and bfloat16, not {dtype}"
    if n > MOST_KEYS:
        return f"it takes at most {MOST_KEYS} sub-keys a half, not {n}: their scores have to fit into VMEM"
    return dispatch.automatic_axes()


def forward(q1: Array, q2: Array, c1: Array, c2: Array, k: int) -> tuple[Array, Array]:
    """Scores and ids [B, T, H, k]."""
    shape = (*q1.shape[:3], k)
    call = merged_into_batch(functools.partial(_forward, k))
    return tuple(_from_groups(x, shape, c1) for x in call(*_grouped(q1, q2, c1, c2)))


def backward(q1: Array, q2: Array, c1: Array, c2: Array, ids: Array, g: Array) -> tuple[Array, Array, Array, Array]:
    """(dq1, dq2, dc1, dc2) from the saved ids and the cotangent of the scores."""
    out, n = [], c1.shape[-2]
    per_head = c1.ndim == 3
    for q, c, chosen in ((q1, c1, ids // n), (q2, c2, ids % n)):
        queries, keys = _queries(q, per_head), c if per_head else c[None]
        lanes = [jnp.swapaxes(_queries(x, per_head), 1, 2) for x in (chosen, jnp.asarray(g))]
        dq, dc = merged_into_batch(_backward_half)(queries, keys, *lanes)
        dq = dq.transpose(1, 0, 2) if per_head else dq
        out.append((dq.reshape(q.shape), (dc if per_head else dc[0]).astype(c.dtype)))
    (dq1, dc1), (dq2, dc2) = out
    return dq1, dq2, dc1, dc2


def _queries(x: Array, per_head: bool) -> Array:
    """[B, T, H, ...] as [G, M, ...]."""
    if per_head:
        return jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[-1])
    return x.reshape(1, -1, x.shape[-1])


def _grouped(q1: Array, q2: Array, c1: Array, c2: Array) -> list[Array]:
    per_head = c1.ndim == 3
    return [*(_queries(q, per_head) for q in (q1, q2)), *(c if per_head else c[None] for c in (c1, c2))]


def _from_groups(x: Array, shape: tuple[int, ...], c: Array) -> Array:
    """[G, k, M] as [B, T, H, k]."""
    return jnp.transpose(x, (2, 0, 1) if c.ndim == 3 else (0, 2, 1)).reshape(shape)


def _forward(k: int, q1: Array, q2: Array, c1: Array, c2: Array) -> tuple[Array, Array]:
    """Scores and ids [G, k, M]."""
    (groups, queries, width), n = q1.shape, c1.shape[1]
    padded = -(-n // (ROWS * UNROLL)) * ROWS * UNROLL
    c1, c2 = (jnp.pad(c, ((0, 0), (0, padded - n), (0, 0))) for c in (c1, c2))
    candidates = -(-len(staircase(k)[0]) // (ROWS * UNROLL)) * ROWS * UNROLL
    block = pl.BlockSpec((1, QUERIES, width), lambda g, m: (g, m, 0))
    keys = pl.BlockSpec((1, padded, width), lambda g, m: (g, 0, 0))
    best = pl.BlockSpec((1, k, QUERIES), lambda g, m: (g, 0, m))
    like = lambda dtype: jax.ShapeDtypeStruct((groups, k, queries), dtype,
                                              manual_axis_type=jax.typeof(q1).manual_axis_type)
    return tuple(pl.pallas_call(
        functools.partial(_forward_kernel, n, k),
        grid=(groups, pl.cdiv(queries, QUERIES)),
        in_specs=[block, block, keys, keys], out_specs=[best, best], out_shape=[like(jnp.float32), like(jnp.int32)],
        scratch_shapes=[pltpu.VMEM((padded, QUERIES), jnp.float32), pltpu.VMEM((candidates, QUERIES), jnp.float32),
                        pltpu.VMEM((candidates, QUERIES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"),
                                             vmem_limit_bytes=_vmem(padded, width, q1.dtype)),
        cost_estimate=pl.CostEstimate(flops=4 * groups * queries * n * width, transcendentals=0,
                                      bytes_accessed=2 * (q1.size + c1.size) * q1.dtype.itemsize
                                      + 8 * groups * queries * k),
        name="product_key_topk_forward",
    )(q1, q2, c1, c2))


def _forward_kernel(n: int, k: int, q1, q2, c1, c2, scores_out, ids_out, scores, sums, ids):
    def half(q, c):
        scores[...] = _dot(c[0], q[0], (1, 1))
        if n < scores.shape[0]:
            scores[pl.ds(n, scores.shape[0] - n), :] = jnp.full((scores.shape[0] - n, QUERIES), NONE)
        return _take_best(scores, k)

    (s1, i), (s2, j) = half(q1, c1), half(q2, c2)
    sums[...] = jnp.full(sums.shape, NONE)
    ids[...] = jnp.zeros(ids.shape, jnp.int32)
    start = 0
    for a in range(k):
        here, partners = pl.ds(start, k // (a + 1)), slice(k // (a + 1))
        sums[here, :] = s1[a:a + 1] + s2[partners]
        ids[here, :] = i[a:a + 1] * n + j[partners]
        start += k // (a + 1)
    best, rows = _take_best(sums, k)
    scores_out[0] = best
    row = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    for r in range(k):
        ids_out[0, r:r + 1, :] = jnp.sum(jnp.where(row == rows[r:r + 1], ids[...], 0), axis=0, keepdims=True)


def _take_best(scores, k: int) -> tuple[Array, Array]:
    """The k best of scores [rows, 128] along rows, best first, and their rows; of equal ones the first. Spends them."""
    def better(earlier, later):
        wins = later[0] > earlier[0]
        return jnp.where(wins, later[0], earlier[0]), jnp.where(wins, later[1], earlier[1])

    sublane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 0)
    place = jax.lax.broadcasted_iota(jnp.int32, (k, QUERIES), 0)

    def take(r, carry):
        values, rows, last = carry
        taken = last - sublane

        def trip(t, carry):
            found = []
            for u in range(UNROLL):
                start = pl.multiple_of((t * UNROLL + u) * ROWS, ROWS)
                here = pl.ds(start, ROWS)
                x = jnp.where(taken == start, NONE, scores[here, :])
                scores[here, :] = x
                found.append((x, start))
            while len(found) > 1:        # as a tree: one comparison after the other would wait for each
                found = [better(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
            return better(carry, *found)

        empty = jnp.full((ROWS, QUERIES), NONE), jnp.zeros((ROWS, QUERIES), jnp.int32)
        best, at = jax.lax.fori_loop(0, scores.shape[0] // (ROWS * UNROLL), trip, empty)
        value = jnp.max(best, axis=0, keepdims=True)
        row = jnp.min(jnp.where(best == value, at + sublane, scores.shape[0]), axis=0, keepdims=True)
        return jnp.where(place == r, value, values), jnp.where(place == r, row, rows), row

    start = jnp.zeros((k, QUERIES), jnp.float32), jnp.zeros((k, QUERIES), jnp.int32), jnp.full((1, QUERIES), -1)
    return jax.lax.fori_loop(0, k, take, start)[:2]


def _backward_half(q: Array, c: Array, chosen: Array, g: Array) -> tuple[Array, Array]:
    """(dq [G, M, K] in q's dtype, dc [G, n, K] in float32); chosen and g [G, k, M]."""
    (groups, queries, width), n, k = q.shape, c.shape[1], g.shape[1]
    padded = -(-n // ROWS) * ROWS
    c = jnp.pad(c, ((0, 0), (0, padded - n), (0, 0)))
    block = pl.BlockSpec((1, QUERIES, width), lambda g, m: (g, m, 0))
    keys = pl.BlockSpec((1, padded, width), lambda g, m: (g, 0, 0))
    lanes = pl.BlockSpec((1, k, QUERIES), lambda g, m: (g, 0, m))
    like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(q).manual_axis_type)
    dq, dc = pl.pallas_call(
        functools.partial(_backward_kernel, queries),
        grid=(groups, pl.cdiv(queries, QUERIES)),
        in_specs=[block, keys, lanes, lanes], out_specs=[block, keys],
        out_shape=[like(q.shape, q.dtype), like(c.shape, jnp.float32)],
        scratch_shapes=[pltpu.VMEM((padded, QUERIES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                                             vmem_limit_bytes=_vmem(padded, width, q.dtype)),
        cost_estimate=pl.CostEstimate(flops=4 * groups * queries * n * width, transcendentals=0,
                                      bytes_accessed=2 * q.size * q.dtype.itemsize + 8 * g.size + 8 * c.size),
        name="product_key_topk_backward",
    )(q, c, chosen, g)
    return dq, dc[:, :n]


def _backward_kernel(queries: int, q, c, chosen, g, dq, dc, at_keys):
    """at_keys [n, 128]: the cotangents, put where the chosen sub-keys are; then products with keys and queries."""
    k, first = g.shape[1], pl.program_id(1) * QUERIES
    lane = first + jax.lax.broadcasted_iota(jnp.int32, (1, QUERIES), 1)
    sublane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 0)
    weights = [jnp.broadcast_to(jnp.where(lane < queries, g[0, r:r + 1, :], 0), sublane.shape) for r in range(k)]
    places = [chosen[0, r:r + 1, :] - sublane for r in range(k)]

    def put(t, _):
        start = pl.multiple_of(t * ROWS, ROWS)
        parts = [jnp.where(place == start, weight, 0) for place, weight in zip(places, weights, strict=True)]
        at_keys[pl.ds(start, ROWS), :] = functools.reduce(jnp.add, parts)
        return 0

    jax.lax.fori_loop(0, at_keys.shape[0] // ROWS, put, 0)

    @pl.when(pl.program_id(1) == 0)
    def _():
        dc[...] = jnp.zeros(dc.shape, dc.dtype)

    spread = at_keys[...]
    row = first + jax.lax.broadcasted_iota(jnp.int32, q.shape[1:], 0)
    inside = jnp.where(row < queries, q[0].astype(jnp.float32), 0)
    dq[0] = _dot(spread, c[0].astype(jnp.float32), (0, 0)).astype(dq.dtype)
    dc[0] += _dot(spread, inside, (1, 0))


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Product in float32; of float32 factors without rounding them to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def _vmem(n: int, width: int, dtype) -> int:
    """Bytes that a block may take: keys and their gradients twice, as blocks are double-buffered, and the scores."""
    lanes = -(-width // 128) * 128
    return 2 ** 24 + n * (2 * lanes * (2 * jnp.dtype(dtype).itemsize + 4) + 3 * 4 * QUERIES)
