"""`lm generate`, `lm eval` and opening a run, on a workdir with real checkpoints."""

import io
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from opened_run import save_run

from launch import eval as eval_command
from launch import generate as generate_command
from launch.cli import parse
from launch.restore import open_run
from lm.core.head import logits_of
from lm.core.tree import named_leaves
from lm.generate.sampling import SamplingOptions


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(workdir):
    return open_run(workdir)


def generate(workdir, *words):
    return generate_command.main(parse("generate", ["--workdir", workdir, "--max-new-tokens", "12", *words]))


def write(run, *words):
    """What the command prints for a run that is open already, and so compiled already."""
    args = parse("generate", ["--max-new-tokens", "12", "--temperature", "30", *words])
    return generate_command.write(run, args.prompt, SamplingOptions(args.temperature), args)


def evaluate(workdir, *words):
    return eval_command.main(parse("eval", ["--workdir", workdir, *words]))


def test_a_run_opens_at_the_newest_or_the_given_step(workdir, run):
    newest, first, averaged = run, open_run(workdir, 3), open_run(workdir, 3, ema=True)
    assert (newest.step, first.step) == (8, 3)
    kernel = "head/kernel"
    ratio = np.asarray(named_leaves(first.params)[kernel]) / np.asarray(named_leaves(averaged.params)[kernel])
    np.testing.assert_allclose(ratio, 9, rtol=1e-5)
    assert np.abs(np.asarray(named_leaves(newest.params)[kernel])
                  - np.asarray(named_leaves(first.params)[kernel])).max() > 0.01


def test_a_mesh_of_another_machine_falls_back_to_whole_copies(workdir):
    run = open_run(workdir, overrides=[("mesh.fsdp", "5"), ("mesh.data", "1")])
    assert run.mesh.shape["data"] == jax.device_count()


def test_a_run_with_adapters_opens_with_them(tmp_path):
    save_run(tmp_path, lora_rank=2, steps=(1,))
    run = open_run(str(tmp_path))
    assert run.params["lora"]["stack"]["pattern_0"]["attention"]["query"]["a"].shape == (1, 16, 2)


def test_the_command_prints_the_greedy_continuation_as_it_is_written(workdir, run, capsys):
    assert generate(workdir, "--prompt", "number ", "--temperature", "0") == 0
    out, err = capsys.readouterr()
    forward = jax.jit(run.apply)
    ids = [0, *run.tokenizer.encode("number ").tolist()]  # the data begins documents with bos
    start = len(ids)
    for _ in range(12):
        tokens = np.zeros((1, 20), np.int32)
        tokens[0, :len(ids)] = ids
        result = forward(run.params, tokens)
        ids.append(int(logits_of(result.hidden[0, len(ids) - 1], result.head).argmax()))
        if ids[-1] == 1:
            break
    assert out == f"number {run.tokenizer.decode(ids[start:])}\n"
    assert "tokens/s" in err.splitlines()[-1] and "state" in err.splitlines()[-1]


def test_json_lines_do_not_depend_on_the_batch_and_seeds_differ(run, capsys):
    def lines(*words):
        write(run, "--prompt", "a", "--prompt", "the fox", "--num-samples", "2", "--json", *words)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    together, apart, other = lines(), lines("--batch-size", "2"), lines("--seed", "1")
    assert together == apart
    assert [(row["prompt"], row["sample"], row["step"]) for row in together] == [
        ("a", 0, 8), ("a", 1, 8), ("the fox", 0, 8), ("the fox", 1, 8)]
    assert len({tuple(row["tokens"]) for row in together + other}) == 8


def test_several_texts_stand_under_headlines(run, capsys):
    write(run, "--prompt", "a", "--num-samples", "2")
    out = capsys.readouterr().out
    assert out.count("==> prompt 0, sample ") == 2 and out.startswith("==> prompt 0, sample 0 (")


def test_prompts_come_from_files_and_stdin(tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_text("from a file\n\n")
    assert generate_command.read_prompts(["x"], [str(path)]) == ["x", "from a file\n"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped\n"))
    assert generate_command.read_prompts([], []) == ["piped"]
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"prompt\.txt is not UTF-8: byte 0xe9 at offset 3"):
        generate_command.read_prompts([], [str(path)])
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(ValueError, match="there is no prompt: give --prompt"):
        generate_command.read_prompts([], [])


@pytest.mark.parametrize(("words", "message"), [
    (["--top-k", "0", "--prompt", "a"], "top_k=0"),
    (["--num-samples", "0", "--prompt", "a"], "--num-samples must be at least 1"),
    (["--step", "5", "--prompt", "a"], r"no checkpoint of step 5 .* \[3, 8\]"),
    (["--config", "x.py", "--prompt", "a"], "takes the config from there"),
    (["--config.model.embed_dim=32", "--prompt", "a"], r"embed/embedding is \(\d+, 16\) there and"),
])
def test_mistakes_of_lm_generate_are_named(workdir, words, message):
    with pytest.raises(ValueError, match=message):
        generate(workdir, *words)


def test_lm_eval_prints_a_table_and_keeps_the_numbers(workdir, tmp_path, capsys):
    text = tmp_path / "other.txt"
    text.write_text("short")
    evaluate(workdir, "--set", f"other={text}")
    out = capsys.readouterr().out
    assert "validation" in out and "other" in out and "bigram" in out
    path = pathlib.Path(workdir, "eval", "8.json")
    kept = json.loads(path.read_text())
    assert kept["step"] == 8 and set(kept["metrics"]) == {
        f"eval/{name}/{metric}" for name in ("validation", "other")
        for metric in ("loss", "perplexity", "bits_per_byte", "accuracy", "baseline_bits_per_byte")}
    kept["metrics"]["eval/validation/loss"] = kept["metrics"]["eval/mine/loss"] = 0.0
    path.write_text(json.dumps(kept))
    evaluate(workdir, "--json", "--no-baseline")
    printed = json.loads(capsys.readouterr().out)
    again = json.loads(path.read_text())
    assert again["metrics"]["eval/validation/loss"] == printed["metrics"]["eval/validation/loss"] > 0
    assert again["metrics"]["eval/mine/loss"] == 0 and "eval/other/loss" not in printed["metrics"]


def test_bits_per_byte_of_a_text_divide_by_its_bytes(workdir, run, tmp_path, capsys):
    text = tmp_path / "other.txt"
    text.write_text("naïve 東京")
    evaluate(workdir, "--set", f"other={text}", "--only-sets", "--json", "--no-baseline")
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    ids = np.array([[0, *run.tokenizer.encode("naïve 東京")]], np.int32)
    out = jax.jit(run.apply)(run.params, ids)
    logp = jax.nn.log_softmax(logits_of(out.hidden[0], out.head))
    bits = -float(sum(logp[n, ids[0, n + 1]] for n in range(ids.shape[1] - 1))) / np.log(2)
    assert metrics["eval/other/bits_per_byte"] == pytest.approx(bits / len("naïve 東京".encode()), rel=1e-5)


def test_rows_of_lm_eval_are_as_long_as_those_of_evaluation_in_training(workdir, monkeypatch):
    seen = []
    monkeypatch.setattr("lm.eval.base.evaluate", lambda evaluators, *_: seen.append(
        next(iter(evaluators[0].sets["validation"].batches())).tokens.shape[1]) or {})
    evaluate(workdir, "--no-baseline")
    evaluate(workdir, "--no-baseline", "--config.eval.seq_len=5")
    assert seen[0] != 5 and seen[1] == 5


@pytest.mark.parametrize("word", ["name", "=x", "a/b=x", "a="])
def test_sets_that_are_no_pairs_are_refused(word):
    with pytest.raises(ValueError, match="NAME=PATH"):
        eval_command.parse_sets([word])


def test_numbers_that_json_cannot_hold_are_null():
    assert eval_command.plain({"a": float("inf"), "b": 1.0}) == {"a": None, "b": 1.0}
