"""From the numbers of all cells to PASS or FAIL, and whether the check could have said FAIL at all.

A check that passes whatever the arms are says nothing. It is therefore called again on copies whose results are dealt
out to the cells at random, as in a permutation test; a claim passes only where at most one in twenty of these does.
"""

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SHUFFLES = 200
ALLOWED_SHARE = 0.05
KEYS = {"passed", "criteria"}

Check = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


def results_of(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `check` is given: arm, seed and values of each cell."""
    return [{"arm": cell["arm"], "seed": cell["seed"], "values": dict(cell["values"])} for cell in cells]


def judge(check: Check, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict on stored cells: `passed`, `criteria`, `metrics`, `figure`, `control` and `reason`.

    A cell without numbers (its run failed, or was not run) makes the verdict FAIL, with no criteria.
    """
    without = [cell["name"] for cell in cells if not cell.get("values")]
    if without:
        return {"passed": False, "criteria": [], "metrics": [], "figure": None, "control": None,
                "reason": f"{len(without)} of {len(cells)} cells gave no numbers: {', '.join(without[:4])}"}
    results = results_of(cells)
    said = dict(check(results))
    if not set(said) >= KEYS or bool(said["passed"]) != all(c["passed"] for c in said["criteria"]):
        raise ValueError(f"check() must return {', '.join(sorted(KEYS))}, and pass exactly where all criteria do; got "
                         f"{said!r}")
    control = shuffled_control(check, results)
    passed, reason = bool(said["passed"]), ""
    if passed and control["passed"] > ALLOWED_SHARE * control["shuffles"]:
        passed, reason = False, (f"the check passes on {control['passed']} of {control['shuffles']} shuffled copies: "
                                 f"it does not see which arm is which")
    return {"passed": passed, "criteria": list(said["criteria"]), "metrics": list(said.get("metrics", ())),
            "figure": said.get("figure"), "control": control, "reason": reason}


def shuffled_control(check: Check, results: Sequence[Mapping[str, Any]], shuffles: int = SHUFFLES) -> dict[str, int]:
    """How many of `shuffles` copies with results dealt out at random pass the check. Deals that leave every result
    with its arm are not counted, as they are no control. An exception is no pass."""
    draw, values, arms = random.Random(0), [r["values"] for r in results], [r["arm"] for r in results]
    count = passed = 0
    if len(set(arms)) < 2:
        return {"shuffles": 0, "passed": 0}
    while count < shuffles:
        order = draw.sample(range(len(results)), len(results))
        if all(arms[to] == arms[of] for to, of in enumerate(order)):
            continue
        count += 1
        copy = [{**result, "values": values[of]} for result, of in zip(results, order, strict=True)]
        with contextlib.suppress(ValueError, ZeroDivisionError, KeyError):
            passed += bool(check(copy)["passed"])
    return {"shuffles": count, "passed": passed}


def spread(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """arm -> metric -> mean, standard deviation (n - 1), least, greatest and number of finite values over the seeds."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        rows = [cell["values"] for cell in cells if cell["arm"] == arm and cell.get("values")]
        for name in dict.fromkeys(name for row in rows for name in row):
            found = [row[name] for row in rows if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
            if found:
                out.setdefault(arm, {})[name] = {
                    "mean": statistics.fmean(found), "std": statistics.stdev(found) if len(found) > 1 else 0.0,
                    "min": min(found), "max": max(found), "n": len(found)}
    return out


def line(name: str, verdict: Mapping[str, Any]) -> str:
    """The verdict in one line: PASS or FAIL, the name, and every criterion with its number."""
    parts = [f"{c['what']} {number(c['value'])} ({'' if c['passed'] else 'not '}{c['limit']})"
             for c in verdict["criteria"]]
    if verdict["reason"]:
        parts.append(verdict["reason"])
    return f"{'PASS' if verdict['passed'] else 'FAIL'} {name}: {'; '.join(parts)}"


def number(value: Any) -> str:
    """A number with four significant digits; large integers in full."""
    if isinstance(value, float) and not (value.is_integer() and abs(value) < 1e15):
        return f"{value:.4g}"
    return f"{int(value):,}" if isinstance(value, (int, float)) else str(value)
