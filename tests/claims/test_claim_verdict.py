"""A verdict is PASS only where all criteria are met, every cell has numbers, and the check can tell the arms apart."""

import pathlib

import pytest

from lm.claims.definition import Claim, read
from lm.claims.figure import draw
from lm.claims.page import generate
from lm.claims.store import add_attempt, check_grid, read_cell, read_json, record, write_json
from lm.claims.verdict import judge, line, number, shuffled_control, spread

HERE = pathlib.Path(__file__).resolve().parent


def cells(good=(1.0, 1.01, 1.02), bad=(0.0, 0.01, 0.02)):
    return [{"name": f"{arm}-s{seed}", "arm": arm, "seed": seed, "values": {"score": value}, "config_hash": "0" * 12,
             "attempts": [{"exit_code": 0, "cpu_seconds": 1.0, "wall_seconds": 2.0}]}
            for arm, values in (("good", good), ("bad", bad)) for seed, value in enumerate(values)]


@pytest.fixture
def fake() -> Claim:
    return read(str(HERE / "fake_claim.py"), HERE)


def test_pass_and_fail(fake):
    assert judge(fake.module.check, cells())["passed"]
    verdict = judge(fake.module.check, cells(bad=(0.0, 0.5, 0.0)))
    assert not verdict["passed"] and [c["passed"] for c in verdict["criteria"]] == [True, False]
    assert line("fake_claim", verdict) == "FAIL fake_claim: worst of good 1 (>= 0.9); best of bad 0.5 (not <= 0.1)"


def test_a_check_that_ignores_the_arms_does_not_pass():
    def check(results):
        best = max(result["values"]["score"] for result in results)
        criterion = {"what": "best", "value": best, "limit": "> 0.9", "passed": best > 0.9}
        return {"passed": criterion["passed"], "criteria": [criterion]}
    verdict = judge(check, cells())
    assert not verdict["passed"] and verdict["control"] == {"shuffles": 200, "passed": 200}
    assert "passes on 200 of 200 shuffled copies" in line("x", verdict)


def test_shuffles_deal_every_result_out_and_are_the_same_each_time(fake):
    seen = []
    def check(results):
        seen.append([(r["arm"], r["values"]["score"]) for r in results])
        return fake.module.check(results)
    given = judge(check, cells())["control"]
    assert given == {"shuffles": 200, "passed": 0} == shuffled_control(fake.module.check, cells())
    assert all(sorted(score for _, score in copy) == sorted(score for _, score in seen[0]) for copy in seen)
    assert all({s for a, s in copy if a == "good"} != {1.0, 1.01, 1.02} for copy in seen[1:])


def test_a_check_whose_verdict_contradicts_its_criteria_is_refused():
    with pytest.raises(ValueError, match="pass exactly where all criteria do"):
        judge(lambda results: {"passed": True, "criteria": [{"passed": False}]}, cells())


def test_cells_without_numbers_fail_by_name(fake):
    given = cells()
    given[4]["values"] = None
    verdict = judge(fake.module.check, given)
    assert not verdict["passed"] and verdict["reason"] == "1 of 6 cells gave no numbers: bad-s1"


def test_spread_leaves_out_what_is_not_finite():
    found = spread(cells(good=(1.0, 3.0, float("nan"))))["good"]["score"]
    assert found == {"mean": 2.0, "std": pytest.approx(2**0.5), "min": 1.0, "max": 3.0, "n": 2}


def test_numbers_as_people_read_them():
    assert [number(x) for x in (1234567, 1234567.0, 0.00012345, 1.5, True, "x")] == [
        "1,234,567", "1,234,567", "0.0001234", "1.5", "1", "x"]


@pytest.mark.parametrize("grid, message", [
    ([], "at least 3 seeds of every arm; 'it is empty'"),
    ([dict(arm="a", seed=0), dict(arm="a", seed=1)], "at least 3 seeds of every arm; 'a' has fewer"),
    ([dict(arm="a", seed=0)] * 3, "has 'a-s0' twice"),
    ([dict(arm="a", sed=0)], "entry 0 has no key 'sed'; did you mean 'seed'"),
    ([dict(arm="a")], "seed must be int; got None"),
    ([dict(arm="a/b", seed=0)], "must not be empty or hold '/'"),
    (["a"], "must be a dict of arm, seed"),
])
def test_a_grid_that_is_none_is_refused(fake, grid, message, monkeypatch):
    monkeypatch.setattr(fake.module, "grid", lambda full: grid)
    with pytest.raises(ValueError, match=message):
        fake.cells()


def test_a_file_without_the_functions_is_refused(tmp_path):
    path = tmp_path / "half.py"
    path.write_text("def get_config(): pass\ndef grid(full=False): return []\n")
    with pytest.raises(ValueError, match=r"has no function check\(\); a claim defines get_config, grid, check"):
        read(str(path), tmp_path)
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match=r"half.py: ModuleNotFoundError"):
        read(str(path), tmp_path)


def test_the_store_keeps_every_attempt_and_says_what_is_cut_off(tmp_path):
    add_attempt(tmp_path, "a-s0", {"exit_code": 76, "cpu_seconds": 1.0}, None)
    add_attempt(tmp_path, "a-s0", {"exit_code": 0, "cpu_seconds": 2.0}, {"x": float("inf")})
    assert read_cell(tmp_path, "a-s0") == {"values": {"x": "inf"}, "attempts": [
        {"exit_code": 76, "cpu_seconds": 1.0}, {"exit_code": 0, "cpu_seconds": 2.0}]}
    write_json(tmp_path / "claim.json", {"claim": "a", "full": True, "cells": {}})
    with pytest.raises(ValueError, match="holds the long grid of claim 'a'"):
        check_grid(tmp_path, "a", {}, False)
    (tmp_path / "claim.json").write_text('{"claim":')
    with pytest.raises(ValueError, match="is no JSON"):
        check_grid(tmp_path, "a", {}, False)


def test_records_grow_and_the_page_shows_every_run(fake, tmp_path):
    path, common = tmp_path / "fake_claim.json", {
        "claim": "fake_claim", "full": False, "started": "2026-01-01", "revision": "abc", "dirty": False, "python": "3",
        "packages": {"jax": "1"}, "totals": {"cpu_seconds": 6.0, "wall_seconds": 12.0}}
    for number_, bad in enumerate(((0.0, 0.5, 0.0), (0.0, 0.01, 0.02))):
        rows = cells(bad=bad)
        assert record(path, {**common, "run": f"r{number_}", "cells": rows, "spread": spread(rows),
                             "verdict": judge(fake.module.check, rows)}) == number_ + 1
    page = generate([fake], {"fake_claim": read_json(path)})
    assert page.index("Run r1, 2026-01-01: PASS") < page.index("Run r0, 2026-01-01: FAIL")
    assert "| best of bad | 0.5 | <= 0.1 | **not met** |" in page and "good is better than bad." in page
    assert "| good | 3 | 1.01 ± 0.01 | 000000000000 |" in page
    assert "not run yet" in generate([fake], {"fake_claim": None})


@pytest.mark.parametrize("x, scale", [([1, 10, 100], "log"), (["a", "b", "c"], "linear")])
def test_figures_are_drawn_from_numbers_and_from_names(x, scale):
    series = {"one": {"x": x, "y": [[1.0, 2.0]] * 3}}
    figure = {"x": "x", "y": "y", "xscale": scale, "series": series, "lines": {"limit": 1}}
    assert draw(figure, "title").startswith(b"\x89PNG")
