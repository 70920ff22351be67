"""Trials that differ in seed, learning rate and weight decay only, trained in one process by one program.

A group is several trials of one worker, which holds all their locks and hands them all on. What the process does not
bring to an end, because it would be slower or was killed, is run as any trial, from its own checkpoint.
"""

import copy
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.sweeps import trial
from launch.sweeps.definition import Definition
from launch.sweeps.group_process import STOP
from launch.sweeps.space import text_of
from launch.sweeps.study import VALUES, Held, optuna
from lm.core.whole_file import write_text
from lm.train.exit_codes import DONE, NONFINITE, PREEMPTED

FILE = "together.json"  # in the folder of a group's first trial: the trials
RECORDS = "together"  # in the sweep's: what was measured
SCALARS = (("optimizer", "learning_rate"), ("optimizer", "weight_decay"), ("train", "seed"))


class Groups:
    """What a worker knows of groups. alone: programs that were not faster here with several trials, or broke."""

    def __init__(self, definition: Definition, workdir: pathlib.Path, environ: Mapping[str, str],
                 stopping: threading.Event):
        self.definition, self.workdir, self.environ, self.stopping = definition, workdir, environ, stopping
        self.alone: set[str] = set()

    def run(self, held: Sequence[Held]) -> Iterator[tuple[Held, str]]:
        """Trains trials, and gives each with how it ended: every group, and of those that are better alone the first.
        The others are for whoever comes next."""
        by_program: dict[str, list[Held]] = {}
        for one in held:
            program = program_of(self.workdir, values_of(one)) if len(held) > 1 else ""
            by_program.setdefault(program, []).append(one)
        left: list[Held] = []
        for program, group in by_program.items():
            if len(group) == 1 or program in self.alone:
                left += group
            elif not self.stopping.is_set():
                code, ended = train_group(group, program, self.definition, self.workdir, self.environ, self.stopping)
                if code not in (DONE, PREEMPTED):
                    self.alone.add(program)
                left += [one for one in group if one.number not in ended]
                yield from ((one, ended[one.number]) for one in group if one.number in ended)
        if left and not self.stopping.is_set():
            yield left[0], trial.run(left[0], self.definition, self.workdir, self.environ, self.stopping)


def values_of(held: Held) -> list[tuple[str, str]]:
    """What varies in a trial, as (path, text)."""
    return [(path, text_of(tuple(value) if isinstance(value, list) else value))
            for path, value in held.trial.user_attrs[VALUES].items()]


def program_of(workdir: pathlib.Path, overrides: Sequence[tuple[str, str]]) -> str:
    """A name that trials share whose configs differ in scalars only. Weight decay that is off is another program, and
    with adam_learning_rate set a learning rate decides whether the two are equal."""
    from launch import config as configs
    config = copy.deepcopy(json.loads(configs.to_json(configs.load(str(workdir / trial.BASE), overrides))))
    decays = bool(config["optimizer"]["weight_decay"])
    for group, field in SCALARS:
        if field != "learning_rate" or config["optimizer"]["adam_learning_rate"] is None:
            config[group][field] = None
    return hashlib.sha256(json.dumps([config, decays], sort_keys=True).encode()).hexdigest()[:12]


def group_command(workdir: pathlib.Path, file: pathlib.Path) -> list[str]:
    """What trains a group."""
    return [sys.executable, "-m", "launch.sweeps.group_process", str(workdir / trial.BASE), str(workdir / RECORDS),
            str(file)]


def train_group(group: Sequence[Held], program: str, definition: Definition, workdir: pathlib.Path,
                environ: Mapping[str, str], stopping: threading.Event) -> tuple[int, dict[int, str]]:
    """(exit code, number of a trial to how it ended), as `launch.sweeps.trial.run` has it; without those that have not
    come to an end."""
    from launch.huge_pages import environment as with_huge_pages
    file = group[0].folder / FILE
    write_text(file, json.dumps([{"program": program, "folder": str(held.folder), "overrides": values_of(held)}
                                 for held in group], indent=1) + "\n")
    for held in group:
        os.set_inheritable(held.lock, True)
        (held.folder / STOP).unlink(missing_ok=True)
    with (group[0].folder / trial.LOG).open("ab") as out:
        process = subprocess.Popen(group_command(workdir, file), env=with_huge_pages("train", environ) or dict(environ),
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                   pass_fds=[held.lock for held in group], start_new_session=True)
    pruned: set[int] = set()
    asked = False
    while process.poll() is None:
        if stopping.wait(trial.POLL_SECONDS) and not asked:
            asked = True
            process.send_signal(signal.SIGTERM)
        for held in group if definition.pruner != "none" and not asked else ():
            if held.number not in pruned and trial.falls_behind(held.trial, definition, held.folder / "metrics.jsonl"):
                pruned.add(held.number)
                (held.folder / STOP).touch()
    ended = {held.number: how for held in group
             if (how := how_ended(held, definition, held.number in pruned)) is not None}
    if asked or process.returncode == PREEMPTED:
        ended = {held.number: "stopped" for held in group} | ended
    return process.returncode, ended


def how_ended(held: Held, definition: Definition, pruned: bool) -> str | None:
    """Tells the study what a trial of a group came to, None where it has not come to an end."""
    (held.folder / STOP).unlink(missing_ok=True)
    if pruned:
        held.trial.study.tell(held.number, state=optuna().trial.TrialState.PRUNED)
        return "pruned"
    path = held.folder / trial.RESULT
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if result.get("exit_code") == DONE:
        return trial.tell_result(held, definition)
    if result.get("exit_code") == NONFINITE:
        return trial.tell_failure(held, f"exit code {NONFINITE}: loss or gradient of step "
                                        f"{int(result['train/bad_step']) + 1} is not finite")
    return None
