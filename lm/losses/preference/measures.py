"""What is logged and evaluated of scored responses, beside the loss."""

from typing import Any

import jax.numpy as jnp

from lm.core.types import Mean
from lm.losses.preference.base import PreferenceLoss
from lm.losses.preference.odds import log_odds
from lm.losses.preference.responses import Groups


def measures(loss: PreferenceLoss, groups: Groups) -> dict[str, Any]:
    """Means over responses and pairs: log-probabilities a token, lengths, the log odds ratio, rewards and how often the
    chosen one's is larger; the log-ratio to the reference a token where there is one. Nothing is exponentiated."""
    chosen, rejected, paired = groups.chosen, groups.rejected, groups.paired
    good, bad = loss.reward(chosen), loss.reward(rejected)
    odds = log_odds(chosen.mean_logp) - log_odds(rejected.mean_logp)
    out = {
        "chosen_logp": Mean.of(chosen.mean_logp, chosen.present),
        "rejected_logp": Mean.of(rejected.mean_logp, rejected.present),
        "logp_margin": Mean.of(chosen.mean_logp - rejected.mean_logp, paired),
        "log_odds_ratio": Mean.of(odds, paired),
        "chosen_reward": Mean.of(good, chosen.present),
        "rejected_reward": Mean.of(bad, rejected.present),
        "reward_margin": Mean.of(good - bad, paired),
        "pair_accuracy": Mean.of(good > bad, paired),
        "chosen_length": Mean.of(chosen.length, chosen.present),
        "rejected_length": Mean.of(rejected.length, rejected.present),
        "pairs": Mean(jnp.sum(paired, dtype=jnp.float32), jnp.ones((), jnp.float32)),
    }
    if chosen.reference is not None:
        both = [jnp.stack(pair) for pair in zip(chosen[:3], rejected[:3], strict=True)]
        out["log_ratio"] = Mean(jnp.sum(jnp.where(both[1] > 0, both[0] - both[2], 0)), jnp.sum(both[1]))
    return out
