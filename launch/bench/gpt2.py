"""The model that both sides of the training benchmark run: GPT-2's architecture at a size that two cores train."""

from typing import Any

import numpy as np

VOCAB, WIDTH, LAYERS, HEADS, BATCH = 256, 256, 4, 4, 8
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 3e-4, 0.1, (0.9, 0.95), 1e-8


def config(seq_len: int) -> dict[str, Any]:
    """The `model` group that computes what GPT2LMHeadModel computes without dropout."""
    return dict(
        embed_dim=WIDTH, num_layers=LAYERS, pattern=("attention/mlp",), max_positions=seq_len, norm="layer",
        attention=dict(num_heads=HEADS, rope_theta=None, use_bias=True),
        mlp=dict(mlp_dim=4 * WIDTH, activation="gelu", use_bias=True), dtype="float32", scan=False)


def from_torch(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters from a GPT2LMHeadModel's. Its Conv1D stores [in, out], as we do."""
    def stacked(name: str) -> np.ndarray:
        return np.stack([weights[f"transformer.h.{i}.{name}"] for i in range(LAYERS)])

    def dense(name: str, part: slice = slice(None)) -> dict[str, np.ndarray]:
        return {"kernel": stacked(f"{name}.weight")[..., part], "bias": stacked(f"{name}.bias")[..., part]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    thirds = [slice(i * WIDTH, (i + 1) * WIDTH) for i in range(3)]
    return {"params": {
        "embed": {"embedding": weights["transformer.wte.weight"]},
        "position": {"embedding": weights["transformer.wpe.weight"]},
        "final_norm": {"scale": weights["transformer.ln_f.weight"], "bias": weights["transformer.ln_f.bias"]},
        "stack": {"pattern_0": {
            "norm0": norm("ln_1"), "norm1": norm("ln_2"),
            "attention": {"query": dense("attn.c_attn", thirds[0]), "key": dense("attn.c_attn", thirds[1]),
                          "value": dense("attn.c_attn", thirds[2]), "out": dense("attn.c_proj")},
            "mlp": {"up": dense("mlp.c_fc"), "down": dense("mlp.c_proj")}}}}}


def tokens(seq_len: int, seed: int = 0) -> np.ndarray:
    """[BATCH, seq_len + 1] random tokens: what both sides train on, again and again."""
    return np.random.default_rng(seed).integers(0, VOCAB, (BATCH, seq_len + 1)).astype(np.int32)
