"""`lm bench kernels`: what is skipped says why, and the table is made of what was measured."""

import json

import numpy as np
import pytest

from launch import cli
from launch.bench import kernels
from launch.bench.min_gru import agree


class FakeSide:
    """A side that takes the time that its name says. Of two forms of torch the second is the slower one."""

    def __init__(self, module, who, direction, threads, path, *options):
        torch = (0.3 if threads == "1" else 0.2) + 0.05 * (options[-1] == "chunked")
        self.seconds = {"torch": torch, "ours": 0.05}[who]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, line):
        word, _, count = line.partition(" ")
        return dict(version="fake 1") if word == "report" else dict(seconds=[self.seconds] * int(count))


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(kernels, "side", FakeSide)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(kernels.os, "sched_getaffinity", lambda pid: {0, 1})


def test_torch_runs_at_its_best_number_of_threads_and_ratios_are_of_medians(all_installed, tmp_path, capsys):
    assert cli.main(["bench", "kernels", "--steps", "10", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert [(row["name"], row["direction"]) for row in result["rows"]] == [
        ("min_gru", "forward"), ("min_gru", "both"), *[("peer", "forward"), ("peer", "both")] * 2]
    for row in result["rows"]:
        assert row["threads"] == 2 and row["form"] in ("", "whole") and row["ratio"] == pytest.approx(4)
        assert len(row["seconds"]["ours"]) == len(row["seconds"]["torch"]) == 12        # whole turns
    table = capsys.readouterr().out
    assert "minGRU-pytorch 9.9" in table and "| forward + backward | 2 | 200.0 | 50.0 | 4.00x |" in table
    assert "among 262,144 experts" in table and "| 2, whole |" in table
    assert (tmp_path / "kernels.md").read_text() in table


def test_what_is_not_installed_is_skipped_with_what_to_install(all_installed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None if name == "PEER_pytorch" else True)
    assert cli.main(["bench", "kernels", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| peer | | | | | not measured: PEER_pytorch is not installed: pip install PEER-pytorch |" in table
    assert table.count("4.00x") == 2


def test_too_few_steps_are_refused(capsys):
    assert cli.main(["bench", "kernels", "--steps", "3"]) == 2
    assert "--steps must be at least 10" in capsys.readouterr().err


def test_results_that_differ_are_no_equal_work():
    saved = dict(out=np.array([1.0, -2.0]))
    agree(saved, out=np.array([1.0, -2.003]))
    with pytest.raises(AssertionError, match="the sides differ in out by 5"):
        agree(saved, out=np.array([1.0, -2.1]))
    with pytest.raises(AssertionError, match="differ in out by nan"):
        agree(saved, out=np.array([1.0, np.nan]))
