"""Recurrent depth at the sizes of its paper: Huginn-0125, and the small model of its ablations (Geiping et al. 2025).

Claim: `recurrent_depth.py:SIZE` is the published shape: huginn (two blocks before a core of four, two after it), or
    small (one, four, one).
Command: lm train --config experiments/presets/recurrent_depth.py:huginn --workdir runs/huginn \
    --config.data.source=text --config.data.path=DIR
Hardware: accelerators; docs/sharding.md splits huginn over several.
Expected: 3,564,976,800 parameters in the first line for huginn, where the paper's text says 3.51 billion; losses were
    not measured.

What is not the paper's: initial values are normal with deviation 1 / sqrt(fan in), cut off at two, where its are
sqrt(2 / (5 D)), cut off at three (output projections are smaller by the same factor as there); rotary pairs stand half
a head apart, not beside each other; adamw has an epsilon and no clipping of updates. The paper gives 5e-4 as learning
rate in one place and its config 4e-5; the second is here.
"""

from ml_collections import ConfigDict

from experiments import base

# name -> width, heads, width of the MLP, blocks of prelude, core and coda.
SIZES = {
    "huginn": (5280, 55, 17_920, 2, 4, 2),
    "small": (1024, 16, 3520, 1, 4, 1),
}
VOCAB = 65_536


def get_config(size: str = "huginn") -> ConfigDict:
    """The config of one of SIZES."""
    if size not in SIZES:
        raise ValueError(f"there is no model of recurrent depth of size {size!r}; sizes: {', '.join(SIZES)}")
    width, heads, inner, prelude, core, coda = SIZES[size]
    block = ("attention/mlp",)
    config = base.get_config()
    config.model = dict(
        embed_dim=width, num_layers=prelude + core + coda, prefix=block * prelude, pattern=block,
        recurrent_depth=dict(coda=block * coda, mean=32.0, sigma=0.5, backprop=8, recurrences=32),
        attention=dict(num_heads=heads, rope_theta=50_000.0, qk_bias=True),
        mlp=dict(mlp_dim=inner, activation="swiglu"),
        embed_std=(2 / (5 * width)) ** 0.5, vocab_size=VOCAB, remat="full")
    config.optimizer = dict(name="adamw", learning_rate=4e-5, schedule="constant", warmup_steps=4096, b1=0.9, b2=0.95,
                            weight_decay=4e-5, clip_norm=1.0)
    config.train = dict(steps=47_000, batch_size=4096, seq_len=4096)
    return config
