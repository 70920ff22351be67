"""The optimizer groups that published models were trained with, as data.

    optimizer=dict(RECIPES["rwkv7"], learning_rate=6e-4, warmup_steps=10)

The sizes of a model and its learning rates are its preset's; what is here holds for every size.

RWKV-4: Peng et al. 2023 (arXiv 2305.13048), appendix D, and train.py of its authors: Adam without weight decay; the
learning rate stays at its peak and then falls geometrically; decays learn twice, bonuses three times as fast. RWKV-7:
Peng et al. 2025 (arXiv 2503.14456): Adam with eps 1e-18, decay 1e-3 of the matrices of the model's width and of
embedding and head, none of the low-rank maps; the offset of the decay learns twice as fast.
"""

from collections.abc import Mapping
from typing import Any

_ADAM = dict(name="adamw", b1=0.9, b2=0.99, clip_norm=1.0, warmup_start=0.2)

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "rwkv4": _ADAM | dict(
        eps=1e-8, weight_decay=0.0, schedule="exponential", rules=(
            {"match": r"/rwkv4[^/]*/decay$", "lr_multiplier": 2.0},
            {"match": r"/rwkv4[^/]*/bonus$", "lr_multiplier": 3.0})),
    "rwkv7": _ADAM | dict(
        eps=1e-18, weight_decay=1e-3, decay_embeddings=True, schedule="cosine", rules=(
            {"match": r"/rwkv7[^/]*/decay$", "lr_multiplier": 2.0},
            {"match": r"/rwkv7[^/]*/(decay|rate|value|gate)_(in|out)/kernel$", "weight_decay": 0.0})),
}
