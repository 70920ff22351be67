"""GPUs of any cloud through SkyPilot: a managed job, which is started again elsewhere when its machines are taken."""

import dataclasses
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import Any

from launch.places.job import INSTALL, Job, quoted, yaml_text
from lm.core.fields import option
from lm.train.exit_codes import PREEMPTED

_GPUS = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9-]*)(:(?P<count>[1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of `lm launch sky`."""

    accelerator: str | None = option(None, "GPUs of a machine, such as H100:8")
    nodes: int = option(1, "machines")
    cloud: str | None = option(None, "cloud, such as gcp, aws or lambda (default: the cheapest that has them)")
    spot: bool = option(False, "may be taken away at any time, and costs less")
    disk: int = option(256, "GB of disk a machine")
    max_restarts: int = option(100, "restarts after a run was told to stop")
    shared_workdir: bool = option(False, "the workdir is a path that all machines mount")

    def check(self) -> None:
        """Raises ValueError for what is missing or impossible."""
        if self.accelerator is None:
            raise ValueError("lm launch sky needs --accelerator, such as H100:8")
        if not _GPUS.fullmatch(self.accelerator):
            raise ValueError(f"--accelerator={self.accelerator} must be a GPU and how many of them a machine has, "
                             f"such as H100:8")
        for name, least in (("nodes", 1), ("disk", 50), ("max_restarts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}={getattr(self, name)} must be at least {least}")


def task(job: Job, options: Options) -> dict[str, Any]:
    """The task as plain data."""
    job.needs_bucket("sky", options.shared_workdir)
    resources: dict[str, Any] = {"accelerators": options.accelerator, "disk_size": options.disk,
                                 "use_spot": options.spot, "job_recovery": {
                                     "max_restarts_on_errors": options.max_restarts,
                                     "recover_on_exit_codes": [PREEMPTED]}}
    if options.cloud:
        resources["infra"] = options.cloud
    join = [] if options.nodes == 1 else [
        'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n1):8476"',
        'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES"', 'export JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"']
    run = [*job.setup, "source .venv/bin/activate", *join, f"exec {quoted(job.installed)}"]
    return {"name": job.name, "workdir": ".", "num_nodes": options.nodes, "resources": resources,
            "envs": dict(job.env),
            "setup": "\n".join([*INSTALL, "uv pip install -q -e '.[cuda]'", ""]),
            "run": "\n".join(run) + "\n"}


def render(job: Job, options: Options) -> str:
    """The task as YAML."""
    return yaml_text(task(job, options))


def start(job: Job, options: Options) -> int:
    """Gives the task to SkyPilot as a managed job."""
    text = render(job, options)
    if shutil.which("sky") is None:
        raise ValueError("there is no sky on this machine; pip install skypilot, or see the YAML with --dry-run")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"{job.name}.yaml"
        path.write_text(text)
        return subprocess.run(["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name,
                               str(path)]).returncode
