"""RWKV-4 at its published sizes, with the initial values and optimizer settings of its trainer (Peng et al. 2023).

Claim: `rwkv4.py:SIZE` is the published model: 169m, 430m, 1b5, 3b, 7b or 14b, with the paper's number of parameters.
Command: lm train --config experiments/presets/rwkv4.py:169m --workdir runs/rwkv4 \
    --config.data.source=text --config.data.path=DIR
Hardware: accelerators; docs/sharding.md splits the larger sizes over several.
Expected: 169,342,464 parameters in the first line, to the unit those of the paper's table; losses were not measured.

The learning rate stays at its peak for the first 361 to 544 of 8,043 "mini-epochs" of 40,320 rows, one pass over the
Pile, and then falls exponentially.
"""

from ml_collections import ConfigDict

from experiments import base

# name -> blocks, width, first and last learning rate, mini-epochs at the first.
SIZES = {
    "169m": (12, 768, 6e-4, 1e-5, 361),
    "430m": (24, 1024, 4e-4, 1e-5, 411),
    "1b5": (24, 2048, 3e-4, 1e-5, 443),
    "3b": (32, 2560, 1.5e-4, 1e-5, 451),
    "7b": (32, 4096, 1.5e-4, 1e-5, 465),
    "14b": (40, 5120, 1e-4, 7e-6, 544),
}
EPOCHS, ROWS, BATCH = 8_043, 40_320, 128
VOCAB = 50_277  # of the Pile models' tokenizer


def get_config(size: str = "169m") -> ConfigDict:
    """The config of one of SIZES. The table of embeddings has 50,277 rows, as published; for a mesh that splits the
    vocabulary, raise model.vocab_multiple."""
    if size not in SIZES:
        raise ValueError(f"there is no RWKV-4 of size {size!r}; sizes: {', '.join(SIZES)}")
    layers, width, first, last, constant = SIZES[size]
    config = base.get_config()
    config.model = dict(
        embed_dim=width, num_layers=layers, pattern=("rwkv4/channel_mix",), rwkv4=dict(), channel_mix=dict(version=4),
        norm="layer", embed_norm=True, tie_embeddings=False, vocab_size=VOCAB, vocab_multiple=1,
        embed_std=5.8e-5)  # as uniform between -1e-4 and 1e-4
    config.optimizer = dict(
        name="adamw", learning_rate=first, schedule="exponential", final_fraction=last / first, warmup_steps=0,
        warmup_start=0.2, decay_steps=(EPOCHS - constant) * ROWS // BATCH, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0,
        clip_norm=1.0, rules=({"match": r"/rwkv4[^/]*/decay$", "lr_multiplier": 2.0},
                              {"match": r"/rwkv4[^/]*/bonus$", "lr_multiplier": 3.0}))
    config.train = dict(steps=EPOCHS * ROWS // BATCH, batch_size=BATCH, seq_len=1024)
    return config
