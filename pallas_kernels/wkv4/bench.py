"""Time of each implementation that serves here: `python -m pallas_kernels.wkv4.bench`.

One line a shape and direction: median milliseconds, alternating. `identity` is an operation that reads k and v and
writes as much as wkv4 does, y = sigmoid(k) v: what its place in a model costs at least.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import current_platform
from pallas_kernels.timing import medians
from pallas_kernels.wkv4.api import _MODULES, wkv4

Array = jax.Array
SHAPES = ((8, 256, 256), (8, 512, 256), (8, 1024, 256), (1, 1024, 512), (8, 1024, 512))


def identity(w: Array, u: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """As many arrays in and out, no recurrence."""
    return jax.nn.sigmoid(k + u - w) * v, v[:, -1]


def candidates() -> dict[str, Callable]:
    """Every implementation that this platform has, by name."""
    names = [name for name, module in _MODULES.items()
             if not hasattr(module, "unsupported") or module.unsupported("float32", current_platform()) is None]
    return {name: functools.partial(wkv4, implementation=name) for name in names} | {"identity": identity}


def measure(shape: tuple[int, int, int], dtype=jnp.float32, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Median seconds by direction ("forward", "forward+backward") and implementation, for [B, T, C] = shape."""
    keys = jax.random.split(jax.random.key(0), 4)
    k, v = (jax.random.normal(key, shape).astype(dtype) for key in keys[:2])
    w, u = jnp.exp(jax.random.normal(keys[2], shape[2:])), jax.random.normal(keys[3], shape[2:])

    def loss(run, *arrays):
        y, state = run(*arrays)
        return (y.astype(jnp.float32) ** 2).sum() + state.sum()

    forward = {name: functools.partial(jax.jit(run), w, u, k, v) for name, run in candidates().items()}
    both = {name: functools.partial(jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1, 2, 3))), w, u, k, v)
            for name, run in candidates().items()}
    return {"forward": medians(forward, rounds), "forward+backward": medians(both, rounds)}


def main() -> None:
    print(f"wkv4 on {current_platform()}, float32, jax {jax.__version__}; median ms, alternating")
    for shape in SHAPES:
        for direction, seconds in measure(shape).items():
            times = "  ".join(f"{name} {1e3 * value:.2f}" for name, value in seconds.items())
            print(f"B{shape[0]} T{shape[1]} C{shape[2]} {direction}: {times}")


if __name__ == "__main__":
    main()
