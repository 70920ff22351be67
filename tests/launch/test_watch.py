"""`lm watch`: runs at every stage, from the files that they left."""

import json

from launch import cli
from launch.watch import look, spark


def write(folder, steps, result=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"train": {"steps": 100}}))
    if steps:
        rows = [{"step": n, "train/loss": 5 / n, "perf/tokens_per_sec": 1234.0, "eval/validation/loss": 2.5}
                for n in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    if result is not None:
        (folder / "final_result.json").write_text(json.dumps(result))
    return str(folder)


def test_runs_at_every_stage_are_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path / "a", 0)
    write(tmp_path / "b", 40)
    write(tmp_path / "c", 100, {"step": 100, "exit_code": 0})
    write(tmp_path / "d", 60, {"step": 50, "exit_code": 75})  # stopped at 50, and goes on now
    assert cli.main(["watch", str(tmp_path), "--once"]) == 0
    said = capsys.readouterr().out
    for words in ("not begun", "40/100", "0.125 loss", "validation 2.5", "1,234", "done", "s ago"):
        assert words in said, said
    assert look(str(tmp_path / "d"))["ended"] is None and look(str(tmp_path / "c"))["ended"] == "done"


def test_a_falling_loss_falls(tmp_path):
    line = spark([10.0 / n for n in range(1, 200)])
    assert len(line) == 40 and line[0] == "█" and line[-1] == "▁"
    assert spark([1.0]) == "" and set(spark([2.0] * 9)) == {"▁"}


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["watch", str(tmp_path)]) == 2 and "no workdir" in capsys.readouterr().err
    assert cli.main(["watch"]) == 2 and cli.main(["watch", str(tmp_path), "--every=0"]) == 2
