"""Time of each implementation that serves here: `python -m pallas_kernels.wkv6.bench`.

One line a shape and direction: median milliseconds, alternating, and how many times the reference the best one is.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import current_platform
from pallas_kernels.timing import medians
from pallas_kernels.wkv6.api import IMPLEMENTATIONS, wkv6

Array = jax.Array
SHAPES = ((8, 256, 4, 64), (1, 1024, 8, 64))
Inputs = Mapping[str, Array]


def inputs(shape: tuple[int, int, int, int]) -> dict[str, Array]:
    """Float32 arrays for [B, T, H, K] = shape, V = K."""
    keys = jax.random.split(jax.random.key(0), 5)
    r, k, v = (jax.random.normal(key, shape) for key in keys[:3])
    return dict(r=r, w=-jnp.exp(jax.random.normal(keys[3], shape) - 3), k=k, v=v,
                u=jax.random.normal(keys[4], shape[2:]))


def measure(op: Callable, given: Inputs, rounds: int = 9) -> dict[str, dict[str, float]]:
    """Median seconds by direction ("forward", "forward+backward") and implementation."""
    names = [name for name in IMPLEMENTATIONS if name != "pallas_tpu" or current_platform() == "tpu"]
    runs = {name: functools.partial(op, implementation=name) for name in names}

    def loss(run, given):
        y, state = run(**given)
        return (y ** 2).sum() + state.sum()

    forward = {name: functools.partial(jax.jit(run), **given) for name, run in runs.items()}
    both = {name: functools.partial(jax.jit(jax.grad(functools.partial(loss, run))), given)
            for name, run in runs.items()}
    return {"forward": medians(forward, rounds), "forward+backward": medians(both, rounds)}


def report(op: Callable, make: Callable[[tuple[int, int, int, int]], Inputs]) -> None:
    """Measure at every shape and print."""
    print(f"{op.__name__} on {current_platform()}, float32, jax {jax.__version__}; median ms, alternating")
    for shape in SHAPES:
        for direction, seconds in measure(op, make(shape)).items():
            times = "  ".join(f"{name} {1e3 * value:.2f}" for name, value in seconds.items())
            best = min(seconds, key=seconds.get)
            print(f"B{shape[0]} T{shape[1]} H{shape[2]} K{shape[3]} {direction}: {times}; "
                  f"{best} is {seconds['reference'] / seconds[best]:.1f}x reference")


if __name__ == "__main__":
    report(wkv6, inputs)
