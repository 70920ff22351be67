"""What a training step costs by the length of its rows: products counted in the program, bytes, state and seconds.

Counts are of the traced program: a loop's body counts as often as the loop runs, which XLA's own analysis does not do.
"""

import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from lm.claims.measures.decode_cost import VOCAB, state_bytes
from lm.models.build import build_model, init_params, make_apply

CALLS = 3  # at least, and for SECONDS
SECONDS = 2.0


def product_flops(jaxpr: Any) -> float:
    """Two for each multiply-add of the matrix products of a jaxpr, those of loops as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
            continue
        inner = [product_flops(part) for value in equation.params.values() for part in _jaxprs(value)]
        if equation.primitive.name == "cond":
            total += max(inner, default=0.0)
        else:
            total += equation.params.get("length", 1) * sum(inner) if inner else 0.0
    return total


def _jaxprs(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, (tuple, list)):
        return [part for one in value for part in _jaxprs(one)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def length_cost(config: Any) -> dict[str, float]:
    """`flops` of the matrix products and `temporary_bytes` of loss and gradient on one row of `train.seq_len` tokens,
    `seconds` of it (median of calls), and `state_bytes` for decoding after as many."""
    model, length = build_model(config.model.to_dict(), VOCAB), config.train.seq_len
    apply, params = make_apply(model), init_params(model, jax.random.key(config.train.seed))
    tokens = jax.random.randint(jax.random.key(config.train.seed), (1, length), 0, VOCAB)

    def loss(params):
        return jnp.mean(jnp.square(apply(params, tokens).hidden.astype(jnp.float32)))

    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    compiled = traced.lower().compile()
    jax.block_until_ready(compiled(params))
    seconds, started = [], time.perf_counter()
    while len(seconds) < CALLS or time.perf_counter() - started < SECONDS:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(params))
        seconds.append(time.perf_counter() - begin)
    return {"flops": product_flops(traced.jaxpr.jaxpr), "seconds": statistics.median(seconds),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "state_bytes": state_bytes(model, length), "tokens": length}
