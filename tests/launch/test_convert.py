"""`lm convert`: weights of others become a run, and a run becomes weights of others; or nothing is left behind."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn

from launch import cli
from launch.restore import open_run
from lm.models.build import abstract_params, build_model
from lm.models.convert.safetensors_file import read_safetensors, write_safetensors
from lm.models.convert.target import to_blinkdl, to_hugging_face

VOCAB = 256
RWKV = dict(embed_dim=16, num_layers=2, norm="layer", embed_norm=True, tie_embeddings=False, vocab_size=VOCAB,
            dtype="float32", pattern=("rwkv6/channel_mix",), rwkv6=dict(head_dim=8, mix_rank=2, decay_rank=3),
            channel_mix=dict(version=6))
LLAMA = dict(embed_dim=16, num_layers=2, tie_embeddings=True, vocab_size=40, pattern=("attention/mlp",),
             attention=dict(num_heads=2), mlp=dict(activation="swiglu"))


def drawn(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = nn.meta.unbox(abstract_params(build_model(config, 1)))
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(dtype).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def rwkv(tmp_path_factory):
    """A file with BlinkDL's names, and what is in it."""
    path = tmp_path_factory.mktemp("rwkv") / "rwkv.safetensors"
    tensors = to_blinkdl(RWKV, drawn(RWKV), VOCAB, lambda value: value)
    write_safetensors(path, tensors)
    return path, tensors


def llama_folder(folder):
    """A half-precision Llama folder as others publish it, with a tokenizer of letters."""
    tokenizers = pytest.importorskip("tokenizers")
    hf, tensors = to_hugging_face(LLAMA, drawn(LLAMA, np.float16), 40, 64, lambda value: value.astype(np.float16))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf | {"bos_token_id": 1, "eos_token_id": [2, 3], "kept": "as is"}))
    letters = {text: n for n, text in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh "])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    write_safetensors(folder / "model.safetensors", tensors)
    return tensors


def lm(*words):
    return cli.main([str(word) for word in words])


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_converted_run_goes_back_bit_by_bit(rwkv, tmp_path, capsys):
    path, tensors = rwkv
    assert lm("convert", path, "--workdir", tmp_path / "run") == 0
    assert "RWKV-6: " in capsys.readouterr().out
    assert left(tmp_path / "run") == ["checkpoints", "config.json", "source.json"]
    assert lm("convert", "--to", "blinkdl", "--workdir", tmp_path / "run", "--out", tmp_path / "back.safetensors") == 0
    back = read_safetensors(tmp_path / "back.safetensors")
    assert {n: a.tobytes() for n, a in back.items()} == {n: np.asarray(a).tobytes() for n, a in tensors.items()}
    assert lm("convert", "--to", "hf", "--workdir", tmp_path / "run", "--out", tmp_path / "hf") == 2
    assert "transformers has no code for" in capsys.readouterr().err
    assert left(tmp_path) == ["back.safetensors", "run"]


def test_a_folder_comes_back_with_its_tokenizer_and_dtype(tmp_path):
    tensors = llama_folder(tmp_path / "given")
    assert lm("convert", tmp_path / "given", "--workdir", tmp_path / "run") == 0
    run = open_run(str(tmp_path / "run"))
    assert run.tokenizer.encode("a").tolist() == [3] and (run.tokenizer.bos_id, run.tokenizer.eos_id) == (1, 2)
    assert run.config.model.dtype == "bfloat16" and run.config.train.seq_len == 64 and run.step == 0
    assert lm("convert", "--to", "hf", "--workdir", tmp_path / "run", "--out", tmp_path / "back") == 0
    assert left(tmp_path / "back") == left(tmp_path / "given")
    back = read_safetensors(tmp_path / "back" / "model.safetensors")
    assert {n: (a.dtype, a.tobytes()) for n, a in back.items()} == {n: (a.dtype, a.tobytes())
                                                                    for n, a in tensors.items()}
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["kept"] == "as is" and config["dtype"] == "float16" and config["eos_token_id"] == [2, 3]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()


def test_a_failure_after_the_first_file_was_written_leaves_nothing_behind(tmp_path, capsys):
    tensors = llama_folder(tmp_path / "given")
    write_safetensors(tmp_path / "given" / "model.safetensors",
                      {n: a for n, a in tensors.items() if n != "model.layers.0.mlp.up_proj.weight"})
    assert lm("convert", tmp_path / "given", "--workdir", tmp_path / "run") == 2
    assert "missing model.layers.0.mlp.up_proj.weight; not understood nothing" in capsys.readouterr().err
    assert left(tmp_path) == ["given"]
    write_safetensors(tmp_path / "given" / "model.safetensors", tensors)
    assert lm("convert", tmp_path / "given", "--workdir", tmp_path / "run") == 0
    for words, message in ((("--dtype", "float16", "--step", "3"), "no checkpoint of step 3"),
                           (("--to", "blinkdl"), "BlinkDL has no names for")):
        assert lm("convert", "--to", "hf", "--workdir", tmp_path / "run", "--out", tmp_path / "out", *words) == 2
        assert message in capsys.readouterr().err
        assert left(tmp_path) == ["given", "run"]


@pytest.mark.slow
def test_a_converted_run_generates_and_is_evaluated_and_tuned(rwkv, tmp_path):
    path, _ = rwkv
    text = tmp_path / "text.txt"
    text.write_text("abc abd abe " * 200)
    assert lm("convert", path, "--workdir", tmp_path / "run", "--config.train.seq_len=32") == 0
    assert lm("generate", "--workdir", tmp_path / "run", "--prompt", "ab", "--max-new-tokens", "2") == 0
    assert lm("eval", "--workdir", tmp_path / "run", "--only-sets", "--no-baseline", "--set", f"a={text}") == 0
    common = ("--config.data.source=text", f"--config.data.path={text}", "--config.data.separator= ",
              "--config.train.steps=2", "--config.train.batch_size=8", "--config.optimizer.warmup_steps=0")
    assert lm("train", "--config", tmp_path / "run", "--init-from", tmp_path / "run", "--workdir", tmp_path / "tuned",
              *common) == 0
    out = tmp_path / "tuned.safetensors"
    assert lm("convert", "--to", "blinkdl", "--workdir", tmp_path / "tuned", "--out", out) == 0
    assert read_safetensors(out).keys() == read_safetensors(path).keys()


def test_what_is_wrong_leaves_nothing_behind(rwkv, tmp_path, capsys):
    path, tensors = rwkv
    bad = tmp_path / "bad.safetensors"

    def refused(*words):
        assert lm("convert", *words) == 2
        assert left(tmp_path) == ["bad.safetensors"]
        return capsys.readouterr().err

    whole = path.read_bytes()
    bad.write_bytes(whole[:-100])
    assert "no whole safetensors file" in refused(bad, "--workdir", tmp_path / "run")
    less = {n: a for n, a in tensors.items() if n != "blocks.1.ln2.bias"}
    write_safetensors(bad, less | {"blocks.1.att.more": np.zeros(3, np.float32)})
    message = refused(bad, "--workdir", tmp_path / "run")
    assert "missing blocks.1.ln2.bias; not understood blocks.1.att.more" in message
    write_safetensors(bad, tensors | {"emb.weight": np.zeros((VOCAB, 16), np.int32)})
    assert "emb.weight is int32" in refused(bad, "--workdir", tmp_path / "run")
    large = {n: np.pad(a, ((0, 50), (0, 0))) if n in ("emb.weight", "head.weight") else a for n, a in tensors.items()}
    write_safetensors(bad, large)
    assert "brings no tokenizer for its 306 token ids" in refused(bad, "--workdir", tmp_path / "run")
    absent = refused(tmp_path / "absent.pth", "--workdir", tmp_path / "run")
    assert "no file or folder" in absent and "nothing is downloaded" in absent
    write_safetensors(bad, tensors)
    message = refused(bad, "--workdir", tmp_path / "run", "--config.model.widt=3")
    assert "config has no field 'config.model.widt'" in message


def test_nothing_is_overwritten_and_flags_fit_together(rwkv, tmp_path, capsys):
    path, _ = rwkv
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    for words, message in (
            ((path, "--workdir", run), "run is there already, and is not overwritten"),
            ((path,), "needs --workdir"), (("--workdir", run), "needs SOURCE"),
            ((path, "--workdir", tmp_path / "new", "--out", "x"), "--out belongs to --to"),
            ((path, "--to", "hf", "--workdir", run, "--out", "x"), "neither SOURCE nor --tokenizer"),
            ((path, "--workdir", tmp_path / "new", "--tokenizer", "a.bpe"), "give 'bytes' or a file that ends in"),
            ((path, "--workdir", tmp_path / "new", "--tokenizer", "absent.json"), "there is no such file"),
            ((path, "--workdir", "gs://bucket/run"), "writes local folders"),
            (("--to", "hf", "--workdir", run, "--out", tmp_path / "x"), "config.json")):
        assert lm("convert", *words) == 2
        assert message in capsys.readouterr().err
    assert left(tmp_path) == ["run"] and left(run) == ["mine.txt"]
