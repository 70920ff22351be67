"""`lm analyze` on an opened run: files, numbers and mistakes."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn

from launch import cli
from launch import config as configs
from launch.analyze import tokens_of
from launch.restore import Run
from lm.core.sharding import make_mesh
from lm.data.tokenizer import build_tokenizer
from lm.models.build import abstract_params, build_model, init_params, make_apply

TEXT = "the loom weaves"


@pytest.fixture
def opened(monkeypatch):
    tokenizer = build_tokenizer(dict(kind="bytes", bos_id=0, eos_id=1))
    config = configs.resolve(dict(
        model=dict(embed_dim=16, num_layers=2, pattern=("rwkv4/mlp",), dtype="float32"),
        data=dict(source="memory", texts=(TEXT,), tokenizer=dict(kind="bytes", bos_id=0, eos_id=1), add_bos=True)))
    model = build_model(config.model.to_dict(), tokenizer.vocab_size)
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    run = Run(config, model, make_apply(model), init_params(model, jax.random.key(0)), tokenizer, 7, mesh)
    monkeypatch.setattr("launch.restore.open_run", lambda *args, **kwargs: run)
    return run


def test_decay_writes_a_curve_a_layer(opened, tmp_path, capsys):
    assert cli.main(["analyze", "decay", "--workdir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "analysis" / "decay.json").read_text())
    assert found["step"] == 7 and [(c["layer"], c["kind"], len(c["factors"])) for c in found["curves"]] == [
        (0, "rwkv4", 16), (1, "rwkv4", 16)]
    assert (tmp_path / "analysis" / "decay.png").read_bytes().startswith(b"\x89PNG")
    assert "decay.png and .json" in capsys.readouterr().out


@pytest.mark.slow
def test_trace_writes_a_map_of_layers_and_tokens(opened, tmp_path, capsys):
    assert cli.main(["analyze", "trace", "--workdir", "run", "--out", str(tmp_path), "--prompt", TEXT, "--subject",
                     "loom", "--answer", " a", "--draws", "1"]) == 0
    found = json.loads((tmp_path / "trace.json").read_text())
    assert np.shape(found["restored"]) == (2, 16) and found["subject_tokens"] == [5, 9]
    assert "log p(answer): clean" in capsys.readouterr().out
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_the_tokens_of_a_part_of_the_prompt(opened):
    ids = [0, *opened.tokenizer.encode("a löom, a löom")]
    assert tokens_of(opened.tokenizer, np.array(ids), "a löom, a löom", "löom") == (3, 8)
    assert tokens_of(opened.tokenizer, np.array(ids[1:]), "a löom, a löom", "a") == (0, 1)
    with pytest.raises(ValueError, match="--subject 'b' is no part of --prompt"):
        tokens_of(opened.tokenizer, np.array(ids), "a löom", "b")


def test_a_part_that_no_token_holds_is_refused():
    class Silent:
        def decode(self, ids):
            return ""

    with pytest.raises(ValueError, match="lies in no token of the prompt"):
        tokens_of(Silent(), np.array([4, 5]), "a b ", " ")


@pytest.mark.parametrize("words, says", [
    (["decai", "--workdir", "x"], "has no 'decai'; did you mean 'decay'"),
    (["decay"], "needs --workdir RUN"),
    (["trace", "--workdir", "x", "--prompt", "a"], "needs --subject, --answer"),
])
def test_mistakes(words, says, capsys):
    assert cli.main(["analyze", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.fixture
def with_experts(monkeypatch):
    """What is asked of `open_run` is kept: the stack has to be unrolled."""
    tokenizer, asked = build_tokenizer("bytes"), []
    config = configs.resolve(dict(
        model=dict(embed_dim=16, num_layers=2, pattern=("peer",), peer=dict(num_experts=16, num_heads=2, top_k=2),
                   dtype="float32", scan=False), train=dict(batch_size=8, seq_len=16),
        data=dict(source="memory", texts=(TEXT,) * 9, tokenizer="bytes", validation_fraction=0.0)))
    model = build_model(config.model.to_dict(), tokenizer.vocab_size)
    mesh, rng = make_mesh({"data": 1}, devices=jax.devices()[:1]), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) ** 2,
                          nn.meta.unbox(abstract_params(model)))
    run = Run(config, model, make_apply(model), params, tokenizer, 7, mesh)
    monkeypatch.setattr("launch.restore.open_run", lambda *args, **kwargs: asked.append(kwargs) or run)
    return asked


def test_experts_lists_the_tokens_that_choose_one_most(with_experts, tmp_path, capsys):
    assert cli.main(["analyze", "experts", "--workdir", str(tmp_path), "--layer", "layer_1/peer", "--batches",
                     "1", "--tokens", "3"]) == 0
    assert ("model.scan", False) in with_experts[0]["overrides"]
    layer = json.loads((tmp_path / "analysis" / "experts.json").read_text())["layers"]["layer_1/peer"]
    most, out = max(range(16), key=layer["weight"].__getitem__), capsys.readouterr().out
    places = layer["chosen_by"][str(most)]
    assert layer["experts"] == 16 and len(layer["chosen_by"]) == len(places) == 3
    assert all(place["before"] + place["token"] + place["after"] in TEXT * 3 for place in places)
    assert f"expert {most}: chosen by" in out and f">{places[0]['token']!r}<" in out
    assert (tmp_path / "analysis" / "experts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, message", [
    (("--expert", "16"), "--expert 16: the experts of layer_0/peer, layer_1/peer are 0 to 15"),
    (("--layer", "layer_2/peer"), "is no layer with experts; did you mean 'layer_1/peer'"),
    (("--batches", "0"), "--batches must be at least 1")])
def test_what_is_no_expert_is_refused(with_experts, tmp_path, capsys, words, message):
    assert cli.main(["analyze", "experts", "--workdir", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_run_without_experts_is_refused(opened, tmp_path, capsys):
    assert cli.main(["analyze", "experts", "--workdir", str(tmp_path)]) == 2
    assert "no layer of kind peer or pkm" in capsys.readouterr().err
