"""Texts that come hundreds of times and are not learned by heart: the goldfish loss on made documents.

Claim: with the mask no repeated document can be recited, and without it (`goldfish.py:none`) all of them can.
Command: lm train --config experiments/goldfish.py --workdir runs/goldfish
Hardware: 2 CPU cores, half a minute.
Expected: `memorization exact 0.0%` after the last step; with `experiments/goldfish.py:none` it is 100.0%.

32 documents of 32 ids stand for half of all rows, among new ones of the same kind. After training, the model is given
the first half of each document, and of as many that it never saw (docs/memorization.md).
"""

from ml_collections import ConfigDict

from experiments import base

ARMS = {"hash": dict(k=4, h=4), "static": dict(mask="static", k=4), "random": dict(mask="random", k=4), "none": None}


def get_config(name: str = "hash") -> ConfigDict:
    """The config of one of ARMS."""
    if name not in ARMS:
        raise ValueError(f"there is no mask {name!r}; masks: {', '.join(ARMS)}")
    config = base.get_config()
    config.model = dict(embed_dim=64, num_layers=2, attention=dict(num_heads=4), mlp=dict(), dtype="float32",
                        scan=False, tie_embeddings=False)
    config.loss = dict(next_token=1.0)
    if ARMS[name] is not None:
        config.loss.goldfish = ARMS[name]
    config.optimizer = dict(name="adamw", learning_rate=3e-3, warmup_steps=20, weight_decay=0.0, b2=0.99)
    config.data = dict(source="recital", task=dict(length=32), validation=dict(source="recital",
                                                                               task=dict(length=32, share=0.0)))
    config.train = dict(steps=900, batch_size=16, seq_len=32)
    config.checkpoint = dict(every=450)
    config.eval = dict(every=300, batches=8, baseline=False,
                       memorization=dict(prefix=16, suffix=16, batch_size=32))
    config.log = dict(every=50)
    return config
