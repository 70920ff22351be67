"""Models go out under the names of others only where others compute the same, and come back bit by bit."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from lm.models.build import abstract_params, build_model
from lm.models.convert import hf_rwkv, llama
from lm.models.convert.gguf_file import tokenizer_files, unpermuted
from lm.models.convert.names import from_names
from lm.models.convert.target import to_blinkdl, to_hugging_face

LLAMA = dict(embed_dim=16, num_layers=3, norm="rms", tie_embeddings=False, pattern=("attention/mlp",), dtype="float32",
             attention=dict(num_heads=4, num_kv_heads=2), mlp=dict(activation="swiglu", mlp_dim=24))
RWKV4 = dict(embed_dim=16, num_layers=2, norm="layer", embed_norm=True, tie_embeddings=False,
             pattern=("rwkv4/channel_mix",), rwkv4=dict(), channel_mix=dict(mlp_dim=24))
VOCAB = 20


def drawn(config):
    """Random parameters of the model."""
    rng = np.random.default_rng(0)
    shapes = nn.meta.unbox(abstract_params(build_model(config, VOCAB)))
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)


def same(value):
    return value


@pytest.mark.parametrize("config, family", [(LLAMA, llama), (LLAMA | {"tie_embeddings": True}, llama),
                                            (RWKV4, hf_rwkv)], ids=["llama", "llama_tied", "rwkv4"])
def test_hugging_face_there_and_back(config, family):
    params = drawn(config)
    hf, tensors = to_hugging_face(config, params, VOCAB, 64, same)
    assert hf["vocab_size"] == VOCAB and hf["architectures"] == [family.ARCHITECTURE]
    model = build_model(family.model_config(hf), VOCAB)
    back = from_names(family.layout_of(hf), tensors, model, "a test")
    _, again = to_hugging_face(config, back, VOCAB, 64, same)
    assert tensors.keys() == again.keys()
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
    assert ("lm_head.weight" in tensors) == (family is llama and not config["tie_embeddings"])


def test_names_are_hugging_faces():
    _, tensors = to_hugging_face(LLAMA | {"attention": LLAMA["attention"] | {"use_bias": True}},
                                 drawn(LLAMA | {"attention": LLAMA["attention"] | {"use_bias": True}}), VOCAB, 64, same)
    assert tensors["model.layers.2.self_attn.k_proj.weight"].shape == (8, 16)
    assert tensors["model.layers.2.self_attn.k_proj.bias"].shape == (8,)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (16, 24)
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
            "model.layers.1.post_attention_layernorm.weight"} < tensors.keys()
    _, tensors = to_hugging_face(RWKV4, drawn(RWKV4), VOCAB, 64, same)
    assert tensors["rwkv.blocks.1.attention.time_mix_receptance"].shape == (1, 1, 16)
    assert tensors["rwkv.blocks.1.attention.time_decay"].shape == (16,)
    assert {"rwkv.embeddings.weight", "rwkv.blocks.0.pre_ln.bias", "rwkv.blocks.1.feed_forward.time_mix_key",
            "rwkv.ln_out.weight", "head.weight", "rwkv.blocks.0.attention.output.weight"} < tensors.keys()


@pytest.mark.parametrize("change, named", [
    (dict(norm="layer"), "model.norm='layer'"), (dict(softcap=30.0), "model.softcap=30.0"),
    (dict(attention=dict(num_heads=4, qk_norm=True)), "model.attention.qk_norm=True"),
    (dict(attention=dict(num_heads=4, window=8)), "model.attention.window=8"),
    (dict(attention=dict(num_heads=4, rope_theta=None)), "model.attention.rope_theta=None"),
    (dict(mlp=dict(activation="gelu")), "model.mlp.activation='gelu'"),
    (dict(max_positions=64), "model.max_positions=64"), (dict(embed_norm=True), "model.embed_norm=True"),
])
def test_what_their_code_does_not_compute_is_refused(change, named):
    with pytest.raises(ValueError, match=f"LlamaForCausalLM as others compute it is not this model: .*{named}"):
        to_hugging_face(LLAMA | change, {}, VOCAB, 64, same)


def test_patterns_without_code_elsewhere_are_refused():
    mixed = LLAMA | dict(num_layers=4, pattern=("attention/mlp", "min_gru/mlp"))
    with pytest.raises(ValueError, match=r"transformers has no code for .*'min_gru/mlp'"):
        to_hugging_face(mixed, {}, VOCAB, 64, same)
    with pytest.raises(ValueError, match=r"BlinkDL has no names for .*'attention/mlp'"):
        to_blinkdl(LLAMA, {}, VOCAB, same)
    with pytest.raises(ValueError, match=r"RWKV-4 as others compute it is not this model: .*tie_embeddings=True"):
        to_blinkdl(RWKV4 | {"tie_embeddings": True}, {}, VOCAB, same)
    for field, wrong in ((dict(hidden_act="gelu"), "hidden_act='gelu'"),
                         (dict(rope_scaling=dict(rope_type="llama3")), "type 'llama3'")):
        hf, _ = to_hugging_face(LLAMA, drawn(LLAMA), VOCAB, 64, same)
        with pytest.raises(ValueError, match=wrong):
            llama.model_config({k: v for k, v in hf.items() if k != "rope_parameters"} | field)


def test_everything_wrong_is_listed_at_once():
    hf, tensors = to_hugging_face(LLAMA, drawn(LLAMA), VOCAB, 64, same)
    wrong = {n: a for n, a in tensors.items() if "layers.1.mlp" not in n}
    wrong |= {"model.layers.3.mlp.up_proj.weight": np.zeros(3), "extra": np.zeros(1),
              "model.norm.weight": np.zeros(15, "<f4"), "lm_head.weight": np.zeros((21, 16), "<f4")}
    with pytest.raises(ValueError, match=(
            r"not the weights of a test: missing model\.layers\.1\.mlp\.gate_proj\.weight, "
            r"model\.layers\.1\.mlp\.up_proj\.weight, model\.layers\.1\.mlp\.down_proj\.weight; "
            r"not understood extra, model\.layers\.3\.mlp\.up_proj\.weight; "
            r"of another shape model\.norm\.weight \[15\], .*lm_head\.weight \[21, 16\], which would be")):
        from_names(llama.layout_of(hf), wrong, build_model(LLAMA, VOCAB), "a test")


def test_rows_of_gguf_heads_become_halves():
    """llama.cpp interleaves the halves of each head: row 2i of a head is its row i, row 2i + 1 its row i + K/2."""
    ours = np.arange(12 * 3).reshape(12, 3)
    theirs = np.concatenate([head[[0, 3, 1, 4, 2, 5]] for head in np.split(ours, 2)])
    np.testing.assert_array_equal(unpermuted(theirs, 2), ours)


def test_tokenizer_of_gguf(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    letters = ["<|end|>", "Ġ", "a", "b", "1", "2", "12", "ab", "Ġab"]
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": letters,
              "tokenizer.ggml.token_type": [3] + [1] * 8, "tokenizer.ggml.merges": ["1 2", "a b", "Ġ ab"],
              "tokenizer.ggml.eos_token_id": 0}
    made = tokenizers.Tokenizer.from_str(tokenizer_files(fields)["tokenizer.json"].decode())
    assert made.encode("ab ab12<|end|>").ids == [7, 8, 4, 5, 0]  # digits stand alone before the merges
    assert made.decode([7, 8, 4]) == "ab ab1"
    assert tokenizer_files(fields | {"tokenizer.ggml.pre": "llama-bpe"}) == {}
