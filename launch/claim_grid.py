"""The cells of a claim, each in a process of its own, as many at a time as asked for."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from launch.claim_cell import CONFIG_FILE, STAGES_FILE, VALUES_FILE
from launch.huge_pages import environment as with_huge_pages
from lm.claims.definition import Cell
from lm.claims.store import add_attempt, cell_folder, read_cell
from lm.train.exit_codes import DONE, PREEMPTED

COMMAND = (sys.executable, "-m", "launch.claim_cell")
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
_ROOT = pathlib.Path(__file__).resolve().parent.parent


class Running(NamedTuple):
    """A process that runs a cell, and when it began."""

    cell: Cell
    process: subprocess.Popen
    began: float


def default_jobs() -> int:
    """Processes at a time: one a core where jax is told to use the CPU, one where there are accelerators."""
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a cell: on CPUs one thread, so that cells share cores evenly, and the same sums whatever
    --jobs is. The project's own folder is where imports look first."""
    out = dict(environ)
    if out.get("JAX_PLATFORMS") == "cpu" and ONE_THREAD not in out.get("XLA_FLAGS", ""):
        out["XLA_FLAGS"] = f"{out.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    out["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [out.get("PYTHONPATH")])])
    return with_huge_pages("train", out) or out


def unfinished(workdir: pathlib.Path, cells: Sequence[Cell]) -> list[Cell]:
    """The cells without numbers, those that need the machine for themselves last."""
    left = [cell for cell in cells if read_cell(workdir, cell.name)["values"] is None]
    return sorted(left, key=lambda cell: cell.alone)


def start(workdir: pathlib.Path, cell: Cell, config_text: str, environ: Mapping[str, str]) -> Running:
    """Starts a cell's process; what it prints goes to <cell>/log.txt."""
    folder = cell_folder(workdir, cell.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config_text)
    if cell.then:
        (folder / STAGES_FILE).write_text(json.dumps(cell.then, indent=1) + "\n")
    (folder / VALUES_FILE).unlink(missing_ok=True)
    with open(folder / "log.txt", "a") as file:
        process = subprocess.Popen([*COMMAND, str(folder.absolute()), cell.measure], stdin=subprocess.DEVNULL,
                                   stdout=file, stderr=file, env=dict(environ))
    return Running(cell, process, time.monotonic())


def finished(workdir: pathlib.Path, running: Running, cpu_seconds: float, code: int) -> dict[str, Any]:
    """Notes what came of a process that has ended; returns the attempt."""
    folder = cell_folder(workdir, running.cell.name)
    values = json.loads((folder / VALUES_FILE).read_text()) if code == 0 and (folder / VALUES_FILE).exists() else None
    attempt: dict[str, Any] = {"exit_code": code, "wall_seconds": round(time.monotonic() - running.began, 2),
                               "cpu_seconds": round(cpu_seconds, 2)}
    if values is None:
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        attempt["message"] = lines[-1][:300] if lines else ""
    add_attempt(workdir, running.cell.name, attempt, values)
    return attempt


def run_and_tell(workdir: pathlib.Path, cells: Sequence[Cell], config_texts: Mapping[str, str], *, jobs: int | None,
                 title: str) -> int:
    """As `run`, with a line of what there is to do, one for every cell that ended, and one where it was stopped. jobs:
    None for `default_jobs`. title: what it is, "fam_passkey: 15 cells"."""
    left = unfinished(workdir, cells)
    jobs = min(default_jobs() if jobs is None else jobs, max(1, len(left)))
    print(f"{title}, {len(left)} to run, {jobs} at a time, in {workdir}", flush=True)
    done = len(cells) - len(left)

    def note(cell: Cell, attempt: dict[str, Any]) -> None:
        nonlocal done
        done += "message" not in attempt
        what = "done" if "message" not in attempt else (
            "stopped" if attempt["exit_code"] == PREEMPTED else
            f"failed with exit code {attempt['exit_code']}: {attempt['message']}")
        print(f"[{done}/{len(cells)}] {cell.name}: {what}; {attempt['cpu_seconds']:.0f} CPU-s, "
              f"{attempt['wall_seconds']:.0f} s", flush=True)

    stopped = run(workdir, cells, config_texts, jobs=jobs, note=note)
    if stopped:
        print(f"Stopped; the same command goes on from here ({len(unfinished(workdir, cells))} are left).")
    return stopped


def run(workdir: pathlib.Path, cells: Sequence[Cell], config_texts: Mapping[str, str], *, jobs: int,
        note: Callable[[Cell, dict[str, Any]], None]) -> int:
    """Runs every cell that has no numbers yet. A cell that fails does not stop the others; one that was told to stop
    (exit code 75) ends the grid. note: called with each cell that ended and its attempt. Returns 75 or 0.
    """
    environ = child_environment(os.environ)
    waiting, at_work, stopping = unfinished(workdir, cells), [], False

    def stop(signum, frame):
        nonlocal stopping
        stopping = True
        for one in at_work:
            one.process.terminate()

    before = signal.signal(signal.SIGTERM, stop)  # the cells save, and are waited for
    try:
        while at_work or (waiting and not stopping):
            while waiting and not stopping and len(at_work) < jobs and (
                    not at_work or not (waiting[0].alone or at_work[0].cell.alone)):
                cell = waiting.pop(0)
                at_work.append(start(workdir, cell, config_texts[cell.name], environ))
            done, status, usage = wait_any(at_work)
            at_work.remove(done)
            done.process.returncode = code = os.waitstatus_to_exitcode(status)
            stopping = stopping or code == PREEMPTED
            note(done.cell, finished(workdir, done, usage.ru_utime + usage.ru_stime, code))
    finally:
        signal.signal(signal.SIGTERM, before)
        for one in at_work:
            one.process.terminate()
        for one in at_work:
            one.process.wait()
    return PREEMPTED if stopping else DONE


def wait_any(at_work: Sequence[Running]) -> tuple[Running, int, Any]:
    """The first of the processes that ends, its status, and what it used."""
    while True:
        for one in at_work:
            pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
            if pid:
                return one, status, usage
        time.sleep(0.1)
