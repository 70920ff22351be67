"""`lm bench rwkv4`: RWKV-4, as we build it and as transformers does, which on CPUs loops over the tokens in Python."""

from typing import Any

import numpy as np

from launch.bench.sizes import LAYERS, VOCAB, WIDTH

PACKAGE, IMPORT = "transformers", "transformers"
VARIANTS = {"k + v in place of wkv4": "launch.bench.rwkv4_identity"}
TITLE = "RwkvForCausalLM"
SIZES = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS)     # as its config.json calls them


def torch_model(seq_len: int) -> Any:
    """transformers' model with fresh weights."""
    import transformers
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(**SIZES, context_length=seq_len, rescale_every=0,
                                                                use_cache=False))


def config(seq_len: int) -> dict[str, Any]:
    """The `model` group that computes the same."""
    from lm.models.convert import hf_rwkv
    return hf_rwkv.model_config(SIZES) | dict(dtype="float32", scan=False)


def from_torch(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters from a RwkvForCausalLM's."""
    from lm.models.build import build_model
    from lm.models.convert import hf_rwkv
    from lm.models.convert.names import from_names
    return from_names(hf_rwkv.layout(LAYERS, tied=False), weights, build_model(config(1), VOCAB), TITLE)


def logits(model: Any, tokens: Any) -> Any:
    """[B, T, V] of the other side's model."""
    return model(input_ids=tokens).logits
