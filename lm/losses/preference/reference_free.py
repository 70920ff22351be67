"""Losses of log-probabilities themselves: SimPO and CPO, which need no reference model."""

import dataclasses
from typing import Literal

from lm.core.fields import option
from lm.core.types import Array
from lm.losses.preference.base import Paired, log_sigmoid
from lm.losses.preference.responses import Groups, Responses


@dataclasses.dataclass(frozen=True)
class SimPo(Paired):
    """-log sigma(beta (l_w - l_l) - gamma), l the mean log-probability of a response (Meng et al. 2024, eq. 6).

    gamma is subtracted as it stands; TRL divides it by beta first.
    """

    beta: float = option(2.0, "scale of the mean log-probabilities")
    gamma: float = option(1.0, "margin that the scaled difference has to reach")
    sft_weight: float = option(0.0, "weight of the likelihood of the chosen response; TRL adds it with 1 by default")
    sft_tokens: Literal["response", "all"] = option("response", "what the likelihood covers: the response, or the "
                                                    "prompt too")
    sft_average: Literal["tokens", "sequences"] = option("tokens", "mean over the tokens of the batch, or of the means "
                                                         "of the sequences")

    @property
    def sft(self) -> float:
        """Weight of the likelihood."""
        return self.sft_weight

    def __call__(self, groups: Groups) -> Array:
        """[...]."""
        return -log_sigmoid(self.reward(groups.chosen) - self.reward(groups.rejected) - self.gamma)

    def reward(self, responses: Responses) -> Array:
        """beta l."""
        return self.beta * responses.mean_logp


@dataclasses.dataclass(frozen=True)
class Cpo(Paired):
    """-log sigma(beta (log pi(y_w) - log pi(y_l))) of the summed log-probabilities, beside the likelihood of the chosen
    response (Xu et al. 2024, arXiv:2401.08417)."""

    beta: float = option(0.1, "scale of the log-probabilities")
    sft_weight: float = option(1.0, "weight of the likelihood of the chosen response")
    sft_tokens: Literal["response", "all"] = option("response", "what the likelihood covers: the response, or the "
                                                    "prompt too, as TRL does")
    sft_average: Literal["tokens", "sequences"] = option("tokens", "mean over the tokens of the batch, or of the means "
                                                         "of the sequences")

    @property
    def sft(self) -> float:
        """Weight of the likelihood."""
        return self.sft_weight

    def __call__(self, groups: Groups) -> Array:
        """[...]."""
        return -log_sigmoid(self.reward(groups.chosen) - self.reward(groups.rejected))

    def reward(self, responses: Responses) -> Array:
        """beta log pi."""
        return self.beta * responses.logp
