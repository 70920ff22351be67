"""`lm claim`: the grid runs once, goes on where it was stopped, keeps what failed, and says what came out."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from launch import claim_grid
from launch.cli import main
from lm.claims.store import read_json

HERE = pathlib.Path(__file__).resolve().parent
FAKE = HERE / "fake_claim.py"
CELLS = [f"{arm}-s{seed}" for arm in ("good", "bad") for seed in range(3)]


@pytest.fixture
def lm_claim(monkeypatch, tmp_path, capsys):
    """Calls `lm claim FAKE --workdir ...` with cells that are quick processes; returns (exit code, lines)."""
    monkeypatch.setattr(claim_grid, "COMMAND", (sys.executable, str(HERE / "fake_cell.py")))

    def call(*more, spec=str(FAKE)):
        code = main(["claim", spec, "--workdir", str(tmp_path / "w"), "--jobs", "3", *more])
        captured = capsys.readouterr()
        return code, (captured.out + captured.err).strip().splitlines()
    return call


def starts(tmp_path):
    return {path.parent.name: len(path.read_text()) for path in (tmp_path / "w" / "cells").glob("*/starts.txt")}


def test_a_claim_that_holds_passes_with_its_numbers_in_the_last_line(lm_claim, tmp_path):
    code, lines = lm_claim()
    assert code == 0
    assert lines[-1] == "PASS fake_claim: worst of good 1 (>= 0.9); best of bad 0.02 (<= 0.1)"
    assert any(line.startswith("  good: score 1.01 ± 0.01 (n=3)") for line in lines)
    results = read_json(tmp_path / "w" / "results.json")
    assert [cell["name"] for cell in results["cells"]] == CELLS and results["verdict"]["passed"]
    assert results["cells"][1]["values"] == {"score": 1.01} and len(results["cells"][1]["config_hash"]) == 12
    assert results["spread"]["bad"]["score"] == {"mean": pytest.approx(0.01), "std": pytest.approx(0.01), "min": 0.0,
                                                 "max": 0.02, "n": 3}
    assert results["packages"]["jax"] and results["totals"]["cpu_seconds"] > 0
    assert (tmp_path / "w" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_not_run_again(lm_claim, tmp_path):
    lm_claim()
    (tmp_path / "w" / "cells" / "bad-s1" / "cell.json").unlink()
    code, lines = lm_claim()
    assert code == 0 and "6 cells, 1 to run" in lines[0]
    assert starts(tmp_path) == {**dict.fromkeys(CELLS, 1), "bad-s1": 2}


def test_a_cell_that_fails_is_named_kept_and_tried_again(lm_claim, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "good-s2.fails").write_text("76")
    code, lines = lm_claim()
    assert code == 1 and lines[-1] == "FAIL fake_claim: 1 of 6 cells gave no numbers: good-s2"
    assert any("good-s2: failed with exit code 76: broken on purpose" in line for line in lines)
    (tmp_path / "w" / "good-s2.fails").unlink()
    assert lm_claim()[0] == 0
    cell = read_json(tmp_path / "w" / "results.json")["cells"][2]
    assert [attempt["exit_code"] for attempt in cell["attempts"]] == [76, 0]


def test_a_cell_that_is_told_to_stop_ends_the_grid_and_the_command_goes_on(lm_claim, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "good-s0.fails").write_text("75")
    code, lines = lm_claim("--jobs", "1")
    assert code == 75 and "(6 are left)" in lines[-1] and not (tmp_path / "w" / "results.json").exists()
    (tmp_path / "w" / "good-s0.fails").unlink()
    assert lm_claim()[0] == 0


def test_a_workdir_of_another_grid_is_refused(lm_claim, tmp_path):
    assert lm_claim()[0] == 0
    code, lines = lm_claim("--full")
    assert code == 2 and "holds claim 'fake_claim'; give another --workdir" in lines[-1]
    other = tmp_path / "fake_claim.py"
    other.write_text(FAKE.read_text().replace("else 16", "else 24"))
    code, lines = lm_claim(spec=str(other))
    assert code == 2 and "was made by another grid: bad-s0, bad-s1, bad-s2 and 3 more differ" in lines[-1]


def test_results_can_be_recorded_and_recording_twice_adds_nothing(lm_claim, tmp_path, monkeypatch):
    from launch import claim
    monkeypatch.setattr(claim, "RECORDS", tmp_path / "records")
    lm_claim("--record")
    lm_claim("--record")
    record = read_json(tmp_path / "records" / "fake_claim.json")
    assert len(record["runs"]) == 1 and record["runs"][0] == read_json(tmp_path / "w" / "results.json")


def test_the_revision_is_that_of_the_code_that_ran_the_cells(lm_claim, tmp_path, monkeypatch):
    from launch import environment
    code = lambda: [read_json(tmp_path / "w" / "results.json")[key] for key in ("revision", "dirty")]
    at = lambda revision: monkeypatch.setattr(environment, "git_state", lambda *_: dict(revision=revision, dirty=False))
    at("one")
    lm_claim()
    at("two")
    lm_claim()      # judges alone
    assert code() == ["one", False]
    (tmp_path / "w" / "cells" / "bad-s1" / "cell.json").unlink()
    lm_claim()
    assert code() == ["two", True]


@pytest.mark.parametrize("words, message", [
    (["minrnn_scn"], "there is no claim 'minrnn_scn'; did you mean 'minrnn_scan'?"),
    ([], "lm claim needs a NAME: "),
    (["base"], "there is no claim 'base'"),
    (["minrnn_scan", "--jobs", "0"], "--jobs must be at least 1; got 0"),
    (["minrnn_scan", "--config.train.steps=3"], "lm claim takes no --config"),
    (["minrnn_scan", "--list"], "--list and --page are about all claims; leave out 'minrnn_scan'"),
    (["minrnn_scan", "--shuffle"], "unknown flag '--shuffle'"),
])
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["claim", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"lm claim: {message}")


def test_the_list_names_every_claim(capsys):
    assert main(["claim", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = {path.stem for path in (HERE.parent.parent / "experiments" / "claims").glob("*.py")}
    assert {line.split()[0] for line in lines} == files - {"__init__", "base"}
    assert all(line.split()[1] in ("PASS", "FAIL", "-") and len(line) > 60 for line in lines)


def test_cells_that_measure_time_run_alone_and_last(monkeypatch, tmp_path):
    from lm.claims.definition import Cell
    events = tmp_path / "events.txt"
    script = tmp_path / "cell.py"
    script.write_text(f"""import pathlib, sys, time
folder, events = pathlib.Path(sys.argv[1]), {str(events)!r}
open(events, "a").write(f"+{{folder.name}} ")
limit = time.monotonic() + 60      # those that may run side by side wait for each other
while folder.name.startswith("a-") and open(events).read().count("+a-") < 2 and time.monotonic() < limit:
    time.sleep(0.02)
open(events, "a").write(f"-{{folder.name}} ")
(folder / "values.json").write_text("{{}}")
""")
    monkeypatch.setattr(claim_grid, "COMMAND", (sys.executable, str(script)))
    timed = [Cell("timed", seed, (), alone=True) for seed in (0, 1)]
    cells = [*timed, Cell("a", 0, ()), Cell("a", 1, ())]
    claim_grid.run(tmp_path, cells, {cell.name: "{}" for cell in cells}, jobs=4, note=lambda cell, attempt: None)
    said = events.read_text().split()
    assert sorted(said[:2]) == ["+a-s0", "+a-s1"]
    assert said[4:] == ["+timed-s0", "-timed-s0", "+timed-s1", "-timed-s1"]


def test_cells_use_one_thread_on_cpus_and_keep_what_the_user_set():
    made = claim_grid.child_environment({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a=1", "GLIBC_TUNABLES": "x=1"})
    assert made["XLA_FLAGS"] == f"--a=1 {claim_grid.ONE_THREAD}"
    assert claim_grid.child_environment({"JAX_PLATFORMS": "tpu"}).get("XLA_FLAGS") is None


@pytest.mark.slow
def test_sigterm_stops_the_cells_and_the_command_goes_on_later(tmp_path):
    """A scheduler that takes the machine back sends SIGTERM to the command alone."""
    cell = tmp_path / "cell.py"
    cell.write_text("import pathlib, sys, time\npathlib.Path(sys.argv[1], 'began').touch()\ntime.sleep(60)\n")
    code = (f"import sys; from launch import claim_grid, cli; claim_grid.COMMAND = (sys.executable, {str(cell)!r}); "
            f"sys.exit(cli.main(['claim', {str(FAKE)!r}, '--workdir', {str(tmp_path / 'w')!r}, '--jobs', '2']))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parent.parent, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "w").glob("cells/*/began"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and out.strip().endswith("(6 are left).")
    assert len(list((tmp_path / "w").glob("cells/*"))) == 2


@pytest.mark.slow
def test_a_real_cell_trains_and_gives_numbers(tmp_path, capsys):
    short = tmp_path / "copying.py"
    text = (HERE.parent.parent / "experiments" / "claims" / "minrnn_copy.py").read_text()
    short.write_text(text.replace("(1, 2), 1500", "(1,), 21").replace("batch_size=64", "batch_size=8"))
    code = main(["claim", str(short), "--workdir", str(tmp_path / "w"), "--compile-cache", str(tmp_path / "cache")])
    captured = capsys.readouterr()
    # Without the arms of two layers every criterion is met, whatever is shuffled: the control makes it a FAIL.
    assert code == 1, captured
    assert captured.out.splitlines()[-1].endswith("200 of 200 shuffled copies: it does not see which arm is which")
    values = json.loads((tmp_path / "w" / "results.json").read_text())["cells"][0]["values"]
    assert values["step"] == 21 and values["num_params"] > 10_000 and 0 <= values["eval/validation/accuracy"] <= 1
    assert values["state_bytes"] > 0


def test_a_mended_check_judges_again_and_keeps_what_was_said(lm_claim, tmp_path, monkeypatch, capsys):
    from launch import claim as command
    from lm.claims.definition import read
    from lm.claims.page import generate
    monkeypatch.setattr(command, "RECORDS", tmp_path / "records")
    blind = tmp_path / "fake_claim.py"
    blind.write_text(FAKE.read_text().replace('"best of bad", max(found["bad"]), 0.1', '"any", 0.0, 0.1')
                     .replace('min(found["good"]), 0.9', '1.0, 0.9'))
    assert lm_claim("--record", spec=str(blind))[0] == 1
    record = tmp_path / "records" / "fake_claim.json"
    assert "shuffled copies" in read_json(record)["runs"][0]["verdict"]["reason"]
    blind.write_text(FAKE.read_text())
    code, lines = lm_claim("--judge-again", spec=str(blind))
    assert code == 0 and "FAIL before; PASS" in lines[0]
    run, = read_json(record)["runs"]
    assert run["verdict"]["passed"] and "shuffled copies" in run["earlier"][0]["reason"]
    page = generate([read(str(blind), tmp_path)], {"fake_claim": read_json(record)})
    assert "An earlier form of the check, with 2 criteria, said FAIL" in page
    assert lm_claim("--judge-again", spec=str(blind))[1] == [] and len(read_json(record)["runs"][0]["earlier"]) == 1
