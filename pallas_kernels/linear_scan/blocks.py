"""Grid of the TPU kernels, and which block of each array a step of the grid has. B batch, T time, C channels."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_scan.config import Tiles

Array = jax.Array
ROWS = 16      # steps a trip of the inner loop: one tile of bf16, two of float32
# Batch rows and channels are independent; blocks of one row go in order of time, so that its state can stay in VMEM.
IN_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def grid_and_specs(shape: tuple[int, int, int], tiles: Tiles, backwards: bool):
    """The grid (batch, channels, time) and where each of its steps reads and writes."""
    batch, length, width = shape
    tiles = tiles.fitted(length, width)
    grid = (batch, pl.cdiv(width, tiles.width), pl.cdiv(length, tiles.time))
    chunk = (lambda t: grid[2] - 1 - t) if backwards else (lambda t: t)
    per_block = tiles.time // ROWS
    return grid, {
        "tiles": tiles,
        "block": pl.BlockSpec((1, tiles.time, tiles.width), lambda b, c, t: (b, chunk(t), c)),
        "before": pl.BlockSpec((1, ROWS, tiles.width),
                               lambda b, c, t: (b, jnp.maximum(chunk(t) * per_block - 1, 0), c)),
        "state": pl.BlockSpec((1, 1, tiles.width), lambda b, c, t: (b, 0, c)),
        "reset": pl.BlockSpec((1, 1, tiles.time), lambda b, c, t: (b, 0, chunk(t))),
    }


def reset_arguments(reset: Array | None, specs) -> tuple[list, list, list]:
    """(arguments, their specs, scratch): [B, 1, T], because [B, T, 1] would take 128 lanes a step in memory."""
    if reset is None:
        return [], [], []
    return ([reset.astype(jnp.float32)[:, None]], [specs["reset"]],
            [pltpu.VMEM((specs["tiles"].time, 128), jnp.float32)])


def like(x: Array) -> jax.ShapeDtypeStruct:
    """What x is; inside jax.shard_map that includes the mesh axes over which it varies."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def cost(a: Array, arrays: int) -> pl.CostEstimate:
    """What XLA is told, as it does not look inside: bytes of `arrays` blocks like a."""
    return pl.CostEstimate(flops=2 * a.size * (arrays - 2), bytes_accessed=arrays * a.size * a.dtype.itemsize,
                           transcendentals=0)
