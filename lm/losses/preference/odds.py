"""ORPO: odds ratio preference optimisation without a reference model (Hong et al. 2024, arXiv:2403.07691).

P is the geometric mean of the token probabilities of a response, l = log P <= 0 its mean log-probability. With odds
P / (1 - P) the log odds ratio of a pair is z = [l_w - l_l] - [log(1 - P_w) - log(1 - P_l)] and the loss
-log sigma(z). Its gradient, with D = P_w + P_l - 2 P_w P_l:

    d/dl_w = -P_l / D        d/dl_l = P_l (1 - P_w) / [(1 - P_l) D]

The paper prints the gradient with the opposite sign (eq. 8 is the direction of descent) and says that 1 / (1 - P) grows
where P is low; it grows where P is high. Chosen responses that are unlikely are learned faster through sigma(-z), which
is at most 1; a rejected response that is nearly certain gets a gradient of 1 / (1 - P_l).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lm.core.fields import option
from lm.core.types import Array
from lm.losses.preference.base import Paired, log1mexp, log_sigmoid
from lm.losses.preference.responses import Groups, Responses


def log_odds(mean_logp: Array, limit: float = -1e-7) -> Array:
    """log(P / (1 - P)) of l = log P, [...]. Above `limit` the value is that at the limit, and so is the derivative: a
    response that is certain is still pushed down."""
    clipped = mean_logp + jax.lax.stop_gradient(jnp.minimum(mean_logp, limit) - mean_logp)
    return clipped - log1mexp(clipped)


@dataclasses.dataclass(frozen=True)
class Orpo(Paired):
    """-log sigma(log odds ratio), beside the likelihood of the chosen response (Hong et al. 2024, eq. 6 and 7)."""

    odds_weight: float = option(0.1, "lambda of the paper (0.1 to 0.25 there); alpha in its code, beta in TRL")
    sft_weight: float = option(1.0, "weight of the likelihood of the chosen response")
    sft_tokens: Literal["response", "all"] = option("response", "what the likelihood covers: the response as in the "
                                                    "paper, or the prompt too, as its code and TRL do by default")
    sft_average: Literal["tokens", "sequences"] = option("tokens", "mean over the tokens of the batch, or of the means "
                                                         "of the sequences")
    limit: float = option(-1e-7, "mean log-probabilities above this count as this: it bounds 1 / (1 - P)")

    def check(self) -> None:
        """Raises ValueError for a limit that is no log-probability below 0."""
        if not self.limit < 0:
            raise ValueError(f"orpo: limit={self.limit} must be below 0, the log of a probability below 1")

    @property
    def scale(self) -> float:
        """lambda."""
        return self.odds_weight

    @property
    def sft(self) -> float:
        """Weight of the likelihood."""
        return self.sft_weight

    def log_odds_ratio(self, groups: Groups) -> Array:
        """z, [...]."""
        return log_odds(groups.chosen.mean_logp, self.limit) - log_odds(groups.rejected.mean_logp, self.limit)

    def __call__(self, groups: Groups) -> Array:
        """[...]."""
        return -log_sigmoid(self.log_odds_ratio(groups))

    def reward(self, responses: Responses) -> Array:
        """The mean log-probability: odds grow with it."""
        return responses.mean_logp
