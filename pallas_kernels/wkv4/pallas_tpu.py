"""TPU kernels. B batch, T time, C channels; in memory [B, T, C] as it comes.

A step wants 8 batch rows on sublanes; memory has 8 steps there. Blocks are turned in registers (`registers.py`), which
costs a fifth of the arithmetic and no byte of traffic. README.md has the derivation and the cycles.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.wkv4 import tpu_backward, tpu_forward
from pallas_kernels.wkv4.config import BITS, LANES, SUBLANES, TIME, Tiles, backward_chains, forward_chains, tiles
from pallas_kernels.wkv4.registers import steps_turned

Array = jax.Array


def unsupported(dtype: str, platform: str) -> str | None:
    """Why these kernels cannot serve, or None."""
    if platform != "tpu":
        return f"it needs a TPU and this is {platform}"
    if dtype not in ("float32", "bfloat16"):
        return f"it takes float32 and bfloat16, not {dtype}"
    return dispatch.automatic_axes()


@merged_into_batch
def forward(w: Array, u: Array, k: Array, v: Array, state: Array, reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, C] in v's dtype and the final state [B, 2, C] in float32."""
    return _forward(w, u, k, v, state, reset, saving=False)


@merged_into_batch
def forward_saving(w: Array, u: Array, k: Array, v: Array, state: Array,
                   reset: Array | None) -> tuple[Array, Array, Array]:
    """y, the final state, and the states [B, blocks, 2, C] before each block of `TIME` steps."""
    return _forward(w, u, k, v, state, reset, saving=True)


@merged_into_batch
def backward(w: Array, u: Array, k: Array, v: Array, reset: Array | None, starts: Array, last: Array, dy: Array,
             dlast: Array) -> tuple[Array, Array, Array, Array, Array]:
    """(dw, du, dk, dv, dstate) from the saved states and the cotangents of y and of the final state."""
    tile = tiles(k.shape[0], k.shape[2], backward_chains(k.dtype.itemsize))
    grid, spec = _blocks(k.shape, tile, backwards=True)
    resets, reset_specs, words = _resets(reset, spec)
    wide = lambda num: pltpu.VMEM((num, tile.chains, SUBLANES, LANES), jnp.float32)
    states = pltpu.VMEM((TIME, tile.chains, 3, SUBLANES, LANES), jnp.float32)
    groups = TIME // steps_turned(k.dtype)
    turned = [_turned(k, groups, tile.chains), _turned(k, groups, tile.chains), _turned(k, tpu_forward.TOGETHER)]
    mean, dmean, dlog = last[:, 0], dlast[:, 0], dlast[:, 1]
    adjoint = jnp.stack([dmean, dlog - dmean * mean], axis=1)
    dw, du, dk, dv, adjoint = pl.pallas_call(
        functools.partial(tpu_backward.kernel, tile, k.shape[1], reset is not None),
        grid=grid,
        in_specs=[*reset_specs, spec["row"], spec["row"], spec["start"], spec["state"], *[spec["block"]] * 3],
        out_specs=[spec["row"], spec["row"], spec["block"], spec["block"], spec["state"]],
        out_shape=[_like(w[:, None]), _like(u[:, None]), _like(k), _like(v), _like(adjoint)],
        scratch_shapes=[wide(2), wide(3), wide(2), wide(2), states, *turned, *words],
        compiler_params=_IN_ORDER, cost_estimate=_cost(k, arrays=5, operations=60, exponentials=6),
        name="wkv4_backward",
    )(*resets, w[:, None], u[:, None], starts, adjoint, k, v, dy)
    da, db = adjoint[:, 0], adjoint[:, 1]
    return dw[:, 0], du[:, 0], dk, dv, jnp.stack([da, da * starts[:, 0, 0] + db], axis=1)


def _forward(w, u, k, v, state, reset, saving: bool) -> tuple[Array, ...]:
    tile = tiles(k.shape[0], k.shape[2], forward_chains(k.dtype.itemsize))
    grid, spec = _blocks(k.shape, tile, backwards=False)
    resets, reset_specs, words = _resets(reset, spec)
    wide = lambda num: pltpu.VMEM((num, tile.chains, SUBLANES, LANES), jnp.float32)
    out_specs, out_shape = [spec["block"], spec["state"]], [_like(v), _like(state)]
    if saving:
        out_specs.append(spec["start"])
        out_shape.append(_like(state[:, None], state.shape[0], grid[2], *state.shape[1:]))
    return tuple(pl.pallas_call(
        functools.partial(tpu_forward.kernel, tile, k.shape[1], reset is not None, saving),
        grid=grid,
        in_specs=[*reset_specs, spec["row"], spec["row"], spec["state"], spec["block"], spec["block"]],
        out_specs=out_specs, out_shape=out_shape, 
        scratch_shapes=[wide(2), wide(3), *[_turned(k, tpu_forward.TOGETHER)] * 2, *words],
        compiler_params=_IN_ORDER, cost_estimate=_cost(k, arrays=3, operations=20, exponentials=4),
        name="wkv4_forward",
    )(*resets, w[:, None], u[:, None], state, k, v))


# Batch rows and channels are independent; blocks of one row go in order of time, so that its state can stay in VMEM.
_IN_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _blocks(shape: tuple[int, int, int], tile: Tiles, backwards: bool):
    """The grid (batch, channels, time) and where each of its steps reads and writes."""
    batch, length, width = shape
    grid = (pl.cdiv(batch, tile.rows), pl.cdiv(width, tile.width), pl.cdiv(length, TIME))
    when = (lambda t: grid[2] - 1 - t) if backwards else (lambda t: t)
    return grid, {
        "block": pl.BlockSpec((tile.rows, TIME, tile.width), lambda b, c, t: (b, when(t), c)),
        "row": pl.BlockSpec((tile.rows, 1, tile.width), lambda b, c, t: (b, 0, c)),
        "state": pl.BlockSpec((tile.rows, 2, tile.width), lambda b, c, t: (b, 0, c)),
        "start": pl.BlockSpec((tile.rows, None, 2, tile.width), lambda b, c, t: (b, when(t), 0, c)),
        "reset": pl.BlockSpec((tile.rows, None, 1, TIME // BITS), lambda b, c, t: (b, when(t), 0, 0)),
    }


def _resets(reset: Array | None, spec) -> tuple[list, list, list]:
    """(arguments, their specs, scratch): bit i of word j of a block says whether step 32 j + i resets."""
    if reset is None:
        return [], [], []
    batch, length = reset.shape
    blocks = pl.cdiv(length, TIME)
    bits = jnp.pad(reset, ((0, 0), (0, blocks * TIME - length))).reshape(batch, blocks, 1, TIME // BITS, BITS)
    words = (bits.astype(jnp.uint32) << jnp.arange(BITS, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
    return ([jax.lax.bitcast_convert_type(words, jnp.int32)], [spec["reset"]],
            [pltpu.VMEM((TIME // BITS, SUBLANES, LANES), jnp.int32)])


def _turned(k: Array, *sizes: int):
    """Scratch for turned registers of k's dtype, eight at a time."""
    dtype = jnp.int32 if k.dtype == jnp.bfloat16 else jnp.float32
    return pltpu.VMEM((*sizes, SUBLANES, SUBLANES, LANES), dtype)


def _like(x: Array, *shape: int) -> jax.ShapeDtypeStruct:
    """What x is, in another shape if one is given; inside jax.shard_map with the mesh axes over which x varies."""
    return jax.ShapeDtypeStruct(shape or x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _cost(k: Array, arrays: int, operations: int, exponentials: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=operations * k.size, bytes_accessed=arrays * k.size * k.dtype.itemsize,
                           transcendentals=exponentials * k.size)
