"""`lm bench orpo`: equal pairs on both sides, turns, and what stops it. No side is started."""

import json
from typing import ClassVar

import numpy as np
import pytest

from launch import cli
from launch.bench import orpo
from launch.bench.orpo_side import rows
from launch.bench.pairs import PAIRS, pairs
from lm.losses.preference.responses import CHOSEN, REJECTED, kind_of, supervised

SECONDS = {"kept": 0.4, "remade": 0.5, "default": 0.1, "chunked": 0.2}


class FakeSide:
    """Answers as a side does; `loss` may be made to differ."""

    losses: ClassVar[dict] = {}

    def __init__(self, module, *arguments):
        self.kind = next(word for word in arguments if word in SECONDS)
        self.threads = int(arguments[2]) if module == orpo.TRL else None
        self.first_loss = self.losses.get(self.kind, 1.0)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, line):
        word, *rest = line.split()
        if word == "report":
            return {"version": "v", "parameters": 7, "threads": self.threads, "tokens_per_step": 2 * PAIRS * 64,
                    "peak_above_imports_mib": 100.0}
        return {"seconds": [SECONDS[self.kind] / (self.threads or 1)] * int(rest[0])}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(orpo, "side", FakeSide)
    monkeypatch.setattr(orpo.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(orpo.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(FakeSide, "losses", {})


def test_speeds_are_compared_with_trl_at_its_best_threads(fake, tmp_path, capsys):
    assert cli.main(["bench", "orpo", "--seq-len", "64", "--out", str(tmp_path)]) == 0
    (shape,) = json.loads((tmp_path / "orpo.json").read_text())["shapes"]
    assert shape["steps"] == 12 and {len(times) for times in shape["seconds"].values()} == {12}
    assert shape["speed_ratio"] == {"ours": pytest.approx(0.2 / 0.1), "chunked": pytest.approx(0.2 / 0.2)}
    assert "| 64 | 12 | 2 | 2,560 | 2,048 | 5,120 | 2,560 | 2.00x | 1.00x |" in capsys.readouterr().out


def test_sides_that_do_other_work_are_no_benchmark(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(FakeSide, "losses", {"chunked": 1.001})
    with pytest.raises(AssertionError, match="differ in their initial loss"):
        cli.main(["bench", "orpo", "--seq-len", "64", "--out", str(tmp_path)])


@pytest.mark.parametrize(("flags", "missing", "message"), [
    ([], "trl", "TRL's ORPOTrainer and trl is not installed; install trl"),
    (["--steps", "3"], None, "--steps must be at least 10"),
    (["--seq-len", "4"], None, "must be at least 8"),
])
def test_mistakes_are_one_line(fake, monkeypatch, capsys, flags, missing, message):
    monkeypatch.setattr(orpo.importlib.util, "find_spec", lambda name: None if name == missing else True)
    assert cli.main(["bench", "orpo", *flags]) == 2
    assert message in capsys.readouterr().err


def test_rows_hold_the_pairs_that_the_trainer_gets():
    given, batch = pairs(16, 50), rows(16, 50)
    for n, kind, response in ((1, CHOSEN, given.chosen), (2, REJECTED, given.rejected)):
        inside = batch.segment_ids == n
        document = batch.tokens[inside].reshape(PAIRS, 16)
        np.testing.assert_array_equal(document, np.concatenate([given.prompt, response], axis=1))
        assert (np.asarray(kind_of(batch.segment_ids))[inside] == kind).all()
        # Every token of the response is a target, its EOS too, and no other.
        targets = batch.targets[inside].reshape(PAIRS, 16)[:, 7:15]
        np.testing.assert_array_equal(targets, response)
        np.testing.assert_array_equal(batch.weights[inside].reshape(PAIRS, 16), [[0] * 7 + [1] * 8 + [0]] * PAIRS)
    assert (given.chosen[:, -1] == 49).all()
    # With the prompt, the likelihood has all tokens of the chosen document but its first.
    assert np.asarray(supervised(batch, "all")).sum() == PAIRS * 15
