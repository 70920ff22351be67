"""Time of each implementation that serves here: `python -m pallas_kernels.wkv7.bench`. As of wkv6."""

import jax
import jax.numpy as jnp

from pallas_kernels.wkv6 import bench
from pallas_kernels.wkv7.api import wkv7


def inputs(shape: tuple[int, int, int, int]) -> dict[str, jax.Array]:
    """Float32 arrays for [B, T, H, K] = shape, V = K, with a and b as RWKV-7 makes them."""
    given = bench.inputs(shape)
    del given["u"]
    keys = jax.random.split(jax.random.key(1), 2)
    kappa = jax.random.normal(keys[0], shape)
    kappa /= jnp.linalg.norm(kappa, axis=-1, keepdims=True)
    return given | dict(a=-kappa, b=kappa * jax.random.uniform(keys[1], shape))


if __name__ == "__main__":
    bench.report(wkv7, inputs)
