"""What a model forgets of one set of facts while it learns another one.

Claim: At equal accuracy on a second set of facts, PEER that was grown for it, with everything frozen but the new
    experts and sub-keys, has forgotten less of the first set than a dense model that was fine-tuned, and nothing once
    the new sub-keys are closed again.
Command: lm claim peer_lifelong --workdir runs/claims/peer_lifelong
Hardware: 2 CPU cores.
Expected: the paper names this use and has no experiment. Trials of one seed before the grid was committed: at 0.999 on
    the second set the grown arm kept 0.21 of the first and dense 0.16, of 0.99 and 1.00 before. Frozen experts alone
    thus save little, since tokens of the first set choose new experts too; the limits are set by that. A trial on text
    (speeches, then Python's help topics; 400 and 200 steps) said the same: at 3.2 bits per byte on the second the
    grown arm was 0.33 worse on the first, dense 0.37 to 0.5, by learning rate, and dense alone went on to 2.6.

One block of attention, width 64. A row is a pair of keys and its class, one of 64; the 2,048 facts of one half of the
first keys are the first set, those of the other half the second. Arms: a dense model, all trained on (`dense`); PEER of
32^2 experts, all trained on (`peer`); and PEER grown to 48^2, with everything frozen but what is new (`grown`).
Forgotten is what accuracy on the first set falls by. As arms learn the second one at different speeds, each is read
where it first is as good there as `grown` is in the end, between its checkpoints.
"""

from ml_collections import ConfigDict

from experiments.claims import base

STEPS = 800
LESS, LEARNED = 0.97, 0.8
SIZE = dict(embed_dim=64, num_layers=1, embed_std=1.0, attention=dict(num_heads=1))
DENSE = dict(pattern=("attention/mlp",), mlp=dict())
PEER = dict(pattern=("attention/peer",), peer=dict(num_experts=32**2, num_heads=4, top_k=8))
# arm: (model, what `lm grow` freezes)
ARMS = {"dense": (DENSE, None), "peer": (PEER, None), "grown": (PEER, "rest")}


def domain(part: int) -> dict:
    """The `data` group of a half of the facts."""
    return dict(source="facts", task=dict(num_keys=64, num_classes=64, part=(part, 2)))


def second(freeze: str | None, steps: int) -> dict:
    """The second stage of an arm: ten checkpoints, each evaluated on both domains."""
    stage = {"set": {"data": domain(1), "train.steps": steps, "checkpoint.every": steps // 10, "checkpoint.keep": 10,
                     "optimizer.learning_rate": 3e-3},
             "evaluate": {"first": {"data": domain(0)}, "second": {"data": domain(1)}}}
    if freeze is not None:
        stage["set"]["model.peer.active_keys"] = None
        stage["grow"] = dict(experts=48**2, freeze=freeze)
        stage["evaluate"]["closed"] = {"data": domain(0), "model.peer.active_keys": 32}
    return stage


def get_config() -> ConfigDict:
    """The first stage; the model is the arm's."""
    config = base.get_config()
    config.model = base.small(**SIZE, **DENSE)
    config.optimizer.learning_rate = 1e-2
    config.data = domain(0)
    config.train = dict(steps=STEPS, batch_size=256, seq_len=2)
    config.eval = dict(every=100_000, batches=16, baseline=False, final=False)
    return config


def grid(full: bool = False) -> list[dict]:
    """Every arm; the long grid has ten times the steps."""
    steps = STEPS * (10 if full else 1)
    return [dict(arm=arm, seed=seed, then=[second(freeze, steps)],
                 set={"model": base.small(**SIZE, **model), "train.steps": steps})
            for arm, (model, freeze) in ARMS.items() for seed in base.SEEDS]


def curve(values: dict, name: str) -> list[float]:
    """Accuracy on a domain before the second stage, and at its checkpoints."""
    start = f"{name}/accuracy@"
    steps = sorted(int(key.removeprefix(start)) for key in values if key.startswith(start))
    return [values[f"{start}{step}"] for step in steps]


def forgotten(values: dict, level: float) -> float:
    """What was forgotten of the first domain when the second had reached `level`, between checkpoints."""
    first, second = curve(values, "first"), curve(values, "second")
    for n in range(1, len(second)):
        if second[n] >= level:
            share = min(1.0, max(0.0, (level - second[n - 1]) / max(second[n] - second[n - 1], 1e-9)))
            return first[0] - first[n - 1] - share * (first[n] - first[n - 1])
    return first[0] - first[-1]


def check(results: list[dict]) -> dict:
    """Means over seeds, each arm read at the level that `grown` reaches on the second set."""
    of = lambda arm: [result["values"] for result in results if result["arm"] == arm]
    reached = base.mean([curve(values, "second")[-1] for values in of("grown")])
    lost = {arm: [forgotten(values, reached) for values in of(arm)] for arm in dict.fromkeys(r["arm"] for r in results)}
    closed = max(abs(values["closed/accuracy"] - values["first/accuracy@0"]) for values in of("grown"))
    before = base.mean([curve(values, "first")[0] for values in of("grown")])
    criteria = [
        base.at_least("grown, accuracy on the first set before", before, LEARNED),
        base.at_least("grown, accuracy on the second set after", reached, LEARNED),
        base.at_most("forgotten by grown over dense", base.mean(lost["grown"]) / base.mean(lost["dense"]), LESS),
        base.at_most("forgotten, worst seed of grown less best of dense", max(lost["grown"]) - min(lost["dense"]), 0.0),
        base.at_most("grown with new sub-keys closed, change of accuracy on the first set, worst seed", closed, 0.0)]
    figure = {"x": "arm", "y": "accuracy", "series": {
        f"forgotten of the first set at {reached:.3f} on the second": {"x": list(lost), "y": list(lost.values())},
        "the first set in the end": {"x": list(lost), "y": [[curve(v, "first")[-1] for v in of(arm)] for arm in lost]},
        "the second set in the end": {"x": list(lost), "y": [[curve(v, "second")[-1] for v in of(arm)]
                                                             for arm in lost]}}}
    return base.verdict(criteria, ("first/accuracy@0", "first/accuracy", "second/accuracy", "closed/accuracy",
                                   "num_params"), figure)
