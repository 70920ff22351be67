"""Whether a mask that keeps texts from being recited also hides that they were trained on. It does not.

Claim: The hash mask at k = 4 protects from membership inference only marginally: its AUC stays above 0.9, and within
    0.05 of that without a mask, while no text is recited; of a model that never saw the texts it is 1/2.
Command: lm claim goldfish_membership --workdir runs/claims/goldfish_membership
Hardware: 2 CPU cores.
Expected: trials before the first whole run, seed 0 of two arms. AUC by loss 0.988 without mask and 0.978 with it, by
    loss / zlib 0.960 and 0.944, by Min-K% 0.959 and 0.899; true positives at 1% false positives by loss 0.86 and 0.81,
    by loss / zlib 0.62 and 0.52, by Min-K% 0.68 and 0.37. With 128 texts in the place of 512, which come 56 times, AUC
    by loss was 1.000 for both. Not one text was recited at 512, with or without mask. The limits were set by these;
    `unseen` was not tried.

Model and chains of `goldfish_extraction`, with 512 documents that come 14 times each, and 512 controls: enough of them
for a false positive rate of 1%, and few enough repetitions for the scores not to be perfect. `unseen` trains on new
text alone; members and controls are both new to it.
"""

from ml_collections import ConfigDict

from experiments.claims import base, goldfish_extraction
from experiments.claims.goldfish_extraction import EXACT, masked

SCORES = ("loss", "zlib", "min_k")
AUC, TPR = ({score: f"eval/memorization/{kind}_{score}" for score in SCORES} for kind in ("auc", "tpr"))
DOCUMENTS = 512


def task(seed: int, share: float = 0.5) -> dict:
    """Fields of the made rows."""
    return dict(num_documents=DOCUMENTS, draw=seed, share=share)


def get_config() -> ConfigDict:
    """What all arms share."""
    return goldfish_extraction.get_config()


def grid(full: bool = False) -> list[dict]:
    """Three arms; the long grid has twice the steps."""
    steps = goldfish_extraction.STEPS * (2 if full else 1)
    arms = {"none": {"train.steps": steps}, "hash_4": masked(k=4, steps=steps), "unseen": {"train.steps": steps}}
    return [dict(arm=arm, seed=seed, set={
        **change, "data.task": task(seed, 0.0 if arm == "unseen" else 0.5),
        "data.validation": dict(source="recital", task=task(seed, 0.0))})
        for arm, change in arms.items() for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Members are told from controls with and without a mask, about equally well, and without training on them not."""
    auc = {score: base.by_arm(results, name) for score, name in AUC.items()}
    tpr, exact = base.by_arm(results, TPR["loss"]), base.by_arm(results, EXACT)
    mean = base.mean
    criteria = [base.at_least("hash_4, AUC by loss, worst seed", min(auc["loss"]["hash_4"]), 0.9),
                base.at_most("none above hash_4, AUC by loss, means",
                             mean(auc["loss"]["none"]) - mean(auc["loss"]["hash_4"]), 0.05),
                base.at_least("hash_4, true positives at 1% by loss, mean", mean(tpr["hash_4"]), 0.5),
                base.at_most("hash_4, texts recited, most of a seed", max(exact["hash_4"]), 0.0),
                base.at_most("unseen, AUC by loss, most of a seed", max(auc["loss"]["unseen"]), 0.6)]
    arms = list(auc["loss"])
    figure = {"x": "mask", "y": "AUC", "series": {score: {"x": arms, "y": [found[arm] for arm in arms]}
                                                  for score, found in auc.items()}, "lines": {"chance": 0.5}}
    return base.verdict(criteria, (*AUC.values(), *TPR.values(), EXACT), figure)
