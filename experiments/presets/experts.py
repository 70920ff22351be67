"""The four arms of PEER's paper in one model: dense, mixture of experts, product key memory, PEER (He 2024).

Claim: `experts.py:ARM` is a decoder of 12 blocks whose block 6 has the arm in the place of its MLP, and
    `experts.py:ARM_everywhere` has it in every block; arms: mlp, moe, pkm, peer.
Command: lm train --config experiments/presets/experts.py:peer --workdir runs/peer \
    --config.data.source=text --config.data.path=DIR
Hardware: accelerators; `lm plan --config experiments/presets/experts.py:peer` prints parameters and FLOPs a token.
Expected: 1,692,423,936 parameters for peer with the default tokenizer, of which a token uses 82,007,808; losses were
    not measured.

Sizes of the arms are the paper's: 1,048,576 experts, 8 heads of 16; 1,048,576 values, 8 heads of 32; 128 experts that
choose their tokens, each as large as the dense MLP. Width, depth and learning rate are not given there.
"""

from ml_collections import ConfigDict

from experiments import base

ARMS = {
    "mlp": dict(),
    "moe": dict(num_experts=128, top_k=2, routing="expert"),
    "pkm": dict(num_values=1024**2, num_heads=8, top_k=32),
    "peer": dict(num_experts=1024**2, num_heads=8, top_k=16),
}
NAMES = [name for arm in ARMS for name in (arm, f"{arm}_everywhere")]


def get_config(name: str = "peer") -> ConfigDict:
    """The config of one of NAMES."""
    if name not in NAMES:
        raise ValueError(f"there is no arm {name!r}; arms: {', '.join(NAMES)}")
    arm, _, everywhere = name.partition("_")
    dense, with_arm = "attention/mlp", f"attention/{arm}"
    config = base.get_config()
    config.model = dict(embed_dim=768, num_layers=12, attention=dict(num_heads=12), mlp=dict())
    config.model[arm] = ARMS[arm]
    if everywhere:
        config.model.pattern = (with_arm,)
    else:
        config.model.update(prefix=(dense,) * 5 + (with_arm,), pattern=(dense,))
    config.optimizer = dict(name="adamw", learning_rate=3e-4)
    config.train = dict(batch_size=128, seq_len=2048)
    return config
