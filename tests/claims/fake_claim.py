"""A claim of the tests: arm "good" gives 1, arm "bad" 0, each with a little of its seed.

Claim: good is better than bad.
Command: lm claim fake_claim --workdir runs/claims/fake_claim
Hardware: none.
Expected: 1 against 0.
"""

from experiments.claims import base


def get_config():
    config = base.get_config()
    config.data = dict(source="pydoc", tokenizer="bytes")
    return config


def grid(full=False):
    return [dict(arm=arm, seed=seed, set={"train.seq_len": 32 if full else 16})
            for arm in ("good", "bad") for seed in base.SEEDS]


def check(results):
    found = base.by_arm(results, "score")
    return base.verdict([base.at_least("worst of good", min(found["good"]), 0.9),
                         base.at_most("best of bad", max(found["bad"]), 0.1)], ("score",),
                        {"x": "arm", "y": "score", "series": {"all": {"x": list(found), "y": list(found.values())}}})
