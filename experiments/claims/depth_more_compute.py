"""More iterations at test time answer harder questions, where the model was trained to loop.

Claim: A core that was looped 5 times on average in training answers more with more iterations, one more hop for each;
    harder instances need more; 20 iterations, four times the mean of training, are as good as 8; and the same model
    trained with a single iteration gains nothing from more.
Command: lm claim depth_more_compute --workdir runs/claims/depth_more_compute
Hardware: 2 CPU cores.
Expected: a trial of one seed before the first whole run, 1,500 steps, evaluated after 500 and 1,000. After 500 the
    accuracy with 1, 2, 4, 8 and 16 iterations was 0.51, 0.60, 0.77, 0.994 and 0.997, a staircase: with r iterations
    right up to r + 2 hops and at chance beyond. The limits were set by it. The arm of a single iteration had not been
    run. Two tasks were tried before this one and given up: ends of chains, as links in random order followed by
    questions, where 1,100 steps had learned one hop, and copies whose chains ran together, so that the most frequent
    value was right in two of three.

The first whole run trained 700 steps, less than the trial had: one seed of three was still guessing, the other two were
right. From then on all train the 1,500 of the trial; no limit was changed.

Copies of copies: blocks of 4 tokens, each the one before in another order; a token of block h needs h hops. Prelude,
core and coda are one block each of width 64, so that one iteration is three layers. Chance is 1/4.
"""

import itertools

from ml_collections import ConfigDict

from experiments.claims import base

HOPS = tuple(range(1, 10))
ITERATIONS = (1, 2, 4, 8, 20)
EVEN, FAR, FARTHEST = 1, 6, 9  # hops that one iteration, four and eight have to be enough for
RIGHT, GUESSED = 0.9, 0.5
RISE, STABLE, FLAT = 0.3, 0.02, 0.05
SIZE = dict(embed_dim=64, num_layers=3, prefix=("attention/mlp",), pattern=("attention/mlp",), embed_std=0.08,
            attention=dict(num_heads=4, rope_theta=100.0), mlp=dict(mlp_dim=128, activation="swiglu"))
DEPTH = dict(coda=("attention/mlp",), mean=4.0, backprop=4)
ARMS = {"looped": DEPTH, "once": {**DEPTH, "mean": 0.0, "backprop": 1}}


def get_config() -> ConfigDict:
    """What both arms share."""
    config = base.get_config()
    config.model = {**base.small(**SIZE), "recurrent_depth": DEPTH, "vocab_multiple": 5}
    config.data = dict(source="copy_chain", task=dict(width=4, num_values=8, report=HOPS))
    config.train = dict(steps=1500, batch_size=32, seq_len=40)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.eval.batches = 8
    config.eval.recurrences = ITERATIONS
    return config


def grid(full: bool = False) -> list[dict]:
    """Both arms; the long grid has chains of up to 19 hops, of which training sees the same numbers of iterations."""
    longer = {"train.steps": 3000, "train.seq_len": 80,
              "data.task": dict(width=4, num_values=8, report=(*HOPS, 14, 19))}
    return [dict(arm=arm, seed=seed, set={"model.recurrent_depth": depth, **(longer if full else {})})
            for arm, depth in ARMS.items() for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Rising, later for more hops, and stable for the looped arm; flat for the other."""
    at = {r: base.by_arm(results, f"eval/validation_r{r}/accuracy") for r in ITERATIONS}
    hops = {(h, r): base.by_arm(results, f"eval/hops_{h}_r{r}/accuracy")["looped"] for h in HOPS for r in ITERATIONS}
    looped = {r: base.mean(found["looped"]) for r, found in at.items()}
    needed = [min((r for r in ITERATIONS if base.mean(hops[h, r]) >= RIGHT), default=999) for h in HOPS]
    few, some, many, most = ITERATIONS[0], ITERATIONS[2], ITERATIONS[3], ITERATIONS[-1]
    gain = max(max(at[r]["once"][seed] for r in ITERATIONS) - at[few]["once"][seed] for seed in range(len(base.SEEDS)))
    criteria = [
        base.at_least(f"looped: {many} iterations over {few}, mean", looped[many] - looped[few], RISE),
        base.at_least(f"looped: {EVEN} hop, {few} iteration, mean", base.mean(hops[EVEN, few]), RIGHT),
        base.at_most(f"looped: {FAR} hops, {few} iteration, mean", base.mean(hops[FAR, few]), GUESSED),
        base.at_least(f"looped: {FAR} hops, {some} iterations, mean", base.mean(hops[FAR, some]), RIGHT),
        base.at_most(f"looped: {FARTHEST} hops, {some} iterations, mean", base.mean(hops[FARTHEST, some]), GUESSED),
        base.at_least(f"looped: {FARTHEST} hops, {many} iterations, mean", base.mean(hops[FARTHEST, many]), RIGHT),
        base.at_least("looped: iterations needed, least difference from one hop more",
                      min(b - a for a, b in itertools.pairwise(needed)), 0),
        base.at_least(f"looped: {most} iterations over {many}, worst seed",
                      min(b - a for a, b in zip(at[many]["looped"], at[most]["looped"], strict=True)), -STABLE),
        base.at_most("once: best number of iterations over one, largest seed", gain, FLAT)]
    series = {f"{h} hops": {"x": list(ITERATIONS), "y": [hops[h, r] for r in ITERATIONS]} for h in (1, 3, 5, 7, 9)}
    series["all, trained with one iteration"] = {"x": list(ITERATIONS), "y": [at[r]["once"] for r in ITERATIONS]}
    figure = {"x": "iterations", "xscale": "log", "y": "accuracy", "series": series, "lines": {"chance": 1 / 4}}
    return base.verdict(criteria, [f"eval/validation_r{r}/accuracy" for r in ITERATIONS] + ["num_params"], figure)
