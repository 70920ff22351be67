"""`lm analyze` on an opened run: files, numbers and mistakes."""

import json

import jax
import numpy as np
import pytest

from launch import cli
from launch import config as configs
from launch.analyze import tokens_of
from launch.restore import Run
from lm.core.sharding import make_mesh
from lm.data.tokenizer import build_tokenizer
from lm.models.build import build_model, init_params, make_apply

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
