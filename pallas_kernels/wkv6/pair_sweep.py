"""What the bfloat16 backward kernels of wkv6 and wkv7 have in common: `pair_loop.py` in reverse.

Blocks go from the last to the first. In a block the passes are those of the forward, and then theirs transposed: what
the forward made of a chunk is computed again, with the state that the chunk starts from as the forward saved it. Only
one pass carries the cotangent of the state from chunk to chunk.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.wkv6.chunk_loop import IN_ORDER, Specs, cost, like
from pallas_kernels.wkv6.config import Tiles
from pallas_kernels.wkv6.lanes import LANES, Lanes
from pallas_kernels.wkv6.pair_loop import (
    F32,
    PAIRS,
    Kept,
    PerPair,
    Reading,
    in_hbm,
    kept_refs,
    starts_along,
    turn_starts,
)
from pallas_kernels.wkv6.pairs import CHUNK, apart_packed, registers

Array = jax.Array
TILES = Tiles(128, 64)      # what the passes keep of a chunk leaves no room for more of them in 16 MiB


def backward(name: str, passes: Callable, memory: Mapping[str, Kept], lanes: Lanes, tiles: Tiles,
             arrays: Mapping[str, Array], constants: Mapping[str, Array], starts: Array, reset: Array | None, dy: Array,
             dlast: Array) -> tuple[dict, dict, Array]:
    """As `chunk_loop.backward`. passes(block) -> (function of a chunk's number, how many chunks it takes at once),
    each run over all chunks of the block, from the last, before the next; memory: what they keep, by name."""
    blocks = lanes.time // tiles.tile
    specs = Specs(lanes, tiles, lambda t: blocks - 1 - t, PAIRS)
    resets = [] if reset is None else [starts_along(reset, lanes)]
    in_blocks, constant_blocks = [*map(specs.block, arrays.values())], [*map(specs.constant, constants.values())]
    call = pl.pallas_call(
        functools.partial(_kernel, passes, memory, tuple(arrays), tuple(constants), reset is not None),
        grid=(lanes.batch, specs.steps, blocks),
        in_specs=[*[pl.BlockSpec((1, 2, tiles.tile), lambda b, g, t: (b, 0, specs.order(t))) for _ in resets],
                  *in_blocks, *constant_blocks, specs.start, specs.block(dy), specs.state],
        out_specs=[*in_blocks, *constant_blocks, specs.state],
        out_shape=[*map(like, arrays.values()), *map(like, constants.values()), like(dlast)],
        scratch_shapes=[*[pltpu.VMEM((tiles.tile, LANES), F32)] * 2 * len(resets),
                        *kept_refs(memory, tiles.tile // tiles.chunk, specs.groups)],
        compiler_params=IN_ORDER, cost_estimate=cost(lanes, (*arrays.values(), *arrays.values(), dy), 3), name=name,
    )
    out = jax.jit(lambda *given: call(*map(in_hbm, given)))(
        *resets, *arrays.values(), *constants.values(), starts, dy, dlast)
    return dict(zip(arrays, out, strict=False)), dict(zip(constants, out[len(arrays):], strict=False)), out[-1]


class Block(Reading):
    """What the passes see: refs by name, "dy" among the arrays, saved states, gradients, and memory by name."""

    def __init__(self, arrays, constants, resets, memory, starts, gradients, dconstants, dstate):
        super().__init__(arrays, constants, resets, memory, range(dstate.shape[1]))
        self._dconstants, self._starts, self._gradients, self._dstate = dconstants, starts, gradients, dstate

    def write(self, name: str, chunk, pair: int, x: Array, start: int = 0) -> None:
        """The gradient of rows of a chunk, from `start` on."""
        ref = self._gradients[name]
        here = pl.ds(pl.multiple_of(chunk * CHUNK + start, 16), x.shape[0])
        ref[0, here, self.lanes(pair)] = x.astype(ref.dtype)

    def add(self, name: str, pair: int, x: Array) -> None:
        """To the gradient of a constant, the sum over the rows of x [8, 128]."""
        self._dconstants[name][0, :, self.lanes(pair)] += jnp.sum(x, axis=0, keepdims=True)

    def saved(self, chunk, pair: int) -> Array:
        """The state that the chunk starts from, [64, 128]: of each head its own lanes."""
        return self._starts[0, chunk, pair]

    def state(self, chunk, pair: int) -> Array:
        """[128, 128] of the saved state, with zeros between the heads."""
        return apart_packed(self.saved(chunk, pair))

    def cotangent(self, pair: int) -> Array:
        """That of the state, [128, 128]; between the heads it holds what nobody reads."""
        return self._dstate[0, pair]

    def move(self, pair: int, decay: Array, added: Array) -> None:
        """The cotangent a chunk earlier."""
        for i, x in enumerate(registers(added)):
            here = slice(8 * i, 8 * i + 8)
            self._dstate[0, pair, here] = self._dstate[0, pair, here] * decay + x


def _kernel(passes, memory, names, constant_names, has_reset, *refs):
    take = lambda count: (refs[:count], refs[count:])
    resets, refs = take(has_reset)
    arrays, refs = take(len(names))
    constants, refs = take(len(constant_names))
    (starts, dy, dlast), refs = take(3)
    gradients, refs = take(len(names))
    dconstants, refs = take(len(constant_names))
    (dstate,), refs = take(1)
    turned, refs = take(2 * has_reset)
    turn_starts(resets, turned)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dlast[...]
        for ref in dconstants:
            ref[...] = jnp.zeros_like(ref)

    named = lambda names, refs: dict(zip(names, refs, strict=True))
    pairs = dstate.shape[1]
    block = Block(named(names, arrays) | {"dy": dy}, named(constant_names, constants), turned,
                  {name: PerPair(refs[i * pairs:(i + 1) * pairs], memory[name].on) for i, name in enumerate(memory)},
                  starts, named(names, gradients), named(constant_names, dconstants), dstate)
    chunks = dy.shape[1] // CHUNK
    for run, at_once in passes(block):
        back = lambda i, _, run=run, n=at_once: run(chunks - (i + 1) * n)
        jax.lax.fori_loop(0, chunks // at_once, back, None)
