"""`lm eval --task memorization` and `lm generate --beams`, on a workdir with real checkpoints; and a run that tests
itself."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from opened_run import TEXTS, TOKENIZER, save_run

from launch import eval as eval_command
from launch import generate as generate_command
from launch.cli import parse
from launch.restore import open_run
from lm.data.tokenizer import build_tokenizer, special_ids


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, steps=(8,))
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two of the run's texts as JSONL, and two others as text files."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "members.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    (folder / "controls").mkdir()
    for n in (51, 52):
        text = f"document {n}: the slow grey fox number {n * n} walks under {n % 7} lively cats."
        (folder / "controls" / f"{n}.txt").write_text(text)
    return ["--members", str(folder / "members.jsonl"), "--controls", str(folder / "controls")]


def evaluate(workdir, *words):
    return eval_command.main(parse("eval", ["--workdir", workdir, "--task", "memorization", *words]))


def test_texts_of_files_are_measured_and_kept(workdir, files, capsys):
    """Every number is there, of members and controls, and the texts with a picture beside."""
    assert evaluate(workdir, *files, "--prefix", "10", "--suffix", "12") == 0
    out = capsys.readouterr().out
    assert "2 members" in out and "2 controls" in out and "Exposure" in out and "reference" not in out
    folder = pathlib.Path(workdir) / "eval"
    kept = json.loads((folder / "memorization-8.json").read_text())
    assert kept["options"]["suffix"] == 12 and len(kept["texts"]) == 4 and kept["reference"] is None
    assert kept["metrics"]["exact_match"] == 0 and "beam_any_match" not in kept["metrics"]
    assert (folder / "memorization-8.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "8.json").read_text())["metrics"]
    assert metrics["eval/memorization/members"] == 2


@pytest.mark.slow
def test_a_beam_search_and_a_reference(workdir, files, capsys, tmp_path):
    other = str(shutil.copytree(workdir, tmp_path / "copy"))
    assert evaluate(workdir, *files, "--suffix", "12", "--beams", "3", "--reference", other, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["metrics"]["beam_any_match"] == 0 and said["reference"] == other
    kept = json.loads((pathlib.Path(workdir) / "eval" / "memorization-8.json").read_text())
    assert [text["reference"] for text in kept["texts"]] == pytest.approx([1.0] * 4), "a copy of the run"


@pytest.mark.parametrize("words, message", [
    (["--members", "m.txt"], "--task memorization has members and no controls"),
    ([], "needs members and controls"), (["--set", "a=b"], "belong to --task perplexity"),
    (["--members", "none.txt", "--controls", "none.txt"], "none.txt")])
def test_what_says_nothing_is_refused(workdir, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(workdir, *words)


def test_a_run_is_no_reference_for_itself(workdir, files):
    with pytest.raises(ValueError, match=r"is the run itself.*not trained on the members"):
        evaluate(workdir, *files, "--suffix", "12", "--reference", f"{workdir}/.")


def test_more_beams_than_tokens_are_refused(workdir, files):
    with pytest.raises(ValueError, match=r"beams=100000 is more than the \d+ tokens of the vocabulary"):
        evaluate(workdir, *files, "--suffix", "12", "--beams", "100000")
    with pytest.raises(ValueError, match="--beams=100000 is more than"):
        generate_command.main(parse("generate", ["--workdir", workdir, "--prompt", "a", "--beams", "100000"]))


def test_flags_of_the_task_need_the_task(workdir):
    with pytest.raises(ValueError, match="--beams belongs to --task memorization"):
        eval_command.main(parse("eval", ["--workdir", workdir, "--beams", "3"]))


@pytest.mark.slow
def test_beams_are_printed_best_first(workdir, capsys):
    words = ["--workdir", workdir, "--prompt", "the quick", "--max-new-tokens", "6", "--beams", "4"]
    assert generate_command.main(parse("generate", [*words, "--num-samples", "3", "--json"])) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 and [row["logp"] for row in rows] == sorted((row["logp"] for row in rows), reverse=True)
    assert all(row["text"] == open_run_text(row["tokens"]) for row in rows)
    assert generate_command.main(parse("generate", words)) == 0
    assert capsys.readouterr().out == "the quick" + rows[0]["text"] + "\n"


def open_run_text(tokens):
    return build_tokenizer(TOKENIZER).decode(tokens)


@pytest.mark.parametrize("words, message", [
    (["--beams", "0"], "at least 1"), (["--beams", "2", "--num-samples", "3"], "--num-samples=3"),
    (["--beams", "2", "--top-k", "3"], "--top-k is about drawing"), (["--length-penalty", "1"], "give --beams N too")])
def test_flags_that_a_search_does_not_have_are_refused(workdir, words, message):
    with pytest.raises(ValueError, match=message):
        generate_command.main(parse("generate", ["--workdir", workdir, "--prompt", "a", *words]))


def test_special_ids_are_bos_and_eos_and_those_of_no_text():
    assert special_ids(build_tokenizer(TOKENIZER)) == (0, 1) and special_ids(build_tokenizer("bytes")) == ()


@pytest.mark.slow
def test_the_mask_and_evaluation_in_one_short_run(tmp_path):
    """The preset's data at two steps: `lm train` logs kept and dropped loss, and its evaluation has the test."""
    from launch.cli import main
    words = ["--config.train.steps=2", "--config.optimizer.warmup_steps=1",
             "--config.eval.memorization={prefix: 24, suffix: 24, limit: 4}",
             "--config.data.task={num_documents: 4}", "--config.log.every=1"]
    assert main(["train", "--config", "experiments/claims/goldfish_extraction.py", "--workdir", str(tmp_path), *words,
                 "--config.loss.goldfish.k=4", "--config.loss.goldfish.h=4"]) == 0
    result = json.loads((tmp_path / "final_result.json").read_text())
    assert np.isfinite([result["train/goldfish_kept"], result["train/goldfish_dropped"]]).all()
    assert 0.1 < result["train/goldfish_share"] < 0.4 and result["eval/memorization/members"] == 4
    assert open_run(str(tmp_path)).config.loss.goldfish.k == 4
