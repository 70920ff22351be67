"""`lm generate` and `lm eval` with the flags of recurrent depth, on a saved run that loops its pattern."""

import json
import pathlib

import pytest
from opened_run import save_run

from launch import depth
from launch import eval as eval_command
from launch import generate as generate_command
from launch.cli import parse
from launch.restore import open_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looped")
    save_run(folder, steps=(3,), model=dict(recurrent_depth=dict(mean=4.0)))
    return str(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save_run(folder, steps=(3,))
    return str(folder)


def generate(workdir, capsys, *words):
    code = generate_command.main(parse("generate", ["--workdir", workdir, "--max-new-tokens", "6", "--temperature", "0",
                                                    "--json", "--prompt", "doc", *words]))
    assert code == 0
    out, err = capsys.readouterr()
    return json.loads(out)["tokens"], err


@pytest.mark.slow
def test_a_draft_writes_what_all_iterations_write_and_says_what_was_kept(workdir, capsys):
    text, _ = generate(workdir, capsys)
    drafted, said = generate(workdir, capsys, "--draft", "1", "--lookahead", "2")
    assert drafted == text and "drafted tokens kept" in said


@pytest.mark.slow
def test_rows_at_their_own_pace_write_what_a_threshold_writes(workdir, capsys):
    words = ("--recurrences", "9", "--exit-kl", "1e-3")
    assert generate(workdir, capsys, *words)[0] == generate(workdir, capsys, *words, "--continuous")[0]
    assert generate(workdir, capsys, "--warm-start", "--cache", "2")[0]


def test_evaluation_adds_sets_at_other_depths_and_how_many_iterations_were_taken(workdir, capsys):
    assert eval_command.main(parse("eval", ["--workdir", workdir, "--recurrences", "1", "4", "--exit-kl", "1e-3",
                                            "--no-baseline", "--batches", "1"])) == 0
    found = json.loads((pathlib.Path(workdir) / "eval" / "3.json").read_text())["metrics"]
    same = [found[f"eval/{name}/loss"] for name in ("validation", "validation_r4")]
    assert same[0] == pytest.approx(same[1], rel=1e-5) and found["eval/validation_r1/loss"] != same[0]
    shares = {int(name.rpartition("_")[2]): value for name, value in found.items()
              if name.startswith("eval/validation_exit/steps_")}
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(n * share for n, share in shares.items()) == pytest.approx(found["eval/validation_exit/steps"])
    assert "validation_exit: " in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (("--lookahead", "2"), "--lookahead 2 is the length of a draft, and there is none"),
    (("--recurrences", "0"), "recurrences=0 must be at least 1"), (("--exit-kl", "nan"), "exit_kl=nan"),
    (("--recurrences", "3000000000"), "and below 2"), (("--cache", "0"), "cache=0"),
    (("--draft", "4"), "--draft 4 must be below the 4 iterations"),
    (("--draft", "1", "--warm-start"), "--draft verifies several tokens at once"),
    (("--draft", "1", "--exit-kl", "0.1"), "--draft verifies several tokens at once"),
    (("--draft", "1", "--continuous"), "do not go together")], ids=str)
def test_flags_that_cannot_be_are_named(workdir, words, message):
    run = open_run(workdir)
    with pytest.raises(ValueError, match=message):
        depth.changed(run, parse("generate", ["--workdir", workdir, *words]))


@pytest.mark.parametrize("words", [("--continuous",), ("--draft", "1")], ids=str)
def test_a_search_refuses_the_flags_of_rows_at_their_own_pace(workdir, capsys, words):
    with pytest.raises(ValueError, match=f"{words[0]} is about rows that each write one text"):
        generate(workdir, capsys, "--temperature", "1", "--beams", "2", *words)


def test_a_model_that_loops_nothing_refuses_the_flags(plain):
    run = open_run(plain)
    with pytest.raises(ValueError, match="--recurrences is about a model of recurrent depth"):
        depth.changed(run, parse("generate", ["--workdir", plain, "--recurrences", "4"]))
    with pytest.raises(ValueError, match="--exit-kl is about a model of recurrent depth"):
        eval_command.main(parse("eval", ["--workdir", plain, "--exit-kl", "0.1", "--no-baseline"]))
