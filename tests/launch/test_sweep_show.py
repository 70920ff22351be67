"""`lm sweep show`: once where nobody watches, and on a terminal until the trials have ended."""

import json

from test_sweep import TINY, fast, sweep  # noqa: F401  fast is a fixture

from launch.sweeps import table


def test_a_terminal_is_shown_the_table_until_ctrl_c(tmp_path, fast, monkeypatch, capsys):  # noqa: F811
    fast(1)
    assert sweep("--config", TINY, "--workdir", tmp_path, "--param", "optimizer.learning_rate=loguniform(0.1,0.2)",
                 "--sampler=random", "--trials=1", "--workers=1") == 0
    assert sweep("show", "--workdir", tmp_path) == 0
    assert "complete" in capsys.readouterr().out
    kept = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps({**kept, "trials": 2}))  # one is still to come
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    monkeypatch.setattr(table.time, "sleep", sleep)
    assert sweep("show", "--workdir", tmp_path) == 0
    out = capsys.readouterr().out
    assert len(naps) == 3 and out.count("optimizer.learning_rate") >= 3 and "1 complete of 2" in out
