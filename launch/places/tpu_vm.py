"""Cloud TPU VMs: a bash script of gcloud commands that asks for the slice, copies the project, and starts the run.

The run is started on all workers at once and goes on without this machine. Run again, the script finds what is there
already: it takes the slice that it made, stops a run of the same name that still goes, copies the files anew, and the
same command goes on from the checkpoint. That is also what to do after a spot slice was taken away.
"""

import dataclasses
import re
import shutil
import subprocess

from launch.places.job import INSTALL, Job, exports, quoted
from launch.tpu_slices import find_slice
from lm.core.fields import option


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of `lm launch tpu-vm`."""

    accelerator: str | None = option(None, "slice, such as v5e-16 or v4:2x2x4")
    slices: int = option(1, "slices that train together")
    zone: str | None = option(None, "zone, such as us-west4-a")
    project: str | None = option(None, "project (default: gcloud's own)")
    spot: bool = option(False, "may be taken away at any time, and costs less")
    reserved: bool = option(False, "from a reservation")
    runtime_version: str | None = option(None, "image of the machines (default: the generation's)")
    shared_workdir: bool = option(False, "the workdir is a path that all machines mount")

    def check(self) -> None:
        """Raises ValueError for what is missing or impossible."""
        for name in ("accelerator", "zone"):
            if getattr(self, name) is None:
                raise ValueError(f"lm launch tpu-vm needs --{name}, such as "
                                 f"{'v5e-16' if name == 'accelerator' else 'us-west4-a'}")
        find_slice(self.accelerator).accelerator_type  # noqa: B018 (raises for what TPU VMs do not have)
        if self.slices < 1:
            raise ValueError(f"--slices={self.slices} must be at least 1")
        if self.spot and self.reserved:
            raise ValueError("--spot and --reserved exclude each other")


def nodes(job: Job, options: Options) -> list[str]:
    """Names of the slices."""
    return [job.name] if options.slices == 1 else [f"{job.name}-{i}" for i in range(options.slices)]


def render(job: Job, options: Options) -> str:
    """The script."""
    job.needs_bucket("tpu-vm", options.shared_workdir)
    tpu = find_slice(options.accelerator)
    where = ["--zone", options.zone, *(["--project", options.project] if options.project else [])]
    several = ["--node-id", job.name] if options.slices == 1 else [
        "--node-count", str(options.slices), "--node-prefix", job.name]
    create = ["gcloud", "compute", "tpus", "queued-resources", "create", job.name, *several,
              "--accelerator-type", tpu.accelerator_type,
              "--runtime-version", options.runtime_version or tpu.generation.runtime, *where,
              *(["--spot"] if options.spot else []), *(["--reserved"] if options.reserved else [])]
    describe = ["gcloud", "compute", "tpus", "queued-resources", "describe", job.name, *where,
                "--format", "value(state.state)"]
    delete = ["gcloud", "compute", "tpus", "queued-resources", "delete", job.name, "--force", "--quiet", *where]
    copy, ssh = (["gcloud", "compute", "tpus", "tpu-vm", verb] for verb in ("scp", "ssh"))
    log = f"{job.name}.log"
    setup = " && ".join([f"mkdir -p {job.name}", f"tar -xzf {job.name}.tgz -C {job.name}", f"cd {job.name}", *job.setup,
                         *INSTALL, "uv pip install -q -e '.[tpu]'"])
    # In brackets, so that the pattern does not find the shell that looks for it.
    running = quoted([f"[l]m {job.words[0]}.* --workdir {re.escape(job.workdir)}( |$)"])
    stop = f"pkill -TERM -f {running}; while pgrep -f {running} > /dev/null; do sleep 1; done"
    go = " && ".join([f"cd {job.name}", *job.setup, *exports(job.env),
                      f"{{ PATH=$PWD/.venv/bin:$PATH nohup {quoted(job.installed)} >> ~/{log} 2>&1 < /dev/null & }}",
                      "sleep 1"])

    def everywhere(command: str) -> list[str]:
        return [*(f"{quoted([*ssh, node, '--worker=all', *where, '--command', command])} & pids+=($!)"
                  for node in nodes(job, options)), "finish"]

    lines = [
        "#!/bin/bash", f"# {tpu.chips} chips on {tpu.hosts} machines a slice, {options.slices} slice(s)",
        "set -euo pipefail", "archive=$(mktemp -d)", "trap 'rm -rf \"$archive\"' EXIT",
        f"state() {{ {quoted(describe)} 2>/dev/null || true; }}",
        "pids=()", 'finish() { for pid in "${pids[@]}"; do wait "$pid"; done; pids=(); }  # fails where one failed', "",
        "# Ask for the slice, and for a new one where it was taken away.",
        'case "$(state)" in', f"  SUSPENDED|FAILED) {quoted(delete)} ;;", "esac",
        f'[ -n "$(state)" ] || {quoted(create)}',
        'until [ "$(state)" = ACTIVE ]; do',
        '  case "$(state)" in FAILED|SUSPENDED) echo "the request failed: $(state)" >&2; exit 1 ;; esac',
        "  sleep 30", "done", "",
        "# The project's files as git knows them, with what is not committed.",
        f'git ls-files -z --cached --others --exclude-standard | xargs -0 tar -czf "$archive/{job.name}.tgz"',
        *(f'{quoted(copy)} "$archive/{job.name}.tgz" {node}: --worker=all {quoted(where)}'
          for node in nodes(job, options)), *everywhere(setup), "",
        "# Stop what still runs, then start on all machines: they wait for each other.",
        *everywhere(stop), *everywhere(go), "",
        f"echo 'follow:  {ssh_hint(nodes(job, options)[0], where, 'tail -f ' + log)}'",
        f"echo 'end:     {quoted(delete)}'", ""]
    return "\n".join(lines)


def ssh_hint(node: str, where: list[str], command: str) -> str:
    """A command to type, in double quotes, as it is printed inside of single ones."""
    return f'gcloud compute tpus tpu-vm ssh {node} --worker=0 {" ".join(where)} --command "{command}"'


def start(job: Job, options: Options) -> int:
    """Runs the script and returns its exit code."""
    script = render(job, options)
    for program in ("gcloud", "git"):
        if shutil.which(program) is None:
            raise ValueError(f"there is no {program} on this machine; install it, or see the script with --dry-run")
    return subprocess.run(["bash", "-c", script]).returncode
