"""Moving average of the parameters, for evaluation."""

from typing import Any

import jax
import jax.numpy as jnp


def ema_update(ema: Any, params: Any, decay: float, step: jax.Array, *, debias: bool = True) -> Any:
    """The average after one more step: d * ema + (1 - d) * params, leaf by leaf, in the dtype of `ema`.

    step: number of updates that `ema` has seen, from 0.
    debias: d = decay (1 - decay^step) / (1 - decay^(step + 1)), which weighs the parameters of step i in proportion to
    decay^-i and nothing else: the value that Adam's bias correction gives to an average started at zero. What `ema`
    holds at step 0 then does not count. Without it d = decay throughout, and `ema` is to start as the parameters.
    """
    if debias:
        count = jnp.asarray(step, jnp.float32)
        seen = lambda n: -jnp.expm1(n * jnp.log(jnp.float32(decay)))  # 1 - decay^n without cancellation
        keep = decay * seen(count) / seen(count + 1)
    else:
        keep = decay
    return jax.tree.map(lambda e, p: (p + keep * (e - p)).astype(e.dtype), ema, params)
