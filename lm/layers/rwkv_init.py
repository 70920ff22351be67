"""Initial values of RWKV's parameters: functions of the layer's depth and of the channel, as in the reference trainers.

l of L layers, channel n of C. Depth may be traced (layers initialised under vmap), so everything is an array.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array

Init = Callable[[Array, tuple[int, ...]], Array]


def ratios(shared: Mapping[str, Any]) -> tuple[Array, Array]:
    """(r01, r10): l / (L - 1), which is 0 in a model of one layer, and 1 - l / L."""
    depth = jnp.asarray(shared["depth"], jnp.float32)
    count = jnp.asarray(shared["num_layers"], jnp.float32)
    return depth / jnp.maximum(count - 1, 1), 1 - depth / count


def ramp(shape: tuple[int, ...]) -> Array:
    """n / C."""
    return (jnp.arange(shape[0]) / shape[0]).astype(jnp.float32)


def slope(size: int) -> Array:
    """n / (C - 1), 0 for one channel."""
    return (jnp.arange(size) / max(size - 1, 1)).astype(jnp.float32)


def zigzag(size: int) -> Array:
    """((n + 1) mod 3) - 1: 0, 1, -1, 0, ..."""
    return ((jnp.arange(size) + 1) % 3 - 1).astype(jnp.float32)


def table(function: Callable[[int], Array]) -> Init:
    """An initialiser that draws nothing: `function(C)`."""
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(function(shape[0]), dtype).reshape(shape)


def mix(power: Array | float, shift: Array | float = 0.0) -> Init:
    """c^power + shift of the ramp c: the share of the present token (RWKV-4 and 5)."""
    return lambda key, shape, dtype=jnp.float32: (ramp(shape) ** power + shift).astype(dtype)


def unmix(power: Array | float, shift: Array | float = 0.0) -> Init:
    """1 - (c^power + shift): the share of the token before (RWKV-6 and 7)."""
    return lambda key, shape, dtype=jnp.float32: (1 - (ramp(shape) ** power + shift)).astype(dtype)


def orthogonal(gain: float) -> Init:
    """Orthonormal rows or columns, whichever are fewer, times gain and sqrt(out / in) where the product widens, as
    RWKV's trainers scale them."""
    def init(key, shape, dtype=jnp.float32):
        wider = max(1.0, shape[1] / shape[0]) ** 0.5
        return one_by_one(nn.initializers.orthogonal(gain * wider))(key, shape, dtype)
    return init


def one_by_one(init: Init) -> Init:
    """An initialiser of orthogonal matrices that under vmap draws one after another.

    Each of jaxlib's batched QRs on CPUs (jax 0.10.2) keeps a thread of XLA's while it waits for others, and as many at
    a time as there are cores then wait for ever.
    """
    return lambda key, shape, dtype=jnp.float32: jax.custom_batching.sequential_vmap(
        lambda key: init(key, shape, dtype))(key)


def uniform(bound: float) -> Init:
    """Uniform between -bound and bound."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def eagle_decay(r01: Array) -> Init:
    """-6 + 5 (n / (C - 1))^(0.7 + 1.3 r01): the raw decay of RWKV-5 and 6."""
    return table(lambda n: -6 + 5 * slope(n) ** (0.7 + 1.3 * r01))


def eagle_bonus(r01: Array) -> Init:
    """r01 (1 - n / (C - 1)) + 0.1 zigzag: the bonus of the present token of RWKV-5 and 6."""
    return table(lambda n: r01 * (1 - slope(n)) + 0.1 * zigzag(n))


def norm_scale(shared: Mapping[str, Any]) -> Array:
    """((l + 1) / L)^0.7: scale of the norm of the heads of RWKV-5, 6 and 7."""
    depth = jnp.asarray(shared["depth"], jnp.float32)
    return ((depth + 1) / jnp.asarray(shared["num_layers"], jnp.float32)) ** 0.7


ZEROS = nn.initializers.zeros


def vector(module: nn.Module, name: str, init: Init, size: int, axis: str | None) -> jax.Array:
    """A parameter [size] whose dimension has the logical axis `axis`."""
    return module.param(name, nn.with_logical_partitioning(init, (axis,)), (size,))
