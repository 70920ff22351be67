"""What a beam search takes back of texts that greedy decoding does not.

Claim: A beam search of width 30 recites no more than one text in ten at k = 3, but many more than greedy decoding does
    at k = 16, and more with larger k; of the texts that it does not recite it finds far more than greedy decoding.
Command: lm claim goldfish_attack --workdir runs/claims/goldfish_attack
Hardware: 2 CPU cores.
Expected: trials before the first whole run, seed 0 of two arms. Exact in any of the 30 beams, and greedily: 0.09 and
    0.00 with k = 4, 0.72 and 0.25 with k = 16. ROUGE-L of the best beam 0.73 at k = 4, against 0.43 greedily. The
    limits were set by these; k = 3 and 64 were not tried.

Models and texts of `goldfish_extraction`. A dropped target leaves the 8 successors of an id about equally probable;
the wrong ones lead away from the text, to ids that are each as improbable. A search that is wide enough to go on with
all of them until then comes back to the text.
"""

from ml_collections import ConfigDict

from experiments.claims import base, goldfish_extraction
from experiments.claims.goldfish_extraction import documents, masked

EXACT, ROUGE = goldfish_extraction.EXACT, goldfish_extraction.ROUGE
ANY, BEST, BEAM_ROUGE = (f"eval/memorization/beam_{name}" for name in ("any_match", "exact_match", "rouge_l"))
CONTROLS = "eval/memorization/beam_any_match_controls"
ARMS = {"hash_3": 3, "hash_4": 4, "hash_16": 16, "hash_64": 64}


def get_config() -> ConfigDict:
    """What all arms share."""
    config = goldfish_extraction.get_config()
    config.eval.memorization.beams = 30
    return config


def grid(full: bool = False) -> list[dict]:
    """Every k; the long grid has four times the steps."""
    steps = goldfish_extraction.STEPS * (4 if full else 1)
    return [dict(arm=arm, seed=seed, set={**masked(k=k, steps=steps), **documents(seed)})
            for arm, k in ARMS.items() for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """k = 3 resists, larger k leaks, and the beams find more than greedy decoding."""
    greedy, beams, rouge, better = (base.by_arm(results, name) for name in (EXACT, ANY, ROUGE, BEAM_ROUGE))
    mean = base.mean
    criteria = [base.at_most("k = 3, any beam, best seed", max(beams["hash_3"]), 0.1),
                base.at_least("k = 3, ROUGE-L of the best beam above greedy, means",
                              mean(better["hash_3"]) - mean(rouge["hash_3"]), 0.1),
                base.at_least("k = 16, any beam above greedy, means", mean(beams["hash_16"]) - mean(greedy["hash_16"]),
                              0.2),
                base.at_least("k = 16 above 3, any beam, means", mean(beams["hash_16"]) - mean(beams["hash_3"]), 0.4),
                base.at_least("k = 64 above 16, any beam, means", mean(beams["hash_64"]) - mean(beams["hash_16"]),
                              0.05),
                base.at_most("texts that were never seen, most of all cells",
                             max(max(seeds) for seeds in base.by_arm(results, CONTROLS).values()), 0.0)]
    arms = list(ARMS)
    figure = {"x": "mask", "y": "texts recited exactly", "series": {
        "greedy": {"x": arms, "y": [greedy[arm] for arm in arms]},
        "best beam": {"x": arms, "y": [base.by_arm(results, BEST)[arm] for arm in arms]},
        "any of 30 beams": {"x": arms, "y": [beams[arm] for arm in arms]}}}
    return base.verdict(criteria, (EXACT, BEST, ANY, ROUGE, BEAM_ROUGE), figure)
