"""What an optimizer's update costs, measured on the machine at hand.

    python -c "from lm.optim.cost import report; print(report())"
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.core.tree import num_params
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions

CASES = {
    "adamw": OptimizerOptions("adamw"),
    "adamw, bfloat16 moments": OptimizerOptions("adamw", state_dtype="bfloat16"),
    "adamw, bfloat16 at random": OptimizerOptions("adamw", state_dtype="bfloat16", stochastic_rounding=True),
    "lion": OptimizerOptions("lion"),
    "adafactor": OptimizerOptions("adafactor"),
    "muon": OptimizerOptions("muon"),
    "muon, gram": OptimizerOptions("muon", muon_newton_schulz="gram"),
}


def transformer(layers: int, embed_dim: int, mlp_dim: int, vocab_size: int = 256) -> dict[str, Any]:
    """The parameters of a decoder with stacked layers, with the names that the models give them, drawn at random."""
    shapes = {"embed": {"embedding": (vocab_size, embed_dim)}, "stack": {"pattern_0": {
        "attention": {name: {"kernel": (layers, embed_dim, embed_dim)} for name in ("query", "key", "value", "out")},
        "mlp": {"up": {"kernel": (layers, embed_dim, mlp_dim)}, "down": {"kernel": (layers, mlp_dim, embed_dim)}},
        "norm0": {"scale": (layers, embed_dim)}, "norm1": {"scale": (layers, embed_dim)}}}}
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return {"params": jax.tree.unflatten(structure, [0.02 * jax.random.normal(key, shape)
                                                     for key, shape in zip(keys, leaves, strict=True)])}


def update_times(params: Any, cases: Mapping[str, OptimizerOptions], repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` updates of every case, sorted; the cases take turns, so that a busy machine hits all alike.
    """
    grads = jax.tree.map(lambda p: p + 0.01, params)
    runs = {}
    for name, options in cases.items():
        tx = build_optimizer(options, params, 1000).tx

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        runs[name] = (step, step(jax.tree.map(jnp.copy, params), tx.init(params), grads))
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (step, carry) in runs.items():
            jax.block_until_ready(carry)
            start = time.perf_counter()
            carry = jax.block_until_ready(step(*carry, grads))
            times[name].append(time.perf_counter() - start)
            runs[name] = (step, carry)
    return {name: sorted(seconds) for name, seconds in times.items()}


def report(layers: int = 4, embed_dim: int = 256, mlp_dim: int = 1024, repeats: int = 20,
           cases: Mapping[str, OptimizerOptions] = CASES) -> str:
    """A Markdown table: fastest and median update in milliseconds, and the ratio of the fastest to that of the first
    case."""
    params = transformer(layers, embed_dim, mlp_dim)
    times = update_times(params, cases, repeats)
    first = next(iter(times.values()))[0]
    lines = [f"{num_params(params) / 1e6:.2f}M parameters, {layers} layers of width {embed_dim} ({mlp_dim}), "
             f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {repeats} updates", "",
             "| optimizer | fastest ms | median ms | ratio |", "|---|---|---|---|"]
    lines += [f"| {name} | {1e3 * t[0]:.1f} | {1e3 * t[len(t) // 2]:.1f} | {t[0] / first:.1f} |"
              for name, t in times.items()]
    return "\n".join(lines)
