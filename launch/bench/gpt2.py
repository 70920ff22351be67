"""`lm bench train`: GPT-2's architecture, as we build it and as transformers does."""

from typing import Any

import numpy as np

from launch.bench.sizes import HEADS, LAYERS, VOCAB, WIDTH

PACKAGE, IMPORT = "transformers", "transformers"
VARIANTS = {}       # other models of ours that are timed with it
TITLE = f"GPT2LMHeadModel, {HEADS} heads, dropout 0"


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


def torch_model(seq_len: int, vocab: int = VOCAB) -> Any:
    """transformers' model with fresh weights."""
    import transformers
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab, n_positions=seq_len, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, bos_token_id=None,
        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="sdpa"))


def logits(model: Any, tokens: Any) -> Any:
    """[B, T, V] of the other side's model."""
    return model(input_ids=tokens).logits
