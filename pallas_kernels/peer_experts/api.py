"""Sum of single-neuron experts that each token chose: the experts of PEER.

B batch, T time, H heads, K experts a head, N experts, R = 2 rows of an expert or 3 (GLU), D width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_dtypes, check_shapes, vary_alike
from pallas_kernels.peer_experts import chunked, dense, pallas_mosaic_gpu, pallas_tpu, pallas_triton, reference, rows

Array = jax.Array
_MODULES = {"pallas_tpu": pallas_tpu, "pallas_mosaic_gpu": pallas_mosaic_gpu, "pallas_triton": pallas_triton,
            "chunked": chunked, "reference": reference}
IMPLEMENTATIONS = tuple(_MODULES)
FLOATS = ("float32", "bfloat16", "float16", "float64")


def peer_experts(x: Array, ids: Array, gates: Array, table: Array, *, activation: Callable[[Array], Array],
                 implementation: str | tuple[str, ...] | None = None) -> Array:
    """y = sum over the chosen experts i of gate * activation(down_i . x) * up_i, for every token.

    x [B, T, D]; ids [B, T, H, K] int32; gates [B, T, H, K]; table [N, 2, D] with down = table[i, 0] and
    up = table[i, 1], or [N, 3, D] with the GLU form activation(down_i . x) * (table[i, 2] . x). x, gates and table are
    floats, each of its own dtype; the arithmetic is float32 (float64 if one of them is) and y [B, T, D] has x's dtype.
    activation: elementwise, and the same object from call to call, or each call compiles anew. N need not be a square.

    An id outside of 0..N-1 chooses no expert: it adds nothing to y, and its gate and the table get no gradient from it.
    A device that holds a part of the rows gives ids relative to its first and sums y over the devices. -1 says so on
    purpose; under `jax.experimental.checkify.checkify` any other such id is an error.

    Gradients: x, gates, table (dense, [N, R, D]; `peer_experts_with_sink` gives the touched rows alone).

    implementation: "pallas_tpu", "pallas_mosaic_gpu" (Hopper, Blackwell), "pallas_triton" (other NVIDIA GPUs),
    "chunked", "reference", a tuple of them to try in turn, or None for the first in that order that serves. The kernels
    have first derivatives and no GLU; the others have all.

    Raises ValueError for shapes and dtypes that do not fit, sizes of 0, and an implementation that is unknown or cannot
    serve.
    """
    name, x, ids, gates, table = _prepare("peer_experts", x, ids, gates, table, implementation)
    if name == "reference":
        return reference.forward(activation, x, ids, gates, table)
    y = _experts(name, activation, *_as_one_row(x, ids, gates), table)
    return y.reshape(x.shape)


def peer_experts_with_sink(x: Array, ids: Array, gates: Array, table: Array, sink: Array, *,
                           activation: Callable[[Array], Array],
                           implementation: str | tuple[str, ...] | None = None) -> tuple[Array, rows.TouchedRows]:
    """`peer_experts`, and the ids of the rows that were touched; the gradient of `sink` is that of those rows.

    sink [U, R, D]: zeros, U = num_touched(B * T * H * K, N). It changes nothing in y; row u of its gradient is the
    gradient of table[touched.ids[u]], summed over all tokens that chose it, and 0 where touched.ids[u] is N. The table
    itself gets no gradient, so that no array of its size is made.
    """
    op = "peer_experts_with_sink"
    name, x, ids, gates, table = _prepare(op, x, ids, gates, table, implementation)
    sink = jnp.asarray(sink)
    want = (rows.num_touched(ids.size, table.shape[0]), *table.shape[1:])
    if sink.shape != want:
        raise ValueError(f"{op}: sink has shape {sink.shape}; it must be [min(B*T*H*K, N), R, D] = {want}")
    check_dtypes(op, FLOATS, sink=sink)
    pairs, touched = rows.compact(rows.sort_pairs(ids), table.shape[0])
    table, sink = vary_alike(jax.lax.stop_gradient(table), sink, x)[:2]
    if name == "reference":
        table = table.at[touched.ids].add(sink.astype(table.dtype), mode="drop")
        return reference.forward(activation, x, ids, gates, table), touched
    y = _experts_with_sink(name, activation, *_as_one_row(x, ids, gates), table, sink, pairs)
    return y.reshape(x.shape), touched


def _prepare(op: str, x, ids, gates, table, implementation):
    """(name, x, ids, gates, table), checked; ids [B, T, P] are N and gates 0 where no expert is chosen."""
    x, ids, gates, table = map(jnp.asarray, (x, ids, gates, table))
    check_shapes(op, x=(x, "B T D"), ids=(ids, "B T H K"), gates=(gates, "B T H K"), table=(table, "N R D"))
    for name, array in dict(x=x, gates=gates, table=table).items():
        check_dtypes(op, FLOATS, **{name: array})
    check_dtypes(op, ("int32",), ids=ids)
    if table.shape[1] not in (2, 3):
        raise ValueError(f"{op}: table has shape {table.shape}; it must be [N, 2, D], down and up, or [N, 3, D], down, "
                         "up and gate")
    num_experts, kinds, width = table.shape
    dtypes = {"x": x.dtype.name, "table": table.dtype.name}
    name = dispatch.choose(op, implementation, {
        "pallas_tpu": functools.partial(pallas_tpu.unsupported, dtypes, kinds, width),
        "pallas_mosaic_gpu": functools.partial(pallas_mosaic_gpu.unsupported, dtypes, kinds, width),
        "pallas_triton": functools.partial(pallas_triton.unsupported, dtypes, kinds, width),
        "chunked": lambda platform: None,
        "reference": lambda platform: None,
    })
    checkify.debug_check(jnp.all((ids >= -1) & (ids < num_experts)),
                         op + ": ids from {low} to {high}; table has rows 0 to {last}, and -1 chooses none",
                         low=ids.min(), high=ids.max(), last=jnp.int32(num_experts - 1))
    known = (ids >= 0) & (ids < num_experts)
    merged = lambda a: a.reshape(*a.shape[:2], -1)
    ids, gates = merged(jnp.where(known, ids, num_experts)), merged(jnp.where(known, gates, 0))
    return name, *vary_alike(x, ids, gates, table)


def _as_one_row(*arrays: Array) -> tuple[Array, ...]:
    """[1, B * T, ...], unless B may be split over devices: then it stays an axis of its own."""
    if dispatch.automatic_axes() is not None:
        return arrays
    return tuple(a.reshape(1, -1, *a.shape[2:]) for a in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(name: str, activation: Callable, x: Array, ids: Array, gates: Array, table: Array) -> Array:
    return _MODULES[name].forward(activation, x, ids, gates, table)


def _experts_forward(name, activation, x, ids, gates, table):
    y, inner = _forward_and_inner(name, activation, x, ids, gates, table)
    return y, (x, ids, gates, table, inner)


def _experts_backward(name, activation, saved, dy):
    x, ids, gates, table, inner = saved
    dx, dgates, factors = _MODULES[name].backward(activation, x, ids, gates, table, dy, *inner)
    of_tokens, experts = _of_tokens(factors, x, dy), table.shape[0]
    if chunked.where_they_lie(table):
        dtable = dense.sum_dense(ids.reshape(-1, ids.shape[-1]), *of_tokens, experts)
    else:
        dtable = rows.sum_pairs(rows.sort_pairs(ids), *of_tokens, experts)
    return dx, None, dgates, dtable.astype(table.dtype)


_experts.defvjp(_experts_forward, _experts_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts_with_sink(name, activation, x, ids, gates, table, sink, pairs) -> Array:
    return _MODULES[name].forward(activation, x, ids, gates, table)


def _with_sink_forward(name, activation, x, ids, gates, table, sink, pairs):
    y, inner = _forward_and_inner(name, activation, x, ids, gates, table)
    return y, (x, ids, gates, table, sink, pairs, inner)


def _with_sink_backward(name, activation, saved, dy):
    x, ids, gates, table, sink, pairs, inner = saved
    dx, dgates, factors = _MODULES[name].backward(activation, x, ids, gates, table, dy, *inner)
    dsink = rows.sum_pairs(pairs, *_of_tokens(factors, x, dy), sink.shape[0])
    return dx, None, dgates, None, dsink.astype(sink.dtype), None


_experts_with_sink.defvjp(_with_sink_forward, _with_sink_backward)


def _forward_and_inner(name, activation, *given):
    """(y, more arguments of the backward)."""
    if name != "chunked":
        return _MODULES[name].forward(activation, *given), ()
    y, inner = chunked.forward_and_inner(activation, *given)
    return y, (inner,)


def _of_tokens(factors: Array, x: Array, dy: Array) -> tuple[Array, Array, Array]:
    """[M, P, R], [M, D], [M, D]."""
    width = x.shape[-1]
    return factors.reshape(-1, *factors.shape[2:]), x.reshape(-1, width), jnp.asarray(dy).reshape(-1, width)
