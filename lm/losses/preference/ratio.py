"""Losses of the log-ratio to a reference model: DPO, IPO and the hinge of SLiC.

With r(y) = log pi(y|x) - log pi_ref(y|x) of the summed log-probabilities, all see u = r(y_w) - r(y_l) alone.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lm.core.fields import option
from lm.core.types import Array
from lm.losses.preference.base import Paired, log_sigmoid
from lm.losses.preference.responses import Groups, Responses


@dataclasses.dataclass(frozen=True)
class Dpo(Paired):
    """-log sigma(beta u) (Rafailov et al. 2023, eq. 7); `label_smoothing` e gives -(1 - e) log sigma(z) - e log
    sigma(-z), and with `robust` the loss whose mean over labels flipped with probability e is that of the right ones
    (Chowdhury et al. 2024)."""

    beta: float = option(0.1, "strength of the pull to the reference model")
    label_smoothing: float = option(0.0, "e: the share of pairs whose label is taken to be wrong")
    robust: bool = option(False, "unbiased under labels flipped with probability e, instead of smoothed")

    needs_reference: ClassVar[bool] = True

    def check(self) -> None:
        """Raises ValueError for a share of wrong labels of a half or more."""
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo: label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")
        if self.robust and not self.label_smoothing:
            raise ValueError("dpo: robust=True needs label_smoothing above 0, the share of labels that are wrong")

    def __call__(self, groups: Groups) -> Array:
        """[...]."""
        z = self.beta * (groups.chosen.ratio - groups.rejected.ratio)
        share = self.label_smoothing
        if self.robust:
            return (-(1 - share) * log_sigmoid(z) + share * log_sigmoid(-z)) / (1 - 2 * share)
        return -(1 - share) * log_sigmoid(z) - share * log_sigmoid(-z)

    def reward(self, responses: Responses) -> Array:
        """beta r."""
        return self.beta * responses.ratio


@dataclasses.dataclass(frozen=True)
class Ipo(Paired):
    """(u - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17)."""

    beta: float = option(0.1, "tau of the paper: the margin that is aimed at is 1 / (2 beta)")
    length_normalized: bool = option(False, "ratios a token, as in TRL, instead of sums, as in the paper")

    needs_reference: ClassVar[bool] = True

    def check(self) -> None:
        """Raises ValueError for a beta that gives no margin."""
        if not self.beta > 0:
            raise ValueError(f"ipo: beta={self.beta} must be above 0")

    def __call__(self, groups: Groups) -> Array:
        """[...]."""
        return jnp.square(self.reward(groups.chosen) - self.reward(groups.rejected) - 1 / (2 * self.beta))

    def reward(self, responses: Responses) -> Array:
        """r, summed or a token."""
        return responses.mean_ratio if self.length_normalized else responses.ratio


@dataclasses.dataclass(frozen=True)
class Slic(Paired):
    """max(0, 1 - beta u), the hinge of SLiC-HF (Zhao et al. 2023) on ratios, as Liu et al. 2023 compare it."""

    beta: float = option(0.1, "the margin that is aimed at is 1 / beta")

    needs_reference: ClassVar[bool] = True

    def __call__(self, groups: Groups) -> Array:
        """[...]."""
        return jax.nn.relu(1 - self.beta * (groups.chosen.ratio - groups.rejected.ratio))

    def reward(self, responses: Responses) -> Array:
        """beta r."""
        return self.beta * responses.ratio
