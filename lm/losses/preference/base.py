"""What a preference loss is, and the two functions that keep them finite.

Shape legend: ... any shape, one entry a pair.
"""

from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from lm.core.types import Array
from lm.losses.preference.responses import Groups, Responses


class PreferenceLoss(Protocol):
    """A pure function of scored responses. What is minimised is
    scale * (mean of the loss over what is counted) + sft * (mean negative log-likelihood of the chosen responses).

    needs_reference: whether responses need `reference`. additive: whether a pair's value depends on that pair alone, so
    that microbatches add up. needs_mismatched: whether groups need responses to other prompts.
    """

    needs_reference: ClassVar[bool]
    needs_mismatched: ClassVar[bool]
    additive: ClassVar[bool]
    scale: float
    sft: float
    sft_tokens: str
    sft_average: str

    def __call__(self, groups: Groups) -> Array:
        """One value an entry of `counted`, unreduced; finite also where nothing is counted."""

    def counted(self, groups: Groups) -> Array:
        """Bool of the same shape: what the mean is taken over. It depends on what is present, not on scores."""

    def reward(self, responses: Responses) -> Array:
        """[...] the implicit reward: what the loss pushes apart."""


class Paired:
    """What losses of pairs share: a pair counts where both responses are there, and it stands for itself alone."""

    needs_reference: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    scale: float = 1.0
    sft: float = 0.0
    sft_tokens: str = "response"
    sft_average: str = "tokens"

    def counted(self, groups: Groups) -> Array:
        """[...] bool."""
        return groups.paired


def log_sigmoid(x: Array) -> Array:
    """log sigma(x) = -softplus(-x): finite for every finite x, and so is its gradient."""
    return -jax.nn.softplus(-x)


def log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, to rounding (Maechler 2012): by expm1 near 0, by log1p below -ln 2.

    Each branch sees only arguments of its own, so that the gradient of the other is not NaN.
    """
    near = x > -jnp.log(jnp.asarray(2.0, x.dtype))
    small, large = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))
