"""`lm bench min_gru`: a minGRU language model, as we build it and as PyPI's minGRU-pytorch does (its minLM)."""

from typing import Any

import numpy as np

from launch.bench.sizes import LAYERS, VOCAB, WIDTH

PACKAGE, IMPORT = "minGRU-pytorch", "minGRU_pytorch"
VARIANTS = {}
HIDDEN, EPS = 3 * WIDTH // 2, float(np.finfo(np.float32).eps)      # its expansion of 1.5, and torch's RMSNorm
TITLE = f"minLM, expansion 1.5: hidden width {HIDDEN}"


def torch_model(seq_len: int) -> Any:
    """minLM with fresh weights. Its MLP takes the tanh form of GELU here, as ours."""
    import torch
    from minGRU_pytorch.minLM import minLM
    model = minLM(num_tokens=VOCAB, dim=WIDTH, depth=LAYERS)
    for module in model.modules():
        if isinstance(module, torch.nn.GELU):
            module.approximate = "tanh"
    return model


def logits(model: Any, tokens: Any) -> Any:
    """[B, T, V] of the other side's model."""
    return model(tokens)


def config(seq_len: int) -> dict[str, Any]:
    """The `model` group that computes the same."""
    return dict(embed_dim=WIDTH, num_layers=LAYERS, pattern=("min_gru/mlp",), norm="rms", norm_eps=EPS,
                tie_embeddings=False, min_gru=dict(hidden_dim=HIDDEN),
                mlp=dict(mlp_dim=4 * WIDTH, activation="gelu", use_bias=True), dtype="float32", scan=False)


def from_torch(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters from a minLM's. Its Linear stores [out, in]."""
    def stacked(name: str) -> np.ndarray:
        return np.stack([weights[f"layers.{i}.{name}"] for i in range(LAYERS)])

    def kernel(name: str, part: slice = slice(None)) -> dict[str, np.ndarray]:
        return {"kernel": np.ascontiguousarray(stacked(f"{name}.weight").swapaxes(1, 2)[..., part])}

    gates = "2.to_hidden_and_gate"
    return {"params": {
        "embed": {"embedding": weights["token_emb.weight"]}, "final_norm": {"scale": weights["norm.weight"]},
        "head": {"kernel": weights["to_logits.weight"]},
        "stack": {"pattern_0": {
            "norm0": {"scale": stacked("1.weight")}, "norm1": {"scale": stacked("3.weight")},
            "min_gru": {"candidate": kernel(gates, slice(HIDDEN)), "update": kernel(gates, slice(HIDDEN, None)),
                        "out": kernel("2.to_out")},
            "mlp": {"up": kernel("4.0") | {"bias": stacked("4.0.bias")},
                    "down": kernel("4.2") | {"bias": stacked("4.2.bias")}}}}}}
