"""What the bfloat16 forward kernels of wkv6 and wkv7 have in common: blocks, scratch memory, and passes over a block.

A grid step holds a block of positions of up to four pairs of heads. Only the last pass carries the state from chunk to
chunk; those before have the chunks' scores ready, so that the products that wait for each other are few. Passes hand
over in VMEM, in memory of its own for each pair: the compiler then knows which loads need not wait for which stores.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.wkv6.chunk_loop import IN_ORDER, Specs, cost, like, turn_lanes
from pallas_kernels.wkv6.config import Tiles
from pallas_kernels.wkv6.lanes import LANES, Lanes
from pallas_kernels.wkv6.pair_scores import across_eighths
from pallas_kernels.wkv6.pairs import CHUNK, packed, place, registers, together

Array = jax.Array
PAIRS = 4           # at most, a grid step
BF16, F32 = jnp.bfloat16, jnp.float32


class Kept(NamedTuple):
    """An array for each pair of heads; on: for each chunk, so that a later pass finds it, and not for one at a time."""
    shape: tuple[int, ...]
    dtype: Any
    on: bool = True


class PerPair:
    """The arrays of one name; x[chunk, pair] and x[chunk, pair, rows] read and write."""

    def __init__(self, refs, on: bool):
        self.refs, self.on = refs, on

    def __getitem__(self, key):
        chunk, pair, *rest = key
        return self.refs[pair][(chunk if self.on else 0, *rest)]

    def __setitem__(self, key, value):
        chunk, pair, *rest = key
        self.refs[pair][(chunk if self.on else 0, *rest)] = value

    def at(self, chunk, pair):
        """A view of one array."""
        return self.refs[pair].at[chunk if self.on else 0]

    def later(self, chunk, pair):
        """The same, to load from in the pass that stored it. The index is one that the compiler does not know to be the
        same: it would keep what is stored until then in registers, more than there are."""
        zero = jax.lax.shift_right_logical(pl.program_id(2), 31)
        return self.refs[pair].at[(chunk if self.on else 0) + zero]


def serves(lanes: Lanes, tiles: Tiles, dtype: Any) -> bool:
    """Whether these kernels take heads and inputs of this kind."""
    return lanes.together == 2 and tiles.chunk == CHUNK and dtype == BF16


def forward(name: str, passes: Callable, memory: Mapping[str, Kept], lanes: Lanes, tiles: Tiles,
            arrays: Mapping[str, Array], constants: Mapping[str, Array], state: Array, reset: Array | None,
            save: bool) -> tuple[Array, Array, Array | None]:
    """As `chunk_loop.forward`. passes(block) -> (function of a chunk's number, how many chunks it takes at once),
    each run over all chunks of the block before the next; memory: what they keep, by name."""
    specs = Specs(lanes, tiles, lambda t: t, PAIRS)
    chunks, blocks = tiles.tile // tiles.chunk, lanes.time // tiles.tile
    resets = [] if reset is None else [starts_along(reset, lanes)]
    turned = [pltpu.VMEM((tiles.tile, LANES), F32)] * 2 * len(resets)
    call = pl.pallas_call(
        functools.partial(_kernel, passes, memory, tuple(arrays), tuple(constants), reset is not None, save),
        grid=(lanes.batch, specs.steps, blocks),
        in_specs=[*[pl.BlockSpec((1, 2, tiles.tile), lambda b, g, t: (b, 0, t)) for _ in resets],
                  *map(specs.block, arrays.values()), *map(specs.constant, constants.values()), specs.state],
        out_specs=[specs.block(arrays["v"]), specs.state, *([specs.start] if save else [])],
        out_shape=[like(arrays["v"]), like(state), *([like(arrays["v"], specs.saved)] if save else [])],
        scratch_shapes=[pltpu.VMEM(specs.side, F32), *turned, *kept_refs(memory, chunks, specs.groups)],
        compiler_params=IN_ORDER, cost_estimate=cost(lanes, (*arrays.values(), arrays["v"])), name=name,
    )
    out = jax.jit(lambda *given: call(*map(in_hbm, given)))(*resets, *arrays.values(), *constants.values(), state)
    return out[0], out[1], (out[2] if save else None)


class Reading:
    """What passes see of the inputs, and their memory, by name; pairs: the numbers of the pairs of heads."""

    def __init__(self, arrays, constants, resets, memory, pairs):
        self.arrays, self.constants, self.resets, self.memory, self.pairs = arrays, constants, resets, memory, pairs

    @staticmethod
    def rows(chunk):
        return pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)

    @staticmethod
    def lanes(pair: int) -> slice:
        return slice(pair * LANES, (pair + 1) * LANES)

    def read(self, name: str, chunk, pair: int) -> Array:
        return self.arrays[name][0, self.rows(chunk), self.lanes(pair)]

    def constant(self, name: str, pair: int) -> Array:
        return self.constants[name][0, :, self.lanes(pair)]

    def start(self, chunk) -> tuple[Array | None, Array | None]:
        """1 where a document starts, and the number of starts until there, [64, 128] in all lanes; or None twice."""
        return tuple(ref[self.rows(chunk)] for ref in self.resets) if self.resets else (None, None)

    def starts_across(self, chunk) -> list[Array] | None:
        """The first of these in the order of `across_eighths`."""
        return [self.resets[0][here] for here in across_eighths(chunk * CHUNK)] if self.resets else None


class Block(Reading):
    """What the passes see: refs by name, the state, and memory by name."""

    def __init__(self, arrays, constants, resets, memory, state, y, starts):
        super().__init__(arrays, constants, resets, memory, range(state.shape[0]))
        self._state, self._y, self._starts = state, y, starts

    def write(self, chunk, pair: int, y: Array) -> None:
        self._y[0, self.rows(chunk), self.lanes(pair)] = y.astype(self._y.dtype)

    def state(self, chunk, pair: int) -> Array:
        """The state that the chunk starts from, in bfloat16, zeros between the heads; saved where that is asked for."""
        if self._starts is not None:
            self._starts[0, chunk, pair] = together(self._state[pair]).astype(self._starts.dtype)
        left = place(1) < LANES // 2
        return packed([jnp.where(left == (i < 8), x, 0) for i, x in enumerate(registers(self._state[pair]))])

    def move(self, pair: int, decay: Array, added: Array) -> None:
        """The state a chunk later; between the heads it holds what nobody reads."""
        for i, x in enumerate(registers(added)):
            here = slice(8 * i, 8 * i + 8)
            self._state[pair, here] = self._state[pair, here] * decay + x


def _kernel(passes, memory, names, constant_names, has_reset, save, *refs):
    take = lambda count: (refs[:count], refs[count:])
    resets, refs = take(has_reset)
    arrays, refs = take(len(names))
    constants, refs = take(len(constant_names))
    (first, y, last), refs = take(3)
    starts, refs = take(save)
    (state,), refs = take(1)
    turned, refs = take(2 * has_reset)
    pairs = state.shape[0]
    kept = {name: PerPair(refs[i * pairs:(i + 1) * pairs], memory[name].on) for i, name in enumerate(memory)}
    turn_starts(resets, turned)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = first[0]

    block = Block(dict(zip(names, arrays, strict=True)), dict(zip(constant_names, constants, strict=True)), turned,
                  kept, state, y, starts[0] if save else None)
    for run, at_once in passes(block):
        jax.lax.fori_loop(0, y.shape[1] // CHUNK // at_once, lambda i, _, run=run, n=at_once: run(i * n), None)
    last[0] = state[...]


def in_hbm(x: Array) -> Array:
    """Left to itself XLA copies an array or two to VMEM first, and a kernel reads it from there: twice the traffic."""
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def kept_refs(memory: Mapping[str, Kept], chunks: int, pairs: int) -> list:
    """Scratch arrays, those of one name for all pairs after each other."""
    return [pltpu.VMEM((chunks if kept.on else 1, *kept.shape), kept.dtype)
            for kept in memory.values() for _ in range(pairs)]


def starts_along(reset: Array, lanes: Lanes) -> Array:
    """[B, 2, time]: 1 where a document starts, and the number of starts until there."""
    reset = jnp.pad(reset.astype(F32), ((0, 0), (0, lanes.time - lanes.length)))
    return jnp.stack([reset, jnp.cumsum(reset, axis=1)], axis=1)


def turn_starts(resets: Sequence, turned: Sequence) -> None:
    """Fill both refs of `turned` from a block of `starts_along`, where there is one."""
    for i, ref in enumerate(turned):
        turn_lanes(lambda start, i=i: resets[0][0, i:i + 1, pl.ds(start, LANES)], ref)
