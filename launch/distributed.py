"""Joins the processes of a run: decides from the environment whether there are several, and connects them.

Asked in this order: the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Slurm tasks started by
srun; MPI ranks; a TPU pod (GKE's variables, or the metadata server of a TPU VM). Otherwise this is a single process and
`jax.distributed` is left alone.
"""

import functools
import glob
import importlib.util
import os
import pathlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import logging

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What jax's own detection of Slurm reads. A batch script without srun lacks the step's node list.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TIMEOUT_SECONDS = 300


class Plan(NamedTuple):
    """How the processes find each other. method: "single", "environment", or a name that
    `jax.distributed.initialize(cluster_detection_method=...)` knows. The numbers are None where jax finds them out.
    reason: one line for people."""

    method: str
    reason: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def detect(env: Mapping[str, str], pod_hosts: Callable[[], int] = lambda: 1) -> Plan:
    """The plan for a process with these environment variables. Pure but for `pod_hosts`, which tells how many hosts a
    TPU pod has where the variables do not, and is only called where nothing else was found.

    Raises ValueError naming what is missing or wrong in a half-set environment.
    """
    if any(env.get(name) for name in VARIABLES):
        return _from_variables(env)
    tasks = _positive(env, "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS")
    if all(name in env for name in SLURM) and tasks > 1:
        return Plan("slurm", f"Slurm job {env['SLURM_JOB_ID']}, {tasks} tasks, one process a task",
                    num_processes=tasks, process_id=int(env["SLURM_PROCID"]))
    ranks = _positive(env, "OMPI_COMM_WORLD_SIZE")
    if ranks > 1:
        # Open MPI 4 leaves an address that jax can read; later ones do not, and jax asks mpi4py.
        return Plan("ompi" if "OMPI_MCA_orte_hnp_uri" in env else "mpi4py", f"MPI, {ranks} ranks", num_processes=ranks)
    if env.get("JAX_PLATFORMS") and "tpu" not in env["JAX_PLATFORMS"].split(","):
        return Plan("single", f"single process: JAX_PLATFORMS={env['JAX_PLATFORMS']}" + _hint(env, tasks))
    slices = _positive(env, "MEGASCALE_NUM_SLICES")
    workers = (env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    if len(workers) > 1 or (workers[0] and slices > 1):
        return Plan("gketpu", f"TPU pod on GKE, {slices} slice(s) of {len(workers)} host(s)")
    if not workers[0]:
        hosts = pod_hosts()
        if hosts * slices > 1:
            return Plan("gcetpu", f"TPU pod, {slices} slice(s) of {hosts} host(s)")
    return Plan("single", "single process" + _hint(env, tasks))


def _from_variables(env: Mapping[str, str]) -> Plan:
    missing = [name for name in VARIABLES if not env.get(name)]
    if missing:
        present = ", ".join(f"{name}={env[name]}" for name in VARIABLES if env.get(name))
        raise ValueError(f"{present} is set but not {' and '.join(missing)}: set all three (coordinator: host:port of "
                         f"process 0, e.g. 10.0.0.1:1234; the number of processes; this one's number from 0), or none "
                         f"for a single process")
    address, count = env[VARIABLES[0]], _positive(env, VARIABLES[1])
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address!r} must be host:port of process 0, e.g. 10.0.0.1:1234")
    number = env[VARIABLES[2]]
    if not number.isdecimal() or int(number) >= count:
        raise ValueError(f"JAX_PROCESS_ID={number!r} must be a whole number from 0 to {count - 1}, one less than "
                         f"JAX_NUM_PROCESSES")
    if count == 1:
        return Plan("single", "single process: JAX_NUM_PROCESSES=1")
    return Plan("environment", f"process {number} of {count}, coordinator {address} (JAX_* variables)", address, count,
                int(number))


def _positive(env: Mapping[str, str], name: str) -> int:
    value = env.get(name) or "1"
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    return int(value)


def _hint(env: Mapping[str, str], tasks: int) -> str:
    if "SLURM_JOB_ID" in env and tasks > 1:
        return f" (Slurm job {env['SLURM_JOB_ID']} has {tasks} tasks: start this with srun to use all of them)"
    return ""


def tpu_pod_hosts(env: Mapping[str, str] = os.environ, *, chips: int | None = None) -> int:
    """Hosts of the TPU pod slice that this machine belongs to, from the metadata server of Google Compute Engine; 1
    where there is no TPU, libtpu is not installed or TPU_SKIP_MDS_QUERY is set. chips: for tests.

    Raises RuntimeError where there is a TPU but no answer: guessing would start many single runs on one workdir.
    """
    if chips is None:
        vendors = (pathlib.Path(p).read_text().strip() for p in glob.glob("/sys/bus/pci/devices/*/vendor"))
        chips = sum(vendor == "0x1ae0" for vendor in vendors)  # Google
        if chips and importlib.util.find_spec("libtpu") is None:
            chips = 0
    if not chips or env.get("TPU_SKIP_MDS_QUERY"):
        return 1
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
                                     headers={"Metadata-Flavor": "Google"})
    try:
        # No proxy: the server is on this machine's own link.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return len(answer.read().decode().split(","))
    except urllib.error.HTTPError as error:
        if error.code == 404:  # a machine with TPUs that is no TPU VM pod
            return 1
        raise RuntimeError(f"the metadata server {server} answered {error.code} when asked for the hosts of this TPU "
                           f"pod; set TPU_SKIP_MDS_QUERY=1 to run on this host alone") from error
    except OSError as error:
        raise RuntimeError(f"there is a TPU here but the metadata server {server} does not answer ({error}); set "
                           f"TPU_SKIP_MDS_QUERY=1 to run on this host alone, or JAX_COORDINATOR_ADDRESS, "
                           f"JAX_NUM_PROCESSES and JAX_PROCESS_ID by hand") from error


def initialize(env: Mapping[str, str] = os.environ, *, timeout_seconds: int = TIMEOUT_SECONDS) -> Plan:
    """Connects this process with the others of the run, where there are others, and logs which way was taken. Call it
    before anything asks jax for devices. jax disconnects by itself when the process ends.

    Raises ValueError for a half-set environment, and RuntimeError when the coordinator given by the variables cannot be
    reached within `timeout_seconds` or its port is taken. Where others stay away from a coordinator that is up, jaxlib
    aborts the process after that time, without an exception: what to look for is logged shortly before.
    """
    plan = detect(env, functools.partial(tpu_pod_hosts, env))
    if plan.method == "single":
        logging.info("%s", plan.reason)
        return plan
    import jax
    logging.info("joining the other processes: %s", plan.reason)
    began = time.monotonic()
    given: dict[str, Any] = {"cluster_detection_method": plan.method}
    if plan.method == "environment":
        if plan.process_id != 0:
            wait_for_coordinator(plan.coordinator, timeout_seconds)
        elif "JAX_COORDINATOR_BIND_ADDRESS" not in env:
            check_port_is_free(plan.coordinator)
        # With the variables given, jax must not look around: it would take one GPU a Slurm task, or ask for a TPU.
        given = {"cluster_detection_method": "deactivate", "coordinator_address": plan.coordinator,
                 "num_processes": plan.num_processes, "process_id": plan.process_id}
    left = max(int(timeout_seconds - (time.monotonic() - began)), 1)
    notice = threading.Timer(0.8 * left, logging.error, (
        "%s: not all processes have come yet, giving up %d s after the start. Are all of them started, with the same "
        "coordinator and count, and can they reach its port?", plan.reason, left))
    notice.daemon = True
    notice.start()
    try:
        jax.distributed.initialize(initialization_timeout=left, **given)
    finally:
        notice.cancel()
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    return plan


def check_port_is_free(address: str) -> None:
    """Raises RuntimeError where this machine cannot listen on the port of host:port. jaxlib cannot be left to find out:
    0.10.2 sometimes ends with a segmentation fault after it."""
    try:
        # It allows for connections of an earlier run that are still closing, as gRPC does.
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise RuntimeError(f"process 0 cannot listen on the port of JAX_COORDINATOR_ADDRESS={address} ({error}): does "
                           f"another run use it? Take another port, the same for all processes") from error


def wait_for_coordinator(address: str, timeout_seconds: float) -> None:
    """Returns when something listens at host:port. Raises RuntimeError after `timeout_seconds`."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(f"nothing answers at JAX_COORDINATOR_ADDRESS={address} after {timeout_seconds:g} s "
                                   f"({error}): start process 0 on that host, with that port open") from error
        time.sleep(0.2)
