"""The recorded matrix is of these operations, its page is made from it, and real compilers still agree with it."""


import pytest

from launch import cli
from launch.kernels import cells, matrix, table
from launch.kernels.process import toolchain_of
from pallas_kernels.aot.case import cases
from pallas_kernels.aot.targets import TARGETS


def test_the_record_has_every_operation_and_no_cell_that_is_none():
    """On v5e at least: a new operation is compiled before it lands, and CI compiles what is not recorded yet."""
    recorded = set(next(iter(cells.read().values())))
    missing = {cell.key for cell in cells.plan(cases(), ["v5e"])} - recorded
    assert not missing, f"run `lm kernels matrix --write` with libtpu; not recorded: {sorted(missing)}"
    gone = recorded - {cell.key for cell in cells.plan(cases(), TARGETS)}
    assert not gone, f"run `lm kernels matrix --write` with libtpu; no cells any more: {sorted(gone)}"


def test_nothing_is_refused_where_it_must_not_be():
    first = next(iter(cells.read().values()))
    bad = {key: result["reason"] for key, result in first.items()
           if key.split("/")[-1] in ("v5e", "v5p", "v6e") and result["status"] != "ok"}
    assert not bad


def test_gpu_kernels_are_recorded_as_compiled_and_spill_nothing():
    """Each kernel on each GPU that it is made for; CI has no compiler for them and compares their sources."""
    recorded = next(results for compiler, results in cells.read().items() if toolchain_of(compiler) == "cuda")
    planned = {cell.key for cell in cells.plan(cases(), TARGETS) if cell.toolchain == "cuda"}
    assert planned == set(recorded), "run `lm kernels matrix --write --python` with a python that has loomlm[aot-gpu]"
    assert not {key: result["reason"] for key, result in recorded.items() if result["status"] != "ok"}
    assert all(set(result["ptxas"]) == set(result["calls"]) for result in recorded.values())
    spills = {key: {name: kernel["spills"] for name, kernel in result["ptxas"].items()}
              for key, result in recorded.items()}
    assert not {key: kernels for key, kernels in spills.items() if any(kernels.values())}


def test_gpu_kernels_are_of_the_sources_that_were_compiled():
    """What a check without CUDA's compilers refuses, known before it."""
    known, record = cases(), cells.read()
    gpus = {compiler: results for compiler, results in record.items() if toolchain_of(compiler) == "cuda"}
    assert gpus and not matrix.check_unseen(cells.plan(known, TARGETS), gpus, matrix.hashes(known), {}), \
        "run `lm kernels matrix --write --python` with a python that has loomlm[aot-gpu]"


def test_the_table_of_the_page_is_that_of_the_record():
    page = table.PAGE.read_text()
    shown = page.split(table.BEGIN)[1].split(table.END)[0].strip()
    assert shown == table.markdown(cells.read(), cases()), "run `lm kernels matrix --write`"


def test_a_sample_of_the_matrix_still_compiles(python_with_libtpu, capsys):
    code = cli.main(["kernels", "matrix", "--check", "--sample", "0.02", "--seconds", "15", "--python",
                     python_with_libtpu])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err


@pytest.mark.slow
def test_the_whole_matrix_still_compiles(python_with_libtpu, capsys):
    code = cli.main(["kernels", "matrix", "--check", "--sample", "1", "--python", python_with_libtpu])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err


def test_a_schedule_is_read_from_a_real_compiler(python_with_libtpu, capsys):
    """linear_scan's forward: 8 x 4 x 4 steps of the grid, 32 trips inside, and no spills on v5e."""
    assert cli.main(["kernels", "schedule", "linear_scan float32", "--direction", "forward",
                     "--python", python_with_libtpu]) == 0
    said = capsys.readouterr().out
    assert "linear_scan_forward: " in said and " 32      4096 " in said and ", 0 spills" in said
    assert "bound 739,171 cycles by bytes" in said
