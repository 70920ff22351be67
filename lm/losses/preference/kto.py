"""KTO: responses that are good or bad by themselves, without pairs (Ethayarajh et al. 2024, arXiv:2402.01306)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lm.core.fields import option
from lm.core.types import Array, Mean
from lm.losses.preference.responses import Groups, Responses


@dataclasses.dataclass(frozen=True)
class Kto:
    """lambda_D (1 - sigma(beta (r - z0))) of a desirable response, lambda_U (1 - sigma(beta (z0 - r))) of one that is
    undesirable, r the summed log-ratio to the reference.

    z0 = max(0, mean of r over the batch's responses to other prompts) estimates the divergence from the reference; no
    gradient flows through it. It belongs to the whole batch, so microbatches do not add up. Where the batch has no such
    responses it is 0.
    """

    beta: float = option(0.1, "scale of the log-ratios")
    desirable_weight: float = option(1.0, "lambda_D")
    undesirable_weight: float = option(1.0, "lambda_U; with n_D desirable and n_U undesirable responses, keep lambda_D "
                                            "n_D / (lambda_U n_U) between 1 and 4/3")

    needs_reference: ClassVar[bool] = True
    needs_mismatched: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    scale: ClassVar[float] = 1.0
    sft: ClassVar[float] = 0.0
    sft_tokens: ClassVar[str] = "response"
    sft_average: ClassVar[str] = "tokens"

    def baseline(self, groups: Groups) -> Array:
        """z0, a scalar."""
        other = groups.mismatched
        return jax.lax.stop_gradient(jnp.maximum(Mean.of(other.ratio, other.present).value, 0))

    def __call__(self, groups: Groups) -> Array:
        """[..., 2]: desirable, undesirable."""
        z0 = self.baseline(groups)
        good = jax.nn.sigmoid(-self.beta * (groups.chosen.ratio - z0))  # 1 - sigma(x) = sigma(-x)
        bad = jax.nn.sigmoid(-self.beta * (z0 - groups.rejected.ratio))
        return jnp.stack([self.desirable_weight * good, self.undesirable_weight * bad], axis=-1)

    def counted(self, groups: Groups) -> Array:
        """[..., 2] bool: each response by itself."""
        return jnp.stack([groups.chosen.present, groups.rejected.present], axis=-1)

    def reward(self, responses: Responses) -> Array:
        """beta r."""
        return self.beta * responses.ratio
