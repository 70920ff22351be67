"""The standard setting of the goldfish paper: a decoder of 1.1 billion parameters from scratch (Hans et al. 2024).

Claim: `goldfish.py:k4` drops one target in four by the hash of 13 tokens; `k3`, `k8`, `k32`, `k128` and `none` are the
    paper's other arms, `umd_k4` drops what the authors' CPU code drops.
Command: lm train --config experiments/presets/goldfish.py:k4 --workdir runs/goldfish_k4 \
    --config.data.source=text --config.data.path=DIR --config.data.tokenizer='{kind: tokenizers, path: tokenizer.json}'
Hardware: accelerators; `lm plan --config experiments/presets/goldfish.py:k4` prints parameters and FLOPs a token.
Expected: 970,024,960 parameters with the default tokenizer of bytes; losses were not measured.

Sizes are TinyLlama's, and learning rate, batch, steps, warm-up, decay and moments the paper's: 20 billion tokens. What
to repeat is a source of its own in `data.sources`; test it with `config.eval.memorization` (docs/memorization.md).
"""

from ml_collections import ConfigDict

from experiments import base

ARMS = {"none": None, **{f"k{k}": dict(k=k, h=13) for k in (3, 4, 8, 32, 128)}, "umd_k4": dict(k=4, h=13, compat="umd")}


def get_config(name: str = "k4") -> ConfigDict:
    """The config of one of ARMS."""
    if name not in ARMS:
        raise ValueError(f"there is no arm {name!r}; arms: {', '.join(ARMS)}")
    config = base.get_config()
    config.model = dict(embed_dim=2048, num_layers=22, attention=dict(num_heads=32, num_kv_heads=4),
                        mlp=dict(mlp_dim=5632, activation="swiglu"), tie_embeddings=False)
    config.loss = dict(next_token=1.0)
    if ARMS[name] is not None:
        config.loss.goldfish = ARMS[name]
    config.optimizer = dict(name="adamw", learning_rate=4e-4, final_fraction=0.1, warmup_steps=1000, weight_decay=0.1,
                            b1=0.9, b2=0.95, clip_norm=1.0)
    config.train = dict(steps=9536, batch_size=1024, microbatches=16, seq_len=2048)
    return config
