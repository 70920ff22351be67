"""`lm kernels`: which cells are compiled, what fails, what is printed. No compiler is asked here."""

import json
import stat
import sys

import pytest

from launch import cli
from launch.kernels import cells, matrix, process, schedule, table
from launch.kernels.cells import Cell
from pallas_kernels.aot.case import cases, find_case
from pallas_kernels.aot.schedule import Body, Schedule
from pallas_kernels.aot.targets import TARGETS

COMPILER = "jax 0, libtpu 0"
GPU_COMPILER = "jax 0, jax-cuda13-plugin 0, nvidia-cuda-nvcc 0"
TPUS = ["v4", "v5e", "v5p", "v6e", "7x"]
KNOWN = [find_case(name) for name in ("linear_scan", "linear_scan reset", "linear_scan float32")]
TPU_ALONE = find_case("wkv7")._replace(kernels=("pallas_tpu",))
CELLS = cells.plan(KNOWN, TPUS)
GPU_CELLS = cells.plan(KNOWN, ["h100", "b200", "a100"])
SOURCES = {(case.name, kernel): "same" for case in KNOWN for kernel in case.kernels}


def record_of(planned=CELLS, **changes):
    """A record in which all is OK but what is given as key=result."""
    results = {cell.key: dict(status="ok", sources="same") for cell in planned}
    return {COMPILER: results | {key.replace("__", "/"): value for key, value in changes.items()}}


def answer(bad=()):
    """(compile_one, the cells it was asked for)."""
    asked = []

    def compile_one(cell):
        asked.append(cell.key)
        return dict(status="refused", reason="E2003") if cell.key in bad else dict(status="ok")

    return compile_one, asked


def check(record, compile_one, sources=SOURCES, share=0.2, commit="a", wanted=CELLS, compiler=COMPILER, **more):
    return matrix.check(wanted, record, compiler, sources, compile_one, share, commit, None, **more)


def test_the_plan_has_every_direction_and_every_target():
    assert len(CELLS) == len(KNOWN) * 2 * 5
    assert Cell("linear_scan", "backward", "pallas_tpu", "7x") in CELLS
    assert len(GPU_CELLS) == len(KNOWN) * 2 * 5     # two kernels on h100 and b200, one on a100
    assert Cell("linear_scan", "backward", "pallas_mosaic_gpu", "b200") in GPU_CELLS
    assert not any(cell.target == "a100" and cell.kernel == "pallas_mosaic_gpu" for cell in GPU_CELLS)
    assert set(cells.plan(KNOWN, TARGETS)) == {*CELLS, *GPU_CELLS}
    assert {cell.toolchain for cell in CELLS} == {"libtpu"} and {cell.toolchain for cell in GPU_CELLS} == {"cuda"}
    assert not cells.plan([TPU_ALONE], ["h100"])                                 # no kernel there: chunked serves


def test_cells_that_no_compiler_here_can_ask_about_are_compared_by_their_sources(capsys):
    record = {GPU_COMPILER: record_of(GPU_CELLS)[COMPILER]}
    only_tpus = {"libtpu": COMPILER}
    assert matrix.check_unseen(GPU_CELLS, record, SOURCES, only_tpus) == 0
    changed = SOURCES | {("linear_scan reset", "pallas_triton"): "changed"}
    assert matrix.check_unseen(GPU_CELLS, record, changed, only_tpus) == 1
    said = capsys.readouterr().out
    assert said.count("recorded with other sources") == 6 and "pip install 'loomlm[aot-gpu]'" in said
    assert "pallas_mosaic_gpu" not in said
    assert matrix.check_unseen(GPU_CELLS, record, changed, only_tpus | {"cuda": GPU_COMPILER}) == 0


def test_unchanged_cells_are_sampled_by_the_commit_and_changed_ones_all_run():
    compile_one, asked = answer()
    sources = SOURCES | {("linear_scan reset", "pallas_tpu"): "changed"}
    assert check(record_of(), compile_one, sources) == 0
    changed = {cell.key for cell in CELLS if cell.case == "linear_scan reset"}
    assert set(asked[:10]) == changed and len(asked) == 10 + 4      # a fifth of the other twenty
    again, asked_again = answer()
    check(record_of(), again, sources)
    assert asked_again == asked
    other, asked_other = answer()
    check(record_of(), other, sources, commit="b")
    assert set(asked_other[10:]) != set(asked[10:])


def test_commits_draw_every_cell_in_time():
    drawn = {cell.key for number in range(200) for cell in cells.sample(CELLS, 0.05, str(number))}
    assert drawn == {cell.key for cell in CELLS}
    assert cells.sample(CELLS, 0, "a") == [] and len(cells.sample(CELLS[:3], 0.01, "a")) == 1


def test_a_cell_that_was_ok_and_is_not_fails(capsys):
    bad = CELLS[3].key
    compile_one, _ = answer({bad})
    assert check(record_of(), compile_one, share=1) == 1
    assert f"{bad} was OK and is refused now: E2003" in capsys.readouterr().out


def test_a_cell_that_was_refused_before_may_stay_so(capsys):
    bad = CELLS[3].key
    compile_one, _ = answer({bad})
    assert check(record_of(**{bad: dict(status="refused", reason="E2003", sources="same")}), compile_one, share=1) == 0
    assert f"not OK, as before: {bad}" in capsys.readouterr().out


def test_a_cell_that_is_gone_fails_unless_only_a_part_is_checked():
    gone = record_of(**{"old_op__forward__pallas_tpu__v5e": dict(status="ok", sources="same")})
    assert check(gone, answer()[0]) == 1
    assert check(gone, answer()[0], everything=False) == 0


def test_a_compiler_without_a_record_compiles_everything_against_the_first(capsys):
    bad = CELLS[0].key
    compile_one, asked = answer({bad})
    assert check(record_of(), compile_one, compiler="jax 9, libtpu 9", share=0) == 1
    assert len(asked) == len(CELLS)


def test_new_cells_are_compiled_and_only_reported(capsys):
    new = CELLS[0].key
    compile_one, asked = answer({new})
    assert check(record_of(CELLS[1:]), compile_one, share=0) == 0
    assert asked == [new] and f"new and not OK: {new}" in capsys.readouterr().out


def test_time_that_is_spent_leaves_cells_and_says_which(capsys):
    results, left = matrix.compile_all(CELLS, answer()[0], SOURCES, seconds=-1)
    assert results == {} and left == CELLS
    matrix.report_left(left[:1])
    assert CELLS[0].key in capsys.readouterr().err


def test_the_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "kernels.json"
    cells.write(record_of(), path)
    assert cells.read(path) == record_of() and json.loads(path.read_text())
    assert cells.read(tmp_path / "none.json") == {}
    path.write_text("[]")
    with pytest.raises(ValueError, match="no record of `lm kernels matrix`"):
        cells.read(path)


def test_the_table_names_what_serves_and_the_reasons():
    bad = dict(status="refused", reason="E2003: not aligned", sources="same")
    record = record_of(linear_scan__forward__pallas_tpu__v4=bad, linear_scan__backward__pallas_tpu__v4=bad)
    page = table.markdown(record, KNOWN)
    assert "| linear_scan | forward | refused [1] | OK | OK | OK | OK |" in page
    assert "- [1] E2003: not aligned" in page and "[2]" not in page
    assert "| linear_scan reset | backward | OK |" in page
    shown = table.text({COMPILER: {"linear_scan/forward/pallas_tpu/v5e": dict(status="ok")}}, KNOWN)
    assert shown.splitlines()[1:] == ["operation    direction  v5e", "linear_scan  forward    OK"]


def test_gpus_have_a_table_of_their_own_with_what_was_spilled():
    record = record_of() | {GPU_COMPILER: record_of(GPU_CELLS)[COMPILER]}
    record[GPU_COMPILER]["linear_scan/forward/pallas_triton/a100"]["ptxas"] = {"k": dict(registers=255, spills=12)}
    record[GPU_COMPILER]["linear_scan/forward/pallas_triton/h100"]["ptxas"] = {"k": dict(registers=64, spills=0)}
    tpus, gpus = table.markdown(record, [*KNOWN, TPU_ALONE]).split("\n\nWith ")
    assert "| wkv7 | forward | not compiled |" in tpus and "h100" not in tpus
    both = "pallas_mosaic_gpu OK, pallas_triton OK"
    assert f"| linear_scan | forward | {both} | {both} | OK, spills 12 B |" in gpus
    assert "| wkv7 | forward | chunked | chunked | chunked |" in gpus and "v5e" not in gpus


def test_the_page_keeps_what_stands_around_the_table(tmp_path, monkeypatch):
    page = tmp_path / "kernels.md"
    monkeypatch.setattr(table, "PAGE", page)
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write_into_page("new")
    assert page.read_text() == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="the table goes between them"):
        table.write_into_page("new")


def script(tmp_path, body):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_compiler_that_hangs_crashes_or_answers(tmp_path):
    cell = CELLS[0]
    assert process.run(script(tmp_path, "sleep 60"), cell, 0.2) == dict(status="timeout", reason="not done after 0.2 s")
    assert process.run(script(tmp_path, "echo bang >&2; kill -11 $$"), cell, 9)["status"] == "crashed"
    assert process.run(script(tmp_path, "echo bang >&2; exit 3"), cell, 9)["reason"] == "exit code 3: bang"
    assert process.run(script(tmp_path, """echo noise; echo '{"status": "ok"}'"""), cell, 9) == dict(status="ok")


def test_the_compiling_process_has_its_own_settings(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    environ = process.environment("folder")
    assert environ["JAX_PLATFORMS"] == "cpu" and "XLA_FLAGS" not in environ
    assert "--xla_jf_dump_to=folder" in environ["LIBTPU_INIT_ARGS"]
    assert "LIBTPU_INIT_ARGS" not in process.environment()
    environ = process.environment("folder", "cuda")
    assert environ["XLA_FLAGS"] == "--xla_dump_to=folder" and environ["MOSAIC_GPU_DUMP_TO"] == "folder"


def test_without_a_compiler_the_error_says_what_to_install(tmp_path, capsys):
    nothing = script(tmp_path, """echo '{"jax": "0"}'""")
    assert cli.main(["kernels", "matrix", "--python", nothing]) == 2
    said = capsys.readouterr().err
    assert "pip install 'loomlm[aot]'" in said and "pip install 'loomlm[aot-gpu]'" in said
    only_tpus = script(tmp_path, """echo '{"jax": "0", "libtpu": "1"}'""")
    assert process.compilers(only_tpus) == {"libtpu": "jax 0, libtpu 1"}
    assert process.toolchain_of("jax 0, libtpu 1") == "libtpu" and process.toolchain_of(GPU_COMPILER) == "cuda"
    assert cli.main(["kernels", "matrix", "--target", "h100", "--python", only_tpus]) == 2
    said = capsys.readouterr().err
    assert "cannot compile for h100" in said and "pip install 'loomlm[aot-gpu]'" in said


@pytest.mark.parametrize(("words", "said"), [
    (["matrx"], "did you mean 'matrix'?"),
    (["matrix", "linear_scna"], "did you mean 'linear_scan'?"),
    (["matrix", "--target", "v5"], "no target 'v5'; did you mean 'v5p'?"),
    (["schedule"], "needs an operation: "),
    (["schedule", "linear_scan", "--target", "h100"], "h100 is no TPU; TPUs: v4, v5e"),
    (["matrix", "--check", "--write"], "give one of them"),
    (["matrix", "--check", "--sample", "7"], "a share from 0 to 1"),
    (["matrix", "--python", "/no/such/python"], "cannot be started"),
])
def test_mistakes_are_answered_with_what_is_allowed(words, said, capsys):
    assert cli.main(["kernels", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_python_that_breaks_is_named(capsys, tmp_path):
    python = script(tmp_path, "echo no such library >&2; exit 1")
    assert cli.main(["kernels", "matrix", "--python", python]) == 2
    assert "cannot say what it has: no such library" in capsys.readouterr().err


def fake_schedule(cycles):
    shares = {"MXU": 0.0, "VALU": 0.5}
    return Schedule("linear_scan_backward", [Body("0x0", 0, cycles, 1, 1, shares, 2)], {"MXU": 4, "VALU": 4, "EUP": 1})


def test_the_summary_compares_the_larger_of_compute_and_traffic_with_the_bound():
    case = find_case("linear_scan")
    least = case.work["forward"].bytes
    calls = ["linear_scan_forward"]
    v5e, v6e = TARGETS["v5e"], TARGETS["v6e"]
    result = dict(calls=calls, bytes=2 * least)
    by_bytes = schedule.summary(case, "forward", v5e, result, [fake_schedule(10)])
    assert by_bytes["ratio"] == pytest.approx(2) and by_bytes["bytes_ratio"] == 2 and by_bytes["spills"] == 2
    by_compute = schedule.summary(case, "forward", v5e, result, [fake_schedule(10 ** 7)])
    assert by_compute["ratio"] == pytest.approx(10 ** 7 / by_compute["bound"]["cycles"])
    assert by_compute["cycles_per_1024"] == pytest.approx(10 ** 7 / (8 * 2048 * 2))
    both = dict(calls=["linear_scan_forward", "linear_scan_backward"], bytes=least + case.work["backward"].bytes)
    assert schedule.summary(case, "backward", v5e, both, [fake_schedule(10)])["bytes_ratio"] == 1
    without_clock = schedule.summary(case, "forward", v6e, result, [fake_schedule(10)])
    assert "ratio" not in without_clock
    for one in (by_bytes, without_clock):
        shown = schedule.text(one | dict(cell="c", status="ok", compiler=COMPILER, temporaries=0))
        assert ("2.00 times the bound" in shown) == ("ratio" in one) and "2 spills" in shown


def test_schedule_prints_json_and_fails_where_a_kernel_was_refused(monkeypatch, capsys):
    monkeypatch.setattr(process, "compilers", lambda python: {"libtpu": COMPILER})
    monkeypatch.setattr(process, "run", lambda python, cell, limit, dump: dict(status="refused", reason="E2003"))
    words = ["kernels", "schedule", "linear_scan", "--python", sys.executable, "--direction", "forward"]
    assert cli.main([*words, "--json"]) == 1
    assert [one["reason"] for one in json.loads(capsys.readouterr().out)] == ["E2003"] * len(cases("linear_scan"))
    assert cli.main(words) == 1
    assert "linear_scan/forward/pallas_tpu/v5e: refused: E2003" in capsys.readouterr().out


def test_write_compiles_what_changed_and_keeps_the_rest(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(process, "compilers", lambda python: {"libtpu": COMPILER})
    monkeypatch.setattr(cells, "RECORD", tmp_path / "kernels.json")
    monkeypatch.setattr(cells.read, "__defaults__", (tmp_path / "kernels.json",))
    monkeypatch.setattr(cells.write, "__defaults__", (tmp_path / "kernels.json",))
    monkeypatch.setattr(table, "PAGE", tmp_path / "kernels.md")
    table.PAGE.write_text(table.BEGIN + table.END)
    monkeypatch.setattr(matrix, "selected", lambda names: KNOWN)
    monkeypatch.setattr(matrix, "cases", lambda: KNOWN)
    monkeypatch.setattr(matrix, "hashes", lambda known: SOURCES)
    compile_one, asked = answer()
    monkeypatch.setattr(process, "run", lambda python, cell, limit: compile_one(cell))
    old = record_of(CELLS[1:], **{"old_op__forward__pallas_tpu__v5e": dict(status="ok", sources="same")})
    cells.write(old)
    assert cli.main(["kernels", "matrix", "--write", "--python", sys.executable]) == 0
    assert asked == [CELLS[0].key]
    assert set(cells.read()[COMPILER]) == {cell.key for cell in CELLS}       # and what is gone has left
    assert "| linear_scan | forward | OK" in table.PAGE.read_text()


def test_results_are_kept_after_each_cell():
    kept = []

    def compile_one(cell):
        if len(kept) == 2:
            raise KeyboardInterrupt
        return dict(status="ok")

    with pytest.raises(KeyboardInterrupt):
        matrix.compile_all(CELLS, compile_one, SOURCES, None, lambda results: kept.append(set(results)))
    assert kept == [{CELLS[0].key}, {CELLS[0].key, CELLS[1].key}]


def test_operations_and_targets_may_stand_in_any_order():
    args = cli.parse("kernels", ["matrix", "a", "--target", "v4", "b", "--target", "7x"])
    assert (args.ops, args.target) == (["a", "b"], ["v4", "7x"])
