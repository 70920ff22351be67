"""Llama-architecture models in GGUF files, dequantised to float32 under Hugging Face's names (package `gguf`)."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

MAGIC = b"GGUF"
NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}
IN_BLOCK = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
# Values of token_type.
CONTROL, USER_DEFINED = 3, 4
# How text is cut before the merges, by the file's name for it; each of these is one that `tokenizers` can say.
PRE_TOKENIZERS = {
    "gpt-2": [], "default": [],
    "smollm": [{"type": "Digits", "individual_digits": True}],
}


def read_gguf(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, bytes]]:
    """(config.json, {Hugging Face's name: float32 array}, tokenizer files by name) of a GGUF file.

    The tokenizer is left out where `tokenizers` has no name for it. Raises ValueError for a file that is damaged, of
    another architecture or of a quantisation that the package does not know.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the package gguf; pip install 'loomlm[convert]'") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package raises what numpy does where a file is cut
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from None
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{path} is of architecture {fields.get('general.architecture')!r}; known: 'llama'")
    hf = config_json(fields, tied=all(t.name != "output.weight" for t in reader.tensors))
    tensors = {}
    for tensor in reader.tensors:
        try:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{path}: {tensor.name} is {tensor.tensor_type.name}, which the package gguf cannot "
                             f"dequantise ({error})") from None
        name = renamed(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = hf["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            value = unpermuted(value, heads)
        tensors[name] = np.ascontiguousarray(value, np.float32)
    return hf, tensors, tokenizer_files(fields)


def renamed(name: str) -> str:
    """Hugging Face's name of a tensor; one that is not known keeps its own, and is then refused by it."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found and found[2] in IN_BLOCK:
        return f"model.layers.{found[1]}.{IN_BLOCK[found[2]]}.{found[3]}"
    return NAMES.get(name, name)


def unpermuted(value: np.ndarray, heads: int) -> np.ndarray:
    """[out, in] with the rows of each head as halves, as ours and Hugging Face's rotary positions take them; GGUF has
    them interleaved."""
    return value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def config_json(fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """What Hugging Face would write for these metadata. Raises ValueError where a size is missing."""
    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"the file has no llama.{name}")
        return value

    heads = get("attention.head_count")
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", tie_word_embeddings=tied,
        vocab_size=fields.get("llama.vocab_size", len(fields.get("tokenizer.ggml.tokens", ()))),
        hidden_size=get("embedding_length"), intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"), num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.attention.key_length", get("embedding_length") // heads),
        rms_norm_eps=as_written(get("attention.layer_norm_rms_epsilon")), max_position_embeddings=get("context_length"),
        rope_theta=float(get("rope.freq_base", 10_000.0)),
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"), eos_token_id=fields.get("tokenizer.ggml.eos_token_id"))


def as_written(value: float) -> float:
    """The shortest decimal that is this float32: 1e-5, and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE; nothing for other kinds."""
    pre = fields.get("tokenizer.ggml.pre", "default")
    if fields.get("tokenizer.ggml.model") != "gpt2" or pre not in PRE_TOKENIZERS:
        return {}
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    added = [{"id": n, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kind == CONTROL}
             for n, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (CONTROL, USER_DEFINED)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {token: n for n, token in enumerate(tokens)},
             "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*PRE_TOKENIZERS[pre], byte_level]},
             "post_processor": None, "decoder": byte_level, "model": model}
    special = {f"{name}_token": tokens[fields[key]] for name, key in (
        ("bos", "tokenizer.ggml.bos_token_id"), ("eos", "tokenizer.ggml.eos_token_id")) if key in fields}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special,
                "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False))}
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return {"tokenizer.json": json.dumps(whole, ensure_ascii=False).encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode()}
