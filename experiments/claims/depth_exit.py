"""Tokens that stop when their prediction settles save half of the iterations, and harder ones save less.

Claim: Tokens that stop once an iteration moves their prediction by less than 1e-6 nats take under half of 16 iterations
    and answer within one point of all 16; tokens that need more hops take more.
Command: lm claim depth_exit --workdir runs/claims/depth_exit
Hardware: 2 CPU cores.
Expected: a trial before the first whole run, one seed, 1,500 steps of the schedule of 1,500: 16 iterations 1.000; with
    1e-6 nats 1.000 in 5.5 iterations, 3.7 for three hops, 6.2 for six, 8.8 for nine; with 1e-5 0.995 in 4.8; with 1e-4
    0.943 in 4.0. With the 5e-4 of Geiping et al., after 1,000 steps, 0.849 in 3.4: a token whose answer has not reached
    it yet predicts all four values alike from one iteration to the next, and stops. So the threshold here is smaller
    than theirs; nothing but the threshold was chosen by the trial.

The model and data of depth_more_compute, whose steps were 700 in the first whole run, too few for one seed of three.
Both arms train alike, seed by seed; the second stops by itself in evaluation.
"""

from ml_collections import ConfigDict

from experiments.claims import base, depth_more_compute

ITERATIONS, THRESHOLD = 16, 1e-6
HOPS = depth_more_compute.HOPS
POINT, HALF = 0.01, 0.5
EASY, MIDDLE, HARD = 2, 5, 9
VALIDATION = "eval/validation/"


def get_config() -> ConfigDict:
    """What both arms share."""
    config = depth_more_compute.get_config()
    config.model.recurrent_depth.recurrences = ITERATIONS
    config.eval.recurrences = ()
    return config


def grid(full: bool = False) -> list[dict]:
    """All iterations, and as many as a token needs; the long grid trains on chains of up to 19 hops."""
    longer = {"train.steps": 3000, "train.seq_len": 80,
              "data.task": dict(width=4, num_values=8, report=(*HOPS, 14, 19))}
    return [dict(arm=arm, seed=seed, set={"model.recurrent_depth.exit_kl": threshold, **(longer if full else {})})
            for arm, threshold in (("all", None), ("exit", THRESHOLD)) for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Accuracy against that of all iterations by seed, iterations against all of them, and by hops."""
    right = base.by_arm(results, f"{VALIDATION}accuracy")
    took = {h: [r["values"][f"eval/hops_{h}/steps"] for r in results if r["arm"] == "exit"] for h in HOPS}
    mean = base.mean([r["values"][f"{VALIDATION}steps"] for r in results if r["arm"] == "exit"])
    criteria = [
        base.at_least("all iterations, mean accuracy", base.mean(right["all"]), 0.9),
        base.at_most("points lost by stopping, worst seed",
                     max(a - b for a, b in zip(right["all"], right["exit"], strict=True)), POINT),
        base.at_most("iterations taken, share of all", mean / ITERATIONS, HALF),
        base.at_least(f"iterations of {MIDDLE} hops over {EASY}, least seed",
                      min(b - a for a, b in zip(took[EASY], took[MIDDLE], strict=True)), 1),
        base.at_least(f"iterations of {HARD} hops over {MIDDLE}, least seed",
                      min(b - a for a, b in zip(took[MIDDLE], took[HARD], strict=True)), 1)]
    figure = {"x": "hops", "y": "iterations until a token stops",
              "series": {"mean and range": {"x": list(HOPS), "y": [took[h] for h in HOPS]}},
              "lines": {"half of all iterations": ITERATIONS * HALF}}
    return base.verdict(criteria, [f"{VALIDATION}accuracy", f"{VALIDATION}steps"], figure)
