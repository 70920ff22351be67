"""Time functions against each other fairly: in turn, so that a busy machine slows all of them, and by the median."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def medians(functions: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Median seconds of a call of each function, called alternately `rounds` times after one call to compile."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
