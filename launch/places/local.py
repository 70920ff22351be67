"""Processes on this machine that train together: one a GPU, or as many as asked for on CPUs."""

import contextlib
import dataclasses
import glob
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

from launch.places.job import Job, exports, quoted
from lm.core.fields import option
from lm.train.exit_codes import PREEMPTED

LAST_LINES = 40
POLL_SECONDS = 0.1
KILL_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of `lm launch local`."""

    processes: int | None = option(None, "processes (default: one a GPU, else 1)")
    devices_per_process: int | None = option(None, "devices that a process makes of the CPU")
    grace: int = option(120, "seconds that processes have to save and stop after a signal")

    def check(self) -> None:
        """Raises ValueError for impossible numbers."""
        for name in ("processes", "devices_per_process"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
        if self.grace < 1:
            raise ValueError(f"--grace={self.grace} must be at least 1")


class Process(NamedTuple):
    """One process: its number, what runs with which variables over this environment, and the file of its output."""

    number: int
    words: tuple[str, ...]
    env: dict[str, str]
    log: pathlib.Path


def plan(job: Job, options: Options, environ: Mapping[str, str] = os.environ) -> list[Process]:
    """The processes. Raises ValueError where there are not as many GPUs."""
    gpus = visible_gpus(environ)
    count = options.processes or max(len(gpus), 1)
    if options.devices_per_process is not None and gpus:
        raise ValueError("--devices-per-process splits a CPU, and this machine has GPUs; for a try without them set "
                         "JAX_PLATFORMS=cpu")
    if gpus and count not in (1, len(gpus)):
        raise ValueError(f"--processes={count} with {len(gpus)} GPUs: one process a GPU ({len(gpus)}), or 1 process "
                         f"with all of them; set CUDA_VISIBLE_DEVICES to use fewer")
    port = free_port()
    out = []
    for number in range(count):
        env = dict(job.env)
        if count > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(number), "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
        if gpus and count > 1:
            env["CUDA_VISIBLE_DEVICES"] = gpus[number]
        if options.devices_per_process is not None:
            kept = [f for f in environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
            env["XLA_FLAGS"] = " ".join([*kept, "--xla_force_host_platform_device_count="
                                                f"{options.devices_per_process}"])
        out.append(Process(number, job.here, env, job.log_folder / f"process-{number}.log"))
    return out


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that CUDA would show a process with these variables, as it names them; none where jax is kept away."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    given = environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() and name.strip() != "-1"]
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def free_port() -> int:
    """A port of the loopback that nothing listens at now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def render(job: Job, options: Options) -> str:
    """The processes as a shell script; the port is drawn anew at each start."""
    lines = ["#!/bin/bash"]
    for process in plan(job, options):
        lines += ["(", *(f"  {line}" for line in exports(process.env)),
                  f"  exec {quoted(process.words)} > {quoted([str(process.log)])} 2>&1", ") &"]
    return "\n".join([*lines, "wait", ""])


def start(job: Job, options: Options) -> int:
    """Runs the processes until all have ended; shows the first one's output. Returns the exit code of the run: that of
    the process that failed first, whose last lines are shown, after the others were stopped."""
    return run(plan(job, options), options.grace)


def run(processes: Sequence[Process], grace: float) -> int:
    """As `start`. SIGTERM and Ctrl-C are handed on as SIGTERM, so that all save and stop; a second Ctrl-C kills."""
    processes[0].log.parent.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen] = []
    asked: list[float] = []  # when a signal came, or a process failed

    def stop(number: int | None = None, frame: object = None) -> None:
        again = bool(asked) and number == signal.SIGINT
        asked.append(time.monotonic())
        for process in running:
            send(process, signal.SIGKILL if again else signal.SIGTERM)

    with contextlib.ExitStack() as stack, handlers(stop):
        stack.callback(lambda: [send(process, signal.SIGKILL) for process in running])
        for process in processes:
            out = stack.enter_context(process.log.open("wb"))
            # Sessions of their own: Ctrl-C comes to us alone, and is handed on once.
            running.append(subprocess.Popen(process.words, env={**os.environ, **process.env}, stdout=out,
                                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True))
        done = threading.Event()
        follower = threading.Thread(target=follow, args=(processes[0].log, sys.stderr, done))
        follower.start()
        try:
            first = wait(running, asked, stop, grace)
        finally:
            done.set()
            follower.join()
    return report(processes, [process.returncode for process in running], first)


def wait(running: Sequence[subprocess.Popen], asked: list[float], stop: Callable[[], None], grace: float) -> int | None:
    """Waits for all; returns the number of the process that failed first, or None. One that failed has the others
    stopped; those that outstay their time are killed."""
    first = None
    while None in [process.poll() for process in running]:
        fine = (None, 0, PREEMPTED, *([-signal.SIGTERM] if asked else []))
        if first is None and any(process.returncode not in fine for process in running):
            # The others often fail by the same cause within moments: an exit code of its own tells more than a signal.
            time.sleep(5 * POLL_SECONDS)
            first = worst([process.poll() for process in running], fine)
            stop()
        limit = KILL_SECONDS if first is not None else grace
        if asked and time.monotonic() - asked[0] > limit:
            for process in running:
                send(process, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    fine = (0, PREEMPTED, *([-signal.SIGTERM] if asked else []))
    return worst([process.returncode for process in running], fine) if first is None else first


def worst(codes: Sequence[int | None], fine: Sequence[int | None]) -> int | None:
    """The number of the process whose code tells most: the first that failed by itself, else the first that a signal
    ended; None where all are fine."""
    failed = [i for i, code in enumerate(codes) if code not in fine]
    return min(failed, key=lambda i: (codes[i] < 0, i), default=None)


def report(processes: Sequence[Process], codes: Sequence[int], first: int | None) -> int:
    """Says what ended the run, on stderr, and returns its exit code."""
    folder = processes[0].log.parent
    if first is None:
        if PREEMPTED in codes:
            return PREEMPTED
        return 0 if not any(codes) else 128 + signal.SIGTERM  # told to stop before there was anything to save
    code = codes[first]
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    log = processes[first].log
    print(f"\nprocess {first} of {len(processes)} failed first, with {how}; the last lines of {log}:\n",
          file=sys.stderr)
    lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    print("\n".join(lines), file=sys.stderr)
    print(f"\nall logs: {folder}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


def follow(path: pathlib.Path, out: IO[str], done: threading.Event) -> None:
    """Copies what is written to the file, until `done` and its end."""
    with path.open(errors="replace") as file:
        while True:
            last = done.is_set()
            text = file.read()
            if text:
                out.write(text)
                out.flush()
            elif last:
                return
            else:
                done.wait(POLL_SECONDS)


def send(process: subprocess.Popen, which: signal.Signals) -> None:
    """A signal to a process that still runs, and where it kills, to what the process started."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if which == signal.SIGKILL:
            os.killpg(process.pid, which)
        else:
            process.send_signal(which)


@contextlib.contextmanager
def handlers(stop: Callable[..., None]) -> Iterator[None]:
    """Calls stop(number, frame) for SIGTERM and SIGINT inside the block."""
    before = {which: signal.signal(which, stop) for which in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
