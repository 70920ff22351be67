"""Hugging Face's LlamaForCausalLM: its names and its config, there and back."""

import re
from collections.abc import Mapping
from typing import Any

from lm.models.convert.names import Entry, Layout, in_block, linear, norm

ARCHITECTURE = "LlamaForCausalLM"
# Their name of the nonlinearity, and ours of the gated MLP that has it.
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "relu": "reglu"}
# Written by old versions; a function of the config.
UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def layout(count: int, *, tied: bool, attention_bias: bool = False, mlp_bias: bool = False) -> Layout:
    """Names of a model of `count` blocks."""
    def block(n: int) -> tuple[Entry, ...]:
        projections = (("attention/query", "q_proj"), ("attention/key", "k_proj"), ("attention/value", "v_proj"),
                       ("attention/out", "o_proj"))
        return in_block(f"model.layers.{n}.", (
            *norm("norm0", "input_layernorm", bias=False),
            *linear(((ours, f"self_attn.{theirs}") for ours, theirs in projections), attention_bias),
            *norm("norm1", "post_attention_layernorm", bias=False),
            *linear(((f"mlp/{p}", f"mlp.{p}_proj") for p in ("gate", "up", "down")), mlp_bias)))

    whole = (Entry("embed/embedding", "model.embed_tokens.weight", table=True),
             *norm("final_norm", "model.norm", bias=False),
             *([] if tied else [Entry("head/kernel", "lm_head.weight", table=True)]))
    return Layout(whole, tuple(block(n) for n in range(count)), 0, UNUSED)


def layout_of(hf: Mapping[str, Any]) -> Layout:
    """The layout of the model of this config.json."""
    return layout(hf["num_hidden_layers"], tied=hf.get("tie_word_embeddings", False),
                  attention_bias=hf.get("attention_bias", False), mlp_bias=hf.get("mlp_bias", False))


def model_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` group for this config.json. Raises ValueError, naming the field, for what is not known here."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: rotary positions of type {kind!r} are not known here, only 'default'")
    act = hf.get("hidden_act", "silu")
    if act not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act={act!r} is not known here; known: {', '.join(ACTIVATIONS)}")
    heads = hf["num_attention_heads"]
    return dict(
        embed_dim=hf["hidden_size"], num_layers=hf["num_hidden_layers"], vocab_size=hf["vocab_size"],
        tie_embeddings=hf.get("tie_word_embeddings", False), norm="rms", norm_eps=hf.get("rms_norm_eps", 1e-6),
        pattern=("attention/mlp",),
        attention=dict(num_heads=heads, num_kv_heads=hf.get("num_key_value_heads") or heads,
                       head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
                       rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
                       use_bias=hf.get("attention_bias", False)),
        mlp=dict(mlp_dim=hf["intermediate_size"], activation=ACTIVATIONS[act], use_bias=hf.get("mlp_bias", False)))


def hf_config(model: Mapping[str, Any], max_len: int) -> dict[str, Any]:
    """The config.json for a `model` group whose sizes are all given. What it cannot say is left out: the caller
    compares `model_config` of it with the group."""
    attention, mlp = model["attention"], model["mlp"]
    act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(mlp["activation"], "silu")
    theta = attention["rope_theta"]
    return dict(
        architectures=[ARCHITECTURE], model_type="llama", vocab_size=model["vocab_size"],
        hidden_size=model["embed_dim"], intermediate_size=mlp["mlp_dim"], num_hidden_layers=model["num_layers"],
        num_attention_heads=attention["num_heads"], num_key_value_heads=attention["num_kv_heads"],
        head_dim=attention["head_dim"], hidden_act=act, max_position_embeddings=max_len,
        rms_norm_eps=1e-6 if model["norm_eps"] is None else model["norm_eps"],
        rope_theta=theta, rope_parameters=dict(rope_type="default", rope_theta=theta),
        tie_word_embeddings=model["tie_embeddings"], attention_bias=attention["use_bias"], mlp_bias=mlp["use_bias"])
