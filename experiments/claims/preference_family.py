"""All preference losses on one task: what each gains, and what it pays.

Claim: From a model that writes both styles alike, every preference loss learns to tell and to write the chosen style
    well above what length alone tells; each pays with divergence from where it began.
Command: lm claim preference_family --workdir runs/claims/preference_family
Hardware: 2 CPU cores.
Expected: trials of one seed gave accuracies of 0.94 (orpo), 0.97 (dpo) and 0.96 (simpo), a length baseline of 0.65,
    good marks from 0.60 to 0.81, 1.00 and 0.99, divergences of 0.19, 1.04 and 1.22 nats a token, and responses longer
    by 0.34, 0.59 and 0.60 contents. The limits were set by these.

Two layers of width 64. First 300 steps of next-token prediction on both responses, then 150 steps of the loss with the
settings that are its defaults, one learning rate for all; the model in between is the reference. Responses repeat the
prompt's contents with marks, good ones with probability 0.8 in the chosen and 0.2 in the rejected response, and chosen
ones are longer: they end after a content with probability 0.1, rejected ones with 0.3. Accuracy is by mean
log-probability for all, over 256 new pairs; 256 responses are drawn at temperature 1.

The long grid trains adapters of SmolLM2-135M on real dialogues with DPO, and asks for rewards that tell held-out pairs
(at least 500) better than length does; it takes three hours of a core. It reads runs/smollm2 (`lm convert`) and
data/hh_harmless (`lm data prepare --kind preference --config runs/smollm2 --validation-fraction 0.25` of 2,312
dialogues of HH). Rows of 256 tokens hold most pairs with the end of their prompts; 200 steps of eight rows see nearly
every training pair once.
"""

from ml_collections import ConfigDict

from experiments.claims import base

ACCURACY, GOOD, KL, DRIFT = "accuracy", "good", "kl", "length_drift"
START, SFT = "start", "sft"
ABOVE_LENGTH, AT_START, BETTER, MOVED = 0.15, 0.75, 0.1, 0.02
LOSSES = ("orpo", "dpo", "ipo", "simpo", "cpo", "kto", "slic")


def get_config() -> ConfigDict:
    """What all arms share. eval.every: steps of the second stage."""
    config = base.get_config()
    config.model = base.small(embed_dim=64, num_layers=2, pattern=("attention/mlp",), attention=dict(num_heads=2),
                              mlp=dict(mlp_dim=128))
    config.data = dict(source="style_pairs", task=dict(num_contents=4, num_symbols=64, stop=0.1, rejected_stop=0.3,
                                                       mismatched=True))
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 10
    config.train = dict(steps=300, batch_size=32, seq_len=48)
    config.eval.every = 150
    config.loss = {"orpo": 1.0}
    return config


SMOLLM2 = dict(embed_dim=576, num_layers=30, pattern=("attention/mlp",), vocab_size=49_152, norm_eps=1e-5,
               attention=dict(num_heads=9, num_kv_heads=3, head_dim=64, rope_theta=100_000.0),
               mlp=dict(activation="swiglu", mlp_dim=1536), dtype="float32", scan=True)
REAL = {"model": SMOLLM2, "train.steps": 200, "train.batch_size": 8, "train.seq_len": 256, "train.lora_rank": 16,
        "train.init_from": "runs/smollm2", "optimizer.learning_rate": 2e-4, "optimizer.warmup_steps": 20,
        "eval.every": 100_000, "eval.batches": None, "checkpoint.every": 25, "log.every": 10,
        "data": dict(source="pairs", path="data/hh_harmless")}
REAL_LOSSES = {"dpo": {"dpo": 1.0}}
HELD_OUT = 500


# One step of next to no size.
ONCE = {"optimizer.learning_rate": 1e-9, "optimizer.warmup_steps": 0}


def grid(full: bool = False) -> list[dict]:
    """Every loss, likelihood of the chosen responses alone, and no second stage; the long grid on real dialogues."""
    if full:
        real = {name: {**REAL, "loss": loss} for name, loss in REAL_LOSSES.items()}
        real[START] = {**REAL, **ONCE, "loss": {"orpo": 1.0}, "train.steps": 1}
        return [dict(arm=arm, seed=seed, measure="train", set=settings) for arm, settings in real.items()
                for seed in base.SEEDS]
    arms = {name: {"loss": {name: 1.0}} for name in LOSSES}
    arms[SFT] = {"loss": {"orpo": {"odds_weight": 0.0}}}
    arms[START] = {"eval.every": 1, **ONCE}
    return [dict(arm=arm, seed=seed, measure="preference_run", set=settings) for arm, settings in arms.items()
            for seed in base.SEEDS]


def check_real(results: list[dict]) -> dict:
    """The lower end of the interval of the rewards' accuracy against the length baseline, worst seed of each loss."""
    name = "eval/validation/{}".format
    accuracy, low, high, length, pairs = (base.by_arm(results, name(metric)) for metric in (
        "accuracy", "accuracy_low", "accuracy_high", "length_baseline", "pairs"))
    baseline = max(max(values) for values in length.values())
    criteria = [base.at_least("held-out pairs", min(min(values) for values in pairs.values()), HELD_OUT)]
    criteria += [base.at_least(f"{arm}, lower end of the accuracy's interval above the length baseline "
                               f"({base.mean(accuracy[arm]):.3f}, up to {max(high[arm]):.3f}; {baseline:.3f})",
                               min(low[arm]) - baseline, 0.0) for arm in REAL_LOSSES]
    figure = {"x": "arm", "y": "accuracy on held-out pairs", "lines": {"length baseline": baseline}, "series": {
        "accuracy": {"x": list(accuracy), "y": list(accuracy.values())}}}
    return base.verdict(criteria, [name(metric) for metric in ("accuracy", "accuracy_low", "accuracy_high",
                                                               "length_baseline", "kl", "chosen_length")], figure)


def check(results: list[dict]) -> dict:
    """Each loss by its worst seed, against the length baseline and against the model before the second stage."""
    if "eval/validation/accuracy" in results[0]["values"]:
        return check_real(results)
    accuracy, good, kl, drift, length = (base.by_arm(results, name) for name in (
        ACCURACY, GOOD, KL, DRIFT, "length_baseline"))
    baseline = max(max(values) for values in length.values())
    criteria = [base.at_most("accuracy before the second stage, best seed", max(accuracy[START]), AT_START)]
    for name in LOSSES:
        criteria += [
            base.at_least(f"{name}, accuracy above the length baseline ({baseline:.3f}), worst seed",
                          min(accuracy[name]) - baseline, ABOVE_LENGTH),
            base.at_least(f"{name}, share of good marks gained, worst seed",
                          min(good[name]) - max(good[START]), BETTER),
            base.at_least(f"{name}, divergence in nats a token (length drift {base.mean(drift[name]):+.2f} contents)",
                          min(kl[name]), MOVED)]
    arms = (START, SFT, *LOSSES)
    figure = {"x": "arm", "y": "see the legend", "series": {
        label: {"x": list(arms), "y": [found[arm] for arm in arms]}
        for label, found in (("accuracy", accuracy), ("share of good marks", good), ("divergence, nats a token", kl),
                             ("length drift, contents", drift))}, "lines": {"length baseline": baseline}}
    return base.verdict(criteria, (ACCURACY, "length_baseline", GOOD, "win_rate", "length_win_rate", KL, DRIFT,
                                   "chosen_logp", "rejected_logp"), figure)
