"""A decoder of 1.1 billion parameters with attention alone, at the sizes of TinyLlama (Zhang et al. 2024).

Claim: `transformer.py:1b` has TinyLlama's shape: 22 blocks of width 2,048, 32 heads on 4 of keys and values.
Command: lm train --config experiments/presets/transformer.py:1b --workdir runs/transformer \
    --config.data.source=text --config.data.path=DIR --config.data.tokenizer='{kind: tokenizers, path: tokenizer.json}'
Hardware: accelerators; docs/plan.md says which it fits.
Expected: 1,100,048,384 parameters in the first line, TinyLlama's number; losses were not measured.

Batch, steps and schedule are those of a first 20 billion tokens: 9,536 steps of 1,024 rows of 2,048.
"""

from ml_collections import ConfigDict

from experiments import base

# name -> width, blocks, heads, heads of keys and values, width of the MLP.
SIZES = {"1b": (2048, 22, 32, 4, 5632)}
VOCAB = 32_000  # of Llama 2's tokenizer


def get_config(size: str = "1b") -> ConfigDict:
    """The config of one of SIZES."""
    if size not in SIZES:
        raise ValueError(f"there is no transformer of size {size!r}; sizes: {', '.join(SIZES)}")
    width, layers, heads, kv_heads, inner = SIZES[size]
    config = base.get_config()
    config.model = dict(embed_dim=width, num_layers=layers, pattern=("attention/mlp",), norm_eps=1e-5, vocab_size=VOCAB,
                        attention=dict(num_heads=heads, num_kv_heads=kv_heads), tie_embeddings=False, remat="full",
                        mlp=dict(mlp_dim=inner, activation="swiglu"))
    config.optimizer = dict(name="adamw", learning_rate=4e-4, final_fraction=0.1, warmup_steps=2000, weight_decay=0.1,
                            b1=0.9, b2=0.95, clip_norm=1.0)
    config.train = dict(steps=9536, batch_size=1024, seq_len=2048)
    return config
