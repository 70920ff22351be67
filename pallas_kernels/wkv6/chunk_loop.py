"""TPU kernels of a recurrence in chunks: the state stays in VMEM while a row's chunks pass, in order or in reverse.

`chunk(heads, exact, arrays, constants, keep, state) -> (y, state)` is one chunk in two-dimensional float32 values,
arrays and constants dicts by name (the operations it may use are in vmem_ops.py). The forward saves the state that
each chunk starts from, in the dtype of the inputs, and the backward kernel takes jax.vjp of the same chunk from there.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.wkv6.config import Tiles
from pallas_kernels.wkv6.lanes import LANES, Lanes
from pallas_kernels.wkv6.vmem_ops import apart, together

Array = jax.Array
Arrays = Mapping[str, Array]


def forward(name: str, chunk: Callable, lanes: Lanes, tiles: Tiles, arrays: Arrays, constants: Arrays,
            state: Array, reset: Array | None, save: bool) -> tuple[Array, Array, Array | None]:
    """y [B, time, lanes], the final state, and with `save` the states that the chunks start from, `Specs.saved`.

    arrays: packed [B, time, lanes], "v" among them; constants [B, 1, lanes] the same for all positions; state packed.
    """
    tile, size = tiles
    specs = Specs(lanes, tiles, lambda t: t)
    blocks = lanes.time // tile
    resets, reset_specs, scratch = specs.resets(reset)
    y, last, *starts = pl.pallas_call(
        functools.partial(_forward_kernel, chunk, lanes.together, size, tuple(arrays), tuple(constants),
                          reset is not None, save),
        grid=(lanes.batch, specs.steps, blocks),
        in_specs=[*reset_specs, *map(specs.block, arrays.values()), *map(specs.constant, constants.values()),
                  specs.state],
        out_specs=[specs.block(arrays["v"]), specs.state, *([specs.start] if save else [])],
        out_shape=[like(arrays["v"]), like(state), *([like(arrays["v"], specs.saved)] if save else [])],
        scratch_shapes=[pltpu.VMEM(specs.side, jnp.float32), *scratch],
        compiler_params=IN_ORDER, cost_estimate=cost(lanes, (*arrays.values(), arrays["v"])), name=name,
    )(*resets, *arrays.values(), *constants.values(), state)
    return y, last, (starts[0] if save else None)


def backward(name: str, chunk: Callable, lanes: Lanes, tiles: Tiles, arrays: Arrays, constants: Arrays,
             starts: Array, reset: Array | None, dy: Array, dlast: Array) -> tuple[dict, dict, Array]:
    """Gradients of arrays, constants (float32) and the initial state, from the states that chunks start from."""
    tile, size = tiles
    blocks = lanes.time // tile
    specs = Specs(lanes, tiles, lambda t: blocks - 1 - t)
    resets, reset_specs, scratch = specs.resets(reset)
    in_blocks, fixed = [*map(specs.block, arrays.values())], [*map(specs.constant, constants.values())]
    out = pl.pallas_call(
        functools.partial(_backward_kernel, chunk, lanes.together, size, tuple(arrays), tuple(constants),
                          reset is not None),
        grid=(lanes.batch, specs.steps, blocks),
        in_specs=[*reset_specs, *in_blocks, *fixed, specs.start, specs.block(dy), specs.state],
        out_specs=[*in_blocks, *fixed, specs.state],
        out_shape=[*map(like, arrays.values()), *map(like, constants.values()), like(dlast)],
        scratch_shapes=scratch,
        compiler_params=IN_ORDER, cost_estimate=cost(lanes, (*arrays.values(), *arrays.values(), dy), 3), name=name,
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
        state[...] = first_ref[0]

    groups = state.shape[0]

    def trip(i, _):
        here = pl.ds(pl.multiple_of(i * size, size), size)
        for g in range(groups):
            if save:
                starts_ref[0, i, g] = together(heads, state[g]).astype(starts_ref.dtype)
            y, state[g] = chunk(heads, arrays["v"].dtype == jnp.float32, _read(arrays, here, g, groups),
                                _read(constants, slice(None), g, groups), keep[0][here] if keep else None, state[g])
            y_ref[0, here, _lanes(y_ref, g, groups)] = y.astype(y_ref.dtype)

    jax.lax.fori_loop(0, y_ref.shape[1] // size, trip, None)
    last_ref[0] = state[...]


def _backward_kernel(chunk, heads, size, names, constant_names, has_reset, *refs):
    reset_ref, refs = (refs[0], refs[1:]) if has_reset else (None, refs)
    arrays, refs = _take(names, refs)
    constants, (start_ref, dy_ref, dlast_ref, *refs) = _take(constant_names, refs)
    darrays, refs = _take(names, refs)
    dconstants, (dstate, *keep) = _take(constant_names, refs)
    turn_resets(reset_ref, keep)
    trips, groups = dy_ref.shape[1] // size, dstate.shape[1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dlast_ref[...]
        for ref in dconstants.values():
            ref[...] = jnp.zeros_like(ref)

    def back(n, _):
        i = trips - 1 - n
        here = pl.ds(pl.multiple_of(i * size, size), size)
        kept = keep[0][here] if keep else None
        run = lambda x, fixed, state: chunk(heads, arrays["v"].dtype == jnp.float32, x, fixed, kept, state)
        for g in range(groups):
            x, fixed = _read(arrays, here, g, groups), _read(constants, slice(None), g, groups)
            _, pull = jax.vjp(run, x, fixed, apart(heads, start_ref[0, i, g].astype(jnp.float32)))
            dy = dy_ref[0, here, _lanes(dy_ref, g, groups)].astype(jnp.float32)
            dx, dfixed, dstate[0, g] = pull((dy, dstate[0, g]))
            for name, ref in darrays.items():
                ref[0, here, _lanes(ref, g, groups)] = dx[name].astype(ref.dtype)
            for name, ref in dconstants.items():
                ref[0, :, _lanes(ref, g, groups)] += dfixed[name]

    jax.lax.fori_loop(0, trips, back, None)


def _take(names, refs):
    return dict(zip(names, refs, strict=False)), refs[len(names):]


def _lanes(ref, group: int, groups: int) -> slice:
    """Columns of one of the groups of heads that a block holds."""
    width = ref.shape[2] // groups
    return slice(group * width, (group + 1) * width)


def _read(refs, here, group: int, groups: int) -> dict[str, Array]:
    return {name: ref[0, here, _lanes(ref, group, groups)].astype(jnp.float32) for name, ref in refs.items()}


def turn_resets(reset_ref, keep) -> None:
    """Fill keep[0], [tile, 128], with 1 - reset of each position in all lanes; in memory they lie along lanes."""
    if keep:
        turn_lanes(lambda start: 1 - reset_ref[0, :, pl.ds(start, LANES)], keep[0])


def turn_lanes(along: Callable, ref) -> None:
    """Fill ref [tile, 128] with a number a position, in all lanes; along(start) is [1, 128] of them along lanes."""
    for start in range(0, ref.shape[0], LANES):
        ref[pl.ds(start, LANES), :] = jnp.broadcast_to(along(start), (LANES, LANES)).T


# Rows and groups of heads are independent; blocks of one row go in order, so that its state can stay in VMEM.
IN_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


class Specs:
    """Where a step (row, groups, block) of the grid reads and writes.

    Up to `most` groups a step where their number can be divided so: one computes while another waits for the matrix
    unit.
    """

    def __init__(self, lanes: Lanes, tiles: Tiles, order: Callable, most: int = 2):
        tile, size = tiles
        self.lanes, self.tile, self.order = lanes, tile, order
        self.groups = next(count for count in (4, 2, 1) if count <= most and lanes.groups % count == 0)
        self.steps = lanes.groups // self.groups
        self.side = (self.groups, lanes.together * lanes.value, lanes.together * lanes.key)
        self.state = pl.BlockSpec((1, *self.side), lambda b, g, t: (b, g, 0, 0))
        # The state of heads side by side without the zeros between them, one a chunk.
        self.start = pl.BlockSpec((1, tile // size, self.groups, lanes.value, self.side[2]),
                                  lambda b, g, t: (b, order(t), g, 0, 0))
        self.saved = (lanes.batch, lanes.time // size, lanes.groups, lanes.value, self.side[2])

    def block(self, x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.tile, x.shape[2] // self.steps), lambda b, g, t: (b, self.order(t), g))

    def constant(self, x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, x.shape[2] // self.steps), lambda b, g, t: (b, 0, g))

    def resets(self, reset: Array | None) -> tuple[list, list, list]:
        """(arguments, their specs, scratch): [B, 1, T], because [B, T, 1] would take 128 lanes a position in memory."""
        if reset is None:
            return [], [], []
        reset = jnp.pad(reset.astype(jnp.float32), ((0, 0), (0, self.lanes.time - self.lanes.length)))
        return ([reset[:, None]], [pl.BlockSpec((1, 1, self.tile), lambda b, g, t: (b, 0, self.order(t)))],
                [pltpu.VMEM((self.tile, LANES), jnp.float32)])


def like(x: Array, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """What x is; inside jax.shard_map that includes the mesh axes over which it varies."""
    return jax.ShapeDtypeStruct(shape or x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def cost(lanes: Lanes, moved: tuple[Array, ...], times: int = 1) -> pl.CostEstimate:
    """The four products with or to the state, and the bytes of what is read and written."""
    steps = lanes.batch * lanes.time * lanes.groups * lanes.together
    return pl.CostEstimate(flops=times * 4 * steps * lanes.key * lanes.value, transcendentals=steps * lanes.key,
                           bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved))
