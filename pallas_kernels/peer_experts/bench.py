"""Time of each implementation that serves here: `python -m pallas_kernels.peer_experts.bench`.

One line a shape and direction: median milliseconds, alternating. `gathering` is what one would write without this
package: the rows of all tokens gathered, two einsums, differentiated by JAX. Forward + backward has the gradients of x,
gates and table; `touched` has that of the touched rows in place of the table's. Temporary memory is the compiler's
count (`memory_analysis`), also for a larger batch that is not run.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import current_platform
from pallas_kernels.peer_experts import num_touched, peer_experts, peer_experts_with_sink
from pallas_kernels.timing import medians

Array = jax.Array
LARGE = (8, 2048, 8, 16, 1_048_576, 1024)
SHAPES = ((2, 256, 8, 16, 65_536, 256), (2, 256, 8, 16, 262_144, 256))


def gathering(x: Array, ids: Array, gates: Array, table: Array) -> Array:
    """peer_experts by gathering everything."""
    down, up = table[ids, 0], table[ids, 1]
    hidden = jax.nn.gelu(jnp.einsum("btd,bthkd->bthk", x, down))
    return jnp.einsum("bthk,bthkd->btd", gates * hidden, up)


def candidates() -> dict[str, Callable]:
    """The best implementation here, and the gathering form."""
    name = "pallas_tpu" if current_platform() == "tpu" else "chunked"
    return {name: functools.partial(peer_experts, activation=jax.nn.gelu, implementation=name), "gathering": gathering}


def measure(shape: tuple[int, ...], rounds: int = 7) -> dict[str, dict[str, float]]:
    """Median seconds by direction and implementation, for (B, T, H, K, N, D) = shape in float32."""
    batch, time, heads, chosen, experts, width = shape
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, time, width))
    ids = jax.random.randint(keys[1], (batch, time, heads, chosen), 0, experts, jnp.int32)
    gates = jax.nn.softmax(jax.random.normal(keys[2], ids.shape))
    table = jax.random.normal(keys[3], (experts, 2, width)) / width ** 0.5

    def loss(run, x, gates, table, ids):
        return (run(x, ids, gates, table) ** 2).sum()

    def sparse_loss(x, gates, sink, table, ids):
        y, touched = peer_experts_with_sink(x, ids, gates, table, sink, activation=jax.nn.gelu)
        return (y ** 2).sum(), touched

    forward = {name: functools.partial(jax.jit(run), x, ids, gates, table) for name, run in candidates().items()}
    both = {name: functools.partial(jax.jit(jax.grad(functools.partial(loss, run), (0, 1, 2))), x, gates, table, ids)
            for name, run in candidates().items()}
    sink = jnp.zeros((num_touched(ids.size, experts), 2, width))
    both["touched"] = functools.partial(jax.jit(jax.grad(sparse_loss, (0, 1, 2), has_aux=True)), x, gates, sink, table,
                                        ids)
    return {"forward": medians(forward, rounds), "forward+backward": medians(both, rounds)}


def temporaries(shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """MiB by direction and implementation; nothing of the size is made."""
    batch, time, heads, chosen, experts, width = shape
    array = jax.ShapeDtypeStruct
    x, table = array((batch, time, width), jnp.float32), array((experts, 2, width), jnp.float32)
    ids, gates = (array((batch, time, heads, chosen), dtype) for dtype in (jnp.int32, jnp.float32))

    def mib(function: Callable) -> float:
        return jax.jit(function).lower(x, ids, gates, table).compile().memory_analysis().temp_size_in_bytes / 2**20

    def gradients(run: Callable) -> Callable:
        return jax.grad(lambda x, ids, gates, table: (run(x, ids, gates, table) ** 2).sum(), (0, 2, 3))

    return {"forward": {name: mib(run) for name, run in candidates().items()},
            "forward+backward": {name: mib(gradients(run)) for name, run in candidates().items()}}


def main() -> None:
    print(f"peer_experts on {current_platform()}, float32, jax {jax.__version__}; median ms, alternating")
    for shape in SHAPES:
        label = " ".join(f"{name}{size}" for name, size in zip("BTHKND", shape, strict=True))
        for direction, seconds in measure(shape).items():
            times = "  ".join(f"{name} {1e3 * value:.1f}" for name, value in seconds.items())
            print(f"{label} {direction}: {times}", flush=True)
    for shape in (*SHAPES, LARGE):
        label = " ".join(f"{name}{size}" for name, size in zip("BTHKND", shape, strict=True))
        for direction, sizes in temporaries(shape).items():
            sizes = "  ".join(f"{name} {value:,.1f}" for name, value in sizes.items())
            print(f"{label} {direction}, MiB of temporaries: {sizes}", flush=True)


if __name__ == "__main__":
    main()
