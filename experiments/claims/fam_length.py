"""How many slots of feedback memory a pass key needs: a sweep, reported as it comes out.

Claim: Without slots a key of the first block is not found; with the best number of slots it is, in texts twice as long
    as those of training. Which number is best is reported; it has no limit.
Command: lm claim fam_length --workdir runs/claims/fam_length
Hardware: 2 CPU cores.
Expected: a trial of `fam_passkey` with 4 slots and 700 steps: 1.00 at 12 blocks, 0.92 at 32. Other numbers of slots had
    not been tried.

The task and model of `fam_passkey` with 500 steps, no memory segments, and 0 to 16 slots. Chance is 1/16. The paper's
sweep over 4 to 1024 slots (Hwang et al. 2024, its figure of FAM lengths) had its optimum at 64 in two of three tasks.
"""

from ml_collections import ConfigDict

from experiments.claims import base, fam_passkey

SLOTS, LENGTHS = (0, 1, 2, 4, 16), (6, 12, 32)
LOST, FOUND = 0.2, 0.9


def get_config() -> ConfigDict:
    """As `fam_passkey`, with texts of up to 32 blocks in the evaluation."""
    config = fam_passkey.get_config()
    config.data.validation.task.blocks = LENGTHS
    config.eval.seq_len = max(LENGTHS) * fam_passkey.BLOCK
    config.train.steps = 500
    return config


def grid(full: bool = False) -> list[dict]:
    """Every number of slots; the long grid trains four times as long."""
    return [dict(arm=f"slots_{slots}", seed=seed, set={
        "model": base.small(**fam_passkey.SIZE, mix=dict(fam_passkey.FAM, slots=slots)),
        "train.steps": 2000 if full else 500}) for slots in SLOTS for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Without slots lost, with the best number found; the whole sweep is shown."""
    metrics = [f"eval/blocks_{n}/accuracy" for n in LENGTHS]
    at = {n: base.by_arm(results, metric) for n, metric in zip(LENGTHS, metrics, strict=True)}
    twice = {slots: base.mean(at[12][f"slots_{slots}"]) for slots in SLOTS}
    best = max((slots for slots in SLOTS if slots), key=lambda slots: twice[slots])
    criteria = [base.at_most("without slots, 12 blocks, best seed", max(at[12]["slots_0"]), LOST),
                base.at_least(f"{best} slots, 12 blocks, mean", twice[best], FOUND)]
    series = {f"{n} blocks": {"x": list(SLOTS), "y": [at[n][f"slots_{slots}"] for slots in SLOTS]} for n in LENGTHS}
    figure = {"x": "slots", "y": "accuracy", "series": series, "lines": {"chance": fam_passkey.CHANCE}}
    return base.verdict(criteria, metrics, figure)
