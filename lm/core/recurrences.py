"""How often a model of recurrent depth iterates: numbers beside its variables, which no program is compiled for.

    params = with_recurrences(params, 16)                    # 16 iterations
    params = with_recurrences(params, 32, exit_kl=5e-4)      # at most 32, each token until it changes little
"""

import math
from typing import Any

import jax.numpy as jnp

from lm.core.types import Params

DEPTH = "depth"  # the collection; a model without recurrent depth does not look at it
FINISHED = "depth/finished"  # in `Output.aux` of a sliced model: [1, B] rows whose token is through
# In `Output.aux` where one token at a time gives other predictions than many at once.
NOT_PARALLEL = "depth/not_parallel"
STEPS = "depth/steps"  # in `Output.aux`: [1, B, T] iterations of each token, where tokens stop by themselves


def check_recurrences(recurrences: int | None, where: str = "recurrences") -> None:
    """Raises ValueError for fewer iterations than one, for more than 32 bits count, and for parts of one."""
    if recurrences is None:
        return
    if not 1 <= recurrences < 2**31:
        raise ValueError(f"{where}={recurrences} must be at least 1, for the coda reads a state that the core made, "
                         f"and below 2^31")
    if recurrences != int(recurrences):
        raise ValueError(f"{where}={recurrences} must be a whole number of iterations")


def check_exit(exit_kl: float | None, where: str = "exit_kl") -> None:
    """Raises ValueError for a threshold that is negative or NaN. 0 is never reached and infinity at once."""
    if exit_kl is not None and (math.isnan(exit_kl) or exit_kl < 0):
        raise ValueError(f"{where}={exit_kl} must be at least 0 nats (0: every token takes all iterations), or None")


def with_recurrences(params: Params, recurrences: int | None = None, exit_kl: float | None = None) -> Params:
    """The variables with a number of iterations, a threshold at which tokens stop, or both; None leaves the model's.

    They hold where no key is given to `apply`, that is outside of training. Raises ValueError for fewer iterations than
    one and for a threshold that is none.
    """
    check_recurrences(recurrences)
    check_exit(exit_kl)
    said: dict[str, Any] = {} if recurrences is None else {"recurrences": jnp.int32(recurrences)}
    if exit_kl is not None:
        said["exit_kl"] = jnp.float32(exit_kl)
    return {**params, DEPTH: {**params.get(DEPTH, {}), **said}}
