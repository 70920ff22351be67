"""Every preference loss with its usual settings, on made pairs that need no files; other pairs and a start by flags.

Claim: ORPO raises the chosen responses and lowers the rejected ones, from fresh parameters and without a reference.
Command: lm train --config experiments/presets/preferences.py:orpo --workdir runs/orpo
Hardware: 2 CPU cores. With real pairs and a converted model: docs/preferences.md.
Expected: the validation line tells chosen from rejected for nearly all pairs; the claim orpo_margin measured the
    log-probabilities of this task with longer prompts.
"""

from ml_collections import ConfigDict

from experiments import base

# Of the papers where they name them; see the fields in docs/config-reference.md.
SETTINGS = {
    "orpo": dict(odds_weight=0.25), "dpo": dict(beta=0.1), "ipo": dict(beta=0.1), "simpo": dict(beta=2.0, gamma=1.0),
    "cpo": dict(beta=0.1, sft_weight=1.0), "kto": dict(beta=0.1), "slic": dict(beta=0.1),
}


def get_config(loss: str = "orpo") -> ConfigDict:
    """The config of one of SETTINGS."""
    if loss not in SETTINGS:
        raise ValueError(f"there are no settings of a loss {loss!r}; losses: {', '.join(SETTINGS)}")
    config = base.get_config()
    config.model = dict(embed_dim=64, num_layers=2, pattern=("attention/mlp",), attention=dict(num_heads=2),
                        mlp=dict(mlp_dim=128), tie_embeddings=False, dtype="float32", scan=False)
    config.loss = {loss: SETTINGS[loss]}
    config.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="cosine", warmup_steps=20, weight_decay=0.0)
    config.data = dict(source="style_pairs", task=dict(num_contents=4, num_symbols=64, mismatched=loss == "kto"))
    config.train = dict(steps=300, batch_size=32, seq_len=48 if loss == "kto" else 32)
    config.eval = dict(every=100, batches=8)
    config.log = dict(every=20)
    return config
