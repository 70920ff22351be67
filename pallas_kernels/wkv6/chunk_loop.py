"""TPU kernels of a recurrence in chunks: the state stays in VMEM while a row's chunks pass, in order or in reverse.

`chunk(heads, exact, arrays, constants, keep, state) -> (y, state)` is one chunk in two-dimensional float32 values,
arrays and constants dicts by name (the operations it may use are in vmem_ops.py). The backward kernel first goes
through its block to find the state that each chunk starts from, then from its end with jax.vjp of the same chunk.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.wkv6.config import Tiles
from pallas_kernels.wkv6.lanes import LANES, Lanes

Array = jax.Array
Arrays = Mapping[str, Array]


def forward(name: str, chunk: Callable, lanes: Lanes, tiles: Tiles, arrays: Arrays, constants: Arrays,
            state: Array, reset: Array | None, save: bool) -> tuple[Array, Array, Array | None]:
    """y [B, time, lanes], the final state, and with `save` the states that the blocks start from.

    arrays: packed [B, time, lanes], "v" among them; constants [B, 1, lanes] the same for all positions; state packed.
    """
    tile, size = tiles
    specs = _Specs(lanes, tile, lambda t: t)
    blocks = lanes.time // tile
    resets, reset_specs, scratch = specs.resets(reset)
    y, last, *starts = pl.pallas_call(
        functools.partial(_forward_kernel, chunk, lanes.together, size, tuple(arrays), tuple(constants),
                          reset is not None, save),
        grid=(lanes.batch, lanes.groups, blocks),
        in_specs=[*reset_specs, *map(specs.block, arrays.values()), *map(specs.constant, constants.values()),
                  specs.state],
        out_specs=[specs.block(arrays["v"]), specs.state, *([specs.start] if save else [])],
        out_shape=[_like(arrays["v"]), _like(state), *([_like(state, (lanes.batch, blocks, *state.shape[1:]))]
                                                       if save else [])],
        scratch_shapes=[pltpu.VMEM(state.shape[2:], jnp.float32), *scratch],
        compiler_params=_IN_ORDER, cost_estimate=_cost(lanes, (*arrays.values(), arrays["v"])), name=name,
    )(*resets, *arrays.values(), *constants.values(), state)
    return y, last, (starts[0] if save else None)


def backward(name: str, chunk: Callable, lanes: Lanes, tiles: Tiles, arrays: Arrays, constants: Arrays,
             starts: Array, reset: Array | None, dy: Array, dlast: Array) -> tuple[dict, dict, Array]:
    """Gradients of arrays, constants (float32) and the initial state, from the states that blocks start from."""
    tile, size = tiles
    blocks = lanes.time // tile
    specs = _Specs(lanes, tile, lambda t: blocks - 1 - t)
    resets, reset_specs, scratch = specs.resets(reset)
    in_blocks, fixed = [*map(specs.block, arrays.values())], [*map(specs.constant, constants.values())]
    out = pl.pallas_call(
        functools.partial(_backward_kernel, chunk, lanes.together, size, tuple(arrays), tuple(constants),
                          reset is not None),
        grid=(lanes.batch, lanes.groups, blocks),
        in_specs=[*reset_specs, *in_blocks, *fixed, specs.start, specs.block(dy), specs.state],
        out_specs=[*in_blocks, *fixed, specs.state],
        out_shape=[*map(_like, arrays.values()), *map(_like, constants.values()), _like(dlast)],
        scratch_shapes=[pltpu.VMEM((tile // size, *dlast.shape[2:]), jnp.float32), *scratch],
        compiler_params=_IN_ORDER, cost_estimate=_cost(lanes, (*arrays.values(), *arrays.values(), dy), 3), name=name,
    )(*resets, *arrays.values(), *constants.values(), starts, dy, dlast)
    return dict(zip(arrays, out, strict=False)), dict(zip(constants, out[len(arrays):], strict=False)), out[-1]


def _forward_kernel(chunk, heads, size, names, constant_names, has_reset, save, *refs):
    reset_ref, refs = (refs[0], refs[1:]) if has_reset else (None, refs)
    arrays, refs = _take(names, refs)
    constants, (first_ref, y_ref, last_ref, *refs) = _take(constant_names, refs)
    starts_ref, (state, *keep) = (refs[0], refs[1:]) if save else (None, refs)
    turn_resets(reset_ref, keep)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = first_ref[0, 0]

    if save:
        starts_ref[0, 0, 0] = state[...]
    fixed = {name: ref[0] for name, ref in constants.items()}

    def trip(i, _):
        here = pl.ds(pl.multiple_of(i * size, size), size)
        y, state[...] = chunk(heads, arrays["v"].dtype == jnp.float32, _read(arrays, here), fixed,
                              keep[0][here] if keep else None, state[...])
        y_ref[0, here] = y.astype(y_ref.dtype)

    jax.lax.fori_loop(0, y_ref.shape[1] // size, trip, None)
    last_ref[0, 0] = state[...]


def _backward_kernel(chunk, heads, size, names, constant_names, has_reset, *refs):
    reset_ref, refs = (refs[0], refs[1:]) if has_reset else (None, refs)
    arrays, refs = _take(names, refs)
    constants, (start_ref, dy_ref, dlast_ref, *refs) = _take(constant_names, refs)
    darrays, refs = _take(names, refs)
    dconstants, (dstate, states, *keep) = _take(constant_names, refs)
    turn_resets(reset_ref, keep)
    fixed, trips = {name: ref[0] for name, ref in constants.items()}, dy_ref.shape[1] // size

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dlast_ref[...]
        for ref in dconstants.values():
            ref[...] = jnp.zeros_like(ref)

    def of(i):
        here = pl.ds(pl.multiple_of(i * size, size), size)
        kept = keep[0][here] if keep else None
        return here, lambda x, constants, state: chunk(heads, arrays["v"].dtype == jnp.float32, x, constants, kept,
                                                       state)

    def onward(i, _):
        here, run = of(i)
        states[i + 1] = run(_read(arrays, here), fixed, states[i])[1]

    def back(n, _):
        i = trips - 1 - n
        here, run = of(i)
        _, pull = jax.vjp(run, _read(arrays, here), fixed, states[i])
        dx, dfixed, dstate[0, 0] = pull((dy_ref[0, here].astype(jnp.float32), dstate[0, 0]))
        for name, ref in darrays.items():
            ref[0, here] = dx[name].astype(ref.dtype)
        for name, ref in dconstants.items():
            ref[0] += dfixed[name]

    states[0] = start_ref[0, 0, 0]
    jax.lax.fori_loop(0, trips - 1, onward, None)
    jax.lax.fori_loop(0, trips, back, None)


def _take(names, refs):
    return dict(zip(names, refs, strict=False)), refs[len(names):]


def _read(refs, here) -> dict[str, Array]:
    return {name: ref[0, here].astype(jnp.float32) for name, ref in refs.items()}


def turn_resets(reset_ref, keep) -> None:
    """Fill keep[0], [tile, 128], with 1 - reset of each position in all lanes; in memory they lie along lanes."""
    if keep:
        for start in range(0, keep[0].shape[0], LANES):
            along = jnp.broadcast_to(1 - reset_ref[0, :, pl.ds(start, LANES)], (LANES, LANES))
            keep[0][pl.ds(start, LANES), :] = along.T


# Rows and groups of heads are independent; blocks of one row go in order, so that its state can stay in VMEM.
_IN_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


class _Specs:
    """Where a step (row, group, block) of the grid reads and writes."""

    def __init__(self, lanes: Lanes, tile: int, order: Callable):
        self.lanes, self.tile, self.order = lanes, tile, order
        side = (lanes.together * lanes.value, lanes.together * lanes.key)
        self.state = pl.BlockSpec((1, 1, *side), lambda b, g, t: (b, g, 0, 0))
        self.start = pl.BlockSpec((1, 1, 1, *side), lambda b, g, t: (b, order(t), g, 0, 0))

    def block(self, x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.tile, x.shape[2] // self.lanes.groups), lambda b, g, t: (b, self.order(t), g))

    def constant(self, x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, x.shape[2] // self.lanes.groups), lambda b, g, t: (b, 0, g))

    def resets(self, reset: Array | None) -> tuple[list, list, list]:
        """(arguments, their specs, scratch): [B, 1, T], because [B, T, 1] would take 128 lanes a position in memory."""
        if reset is None:
            return [], [], []
        reset = jnp.pad(reset.astype(jnp.float32), ((0, 0), (0, self.lanes.time - self.lanes.length)))
        return ([reset[:, None]], [pl.BlockSpec((1, 1, self.tile), lambda b, g, t: (b, 0, self.order(t)))],
                [pltpu.VMEM((self.tile, LANES), jnp.float32)])


def _like(x: Array, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """What x is; inside jax.shard_map that includes the mesh axes over which it varies."""
    return jax.ShapeDtypeStruct(shape or x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _cost(lanes: Lanes, moved: tuple[Array, ...], times: int = 1) -> pl.CostEstimate:
    """The four products with or to the state, and the bytes of what is read and written."""
    steps = lanes.batch * lanes.time * lanes.groups * lanes.together
    return pl.CostEstimate(flops=times * 4 * steps * lanes.key * lanes.value, transcendentals=steps * lanes.key,
                           bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved))
