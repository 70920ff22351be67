"""What comes back of a text that was trained on a hundred times, by the mask that hid some of its targets.

Claim: Without a mask, and with one that drops other targets each time, a model recites every repeated text; with the
    hash mask at k = 4, and with the static one, it recites none, and more with larger k; it leaves a text where a
    target was dropped, and its loss on new text is the same at equally many supervised tokens.
Command: lm claim goldfish_extraction --workdir runs/claims/goldfish_extraction
Hardware: 2 CPU cores.
Expected: trials before the first whole run, seed 0 of four arms. Exact continuations 1.00 without mask, 1.00 for
    random, 0.00 for hash with k = 4, 0.25 with k = 16; ROUGE-L 0.43 at k = 4, against 0.19 of texts that were not
    trained on; every first miss at a dropped target. Validation loss 2.328 without mask, 2.329 for k = 4 in as many
    steps; the arm with equally many supervised tokens was not tried. The limits were set by these.

32 documents of 48 ids, each the walk of a chain with 8 successors, stand for half of all rows; the others are new
walks. Two layers of width 64; 900 steps of 16 rows, so that a document comes 225 times. Asked for the last 24 ids of a
document after its first 24, greedily. h = 4. `equal` trains 900 / (1 - 45/47/4) steps: the mask can drop 45 of 47
targets.
"""

from ml_collections import ConfigDict

from experiments.claims import base

EXACT, ROUGE, LOSS = "eval/memorization/exact_match", "eval/memorization/rouge_l", "eval/validation/loss"
MISS, CONTROLS = "eval/memorization/miss_at_dropped", "eval/memorization/rouge_l_controls"
STEPS, EQUAL = 900, 1183
HASH = {"hash_4": 4, "hash_16": 16, "hash_64": 64}


def masked(steps: int = STEPS, **goldfish: object) -> dict:
    """What an arm changes: its mask and steps."""
    return {"loss": dict(next_token=1.0, goldfish=dict(h=4, **goldfish)), "train.steps": steps}


ARMS = {"none": {}, "random_4": masked(mask="random", k=4), "static_4": masked(mask="static", k=4),
        **{arm: masked(k=k) for arm, k in HASH.items()}, "hash_4_equal": masked(k=4, steps=EQUAL)}


def get_config() -> ConfigDict:
    """What all arms share."""
    config = base.get_config()
    config.model = base.small(embed_dim=64, num_layers=2, attention=dict(num_heads=4), mlp=dict())
    config.data = dict(source="recital", task=dict(), validation=dict(source="recital", task=dict(share=0.0)))
    config.train = dict(steps=STEPS, batch_size=16, seq_len=48)
    config.eval.memorization = dict(prefix=24, suffix=24, batch_size=32)
    return config


def documents(seed: int) -> dict:
    """Other documents of another chain for each seed, and new text of the same chain to validate on."""
    return {"data.task.draw": seed, "data.validation": dict(source="recital", task=dict(share=0.0, draw=seed))}


def grid(full: bool = False) -> list[dict]:
    """Every arm; the long grid has four times the steps, at which texts come 900 times."""
    longer = lambda arm: {"train.steps": 4 * (EQUAL if arm == "hash_4_equal" else STEPS)} if full else {}
    return [dict(arm=arm, seed=seed, set={**change, **documents(seed), **longer(arm)})
            for arm, change in ARMS.items() for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Whole texts without a mask that repeats, none with it; misses at dropped targets; equal loss on new text."""
    exact, rouge, loss = (base.by_arm(results, name) for name in (EXACT, ROUGE, LOSS))
    mean = lambda arm: base.mean(exact[arm])
    protected = [result for result in results if result["arm"] == "hash_4"]
    criteria = [base.at_least(f"{arm}, worst seed", min(exact[arm]), 0.95) for arm in ("none", "random_4")]
    criteria += [base.at_most(f"{arm}, best seed", max(exact[arm]), 0.0) for arm in ("hash_4", "static_4")]
    criteria += [base.at_least("k = 16 above 4, mean", mean("hash_16") - mean("hash_4"), 0.05),
                 base.at_least("k = 64 above 16, mean", mean("hash_64") - mean("hash_16"), 0.1),
                 base.at_least("hash_4, misses at dropped targets, worst seed",
                               min(base.by_arm(protected, MISS)["hash_4"]), 0.95),
                 base.at_most("loss on new text at equal supervised tokens, difference of means",
                              abs(base.mean(loss["hash_4_equal"]) - base.mean(loss["none"])), 0.03)]
    arms = list(ARMS)
    figure = {"x": "mask", "y": "of the last 24 ids", "series": {
        "exact": {"x": arms, "y": [exact[arm] for arm in arms]},
        "ROUGE-L": {"x": arms, "y": [rouge[arm] for arm in arms]}},
        "lines": {"ROUGE-L, never seen": base.mean(base.by_arm(results, CONTROLS)["none"])}}
    return base.verdict(criteria, (EXACT, ROUGE, LOSS), figure)
