"""`lm bench` of train steps: how much is measured where the other side is slow, and where two lengths cross."""

import json

import pytest

from launch import cli
from launch.bench import generate, lengths, train


class FakeSide:
    """torch takes as long as its setting says, at T 1024 sixteen times that; we take 50 ms at any length."""

    def __init__(self, module, *arguments):
        self.first_loss, self.module, self.setting = 5.5, module, arguments[1:4]
        slow = 16 if arguments[1] == "1024" else 1
        self.seconds = 0.05
        if module.endswith("torch_side"):
            self.seconds = slow * {"1": 0.5, "2": 0.3}[arguments[2]] * {"fused": 1, "foreach": 0.9}[arguments[3]]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, line):
        word, _, count = line.partition(" ")
        if word == "report":
            return dict(version="fake 1", parameters=7, threads=self.setting[1], optimizer=self.setting[-1],
                        flops_per_step=1e9, peak_above_imports_mib=100.0)
        return dict(seconds=[self.seconds] * int(count))


def test_a_slow_other_side_is_measured_less(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "side", FakeSide)
    monkeypatch.setattr(train, "gemm_peak", lambda: 300.0)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda pid: {0, 1})
    assert cli.main(["bench", "rwkv4", "--steps", "12", "--out", str(tmp_path)]) == 0
    fast, slow = json.loads((tmp_path / "rwkv4.json").read_text())["shapes"]
    assert (fast["steps"], slow["steps"]) == (12, train.FEW)
    assert fast["facts"]["torch"]["optimizer"] == "foreach" and slow["facts"]["torch"]["optimizer"] == "fused"
    assert slow["speed_ratio"] == pytest.approx(0.3 * 16 / 0.05)
    table = capsys.readouterr().out
    assert "| 256 | 12 | 2 threads, foreach | 270 | 50 | 5.40x |" in table
    assert "T 256, with k + v in place of wkv4: 50 ms, so that takes 0% of it." in table


def test_a_package_that_is_missing_is_named_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == "minGRU_pytorch" else True)
    assert cli.main(["bench", "min_gru"]) == 2
    assert "minGRU_pytorch is not installed; install minGRU-pytorch" in capsys.readouterr().err


@pytest.mark.parametrize(("ratios", "want"), [
    ([0.5, 0.5, 2.0], 724.08),          # halfway on both logarithms between 512 and 1024
    ([0.5, 2.0, 0.5, 4.0], 1290.16),     # after the last that is below: a third of the way from 1024
    ([1.5, 2.0], 256), ([2.0, 0.9], None)])
def test_where_the_ratio_stays_above_one(ratios, want):
    assert lengths.crossing([256, 512, 1024, 2048][:len(ratios)], ratios) == (want and pytest.approx(want, abs=0.5))


def test_a_length_that_does_not_divide_the_tokens_of_a_step_is_refused(capsys):
    assert cli.main(["bench", "lengths", "--seq-len", "300"]) == 2
    assert "--seq-len must divide the 8192 tokens of a step; got [300]" in capsys.readouterr().err


def test_generation_prints_bytes_of_state_and_times(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "decoder", lambda module, length: (lambda: None, length * 2**20
                                                                     if "transformer" in module else 2**15))
    assert cli.main(["bench", "generate", "--seq-len", "8", "--seq-len", "4", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "generate.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [4, 8] and len(rows[0]["seconds"]["rwkv4"]) == 12
    table = capsys.readouterr().out
    assert "| 8 | 0.00 | 32 | 0.00 | 8 |" in table
