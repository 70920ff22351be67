"""Runs that `lm launch` starts: several processes, and a cluster, train as one process does."""

import contextlib
import os
import pathlib
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from commands import CONFIG, FLAGS, HERE, losses, rows, run

SBIN = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def launch(place, workdir, *flags, **env):
    return subprocess.run([sys.executable, "-m", "launch.cli", "launch", place, "--config", CONFIG, "--workdir",
                           str(workdir), *flags], cwd=HERE.parent.parent, env={**os.environ, **env}, text=True,
                          capture_output=True, timeout=300)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    code, said = run(tmp_path / "one", devices=2)
    assert code == 0, said
    done = launch("local", tmp_path / "two", "--processes", "2", "--devices-per-process", "1")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert (tmp_path / "two/logs/process-1.log").exists()


LONG = ("--config.train.steps=300", "--config.checkpoint.every=100", "--config.eval.every=100")
SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
MpiDefault=none
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm():
    """A cluster of this machine alone, on the loopback, for the time of a test; the variables that reach it."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=SBIN)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurm-wlm")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores, one a task")
    # Sockets have short paths.
    with tempfile.TemporaryDirectory(prefix="loomlm-slurm-") as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        for part in ("munge", "state", "spool"):
            (folder / part).mkdir(mode=0o700)
        key = folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        sockets = [socket.socket() for _ in range(2)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        conf = folder / "slurm.conf"
        conf.write_text(SLURM.format(host=socket.gethostname().partition(".")[0], folder=folder, cores=os.cpu_count(),
                                     user=pwd.getpwuid(os.getuid()).pw_name,
                                     ports=[s.getsockname()[1] for s in sockets]))
        for s in sockets:
            s.close()
        env = {"SLURM_CONF": str(conf), "PATH": SBIN}
        paths = {flag: f"--{flag}={folder}/munge/{file}" for flag, file in (
            ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))}
        for words in (["munged", "--foreground", "--force", *paths.values()], ["slurmctld", "-D"],
                      ["slurmd", "-D", "-N", "localhost"]):
            process = subprocess.Popen(words, env={**os.environ, **env}, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            stack.callback(end, process)
            time.sleep(0.5)
        ask = lambda *words: subprocess.run(words, env={**os.environ, **env}, text=True, capture_output=True)
        for _ in range(40):
            if "idle" in ask("sinfo", "--noheader", "--format=%T").stdout:
                break
            time.sleep(0.5)
        else:
            log = (folder / "slurmctld.log").read_text() if (folder / "slurmctld.log").exists() else ""
            pytest.skip(f"Slurm's daemons do not run here: {log[-500:]}")
        yield env, ask
        ask("scancel", "--full", "--signal=KILL", "--user", pwd.getpwuid(os.getuid()).pw_name)


def end(process):
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_slurm_job_is_preempted_queued_again_and_ends_as_an_uninterrupted_one(slurm, tmp_path):
    env, ask = slurm
    code, said = run(tmp_path / "one", *LONG, devices=2)
    assert code == 0, said
    # The coordinator's port, as jax derives it from the job's number, on the loopback alone.
    bind = "export JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$((SLURM_JOB_ID % 4096 + 61440))"
    workdir = tmp_path / "two"
    done = launch("slurm", workdir, *LONG, "--tasks-per-node=2", "--setup", bind, "--setup",
                  f"export PATH={pathlib.Path(sys.executable).parent}:$PATH", "--env", "JAX_PLATFORMS=cpu", "--env",
                  f"XLA_FLAGS={FLAGS} --xla_force_host_platform_device_count=1", **env)
    assert done.returncode == 0, done.stderr
    number = re.match(r"job (\d+);", done.stdout)[1]
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(rows(workdir)) >= 20, 120)
    assert ask("scancel", "--signal=TERM", number).returncode == 0
    wait_for(lambda: "COMPLETED" in ask("scontrol", "show", "job", number).stdout, 240)
    shown = ask("scontrol", "show", "job", number).stdout
    assert "Restarts=1" in shown, shown
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "one"), rtol=1e-5)
    assert "SIGTERM received" in (workdir / f"logs/task-{number}-0.log").read_text()


def wait_for(condition, seconds):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)
