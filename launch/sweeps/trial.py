"""One trial: `lm train` in a folder of its own, watched, given up where it falls behind, and its result noted."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from launch.sweeps.definition import Definition
from launch.sweeps.space import text_of
from launch.sweeps.study import ERROR, VALUES, Held, optuna
from lm.train.base import FOLDER
from lm.train.exit_codes import DONE, HUNG, PREEMPTED

BASE = "config.json"
LOG = "log.txt"
RESULT = "final_result.json"
POLL_SECONDS = 0.5
ENDED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, HUNG)  # out of memory, a broken device: no fault of the config
KILLED, TRIES = "killed", 5


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Flags that set what varies."""
    return [f"--config.{path}={text_of(tuple(value) if isinstance(value, list) else value)}"
            for path, value in values.items()]


def training_command(workdir: pathlib.Path, held: Held) -> list[str]:
    """What trains the trial."""
    return [sys.executable, "-m", "launch.cli", "train", "--config", str(workdir / BASE), "--workdir", str(held.folder),
            *overrides(held.trial.user_attrs[VALUES])]


def run(held: Held, definition: Definition, workdir: pathlib.Path, environ: Mapping[str, str],
        stopping: threading.Event) -> str:
    """Trains, and tells the study. Returns "complete", "pruned", "failed", or "stopped" where it was told to stop, and
    "killed" where it was ended from outside: then the trial is left for whoever comes next."""
    package = optuna()
    study, number, metrics = held.trial.study, held.number, held.folder / "metrics.jsonl"
    command = training_command(workdir, held)
    os.set_inheritable(held.lock, True)
    with (held.folder / LOG).open("ab") as out:
        # The lock goes on to the training process: while it lives, even without us, nobody takes up the trial.
        process = subprocess.Popen(command, env=dict(environ), stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=subprocess.STDOUT, pass_fds=[held.lock], start_new_session=True)
    pruned = asked = False
    while process.poll() is None:
        if stopping.wait(POLL_SECONDS) and not asked:
            asked = True
            process.send_signal(signal.SIGTERM)
        if definition.pruner != "none" and not (pruned or asked) and falls_behind(held.trial, definition, metrics):
            pruned = True
            process.send_signal(signal.SIGTERM)
    if pruned and process.returncode in (DONE, PREEMPTED, -signal.SIGTERM):
        study.tell(number, state=package.trial.TrialState.PRUNED)
        return "pruned"
    if process.returncode == PREEMPTED or (asked and process.returncode == -signal.SIGTERM):
        return "stopped"
    if process.returncode in ENDED_FROM_OUTSIDE and try_again(held):
        return "killed"
    if process.returncode == DONE and (held.folder / RESULT).exists():
        return tell_result(held, definition)
    lines = (held.folder / LOG).read_text(errors="replace").strip().splitlines()
    return tell_failure(held, f"exit code {process.returncode}: {lines[-1][:300] if lines else ''}")


def tell_result(held: Held, definition: Definition) -> str:
    """Tells the study the objectives of a trial that came to its end. Returns "complete", or "failed" without them."""
    values, missing = read_values(json.loads((held.folder / RESULT).read_text()), definition)
    if values is None:
        return tell_failure(held, missing)
    held.trial.study.tell(held.number, values)
    return "complete"


def tell_failure(held: Held, why: str) -> str:
    """Tells the study that a trial failed, and keeps why."""
    held.trial.set_user_attr(ERROR, why)
    held.trial.study.tell(held.number, state=optuna().trial.TrialState.FAIL)
    return "failed"


def try_again(held: Held) -> bool:
    """Whether a training that something killed is worth another start: not where it got no further TRIES times in a
    row, as a config that needs more memory than there is."""
    folder = held.folder / FOLDER
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    at = max(steps, default=0)
    before, times = held.trial.user_attrs.get(KILLED, (-1, 0))
    times = times + 1 if at <= before else 1
    held.trial.set_user_attr(KILLED, [at, times])
    return times < TRIES


def read_values(result: Mapping[str, Any], definition: Definition) -> tuple[list[float] | None, str]:
    """(the objectives, "") of a final_result.json, or (None, what is missing)."""
    out = []
    for name, _ in definition.goals:
        value = result.get(name)
        if not isinstance(value, (int, float)):
            what = "is not there" if value is None else f"is {value}"
            return None, f"{name} {what}; final_result.json has {', '.join(sorted(result))}"
        out.append(float(value))
    return out, ""


def falls_behind(trial: Any, definition: Definition, metrics: pathlib.Path) -> bool:
    """Reports what was evaluated since the last look, and whether the pruner gives the trial up."""
    name = definition.goals[0][0]
    known = trial.study._storage.get_trial(trial._trial_id).intermediate_values
    new = False
    for step, value in evaluated(metrics, name):
        if step not in known:
            trial.report(value, step)
            new = True
    return new and trial.should_prune()


def evaluated(metrics: pathlib.Path, name: str) -> Sequence[tuple[int, float]]:
    """(step, value) of a metric in a run's log; a last line that is being written is left for later."""
    if not metrics.exists():
        return []
    out = []
    for line in metrics.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row.get(name), (int, float)):
            out.append((int(row["step"]), float(row[name])))
    return out
