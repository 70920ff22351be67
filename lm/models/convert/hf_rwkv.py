"""Hugging Face's RwkvForCausalLM (RWKV-4): BlinkDL's names under others, and its config, there and back."""

from collections.abc import Mapping
from typing import Any

from lm.models.convert import blinkdl
from lm.models.convert.names import Entry, Layout

ARCHITECTURE = "RwkvForCausalLM"
WORDS = {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}


def renamed(name: str) -> str:
    """Their name of BlinkDL's."""
    parts = name.split(".")
    if parts[0] == "head":
        return name
    parts[0] = {"emb": "embeddings"}.get(parts[0], parts[0])
    swap = {"att": "attention", "ffn": "feed_forward", "ln0": "pre_ln", **WORDS}
    return ".".join(["rwkv", *(swap.get(part, part) for part in parts)])


def layout(count: int, *, tied: bool) -> Layout:
    """Names of a model of `count` blocks."""
    def entries(given: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return tuple(entry._replace(theirs=renamed(entry.theirs)) for entry in given)
    made = blinkdl.layout(4, count)
    whole = tuple(entry for entry in entries(made.whole) if not (tied and entry.ours == "head/kernel"))
    return Layout(whole, tuple(entries(block) for block in made.blocks))


def layout_of(hf: Mapping[str, Any]) -> Layout:
    """The layout of the model of this config.json."""
    return layout(hf["num_hidden_layers"], tied=hf.get("tie_word_embeddings", False))


def model_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` group for this config.json. Raises ValueError for what is not known here."""
    if hf.get("layer_norm_epsilon", 1e-5) != 1e-5:
        raise ValueError(f"config.json: layer_norm_epsilon={hf['layer_norm_epsilon']} is not known here: their last "
                         f"norm has 1e-5 whatever it says, and all of ours are alike")
    width = hf["hidden_size"]
    return dict(
        embed_dim=width, num_layers=hf["num_hidden_layers"], vocab_size=hf["vocab_size"],
        tie_embeddings=hf.get("tie_word_embeddings", False), norm="layer", embed_norm=True,
        pattern=("rwkv4/channel_mix",), rwkv4=dict(attention_dim=hf.get("attention_hidden_size") or width),
        channel_mix=dict(version=4, mlp_dim=hf.get("intermediate_size") or 4 * width))


def hf_config(model: Mapping[str, Any], max_len: int) -> dict[str, Any]:
    """The config.json for a `model` group whose sizes are all given; see `llama.hf_config`."""
    return dict(
        architectures=[ARCHITECTURE], model_type="rwkv", vocab_size=model["vocab_size"],
        hidden_size=model["embed_dim"], attention_hidden_size=model["rwkv4"]["attention_dim"],
        intermediate_size=model["channel_mix"]["mlp_dim"], num_hidden_layers=model["num_layers"],
        context_length=max_len, layer_norm_epsilon=1e-5, tie_word_embeddings=model["tie_embeddings"],
        # Halving the stream every few layers is for float16, and changes what norms see.
        rescale_every=0)
