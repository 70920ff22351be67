"""What the odds ratio adds to fine-tuning on chosen responses: the rejected ones go down instead of up.

Claim: Fine-tuning on chosen responses raises the rejected ones that share their content by more than 2 nats a token;
    ORPO keeps the chosen ones and separates them, the further the larger lambda is.
Command: lm claim orpo_margin --workdir runs/claims/orpo_margin
Hardware: 2 CPU cores.
Expected: an implementation of another hand, on a task of this kind with about 200 ids, one seed, gave chosen and
    rejected log-probabilities a token of -0.26 and -0.71 for lambda 0 (from -5.3), -0.26 and -1.51 for 0.1, -0.30 and
    -3.32 for 1, -0.41 and -5.51 for 5. A trial of one cell here (64 contents, lambda 1, 300 steps) gave -0.25 and
    -3.81. The limits were set by these.

Two layers of width 64 from fresh parameters. A prompt of eight contents; both responses repeat them with a mark behind
each, the good mark with probability 0.8 in the chosen and 0.2 in the rejected response. Entropy of the marks alone is
0.24 nats a token. Log-probabilities are means over the tokens of a response, of 256 new pairs.
"""

from itertools import pairwise

from ml_collections import ConfigDict

from experiments.claims import base

CHOSEN, REJECTED, MARGIN = (f"eval/validation/{name}" for name in ("chosen_logp", "rejected_logp", "logp_margin"))
LAMBDAS = {"sft": 0.0, "lambda_0.1": 0.1, "lambda_1": 1.0, "lambda_5": 5.0}
START = "untrained"
RAISED, KEPT, STEP, SEPARATED = 2.0, 0.3, 0.3, 2.0


def get_config() -> ConfigDict:
    """What all arms share."""
    config = base.get_config()
    config.model = base.small(embed_dim=64, num_layers=2, pattern=("attention/mlp",), attention=dict(num_heads=2),
                              mlp=dict(mlp_dim=128))
    config.data = dict(source="style_pairs", task=dict(num_contents=8, num_symbols=64))
    config.loss = dict(orpo=dict(odds_weight=0.0))
    config.train = dict(steps=300, batch_size=32, seq_len=64)
    return config


def grid(full: bool = False) -> list[dict]:
    """Every lambda, and fresh parameters; the long grid has ten times the steps."""
    arms = {arm: {"loss.orpo.odds_weight": weight, **({"train.steps": 3000} if full else {})}
            for arm, weight in LAMBDAS.items()}
    # One step of next to no size: the parameters are as good as fresh when they are evaluated.
    arms[START] = {"train.steps": 1, "optimizer.learning_rate": 1e-9, "optimizer.warmup_steps": 0}
    return [dict(arm=arm, seed=seed, set=settings) for arm, settings in arms.items() for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Every criterion by the worst seed."""
    chosen, rejected, margin = (base.by_arm(results, name) for name in (CHOSEN, REJECTED, MARGIN))
    arms = list(LAMBDAS)
    criteria = [
        base.at_least("SFT raises the rejected log-probability by, worst seed", min(rejected["sft"]) -
                      max(rejected[START]), RAISED),
        *(base.at_most(f"{arm} lowers the chosen one below SFT's by, worst seed", max(chosen["sft"]) -
                       min(chosen[arm]), KEPT) for arm in arms[1:]),
        *(base.at_least(f"margin of {after} above {before}, worst seeds", min(margin[after]) - max(margin[before]),
                        STEP) for before, after in pairwise(arms)),
        base.at_least("lambda_1 puts the rejected one below SFT's by, worst seed", min(rejected["sft"]) -
                      max(rejected["lambda_1"]), SEPARATED)]
    figure = {"x": "arm", "y": "log-probability a token", "series": {
        label: {"x": [START, *arms], "y": [found[arm] for arm in (START, *arms)]}
        for label, found in (("chosen", chosen), ("rejected", rejected))}}
    return base.verdict(criteria, (CHOSEN, REJECTED, MARGIN, "eval/validation/accuracy"), figure)
