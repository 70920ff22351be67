"""What came of a sweep's trials, as lines, a table, and the command that trains the best again."""

import contextlib
import pathlib
import shlex
import time
from typing import Any

from launch.sweeps.definition import Definition
from launch.sweeps.study import ERROR, VALUES, Held, open_study
from launch.sweeps.trial import BASE, LOG, overrides

REFRESH_SECONDS = 2.0


def line(held: Held, ended: str) -> str:
    """A trial that has just ended."""
    frozen = held.trial.study.get_trials(deepcopy=False)[held.number]
    numbers = "" if frozen.values is None else " ".join(f"{value:.4g}" for value in frozen.values)
    told = frozen.user_attrs.get(ERROR, "") if ended == "failed" else numbers
    settings = " ".join(f"{path}={_short(value)}" for path, value in frozen.user_attrs.get(VALUES, {}).items())
    return f"trial {held.number} {ended} {told} {settings}".replace("  ", " ")


def show(definition: Definition, workdir: pathlib.Path) -> int:
    """Prints all trials, the best first. On a terminal the table is drawn anew until all have ended, or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    console = Console(soft_wrap=True, highlight=False)
    table, left = trials_table(definition, workdir)
    if console.is_terminal and left:
        with Live(table, console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
            while left:
                time.sleep(REFRESH_SECONDS)
                table, left = trials_table(definition, workdir)
                live.update(table, refresh=True)
    else:
        console.print(table)
    summary(definition, workdir)
    return 0


def trials_table(definition: Definition, workdir: pathlib.Path) -> tuple[Any, int]:
    """(a table of the trials, how many have not ended)."""
    from rich.table import Table
    trials = open_study(definition, workdir).get_trials(deepcopy=False)
    paths = [path for parameter in definition.space for path in parameter.paths]
    table = Table(box=None)
    for name in ("trial", "state", *(name for name, _ in definition.goals), *paths, "note"):
        table.add_column(name, overflow="fold")
    more = definition.goals[0][1]
    key = lambda trial: (trial.values is None, 0 if trial.values is None else trial.values[0] * (-1 if more else 1))
    for trial in sorted(trials, key=key):
        values = trial.user_attrs.get(VALUES, {})
        numbers = [f"{value:.4g}" for value in trial.values] if trial.values else [""] * len(definition.goals)
        steps = trial.intermediate_values
        note = trial.user_attrs.get(ERROR, f"evaluated at step {max(steps)}" if steps else "")
        table.add_row(str(trial.number), trial.state.name.lower(), *numbers,
                      *(_short(values.get(path, "")) for path in paths), note)
    return table, definition.num_trials - sum(trial.state.is_finished() for trial in trials)


def summary(definition: Definition, workdir: pathlib.Path) -> int:
    """Prints how many trials came to what, and how to train the best; returns how many failed."""
    study = open_study(definition, workdir)
    trials = study.get_trials(deepcopy=False)
    states = [trial.state.name.lower() for trial in trials]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))) or "no trials",
          f"of {definition.num_trials}")
    best = study.best_trials if any(state == "complete" for state in states) else []
    for trial in best[:5]:
        goals = zip(definition.goals, trial.values, strict=True)
        numbers = ", ".join(f"{name} {value:.6g}" for (name, _), value in goals)
        command = ["lm", "train", "--config", str(workdir / BASE), *overrides(trial.user_attrs[VALUES])]
        print(f"best: trial {trial.number}, {numbers}\n  {shlex.join(command)} --workdir DIR")
    if "fail" in states:
        print(f"errors: {workdir}/trials/*/{LOG}; lm sweep show lists them")
    return states.count("fail")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
