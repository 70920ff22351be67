"""Which process of a run is slow: all of them wait for it in every step, so the step time alone does not tell.

Two things are each process's own: the time that it takes to get a batch, and the time of a small product on its own
devices, which nothing else waits for. At each logged row all processes exchange both (two numbers each), and one that
is far behind the median twice in a row is named. A run of one process does none of this.
"""

import functools
import socket
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

SLOW = 1.5          # a probe that takes so many times the median's
SHARE = 0.1         # time for batches beyond the median's, as a share of the step time
SIZES = {"cpu": 256, "tpu": 4096, "gpu": 4096}  # of the probe's square matrices: about a millisecond
NAME_BYTES = 64

Gather = Callable[[np.ndarray], np.ndarray]


def gather_all(values: np.ndarray) -> np.ndarray:
    """[P, ...] of every process's values."""
    from jax.experimental import multihost_utils
    return np.asarray(multihost_utils.process_allgather(values))


@functools.cache
def _probe(platform: str) -> tuple[Callable, list[tuple[Mesh, jax.Array]]]:
    size = SIZES.get(platform, 1024)
    product = jax.jit(lambda a: jax.lax.fori_loop(0, 4, lambda _, b: (b @ a).astype(a.dtype), a))
    ones = np.full((size, size), 1 / size, jnp.bfloat16 if platform != "cpu" else np.float32)
    return product, [(Mesh(np.array([device]), ("one",)), jax.device_put(ones, device))
                     for device in jax.local_devices()]


def on_its_own(product: Callable, mesh: Mesh, a: jax.Array) -> jax.Array:
    """The product on one device, whatever mesh the run has set."""
    with jax.set_mesh(mesh):
        return product(a)


def probe_seconds() -> float:
    """The best of three times of a small product on all devices of this process at once. Call it when they are idle."""
    product, inputs = _probe(jax.default_backend())
    out = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready([on_its_own(product, mesh, a) for mesh, a in inputs])
        out.append(time.perf_counter() - began)
    return min(out)


class Stragglers:
    """Called by all processes at the same steps; every one gets the same lines.

    count, index: of the processes. probe: seconds of this process's probe. gather: `gather_all`.
    """

    def __init__(self, *, count: int | None = None, probe: Callable[[], float] = probe_seconds,
                 gather: Gather = gather_all, name: str | None = None):
        self._count = jax.process_count() if count is None else count
        self._probe, self._gather = probe, gather
        self._names: list[str] | None = None
        self._name = socket.gethostname() if name is None else name
        self._suspects: set[tuple[int, str]] = set()
        if self._count > 1:
            probe()  # compiles

    def look(self, batch_seconds: float, step_seconds: float | None) -> list[str]:
        """Lines about slow processes. batch_seconds: mean time that this process took to get a batch since the last
        call; step_seconds: of a whole step, None where it is not known yet."""
        if self._count == 1:
            return []
        found = self._gather(np.array([batch_seconds, self._probe()], np.float32))
        if self._names is None:
            mine = np.frombuffer(self._name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0"), np.uint8)
            self._names = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in self._gather(mine)]
        if step_seconds is None:
            return []
        lines = slow_lines(found, step_seconds, self._names)
        again = [line for who, line in lines.items() if who in self._suspects]
        self._suspects = set(lines)
        return again


def slow_lines(found: np.ndarray, step_seconds: float, names: Sequence[str]) -> dict[tuple[int, str], str]:
    """(process, what) to a line, of [P, 2] seconds for a batch and for the probe."""
    out = {}
    batch, probe = (statistics.median_low([float(v) for v in column]) for column in found.T)
    for index, (own_batch, own_probe) in enumerate(found.astype(float)):
        who = f"process {index} ({names[index]}) is slow: "
        if own_batch - batch > SHARE * step_seconds:
            out[index, "batch"] = (f"{who}it takes {own_batch:.3g} s to get a batch, where the median of the processes "
                                   f"is {batch:.3g} s and a step takes {step_seconds:.3g} s")
        if own_probe > SLOW * probe:
            out[index, "devices"] = (f"{who}its devices take {own_probe / probe:.1f} times as long as the median for "
                                     f"the same product")
    return out
