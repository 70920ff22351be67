"""What ORPO saves against DPO: a forward pass, and the second model.

Claim: A forward pass of ORPO costs half the FLOPs of DPO with a copy of the model as reference, and its step holds one
    model less; DPO with cached reference log-probabilities costs what ORPO does.
Command: lm claim orpo_memory --workdir runs/claims/orpo_memory
Hardware: 2 CPU cores.
Expected: counted by hand: DPO scores chosen and rejected with two models, four responses against two. A step is three
    forward passes' worth without a reference (one forward, two backward) and four with one, so 3/4 of the FLOPs. A
    state of AdamW is three models, and four with a copy: 3/4 of the bytes. A trial of one seed counted 0.500, 0.751 and
    0.750; activations, which no loss saves, were three times the state.

Two layers of width 128 over 2048 ids, unrolled, 8 rows of 96 tokens; FLOPs and bytes are those of the compiled step.
Time is measured and decides nothing. A seed is other parameters and another process; the counts do not depend on it.
"""

from ml_collections import ConfigDict

from experiments.claims import base

ARMS = {"orpo": {"orpo": 1.0}, "dpo_copy": {"dpo": 1.0, "reference": "copy"},
        "dpo_cached": {"dpo": 1.0, "reference": "cached"}}


def get_config() -> ConfigDict:
    """What all arms share. The attention is the direct one: loops are counted once by the compiler."""
    config = base.get_config()
    config.model = base.small(embed_dim=128, num_layers=2, pattern=("attention/mlp",),
                              attention=dict(num_heads=2, implementation="reference"), mlp=dict(mlp_dim=512))
    config.data = dict(source="style_pairs", task=dict(num_contents=12, num_symbols=2044))
    config.train = dict(steps=100, batch_size=8, seq_len=96)
    config.loss = ARMS["orpo"]
    return config


def grid(full: bool = False) -> list[dict]:
    """Each arm, alone on the machine; the long grid has four times the width."""
    wide = {"model.embed_dim": 512, "model.attention.num_heads": 8, "model.mlp.mlp_dim": 2048} if full else {}
    return [dict(arm=arm, seed=seed, measure="preference_cost", alone=True, set={"loss": loss, **wide})
            for arm, loss in ARMS.items() for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Counts decide; the ratio of times is in the words of the first criterion."""
    names = ("forward_flops", "step_flops", "state_bytes", "temporary_bytes", "model_bytes", "seconds_per_step")
    found = {name: base.by_arm(results, name) for name in names}
    orpo, copy, cached = ({name: found[name][arm] for name in names} for arm in ARMS)
    ratio = lambda name, a, b: max(a[name]) / min(b[name])
    times = [a / b for a in orpo["seconds_per_step"] for b in copy["seconds_per_step"]]
    less = (min(copy["state_bytes"]) - max(orpo["state_bytes"])) / max(orpo["model_bytes"])
    criteria = [
        base.at_most(f"forward FLOPs, ORPO over DPO (time of a step, measured: {min(times):.2f} to {max(times):.2f})",
                     ratio("forward_flops", orpo, copy), 0.52),
        base.at_most("FLOPs of a step, ORPO over DPO", ratio("step_flops", orpo, copy), 0.8),
        base.at_least("models less in the state of ORPO", less, 0.99),
        base.at_most("models less in the state of ORPO, at most", less, 1.01),
        base.at_most("bytes of state, ORPO over DPO", ratio("state_bytes", orpo, copy), 0.8),
        base.at_most("FLOPs of a step, DPO with cached references over ORPO", ratio("step_flops", cached, orpo), 1.02),
        base.at_most("bytes of state, DPO with cached references over ORPO", ratio("state_bytes", cached, orpo), 1.02)]
    figure = {"x": "arm", "y": "relative to DPO with a copy", "series": {
        label: {"x": list(ARMS), "y": [[value / base.mean(copy[name]) for value in found[name][arm]] for arm in ARMS]}
        for label, name in (("forward FLOPs", "forward_flops"), ("FLOPs of a step", "step_flops"),
                            ("bytes of state", "state_bytes"), ("seconds a step", "seconds_per_step"))}}
    return base.verdict(criteria, names, figure)
