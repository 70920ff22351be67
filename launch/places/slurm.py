"""A Slurm job: the batch script of a run over nodes, which saves and is queued again when it is preempted.

A task of the script is a process of the run, and a GPU's own where there are GPUs. Slurm sends SIGTERM to the tasks
before it takes the nodes away (preemption, end of the time limit, `scancel --signal=TERM`); they save, end with 75, and
the script puts the job back into the queue, where the same command goes on from the checkpoint. `scancel` alone ends
it.
"""

import dataclasses
import pathlib
import shutil
import subprocess

from launch.places.job import Job, exports, quoted
from lm.core.fields import option
from lm.train.exit_codes import PREEMPTED

# Ended by SIGTERM before it could be asked: nothing new to save, and the run goes on as well.
TERMINATED = 128 + 15


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of `lm launch slurm`."""

    nodes: int = option(1, "machines")
    gpus_per_node: int = option(0, "GPUs of a node, each with a process of its own")
    tasks_per_node: int | None = option(None, "processes a node (default: one a GPU, else 1)")
    cpus_per_task: int | None = option(None, "cores of a process")
    memory: str | None = option(None, "of a node, such as 200G")
    time: str | None = option(None, "limit, such as 24:00:00 or 2-00:00:00")
    partition: str | None = option(None, "queue")
    account: str | None = option(None, "account to charge")
    qos: str | None = option(None, "quality of service")
    constraint: str | None = option(None, "features that nodes must have")
    array: str | None = option(None, "indices of an array job, such as 0-15%4")
    sbatch: tuple[str, ...] = option((), "further #SBATCH option, such as --exclusive; may be repeated")
    grace: int = option(120, "seconds between the signal and the end of the time limit")
    max_requeues: int = option(100, "times that a preempted job goes back into the queue")

    def check(self) -> None:
        """Raises ValueError for impossible numbers."""
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("grace", 1), ("max_requeues", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}={getattr(self, name)} must be at least {least}")
        if self.tasks_per_node is not None and self.tasks_per_node < 1:
            raise ValueError(f"--tasks-per-node={self.tasks_per_node} must be at least 1")
        if self.gpus_per_node and self.tasks_per_node not in (None, 1, self.gpus_per_node):
            raise ValueError(f"--tasks-per-node={self.tasks_per_node} with --gpus-per-node={self.gpus_per_node}: one "
                             f"task a GPU ({self.gpus_per_node}), or 1 with all of a node's")
        for word in self.sbatch:
            if not word.startswith("-") or "\n" in word:
                raise ValueError(f"--sbatch {word!r} must be one option of sbatch, such as --sbatch=--exclusive")

    @property
    def tasks(self) -> int:
        """Processes a node."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)


def render(job: Job, options: Options) -> str:
    """The batch script."""
    folder = job.log_folder.absolute()
    command = job.installed if job.setup else job.here
    # %a in the names keeps apart what the jobs of an array print.
    log = "%A_%a" if options.array else "%j"
    run_id = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}" if options.array else "$SLURM_JOB_ID"
    lines = [
        "#!/bin/bash", *(f"#SBATCH {word}" for word in directives(job, options, folder / f"slurm-{log}.out")), "",
        *job.setup, "set -u", *exports(job.env), f"cd {quoted([str(pathlib.Path.cwd())])}",
        f'marker={quoted([str(folder)])}/preempted-"{run_id}"', 'rm -f "$marker"', "",
        "# A task that was told to stop, and has saved, counts as done: Slurm would kill the others, which still save.",
        "task='",
        "  trap : TERM",
        '  "$@"',
        "  code=$?",
        f"  if [ $code -eq {PREEMPTED} ] || [ $code -eq {TERMINATED} ]; then",
        '    : > "$MARKER"',
        "    exit 0",
        "  fi",
        "  exit $code'",
        f"MARKER=\"$marker\" srun --kill-on-bad-exit=1 --output={quoted([str(folder)])}/task-{log}-%t.log "
        f"--open-mode=append \\", f"  bash -c \"$task\" task {quoted(command)}",
        "code=$?", "",
        'if [ $code -eq 0 ] && [ -e "$marker" ]; then',
        '  rm -f "$marker"',
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {options.max_requeues} ]; then',
        '    exec scontrol requeue "$SLURM_JOB_ID"',
        "  fi",
        f"  exit {PREEMPTED}",
        "fi",
        "exit $code", ""]
    return "\n".join(lines)


def directives(job: Job, options: Options, log: pathlib.Path) -> list[str]:
    """The options of sbatch."""
    out = [f"--job-name={job.name}", f"--nodes={options.nodes}", f"--ntasks-per-node={options.tasks}",
           f"--output={log}", "--open-mode=append", "--requeue", f"--signal=TERM@{options.grace}"]
    if options.gpus_per_node:
        out.append(f"--gpus-per-node={options.gpus_per_node}")
    for name, value in (("cpus-per-task", options.cpus_per_task), ("mem", options.memory), ("time", options.time),
                        ("partition", options.partition), ("account", options.account), ("qos", options.qos),
                        ("constraint", options.constraint), ("array", options.array)):
        if value is not None:
            out.append(f"--{name}={value}")
    return [*out, *options.sbatch]


def start(job: Job, options: Options) -> int:
    """Submits the script, kept beside the logs, and prints the job's number and how to follow and stop it."""
    if shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch on this machine; start this on a login node of the cluster, or see the "
                         "script with --dry-run")
    folder = job.log_folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "job.sbatch"
    script.write_text(render(job, options))
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch refused {script}: {done.stderr.strip()}")
    number = done.stdout.strip().partition(";")[0]
    print(f"job {number}; script {script}\n"
          f"follow:  tail -F {folder}/task-{number}-0.log\n"
          f"save and queue again:  scancel --signal=TERM {number}\n"
          f"end:  scancel {number}")
    return 0
