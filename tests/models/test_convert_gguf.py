"""A GGUF file of a Llama is the Hugging Face folder that it was made from."""

import gguf
import numpy as np
import pytest
from test_convert_names import LLAMA, VOCAB, drawn, same

from lm.models.convert.source import read_weights
from lm.models.convert.target import to_hugging_face

BLOCK = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}


def interleaved(value, heads):
    """Rows of each head in the order that llama.cpp keeps them: 0, K/2, 1, K/2 + 1, ..."""
    half = len(value) // heads // 2
    order = [h * 2 * half + side * half + i for h in range(heads) for i in range(half) for side in (0, 1)]
    return value[order]


def write(path, tensors, architecture="llama", skip=()):
    """The file that llama.cpp's converter would make of Hugging Face's tensors, unquantised."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (("block_count", 3), ("embedding_length", 16), ("feed_forward_length", 24),
                        ("vocab_size", VOCAB), ("context_length", 64), ("attention.head_count", 4),
                        ("attention.head_count_kv", 2)):
        if name not in skip:
            writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    for name, value in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            value = interleaved(value, 4 if "q_proj" in name else 2)
        if name.startswith("model.layers."):
            _, _, n, rest = name.split(".", 3)
            name = f"blk.{n}.{BLOCK[rest.removesuffix('.weight')]}.weight"
        writer.add_tensor(WHOLE.get(name, name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_and_config_are_those_of_the_folder(tmp_path):
    _, tensors = to_hugging_face(LLAMA, drawn(LLAMA), VOCAB, 64, same)
    weights = read_weights(write(tmp_path / "a.gguf", tensors))
    assert weights.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(weights.tensors[name], value, err_msg=name)
    assert weights.model["norm_eps"] == 1e-5 and weights.model["attention"]["rope_theta"] == 5000.0
    assert weights.model["attention"]["num_kv_heads"] == 2 and not weights.model["tie_embeddings"]
    assert weights.params()["params"]["stack"]["pattern_0"]["mlp"]["up"]["kernel"].shape == (3, 16, 24)
    tied = read_weights(write(tmp_path / "tied.gguf", {n: a for n, a in tensors.items() if n != "lm_head.weight"}))
    assert tied.model["tie_embeddings"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    _, tensors = to_hugging_face(LLAMA, drawn(LLAMA), VOCAB, 64, same)
    path = write(tmp_path / "a.gguf", tensors)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, 300, 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is damaged or cut short"):
            read_weights(path)
    with pytest.raises(ValueError, match="is of architecture 'qwen2'; known: 'llama'"):
        read_weights(write(tmp_path / "b.gguf", tensors, architecture="qwen2"))
    with pytest.raises(ValueError, match=r"the file has no llama\.block_count"):
        read_weights(write(tmp_path / "c.gguf", tensors, skip=("block_count",)))
    more = read_weights(write(tmp_path / "d.gguf", tensors | {"rope_freqs.weight": np.ones(2, np.float32)}))
    with pytest.raises(ValueError, match=r"not understood rope_freqs\.weight"):
        more.params()
