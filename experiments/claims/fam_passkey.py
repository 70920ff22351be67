"""How far back block sliding-window attention and feedback memory find a pass key.

Claim: With block sliding-window attention two layers that see M blocks back find a key of the first block while a
    text has at most 2 M + 1 blocks, and guess beyond. With feedback memory and no window (M = 0) they find it in texts
    longer than those of training, and memory passed at random between training steps raises what is left of it at 64
    blocks.
Command: lm claim fam_passkey --workdir runs/claims/fam_passkey
Hardware: 2 CPU cores.
Expected: trials of one seed before the first whole run. fam: 1.00 up to 16 blocks, 0.92 at 32, 0.83 at 64; with
    blocks of 8 tokens, 1.00 everywhere. With memory passed half of the time: 0.98 at 16 blocks, 0.48 at 32, 0.18 at
    64; steps that began with a memory were answered with the key of the text before, up to the last one. At the
    paper's 0.8, with blocks of 8: 0.87 at 12, 0.17 at 64. So the last criterion is expected to fail: it is the paper's
    recipe, and what was asked.

Blocks of 16 tokens, two layers of width 48, texts of 2, 3, 4 and 6 blocks in training, 16 keys, 700 steps of 32 new
rows. A text is a key at a random place of block 1, filler, and the question as its last token. Chance is 1/16.
"""

from ml_collections import ConfigDict

from experiments.claims import base

TRAINED, NEAR, FAR = (2, 3, 4, 6), (2, 3, 4, 5, 6, 8, 12), (2, 4, 6, 8, 12, 16, 32, 64)
BLOCK, CHANCE = 16, 1 / 16
INSIDE, OUTSIDE, BEYOND, RISE = 0.95, 0.15, 0.9, 0.05
TASK = dict(block=BLOCK, num_keys=16, num_filler=16)
SIZE = dict(embed_dim=48, num_layers=2, embed_std=0.5, pattern=("mix/mlp",), mlp=dict())
FAM = dict(kind="fam", num_heads=4, block=BLOCK, memory=0, slots=4)
ARMS = {**{f"bswa_{m}": dict(model=dict(kind="bswa", num_heads=4, block=BLOCK, memory=m)) for m in (0, 1, 2)},
        "fam": dict(model=FAM), "fam_passed": dict(model=FAM, pass_memory=0.8)}


def get_config() -> ConfigDict:
    """What all arms share; the model is the arm's."""
    config = base.get_config()
    config.model = base.small(**SIZE, mix=FAM)
    config.data = dict(source="passkey", task=dict(blocks=TRAINED, **TASK),
                       validation=dict(source="passkey", task=dict(blocks=NEAR, **TASK)))
    config.train = dict(steps=700, batch_size=32, seq_len=max(TRAINED) * BLOCK)
    config.optimizer.learning_rate = 2e-3
    config.eval.batches, config.eval.seq_len = 3, max(NEAR) * BLOCK
    return config


def grid(full: bool = False) -> list[dict]:
    """Every arm, those without a memory on the shorter texts; the long grid trains four times as long."""
    far = {"data.validation": dict(source="passkey", task=dict(blocks=FAR, **TASK)),
           "eval.seq_len": max(FAR) * BLOCK}
    return [dict(arm=arm, seed=seed, set={"model": base.small(**SIZE, mix=given["model"]),
                                          "train.pass_memory": given.get("pass_memory"),
                                          "train.steps": 2800 if full else 700,
                                          **(far if given["model"] is FAM else {})})
            for arm, given in ARMS.items() for seed in base.SEEDS]


def accuracy(results: list[dict], arm: str, count: int) -> list[float]:
    """Of each seed of an arm on texts of so many blocks."""
    return [float(r["values"][f"eval/blocks_{count}/accuracy"]) for r in results if r["arm"] == arm]


def check(results: list[dict]) -> dict:
    """Windows at the lengths of training, inside their field and outside; the memory at twice the longest of them, and
    at the end with and without passing."""
    criteria, series = [], {}
    for memory in (0, 1, 2):
        arm, field = f"bswa_{memory}", 2 * memory + 1
        for count in (n for n in TRAINED if n <= field):
            criteria.append(base.at_least(f"{arm}, {count} blocks, worst seed", min(accuracy(results, arm, count)),
                                          INSIDE))
        for count in (n for n in NEAR if n > field):
            criteria.append(base.at_most(f"{arm}, {count} blocks, mean", base.mean(accuracy(results, arm, count)),
                                         OUTSIDE))
    end = {arm: base.mean(accuracy(results, arm, max(FAR))) for arm in ("fam", "fam_passed")}
    criteria += [base.at_least("fam, 12 blocks, mean", base.mean(accuracy(results, "fam", 12)), BEYOND),
                 base.at_least("fam_passed - fam, 64 blocks, mean", end["fam_passed"] - end["fam"], RISE)]
    for arm in ARMS:
        counts = NEAR if arm.startswith("bswa") else FAR
        series[arm] = {"x": list(counts), "y": [accuracy(results, arm, n) for n in counts]}
    figure = {"x": "blocks of the text", "y": "accuracy", "xscale": "log", "series": series,
              "lines": {"chance": CHANCE}}
    shown = [f"eval/blocks_{n}/accuracy" for n in NEAR if n in FAR]
    return base.verdict(criteria, shown, figure)
