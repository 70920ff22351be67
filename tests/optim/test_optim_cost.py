"""The cost report runs and counts what it says."""

from lm.optim.cost import report, transformer, update_times
from lm.optim.options import OptimizerOptions

CASES = {"adamw": OptimizerOptions("adamw"), "muon": OptimizerOptions("muon", muon_newton_schulz="gram")}


def test_every_case_is_timed_as_often_as_asked():
    times = update_times(transformer(2, 8, 16), CASES, repeats=3)
    assert list(times) == ["adamw", "muon"]
    assert all(len(seconds) == 3 and seconds == sorted(seconds) and seconds[0] > 0 for seconds in times.values())


def test_report_is_a_table_with_the_first_case_as_unit():
    text = report(2, 8, 16, repeats=1, cases=CASES)
    size = 256 * 8 + 2 * (4 * 64 + 2 * 128 + 2 * 8)
    assert text.startswith(f"{size / 1e6:.2f}M parameters, 2 layers of width 8 (16)")
    rows = [line for line in text.splitlines() if line.startswith("| adamw") or line.startswith("| muon")]
    assert len(rows) == 2 and rows[0].endswith("| 1.0 |")
