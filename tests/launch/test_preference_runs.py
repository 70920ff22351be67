"""Learning from preferences from the command line: prepared pairs, references of each kind, evaluation and judges."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from launch import cli
from launch import config as configs
from lm.core.tree import named_leaves
from lm.train.checkpoint import restore_params

MODEL = dict(embed_dim=16, num_layers=1, pattern=("attention/mlp",), attention=dict(num_heads=2),
             mlp=dict(mlp_dim=32), dtype="float32", vocab_size=257)
STEPS = 6


def length_score(prompt, response):
    """A judge for these tests: long responses are better."""
    return len(response)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """pairs.jsonl prepared as `pairs`, and a run `base` whose parameters are the start of others."""
    folder = tmp_path_factory.mktemp("preferences")
    records = [dict(prompt=f"{i}?", chosen="yes" * (1 + i % 3), rejected="no" * (1 + i % 2)) for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, dict(prompt="x")]))
    assert cli.main(["data", "prepare", "--kind", "preference", "--source", "jsonl", "--path",
                     str(folder / "pairs.jsonl"), "--tokenizer", '{"kind": "bytes", "eos_id": 256}', "--template",
                     "text", "--validation-fraction", "0.2", "--out", str(folder / "pairs")]) == 0
    assert run(folder, "base", dict(orpo=dict(odds_weight=0.0))) == 0
    return folder


def run(folder, name, loss, steps=STEPS, data=None, **train):
    made = dict(model=MODEL, loss=loss, data=data or dict(source="pairs", path=str(folder / "pairs")),
                optimizer=dict(name="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0),
                train=dict(steps=steps, batch_size=8, seq_len=48) | train,
                eval=dict(every=1000), log=dict(every=1, tensorboard=False))
    (folder / f"{name}.json").write_text(configs.to_json(configs.resolve(made)))
    return cli.main(["train", "--config", str(folder / f"{name}.json"), "--workdir", str(folder / name)])


def rows(folder, name):
    """(rows of training, the last row of validation) of metrics.jsonl."""
    found = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    held = [row for row in found if "eval/validation/loss" in row]
    return [row for row in found if "train/loss" in row], held[-1]


def test_rows_left_out_are_said(folder, capsys):
    cli.main(["data", "prepare", "--kind", "preference", "--source", "jsonl", "--path", str(folder / "pairs.jsonl"),
              "--tokenizer", '{"kind": "bytes", "eos_id": 256}', "--template", "text", "--out", str(folder / "again")])
    said = capsys.readouterr().out
    assert "61 rows: 60 kept" in said and "fields missing: 1, at" in said and "pairs.jsonl:61" in said
    assert "60 pairs" in said and "source='pairs'" in said


def test_a_run_learns_and_its_validation_tells_accuracy_beside_the_length_baseline(folder):
    train, held = rows(folder, "base")
    assert train[-1]["train/loss"] < train[0]["train/loss"]
    for name in ("accuracy", "accuracy_low", "length_baseline", "chosen_logp", "logp_margin", "pairs"):
        assert np.isfinite(held[f"eval/validation/{name}"])
    assert held["eval/validation/length_baseline"] > 0.5


@pytest.mark.slow
def test_copied_and_cached_references_train_alike_and_a_run_goes_on_with_its_own(folder):
    start = dict(init_from=str(folder / "base"))
    for name, reference in (("copy", "copy"), ("cached", "cached")):
        assert run(folder, name, dict(dpo=dict(beta=0.5), reference=reference), **start) == 0
    losses = [[row["train/loss"] for row in rows(folder, name)[0]] for name in ("copy", "cached")]
    assert losses[0][0] == pytest.approx(np.log(2), rel=1e-5) and losses[0][-1] < losses[0][0] - 1e-4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert (folder / "cached" / "reference.npy").exists()
    # Cut in two, each half with the reference of before the first step.
    for name, reference in (("copy", "copy"), ("cached", "cached")):
        loss = dict(dpo=dict(beta=0.5), reference=reference)
        assert run(folder, f"{name}2", loss, steps=3, **start) == 0
        assert run(folder, f"{name}2", loss, **start) == 0
        np.testing.assert_allclose([row["train/loss"] for row in rows(folder, f"{name}2")[0]], losses[0], rtol=1e-4)


@pytest.mark.slow
def test_adapters_alone_learn_and_the_model_without_them_is_the_reference(folder, capsys):
    assert run(folder, "lora", dict(dpo=1.0), init_from=str(folder / "base"), lora_rank=2) == 0
    train, held = rows(folder, "lora")
    assert train[0]["train/loss"] == pytest.approx(np.log(2), rel=1e-5) and train[-1]["train/loss"] < np.log(2)
    assert held["eval/validation/kl"] > 0
    before, after = (named_leaves(restore_params(str(folder / name), None)[0]) for name in ("base", "lora"))
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf)
    assert any(name.startswith("lora/") for name in after)
    capsys.readouterr()
    judge = f"{__name__}:length_score"
    assert cli.main(["eval", "--workdir", str(folder / "lora"), "--task", "preference", "--judge", judge, "--responses",
                     "8", "--response-tokens", "6", "--against", str(folder / "lora"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["eval/validation/win_rate"] == 0.5 and found["eval/validation/prompts"] == 8  # against itself
    assert found["eval/validation/length_win_rate"] == 0.5 and found["eval/validation/kl"] == pytest.approx(0, abs=1e-6)
    assert cli.main(["eval", "--workdir", str(folder / "lora"), "--task", "preference", "--judge",
                     f"logprob:{folder / 'base'}", "--responses", "8", "--set", f"again={folder / 'pairs'}"]) == 0
    said = capsys.readouterr().out
    assert "win rate by length alone" in said and "length baseline" in said and "again" in said


@pytest.fixture
def tilde_is_not_finite(monkeypatch):
    """Models whose hidden states are not numbers where they read '~'."""
    from lm.models import build
    made = build.make_apply

    def make_apply(model):
        apply = made(model)

        def broken(params, tokens, *args, **kwargs):
            out = apply(params, tokens, *args, **kwargs)
            return out._replace(hidden=jnp.where(tokens[..., None] == ord("~"), jnp.nan, out.hidden))
        return broken
    monkeypatch.setattr(build, "make_apply", make_apply)
    monkeypatch.setattr("launch.restore.make_apply", make_apply, raising=False)


def test_a_line_that_is_not_finite_ends_a_run_or_is_left_out(tmp_path, tilde_is_not_finite, caplog, capsys):
    """Named either way. Every step has all eight pairs, each on a device of its own."""
    records = [dict(prompt=f"{i}?", chosen="yes~" if i == 5 else "yes", rejected="no") for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert cli.main(["data", "prepare", "--kind", "preference", "--source", "jsonl", "--path",
                     str(tmp_path / "pairs.jsonl"), "--tokenizer", '{"kind": "bytes", "eos_id": 256}', "--template",
                     "text", "--out", str(tmp_path / "pairs")]) == 0
    line = f"{tmp_path / 'pairs.jsonl'}:6"
    data = dict(source="pairs", path=str(tmp_path / "pairs"), packing="single", validation_fraction=0.0)
    short = dict(steps=2)
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, "stops", dict(orpo=1.0), data=data, **short) == 76
    assert f"step 1: 1 of the pairs have log-probabilities that are not finite: {line}\n" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, "skips", dict(orpo=1.0), data=data, on_nonfinite="skip", **short) == 0
    assert f"and are left out: {line}" in caplog.text
    found = [json.loads(line) for line in (tmp_path / "skips" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in found if "train/loss" in row]
    assert [row["train/nonfinite_pairs"] for row in train] == [1, 1] and train[1]["train/loss"] < train[0]["train/loss"]
    assert [row["train/pairs"] for row in train] == [7, 7] and train[1]["train/skipped"] == 0
    command = ["eval", "--workdir", str(tmp_path / "skips"), "--task", "preference", "--set",
               f"again={tmp_path / 'pairs'}"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert cli.main(command) == 0
    assert f"not finite: {line}" in caplog.text and "pairs that are not finite" in capsys.readouterr().out
    assert cli.main([*command, "--on-nonfinite", "refuse"]) == 2
    assert f"again: 1 of the pairs have log-probabilities that are not finite: {line}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Responses that are good or bad by themselves, prepared as `pairs`."""
    folder = tmp_path_factory.mktemp("alone")
    records = [dict(prompt=f"{i}?", completion="yes" * (1 + i % 3), label=i % 2 == 0) for i in range(60)]
    (folder / "alone.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert cli.main(["data", "prepare", "--kind", "preference", "--source", "jsonl", "--path",
                     str(folder / "alone.jsonl"), "--tokenizer", '{"kind": "bytes", "eos_id": 256}', "--template",
                     "text", "--validation-fraction", "0.2", "--out", str(folder / "pairs")]) == 0
    return folder


def test_a_loss_of_pairs_is_refused_before_it_trains_on_none(alone, capsys):
    assert run(alone, "orpo", dict(orpo=1.0)) == 2
    said = capsys.readouterr().err
    assert "config.loss.orpo compares the responses of pairs" in said and "use config.loss.kto" in said


@pytest.mark.slow
def test_kto_learns_from_responses_that_stand_alone_and_is_evaluated(alone, capsys):
    config = dict(source="pairs", path=str(alone / "pairs"), mismatched=True)
    assert run(alone, "kto", dict(kto={}), steps=2, data=config) == 0
    assert "reward AUC" in capsys.readouterr().err
    held = rows(alone, "kto")[1]
    assert 0 <= held["eval/validation/reward_auc"] <= 1 and "eval/validation/accuracy" not in held
    assert cli.main(["eval", "--workdir", str(alone / "kto"), "--task", "preference"]) == 0
    assert "good above bad" in capsys.readouterr().out


@pytest.mark.slow
def test_pairs_that_never_come_again_have_no_cache(tmp_path, capsys):
    made = dict(model={**MODEL, "vocab_size": None}, loss=dict(dpo=1.0, reference="cached"),
                data=dict(source="style_pairs", task=dict(num_contents=2, num_symbols=8)),
                train=dict(steps=1, batch_size=8, seq_len=16))
    (tmp_path / "c.json").write_text(configs.to_json(configs.resolve(made)))
    assert cli.main(["train", "--config", str(tmp_path / "c.json"), "--workdir", str(tmp_path / "run")]) == 2
    assert "pairs that come again" in capsys.readouterr().err


def test_a_perplexity_of_pairs_is_refused(folder, capsys):
    assert cli.main(["eval", "--workdir", str(folder / "base")]) == 2
    assert "--task preference" in capsys.readouterr().err


@pytest.mark.parametrize("changes, message", [
    ({"loss": {"next_token": 1.0}}, "no preference loss"), ({"data": {"source": "pydoc"}}, "needs pairs"),
    ({"loss": {"kto": 1.0}}, "config.data.mismatched=True"),
    ({"loss": {"dpo": 1.0, "reference": "adapters_off"}}, "there are none"),
    ({"loss": {"orpo": 1.0, "goldfish": {"k": 4}}}, "leave one of them out")])
def test_loss_and_data_that_do_not_fit_are_refused(changes, message):
    made = dict(model=MODEL, loss={"orpo": 1.0}, data=dict(source="pairs", path="somewhere")) | changes
    with pytest.raises(ValueError, match=message):
        configs.resolve(made)
