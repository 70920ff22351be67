"""`lm bench generate`: the time of a token and the bytes of state after contexts of growing length.

One row, greedy, the loop that `lm generate` runs. The state is what a prompt of that length leaves, by its sizes: its
numbers do not change what a token costs. All models of a length take turns.
"""

import argparse
import os
import platform
import statistics
import time
from typing import Any

from launch.bench.publish import publish

LENGTHS = (1024, 4096, 16_384, 65_536)
STEPS = 16  # tokens of a call
KINDS = {"rwkv4": "launch.bench.rwkv4", "attention": "launch.bench.transformer"}


def run(args: argparse.Namespace) -> int:
    """Measures every length, prints and writes the table."""
    lengths = sorted(args.seq_len or LENGTHS)
    if lengths[0] < 1:
        raise ValueError(f"--seq-len must be at least 1; got {lengths[0]}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    result = {"when": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "jax": jax.__version__,
              "cores": len(os.sched_getaffinity(0)), "rows": [measure(length, args.steps) for length in lengths]}
    return publish(args.out, "generate", result, markdown(result))


def measure(length: int, calls: int) -> dict[str, Any]:
    """Seconds a token of each call, and bytes of state, by model."""
    runs = {name: decoder(module, length) for name, module in KINDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(calls):
        for name, (call, _) in runs.items():
            began = time.perf_counter()
            call()
            seconds[name].append((time.perf_counter() - began) / STEPS)
    return {"length": length, "seconds": seconds, "state_bytes": {name: size for name, (_, size) in runs.items()}}


def decoder(module: str, length: int) -> tuple[Any, int]:
    """(a function that draws STEPS tokens more, bytes of the state) of a model after `length` tokens."""
    import importlib

    import jax
    import jax.numpy as jnp
    import numpy as np

    from launch.bench.sizes import VOCAB
    from lm.claims.measures.decode_cost import full_state, state_bytes
    from lm.core.tree import apart
    from lm.generate.decode import APART_BYTES
    from lm.generate.loop import Loop, Plan, decode_steps
    from lm.generate.sampling import GREEDY
    from lm.models.build import build_model, init_params, make_apply
    model = build_model(importlib.import_module(module).config(length) | dict(scan=True), VOCAB)
    apply, params = make_apply(model), init_params(model, jax.random.key(0))
    size = state_bytes(model, length)
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), full_state(model, length))
    state = apart(state) if size >= APART_BYTES else state
    none, halted = np.zeros(0, np.int32), np.zeros(1, bool)
    plan = Plan(np.zeros(1, np.int32), np.full(1, 2**30, np.int32), none, jax.random.key(0))
    no = jnp.zeros(1, bool)
    carry = [state, Loop(jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32), no, jnp.copy(no), None)]

    def call() -> None:
        carry[0], carry[1], drawn = decode_steps(apply, params, *carry, halted, plan, options=GREEDY, steps=STEPS)
        if not (np.asarray(drawn) >= 0).all():
            raise AssertionError(f"{module} stopped before {STEPS} tokens")

    call()
    return call, size


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    from launch.bench import sizes
    rows = result["rows"]
    lines = [f"A token of one row, greedy, float32, {result['cores']} CPU cores, width {sizes.WIDTH}, {sizes.LAYERS} "
             f"layers, {sizes.HEADS} heads; Python {result['python']}, jax {result['jax']}. Medians of "
             f"{len(rows[0]['seconds']['rwkv4'])} calls of {STEPS} tokens, in turns.", "",
             "| context | RWKV-4, ms | its state, KiB | attention, ms | its state, MiB |", "|---|---|---|---|---|"]
    for row in rows:
        ours, other = (1e3 * statistics.median(row["seconds"][name]) for name in KINDS)
        lines.append(f"| {row['length']:,} | {ours:.2f} | {row['state_bytes']['rwkv4'] / 2**10:.0f} | {other:.2f} | "
                     f"{row['state_bytes']['attention'] / 2**20:.0f} |")
    return "\n".join(lines) + "\n"
