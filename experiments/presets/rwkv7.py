"""RWKV-7 at its published sizes, with the initial values and optimizer settings of its trainer (Peng et al. 2025).

Claim: `rwkv7.py:SIZE` is the published model: 191m, 450m, 1b5, 2b9 or 7b2, with its inner widths as fields.
Command: lm train --config experiments/presets/rwkv7.py:191m --workdir runs/rwkv7 \
    --config.data.source=text --config.data.path=DIR
Hardware: accelerators; docs/sharding.md splits the larger sizes over several.
Expected: 191,034,624 parameters in the first line, the paper's formula to the unit; losses were not measured.
"""

from ml_collections import ConfigDict

from experiments import base

# name -> blocks, width, ranks of the decay (w), the in-context rate (a), the values (v) and the gate (g).
SIZES = {
    "191m": (12, 768, 64, 64, 32, 128),
    "450m": (24, 1024, 64, 64, 32, 128),
    "1b5": (24, 2048, 96, 96, 64, 256),
    "2b9": (32, 2560, 96, 96, 64, 320),
    "7b2": (32, 4096, 128, 128, 96, 480),
}
VOCAB = 65_536  # of the World models, whose tokenizer knows 65,530


def get_config(size: str = "191m") -> ConfigDict:
    """The config of one of SIZES. Learning rates are those of the reference's small runs (L12 D768)."""
    if size not in SIZES:
        raise ValueError(f"there is no RWKV-7 of size {size!r}; sizes: {', '.join(SIZES)}")
    layers, width, decay, rate, value, gate = SIZES[size]
    fields = dict(head_dim=64, decay_rank=decay, rate_rank=rate, value_rank=value, gate_rank=gate)
    config = base.get_config()
    config.model = dict(
        embed_dim=width, num_layers=layers, prefix=("rwkv7_first/channel_mix",), pattern=("rwkv7/channel_mix",),
        rwkv7_first=dict(kind="rwkv7", value_residual=False, **fields), rwkv7=fields, channel_mix=dict(version=7),
        norm="layer", embed_norm=True, tie_embeddings=False, vocab_size=VOCAB, vocab_multiple=1,
        embed_std=5.8e-5)  # as uniform between -1e-4 and 1e-4
    config.optimizer = dict(
        name="adamw", learning_rate=6e-4, schedule="cosine", final_fraction=0.1, warmup_start=0.2, b1=0.9, b2=0.99,
        eps=1e-18, weight_decay=1e-3, decay_embeddings=True, clip_norm=1.0,
        rules=({"match": r"/rwkv7[^/]*/decay$", "lr_multiplier": 2.0},
               {"match": r"/rwkv7[^/]*/(decay|rate|value|gate)_(in|out)/kernel$", "weight_decay": 0.0}))
    config.train = dict(steps=20_000, batch_size=128, seq_len=512)
    return config
