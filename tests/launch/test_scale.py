"""`lm scale`: each size is trained once for as long as was asked, goes on where it was, and is fitted; training is a
stand-in that follows a law."""

import json
import pathlib
import sys

import pytest

from launch import claim_grid, cli
from launch.scales.definition import from_data, label
from lm.claims.store import read_json

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests/train/tiny_experiment.py")
SIZES = "model.embed_dim=16,32,48,64,96"


@pytest.fixture
def lm_scale(monkeypatch, tmp_path, capsys):
    """Calls `lm scale` with runs that are quick processes; returns (exit code, what was printed)."""
    monkeypatch.setattr(claim_grid, "COMMAND", (sys.executable, str(ROOT / "tests/launch/fake_rung.py")))

    def call(*more, config=TINY):
        code = cli.main(["scale", "--config", config, "--workdir", str(tmp_path / "w"), "--jobs", "2",
                         "--resamples", "3", *more])
        captured = capsys.readouterr()
        return code, captured.out + captured.err
    return call


def found_in(tmp_path):
    return read_json(tmp_path / "w" / "scale.json")


def test_a_ladder_is_trained_fitted_predicted_and_verified(lm_scale, tmp_path):
    flags = ["--param", SIZES, "--next", "128", "--tokens-per-parameter", "20"]
    code, said = lm_scale(*flags)
    assert code == 0 and "5 runs, 5 to run" in said
    found = found_in(tmp_path)
    for run in found["runs"]:
        values = read_json(tmp_path / "w/cells" / run["name"] / "cell.json")["values"]
        assert (run["params"], run["tokens"]) == (values["params"], values["tokens"])
        assert run["tokens"] / run["params"] == pytest.approx(20, rel=0.01)
    law = found["laws"][0]
    assert law["law"] == "L(N) = E + A N^-alpha" and law["numbers"]["alpha"] == pytest.approx(0.3, abs=0.01)
    assert law["numbers"]["E"] == pytest.approx(1.0, abs=0.03)
    assert found["predictions"][0]["found"] == [] and found["verified"] == []
    params = found["predictions"][0]["params"]
    assert found["predictions"][0]["loss"] == pytest.approx(1 + 20 * params**-0.3, rel=2e-3)
    assert (tmp_path / "w/scale.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "w/scale.md").read_text()
    assert "| 64-tpp20-s0 |" in page and "drawn with replacement" in page and "E 1" in page

    code, said = lm_scale(*flags, "--verify")
    assert code == 0 and "6 runs, 1 to run" in said
    again = found_in(tmp_path)
    assert again["laws"] == found["laws"]  # what was predicted is never fitted
    assert again["predictions"][0]["found"] == pytest.approx([1 + 20 * params**-0.3])


@pytest.mark.slow
def test_a_ladder_may_get_more_sizes_and_seeds(lm_scale):
    flags = ["--param", SIZES, "--tokens-per-parameter", "20"]
    assert "5 runs, 5 to run" in lm_scale(*flags)[1]
    assert "5 runs, 0 to run" in lm_scale(*flags)[1]
    assert "12 runs, 7 to run" in lm_scale("--param", f"{SIZES},128", *flags[2:], "--seeds", "0,1")[1]


@pytest.mark.slow
def test_a_run_that_fails_is_kept_with_its_error_and_the_others_are_fitted(lm_scale, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/96-tpp20-s0.fails").write_text("76")
    code, said = lm_scale("--param", SIZES, "--tokens-per-parameter", "20")
    assert code == 1 and "the loss went away" in said
    found = found_in(tmp_path)
    assert found["failed"] == [{"name": "96-tpp20-s0", "error": "exit code 76: the loss went away"}]
    assert len(found["runs"]) == 4 and found["laws"][0]["numbers"]["alpha"] == pytest.approx(0.3, abs=0.02)
    (tmp_path / "w/96-tpp20-s0.fails").unlink()
    code, said = lm_scale("--param", SIZES, "--tokens-per-parameter", "20")
    assert code == 0 and "5 runs, 1 to run" in said


def test_too_few_sizes_for_any_law_is_an_exit_code_and_a_reason(lm_scale, tmp_path):
    code, said = lm_scale("--param", "model.embed_dim=16,64", "--tokens-per-parameter", "20")
    assert code == 1 and "need at least 3 different N; there are 2" in said and "alpha" not in str(
        [law.get("numbers") for law in found_in(tmp_path)["laws"]])


@pytest.mark.slow
def test_budgets_pay_for_the_steps_that_they_say(lm_scale, tmp_path):
    code, said = lm_scale("--param", SIZES, "--flops", "1e10,3e10", "--dry-run")
    assert code == 0 and "8e+10" not in said and "2e+11 FLOPs in all" in said
    assert not (tmp_path / "w").exists()
    lm_scale("--param", SIZES, "--flops", "1e10,3e10")
    found = found_in(tmp_path)
    assert {run["budget"] for run in found["runs"]} == {1e10, 3e10}
    assert all(run["flops"] == pytest.approx(run["budget"], rel=0.02) for run in found["runs"])
    assert len(found["isoflop"]["budgets"]) == 2 and "refused" in found["isoflop"]["growth"]
    # Losses of the stand-in fall with size alone, so no parabola has its minimum between the sizes.
    assert all("refused" in row for row in found["isoflop"]["budgets"])


@pytest.mark.slow
def test_a_ladder_can_stand_in_the_experiment_file(lm_scale, tmp_path):
    file = tmp_path / "sized.py"
    file.write_text(pathlib.Path(TINY).read_text() + (
        "\n\ndef scale():\n    return {'sizes': {'model.embed_dim,model.num_layers': [(16, 2), (32, 2), (64, 2)]},\n"
        "            'next': [(96, 2)], 'tokens_per_parameter': 20}\n"))
    code, said = lm_scale(config=str(file))
    assert "3 runs" in said and "64x2-tpp20-s0" in said and code == 0
    assert "refused" in found_in(tmp_path)["laws"][0] and found_in(tmp_path)["predictions"][0]["size"] == "96x2"
    assert "6 runs, 3 to run" in lm_scale("--seeds", "0,1", config=str(file))[1]
    code, said = lm_scale("--config.optimizer.learning_rate=0.5", config=str(file))
    assert code == 2 and "holds a ladder of another config: 16x2-tpp20-s0" in said


@pytest.mark.parametrize(("words", "message"), [
    (["--tokens-per-parameter", "20"], "a ladder has one list of sizes"),
    (["--param", SIZES], "how long is each size trained?"),
    (["--param", "model.embed_dim=loguniform(1,9)", "--flops", "1"], "a list of values"),
    (["--param", "model.embed_dim", "--flops", "1"], "must be PATH=VALUES"),
    (["--param", SIZES, "--flops", "-1"], "must be above 0"),
    (["--param", SIZES, "--flops", "10"], "would be trained for"),
    (["--param", SIZES, "--tokens-per-parameter", "20", "--next", "64"], "size 64 is given twice"),
    (["--param", SIZES, "--tokens-per-parameter", "20", "--next", "(64,2)"], "config.model.embed_dim"),
    (["--param", SIZES, "--tokens-per-parameter", "20", "--seeds", "1,1"], "each once"),
    (["--param", SIZES, "--tokens-per-parameter", "20", "--count", "bdy"], "did you mean 'body'"),
    (["--param", SIZES, "--tokens-per-parameter", "20", "--level", "1.5"], "between 0 and 1"),
    (["--param", SIZES, "--tokens-per-parameter", "20", "--verify"], "give both"),
    (["--param", "model.embed_dm=1,2", "--tokens-per-parameter", "20"], "embed_dim"),
    (["--param", SIZES, "--tokens-per-parameter", "20", "--config.train.lora_rank=2"], "trains whole models"),
])
def test_mistakes_are_said_before_anything_runs(lm_scale, tmp_path, words, message):
    code, said = lm_scale(*words)
    assert code == 2 and message in said, said
    assert not (tmp_path / "w").exists()


def test_body_leaves_out_the_tables():
    from launch import config as configs
    from launch.scales.ladder import cost
    config = configs.load(TINY)
    whole, body = cost(config, "all"), cost(config, "body")
    assert whole[0] - body[0] == 256 * 16 and whole[1] == body[1]


def test_labels_name_folders():
    assert label((64, 2)) == "64x2" and label(0.5) == "0.5" and "/" not in label("a/b c")
    with pytest.raises(ValueError, match="did you mean 'seeds'"):
        from_data({"seed": 1}, "the ladder")


@pytest.mark.slow
def test_real_runs(tmp_path):
    assert cli.main(["scale", "--config", TINY, "--workdir", str(tmp_path), "--param", "model.embed_dim=16,24,32",
                     "--next", "48", "--tokens-per-parameter", "1", "--verify", "--resamples", "5",
                     "--config.optimizer.warmup_steps=2", "--config.eval.every=100"]) in (0, 1)
    found = json.loads((tmp_path / "scale.json").read_text())
    assert [run["size"] for run in found["runs"]] == ["16", "24", "32"] and found["failed"] == []
    for run in [*found["runs"], *found["verified"]]:
        result = json.loads((tmp_path / "cells" / run["name"] / "run" / "final_result.json").read_text())
        assert result["train/flops"] == pytest.approx(run["flops"]) and result["eval/validation/loss"] == run["loss"]
