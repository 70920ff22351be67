"""Where the time of the PEER layer of `lm bench kernels` goes on this machine: `python -m launch.bench.peer_parts`.

The layer and its parts, each compiled by itself, called in turn: medians of the wall time, and of the processor time of
all threads, which other work on the machine changes less. Parts that are compiled into one program share what they
compute, so their sum is more than the layer.
"""

import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable

from launch.bench.peer import BATCH, CHOSEN, HEADS, TIME, WIDTH
from launch.bench.peer_bound import EXPERTS

ROUNDS = 9
KEY = WIDTH // 2


def parts(experts: int) -> dict[str, Callable[[], object]]:
    """Calls by name, for weights and tokens drawn at random."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.peer_experts import peer_experts
    from pallas_kernels.product_key_topk import product_key_topk
    draw = [jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 6), (
        (BATCH, TIME, WIDTH), (BATCH, TIME, WIDTH), (2 * HEADS * KEY, WIDTH), (HEADS, math.isqrt(experts), KEY),
        (HEADS, math.isqrt(experts), KEY), (experts, 2, WIDTH)), strict=True)]
    x, ct, query, c1, c2, table = draw
    query, table = query / WIDTH ** 0.5, table / WIDTH ** 0.5
    gelu = functools.partial(jax.nn.gelu, approximate=False)

    def queries(x, query):
        return jnp.moveaxis((x @ query.T).reshape(BATCH, TIME, 2, HEADS, KEY), 2, 0)

    def choose(q, c1, c2):
        return product_key_topk(*q, c1, c2, CHOSEN, implementation="chunked")

    def use(x, ids, gates, table):
        return peer_experts(x, ids, gates, table, activation=gelu, implementation="chunked")

    def layer(x, query, c1, c2, table):
        scores, ids = choose(queries(x, query), c1, c2)
        return use(x, ids, jax.nn.softmax(scores), table)

    def both(function, *given):
        """Its value and gradients, for a cotangent that is data."""
        out, pull = jax.vjp(function, *given)
        return out, pull(cotangent if out.shape == cotangent.shape else ct)

    q = jax.jit(queries)(x, query)
    scores, ids = jax.jit(choose)(q, c1, c2)
    gates, cotangent = jax.nn.softmax(scores), q
    chosen = lambda q, c1, c2: choose(q, c1, c2)[0]

    def chosen_both(q, c1, c2):
        out, pull = jax.vjp(chosen, q, c1, c2)
        return out, pull(gates)

    calls = {
        "layer, forward": (layer, x, query, c1, c2, table),
        "layer, forward and backward": (functools.partial(both, layer), x, query, c1, c2, table),
        "queries": (queries, x, query),
        "queries and their gradients": (functools.partial(both, queries), x, query),
        "choice": (choose, q, c1, c2),
        "choice and its gradients": (chosen_both, q, c1, c2),
        "experts": (use, x, ids, gates, table),
        "experts, gradients of x and gates": (
            lambda x, gates, table: both(lambda x, gates: use(x, ids, gates, table), x, gates), x, gates, table),
        "experts, all gradients": (
            lambda *given: both(lambda x, gates, table: use(x, ids, gates, table), *given), x, gates, table),
        "zeros of the table's size": (lambda: jnp.zeros_like(table),),
    }
    return {name: functools.partial(jax.jit(function), *given) for name, (function, *given) in calls.items()}


def main() -> int:
    """Prints a line a part."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    for experts in map(int, sys.argv[1:]) if sys.argv[1:] else EXPERTS:
        calls = parts(experts)
        seconds = {name: [] for name in calls}
        for call in calls.values():
            jax.block_until_ready(call())
        for _ in range(ROUNDS):
            for name, call in calls.items():
                wall, own = time.perf_counter(), time.process_time()
                jax.block_until_ready(call())
                seconds[name].append((time.perf_counter() - wall, time.process_time() - own))
        print(f"{experts:,} experts, jax {jax.__version__}: ms, ms of processor")
        for name, pairs in seconds.items():
            wall, own = (1e3 * statistics.median(values) for values in zip(*pairs, strict=True))
            print(f"  {name:36s} {wall:7.1f} {own:7.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
