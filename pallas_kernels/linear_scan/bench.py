"""Time of each implementation that serves here: `python -m pallas_kernels.linear_scan.bench`.

One line a shape and direction: median milliseconds, alternating, and how many times faster the best is than the
reference. `associative` is what one would write without this package: jax.lax.associative_scan, differentiated by JAX.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import current_platform
from pallas_kernels.linear_scan.api import _MODULES, linear_scan
from pallas_kernels.timing import medians

Array = jax.Array
SHAPES = ((8, 256, 256), (1, 1024, 512), (8, 1024, 512))


def associative(a: Array, b: Array, h0: Array) -> tuple[Array, Array]:
    """linear_scan without resets, in log2(T) passes over the whole arrays."""
    b = b.at[:, 0].add(a[:, 0] * h0)
    _, h = jax.lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), axis=1)
    return h, h[:, -1]


def candidates() -> dict[str, Callable]:
    """Every implementation that this platform has, by name."""
    names = [name for name, module in _MODULES.items()
             if not hasattr(module, "unsupported") or module.unsupported("float32", current_platform()) is None]
    return {name: functools.partial(linear_scan, implementation=name) for name in names} | {"associative": associative}


def measure(shape: tuple[int, int, int], dtype=jnp.float32, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Median seconds by direction ("forward", "forward+backward") and implementation, for [B, T, C] = shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = jax.random.uniform(keys[0], shape).astype(dtype), jax.random.normal(keys[1], shape).astype(dtype)
    h0 = jax.random.normal(keys[2], (shape[0], shape[2]))

    def loss(run, a, b, h0):
        h, last = run(a, b, h0)
        return (h.astype(jnp.float32) ** 2).sum() + last.sum()

    forward = {name: functools.partial(jax.jit(run), a, b, h0) for name, run in candidates().items()}
    both = {name: functools.partial(jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1, 2))), a, b, h0)
            for name, run in candidates().items()}
    return {"forward": medians(forward, rounds), "forward+backward": medians(both, rounds)}


def main() -> None:
    print(f"linear_scan on {current_platform()}, float32, jax {jax.__version__}; median ms, alternating")
    for shape in SHAPES:
        for direction, seconds in measure(shape).items():
            times = "  ".join(f"{name} {1e3 * value:.2f}" for name, value in seconds.items())
            best = min(seconds, key=seconds.get)
            print(f"B{shape[0]} T{shape[1]} C{shape[2]} {direction}: {times}; "
                  f"{best} is {seconds['reference'] / seconds[best]:.1f}x reference")


if __name__ == "__main__":
    main()
