"""Supervised fine-tuning of SmolLM2-135M on chats: all parameters, low-rank adapters, or these with magnitudes (DoRA).

Claim: adapters learn the answers of a chat set, and their checkpoints hold nothing of the model beneath.
Command: lm train --config experiments/presets/fine_tuning.py:lora --init-from runs/smollm2 --workdir runs/chats
Hardware: one GPU or TPU core. docs/fine-tuning.md makes runs/smollm2 and data/chats from the files that users have.
Expected: eval/validation/loss, which counts answers alone, falls; not measured at this size.
"""

from ml_collections import ConfigDict

from experiments import base

# Peak learning rate, and the fields of `train` that make adapters.
WAYS = {
    "full": (1e-5, {}),
    "lora": (2e-4, dict(lora_rank=16, lora_alpha=32.0, lora_match="(attention|mlp)/.*kernel$")),
    "dora": (2e-4, dict(lora_rank=16, lora_alpha=32.0, lora_match="(attention|mlp)/.*kernel$", dora=True)),
}


def get_config(how: str = "lora") -> ConfigDict:
    """The config of one of WAYS."""
    if how not in WAYS:
        raise ValueError(f"there is no way {how!r} to fine-tune; ways: {', '.join(WAYS)}")
    rate, adapters = WAYS[how]
    config = base.get_config()
    config.model = dict(embed_dim=576, num_layers=30, pattern=("attention/mlp",), norm="rms", norm_eps=1e-5,
                        attention=dict(num_heads=9, num_kv_heads=3, head_dim=64, rope_theta=100_000.0),
                        mlp=dict(mlp_dim=1536, activation="swiglu"), vocab_size=49_152, tie_embeddings=True)
    config.optimizer = dict(name="adamw", learning_rate=rate, schedule="cosine", warmup_steps=30, weight_decay=0.0)
    config.data = dict(source="array_record", path="data/chats")
    config.train = dict(steps=1000, batch_size=16, seq_len=1024, **adapters)
    config.eval = dict(every=200, batches=20, baseline=False)
    return config
