"""TPU kernels: the two rows of an expert come from HBM by one DMA, while earlier tokens are computed.

M tokens, P = heads * k experts a token, N experts, D width; an expert's down and up are [D / 128, 128] here.

A token is three steps: products of the rows with x (and dy), 8 experts a trip; then everything that is one number an
expert, in a row of P lanes; then the sum of the rows by these numbers, 8 experts a trip. The DMAs of a later token are
started in the trips of the first and third step, so that their scalar instructions share bundles with vector ones.

The compiler stores [N, 2, D] in tiles of 2 x 128, which is as [N, 2 D / 128, 128] in whole registers: 128 columns of
down, the same columns of up, and so on. In bfloat16 the two are the halves of one word.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.peer_experts.config import SLOTS, block_tokens
from pallas_kernels.peer_experts.merging import merging_tokens

Array = jax.Array
LANES = 128
GROUP = 8      # experts of a trip, and the sublanes of a register
DOWN, UP = range(2)


def unsupported(dtypes: dict[str, str], kinds: int, width: int, platform: str) -> str | None:
    """Why these kernels cannot serve, or None."""
    if platform != "tpu":
        return f"it needs a TPU and this is {platform}"
    for name, dtype in dtypes.items():
        if dtype not in ("float32", "bfloat16"):
            return f"it takes float32 and bfloat16, and {name} is {dtype}"
    if kinds != 2:
        return "it takes tables [N, 2, D]: one of three rows an expert would be copied, padded to four"
    if width % 512:
        return f"D={width} is not a multiple of 512: the table would be copied into another layout"
    return dispatch.automatic_axes()


def forward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array) -> Array:
    """y [B, T, D] in x's dtype. ids [B, T, P] outside of the table have gates of 0."""
    call = merging_tokens(functools.partial(_call, "forward", activation))
    y, = call(ids, gates, table, x)
    return y


def backward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array,
             dy: Array) -> tuple[Array, Array, Array]:
    """(dx, dgates, factors) as in `chunked.backward`."""
    call = merging_tokens(functools.partial(_call, "backward", activation))
    dx, dgates, *factors = call(ids, gates, table, x, jnp.asarray(dy))
    return dx, dgates.astype(gates.dtype), jnp.stack(factors, axis=-1)


def _call(direction: str, activation: Callable, ids: Array, gates: Array, table: Array, *given: Array) -> list[Array]:
    """given: x, or x and dy, [B, T, D]. Returns [y], or [dx, dgates, factors of down, of up]."""
    shape, chosen = given[0].shape, ids.shape[-1]
    num_experts, _, width = table.shape
    flat = lambda a, more=0: jnp.pad(a.reshape(-1, a.shape[-1]), ((0, 0), (0, more)))
    ids = flat(jnp.minimum(ids, num_experts - 1), -chosen % GROUP)
    gates, given = flat(gates.astype(jnp.float32), -chosen % GROUP), [flat(a) for a in given]
    table = table.reshape(num_experts, 2, -1, LANES).swapaxes(1, 2).reshape(num_experts, -1, LANES)
    tokens, pairs = ids.shape
    block = block_tokens(tokens, width)
    per_token = lambda size, space=None: pl.BlockSpec((block, size), lambda i: (i, 0), memory_space=space)
    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=jax.typeof(a).manual_axis_type)
    scalars = 0 if direction == "forward" else 3
    out = pl.pallas_call(
        functools.partial(_kernel, activation, tokens, len(given)),
        grid=(pl.cdiv(tokens, block),),
        in_specs=[per_token(pairs, pltpu.SMEM), per_token(pairs), pl.BlockSpec(memory_space=pl.ANY),
                  *[per_token(width)] * len(given)],
        out_specs=[per_token(width), *[per_token(pairs)] * scalars],
        out_shape=[like(given[0]), *[like(gates)] * scalars],
        scratch_shapes=[pltpu.VMEM((SLOTS, pairs, *table.shape[1:]), table.dtype), pltpu.SemaphoreType.DMA((SLOTS,)),
                        *[pltpu.VMEM((block, width // LANES, LANES), jnp.float32)] * (len(given) + 1),
                        *[pltpu.VMEM((pairs, LANES), jnp.float32)] * 2],
        # Ids are within the table, and half of a copy's instructions would check that.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=4 * tokens * pairs * width * len(given), transcendentals=tokens * pairs,
            bytes_accessed=tokens * (2 * pairs * width * table.dtype.itemsize + (2 + scalars) * 4 * pairs
                                     + (1 + len(given)) * width * given[0].dtype.itemsize)),
        name=f"peer_experts_{direction}",
    )(ids, gates, table, *given)
    return [out[0].reshape(shape), *(a[:, :chosen].reshape(*shape[:2], chosen) for a in out[1:])]


def _kernel(activation: Callable, num_tokens: int, num_given: int, ids, gates, table, *refs):
    """One block of tokens. num_given: 1 forward (x), 2 backward (x, dy)."""
    given, (out, *scalars) = refs[:num_given], refs[num_given:1 + num_given + (0 if num_given == 1 else 3)]
    rows, arrived, total, *wide = refs[num_given + 1 + len(scalars):-2]
    sums = refs[-2:]                                             # [P, 128] of the down and of the up row
    block, pairs = ids.shape
    count = jnp.minimum(block, num_tokens - pl.program_id(0) * block)
    for source, target in zip(given, wide, strict=True):
        target[...] = source[...].astype(jnp.float32).reshape(target.shape)

    def fetch(token, first, number):
        """Start the copies of `number` experts of a token. Past the last token, of the last one again: no branch."""
        slot, token = jax.lax.rem(token, SLOTS), jnp.minimum(token, count - 1)
        for j in range(number):
            pltpu.make_async_copy(table.at[ids[token, first + j]], rows.at[slot, first + j], arrived.at[slot]).start()

    def wait(token):
        slot = jax.lax.rem(token, SLOTS)
        pltpu.make_async_copy(rows.at[slot], rows.at[slot], arrived.at[slot]).wait()

    def step(token, _):
        wait(token)
        slot, ahead = jax.lax.rem(token, SLOTS), token + SLOTS - 1
        vectors = dict(zip((DOWN, UP), (w[token] for w in wide), strict=False))
        inner = _products(rows, slot, vectors, sums, lambda group: fetch(ahead, group * GROUP, GROUP // 2))
        weight = gates[pl.ds(token, 1), :]
        if num_given == 1:
            kind, number = UP, weight * activation(inner[DOWN])
        else:
            hidden, pull = jax.vjp(activation, inner[DOWN])
            kind, (number,) = DOWN, pull(weight * inner[UP])
            for target, value in zip(scalars, (hidden * inner[UP], number, weight * hidden), strict=True):
                _write_row(target, token, value)
        total[token] = _sum_rows(rows, slot, kind, number, sums[kind],
                                 lambda group: fetch(ahead, group * GROUP + GROUP // 2, GROUP // 2))
        return 0

    def first(i, _):
        fetch(i // (pairs // GROUP), jax.lax.rem(i, pairs // GROUP) * GROUP, GROUP)
        return 0

    jax.lax.fori_loop(0, (SLOTS - 1) * (pairs // GROUP), first, 0)
    jax.lax.fori_loop(0, count, step, 0)
    for i in range(SLOTS - 1):
        wait(count + i)
    out[...] = total[...].reshape(out.shape).astype(out.dtype)


def _products(rows, slot, vectors: dict[int, Array], sums, start: Callable) -> dict[int, Array]:
    """Product of each expert's row of a kind with the vector for it, [1, P]."""
    pairs = rows.shape[1]

    def trip(group, _):
        here = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
        start(group)
        for kind, vector in vectors.items():
            sums[kind][here, :] = jnp.sum(_read(rows, slot, here, kind) * vector, axis=1)
        return 0

    jax.lax.fori_loop(0, pairs // GROUP, trip, 0)
    own = _diagonal(pairs)
    across = lambda x: jnp.sum(jnp.where(own, jnp.sum(x, axis=1, keepdims=True), 0), axis=0, keepdims=True)
    return {kind: across(sums[kind][...]) for kind in vectors}


def _sum_rows(rows, slot, kind: int, numbers: Array, spread, start: Callable) -> Array:
    """[D / 128, 128]: sum of the experts' rows of a kind by numbers [1, P]."""
    pairs = rows.shape[1]
    column = jnp.sum(jnp.where(_diagonal(pairs), numbers, 0), axis=1, keepdims=True)
    spread[...] = jnp.broadcast_to(column, spread.shape)

    def trip(group, total):
        first = pl.multiple_of(group * GROUP, GROUP)
        start(group)
        parts = [spread[pl.ds(first + j, 1), :] * _read(rows, slot, pl.ds(first + j, 1), kind)[0] for j in range(GROUP)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return total + parts[0]

    size = rows.shape[2] // 2
    return jax.lax.fori_loop(0, pairs // GROUP, trip, jnp.zeros((size, LANES), jnp.float32))


def _diagonal(size: int) -> Array:
    return (jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
            == jax.lax.broadcasted_iota(jnp.int32, (size, size), 1))


def _read(rows, slot, here, kind: int) -> Array:
    """[experts, D / 128, 128] in float32."""
    if rows.dtype == jnp.float32:
        return rows[slot, here, pl.ds(kind, rows.shape[2] // 2, stride=2), :]
    words = pltpu.bitcast(rows[slot, here], jnp.int32)
    return pltpu.bitcast(words & -65536 if kind == UP else words << 16, jnp.float32)


def _write_row(target, row, value: Array) -> None:
    """Write value [1, W] into a row: stores go to whole groups of 8 rows, so the other seven are written again."""
    where = pl.ds(pl.multiple_of(row // GROUP * GROUP, GROUP), GROUP), slice(None)
    mine = jax.lax.broadcasted_iota(jnp.int32, (GROUP, value.shape[1]), 0) == jax.lax.rem(row, GROUP)
    target[where] = jnp.where(mine, value, target[where])
