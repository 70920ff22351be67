"""Tasks of lm-evaluation-harness on a run: every answer against one that is computed by hand."""

import json
import math

import jax
import numpy as np
import pytest

from launch.cli import main
from launch.restore import open_run

QUESTIONS = [{"question": "the quick brown", "choices": [" fox", " dog"], "label": 0},
             {"question": "jumps over the", "choices": [" sea", " lazy"], "label": 1},
             {"question": "one two ", "choices": ["three", "x"], "label": 0}]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\ntarget_delimiter: ''\n" \
         "metric_list: [{metric: acc}]\n"
WRITE = "output_type: generate_until\ndoc_to_target: '{{choices[label]}}'\n" \
        "generation_kwargs: {until: ['e'], max_gen_toks: 6, temperature: 0.0}\nmetric_list: [{metric: exact_match}]\n"


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="needs pip install 'loomlm[harness]'")
    folder = tmp_path_factory.mktemp("harness")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. one two three. " * 40)
    assert main(["train", "--config", "experiments/base.py", "--workdir", str(folder / "run"),
                 f"--config.data.path={folder / 'text.txt'}", "--config.data.source=text",
                 "--config.data.max_document_chars=64", "--config.train.steps=3",
                 "--config.train.batch_size=8", "--config.train.seq_len=32", "--config.model.embed_dim=16",
                 "--config.model.num_layers=1", "--config.eval.samples=()"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return open_run(str(workdir / "run"))


@pytest.fixture(scope="module")
def log_probs(run):
    """[T, V] after each token of a list of ids, one row, no padding."""
    @jax.jit
    def row(params, tokens):
        out = run.apply(params, tokens)
        logits = out.hidden.astype("float32") @ out.head.kernel.astype("float32").T
        return jax.nn.log_softmax(logits[..., :out.head.vocab_size])
    return lambda ids: np.asarray(row(run.params, np.asarray(ids, np.int32)[None])[0], np.float64)


def model(run, **options):
    from lm.eval.harness import HarnessModel
    return HarnessModel(run.apply, run.params, run.model.initial_state, run.tokenizer, batch_size=2, **options)


@pytest.mark.slow
def test_a_continuation_has_its_probability_after_its_context(run, log_probs):
    pairs = [("the quick brown", " fox"), ("one two ", "three"), ("a", "b"), ("over the lazy dog", ". one two")]
    found = model(run).loglikelihood([Request(*pair) for pair in pairs])
    for (context, more), (logp, greedy) in zip(pairs, found, strict=True):
        ids, size = run.tokenizer.encode(context + more), len(run.tokenizer.encode(context.rstrip()))
        rows = log_probs(ids)
        want = sum(rows[t - 1, ids[t]] for t in range(size, len(ids)))
        assert logp == pytest.approx(want, abs=1e-3)
        assert greedy == all(rows[t - 1].argmax() == ids[t] for t in range(size, len(ids)))


@pytest.mark.slow
def test_windows_score_each_token_once(run, log_probs):
    ids = run.tokenizer.encode("the quick brown fox jumps")
    whole = log_probs(ids)
    total, = model(run).loglikelihood_rolling([Request("the quick brown fox jumps")])
    assert total == pytest.approx(sum(whole[t - 1, ids[t]] for t in range(1, len(ids))), abs=1e-3)
    cut, = model(run, max_length=8).loglikelihood_rolling([Request("the quick brown fox jumps")])
    want = 0.0
    for t in range(1, len(ids)):
        start = (t - 1) // 7 * 7
        want += log_probs(ids[start:t])[-1, ids[t]]
    assert cut == pytest.approx(want, abs=1e-3)


@pytest.mark.slow
def test_a_context_that_is_too_long_loses_its_beginning(run):
    long, short = "x" * 50 + "the quick", "quick"
    (cut, _), (whole, _) = model(run, max_length=len(short) + 3).loglikelihood([Request(long, "abc"),
                                                                               Request(short, "abc")])
    assert cut == pytest.approx(whole, abs=1e-4)
    with pytest.raises(ValueError, match="a continuation has 8 tokens, and the model takes 8"):
        model(run, max_length=8).loglikelihood([Request("the", "x" * 8)])
    with pytest.raises(ValueError, match="max_gen_toks"):
        model(run, max_length=8).generate_until([Request("the", {"until": ["."], "max_gen_toks": 8})])


class Pairs:
    """Two letters a token, the last one by itself: a continuation may disappear in a token of its context."""
    bos_id = eos_id = None

    def encode(self, text):
        return [sum(map(ord, text[n:n + 2])) % 256 for n in range(0, len(text), 2)]


@pytest.mark.slow
def test_a_continuation_that_shares_the_last_token_of_its_context_is_that_token(run, log_probs):
    from lm.eval.harness import HarnessModel
    given = HarnessModel(run.apply, run.params, run.model.initial_state, Pairs(), batch_size=2)
    (logp, _), = given.loglikelihood([Request("abc", "d")])
    ids = Pairs().encode("abcd")
    assert len(ids) == len(Pairs().encode("abc")) and logp == pytest.approx(log_probs(ids)[-2, ids[-1]], abs=1e-3)
    with pytest.raises(ValueError, match="stands after nothing"):
        given.loglikelihood([Request("a", "b")])


class Latin:
    bos_id = eos_id = None

    def encode(self, text):
        return [ord(letter) for letter in text]


@pytest.mark.slow
def test_what_the_model_would_write_is_said_of_the_continuation_alone(run, log_probs):
    from lm.eval.harness import HarnessModel
    given = HarnessModel(run.apply, run.params, run.model.initial_state, Latin(), batch_size=2)
    first = log_probs(Latin().encode("the qui"))[-1].argmax()
    second = log_probs([*Latin().encode("the qui"), first])[-1].argmax()
    words = [chr(first), chr(first) + chr(second), chr(first) + chr((second + 1) % 256), chr((first + 1) % 256)]
    found = given.loglikelihood([Request("the qui", word) for word in words])
    assert [greedy for _, greedy in found] == [True, True, False, False]


@pytest.mark.slow
def test_settings_of_a_task_that_are_not_known_are_refused(run):
    with pytest.raises(ValueError, match=r"\['num_beams'\]"):
        model(run).generate_until([Request("the", {"until": ["."], "num_beams": 3})])
    with pytest.raises(ValueError, match="stands after nothing"):
        model(run).loglikelihood([Request("", "abc")])


@pytest.mark.slow
def test_the_command_runs_local_tasks_and_keeps_what_they_find(workdir, run, log_probs, capsys):
    questions = workdir / "questions.jsonl"
    questions.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    tasks = workdir / "tasks"
    tasks.mkdir()
    for name, kind in (("pick", CHOICE), ("write", WRITE)):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, path=questions) + kind)
    words = ["eval", "--workdir", str(workdir / "run"), "--task", "harness", "--harness-path", str(tasks)]
    assert main([*words, "--harness-tasks", "pick,write", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    right = 0
    for q in QUESTIONS:
        totals = []
        for choice in q["choices"]:
            ids, size = run.tokenizer.encode(q["question"] + choice), len(run.tokenizer.encode(q["question"].rstrip()))
            rows = log_probs(ids)
            totals.append(sum(rows[t - 1, ids[t]] for t in range(size, len(ids))))
        right += int(np.argmax(totals)) == q["label"]
    assert metrics["eval/pick/acc"] == pytest.approx(right / 3)
    assert 0 <= metrics["eval/write/exact_match"] <= 1 and math.isfinite(metrics["eval/pick/acc_stderr"])
    kept = json.loads((workdir / "run/eval/3.json").read_text())["metrics"]
    assert kept["eval/pick/acc"] == metrics["eval/pick/acc"]
    assert main([*words, "--harness-tasks", "pik"]) == 2
    assert "did you mean 'pick'" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--questions", "3"], "add it"), (["--task", "harness"], "needs --harness-tasks"),
    (["--task", "harness", "--harness-tasks", "a", "--harness-path", "/nowhere"], "is no folder"),
    (["--task", "harness", "--harness-tasks", "a", "--questions", "0"], "at least 1")])
def test_flags_that_cannot_be_are_refused_before_anything_is_loaded(words, message, capsys):
    assert main(["eval", "--workdir", "/nowhere", *words]) == 2
    assert message in capsys.readouterr().err
