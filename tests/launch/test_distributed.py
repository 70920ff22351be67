"""Which processes belong together, decided from the environment; and two real processes over loopback."""

import http.server
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch.distributed import Plan, detect, tpu_pod_hosts

ROOT = pathlib.Path(__file__).resolve().parents[2]
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SRUN = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1"}


def never():
    pytest.fail("asked for a TPU pod")


def test_variables_win_over_everything_else():
    plan = detect(JAX | SRUN | {"TPU_WORKER_HOSTNAMES": "a,b"}, never)
    assert plan[0] == "environment" and plan[2:] == ("10.0.0.1:1234", 4, 3)
    assert "process 3 of 4" in plan.reason


@pytest.mark.parametrize("missing", list(JAX))
def test_a_half_set_environment_names_what_is_missing(missing):
    env = {k: v for k, v in JAX.items() if k != missing}
    with pytest.raises(ValueError, match=f"is set but not {missing}: set all three"):
        detect(env, never)
    with pytest.raises(ValueError, match=f"but not .*{missing}"):
        detect(env | {missing: ""}, never)


def test_only_one_of_three_names_both_others():
    with pytest.raises(ValueError, match="_ID=0 is set but not JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES:"):
        detect({"JAX_PROCESS_ID": "0"}, never)


@pytest.mark.parametrize(("name", "value"), [
    ("JAX_COORDINATOR_ADDRESS", "10.0.0.1"), ("JAX_COORDINATOR_ADDRESS", ":1234"),
    ("JAX_COORDINATOR_ADDRESS", "host:port"), ("JAX_COORDINATOR_ADDRESS", "host:70000"), ("JAX_NUM_PROCESSES", "0"),
    ("JAX_NUM_PROCESSES", "two"), ("JAX_PROCESS_ID", "4"), ("JAX_PROCESS_ID", "-1")])
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}='{value}' must be"):
        detect(JAX | {name: value}, never)


def test_a_single_process_is_left_alone():
    assert detect({}).method == "single"
    assert detect(JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, never).method == "single"
    assert detect(SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).method == "single"
    assert detect({"OMPI_COMM_WORLD_SIZE": "1"}).method == "single"
    assert detect({"TPU_WORKER_HOSTNAMES": "localhost"}, never).method == "single"


def test_slurm_tasks_are_processes():
    plan = detect(SRUN, never)
    assert plan.method == "slurm" and (plan.num_processes, plan.process_id) == (8, 5) and "job 77" in plan.reason
    # A step of fewer tasks than the allocation.
    assert detect(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}).method == "single"


def test_slurm_without_srun_is_single_and_says_how_to_use_all_tasks():
    env = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}
    plan = detect(env)
    assert plan.method == "single" and "start this with srun" in plan.reason


def test_mpi_ranks_are_processes():
    assert detect({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "x"}, never).method == "ompi"
    assert detect({"OMPI_COMM_WORLD_SIZE": "4"}, never).method == "mpi4py"


def test_tpu_pods():
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, never).method == "gketpu"
    assert detect({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, never).method == "gketpu"
    assert detect({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, never).method == "gketpu"
    assert detect({}, lambda: 4) == Plan("gcetpu", "TPU pod, 1 slice(s) of 4 host(s)")
    assert detect({"MEGASCALE_NUM_SLICES": "2"}, lambda: 1).method == "gcetpu"
    assert detect({"JAX_PLATFORMS": "cpu"}, never).method == "single"  # a CPU test on a worker must not wait for others
    assert detect({"JAX_PLATFORMS": "tpu,cpu"}, lambda: 4).method == "gcetpu"


@pytest.fixture
def metadata():
    """A metadata server on loopback: set `.answer` to (status, text)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            good = self.headers["Metadata-Flavor"] == "Google" and self.path.endswith("/worker-network-endpoints")
            status, text = self.server.answer if good else (403, "")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.env = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        yield server
        server.shutdown()


def test_the_metadata_server_tells_the_hosts_of_a_pod(metadata):
    metadata.answer = (200, "x:1:10.0.0.2,y:2:10.0.0.3,z:3:10.0.0.4")
    assert tpu_pod_hosts(metadata.env, chips=4) == 3
    assert tpu_pod_hosts(metadata.env | {"TPU_SKIP_MDS_QUERY": "1"}, chips=4) == 1
    assert tpu_pod_hosts(metadata.env, chips=0) == 1
    metadata.answer = (404, "")
    assert tpu_pod_hosts(metadata.env, chips=4) == 1
    metadata.answer = (500, "")
    with pytest.raises(RuntimeError, match=r"answered 500.*TPU_SKIP_MDS_QUERY=1"):
        tpu_pod_hosts(metadata.env, chips=4)


def test_a_silent_metadata_server_is_no_single_host():
    with pytest.raises(RuntimeError, match=r"does not answer.*TPU_SKIP_MDS_QUERY=1"):
        tpu_pod_hosts({"GCE_METADATA_IP": f"127.0.0.1:{free_port()}"}, chips=4)


def test_this_machine_has_no_pod():
    assert tpu_pod_hosts({}) >= 1


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def start():
    """Starts a process of a run on loopback; those that a failed test leaves are killed."""
    begun = []

    def start_one(code, number, port, count=2):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "SLURM_", "OMPI_", "TPU_"))}
        env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
        begun.append(subprocess.Popen([sys.executable, "-u", "-c", code], env=env, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE))
        return begun[-1]

    yield start_one
    for process in begun:
        process.kill()
        process.communicate()


TOGETHER = """
import os, signal, time
import numpy as np
from launch.distributed import initialize
plan = initialize(timeout_seconds=60)
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
assert (jax.process_count(), jax.process_index()) == (plan.num_processes, plan.process_id)
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("data",))
mine = 10.0 ** np.arange(2 * plan.process_id, 2 * plan.process_id + 2)      # 1, 10 | 100, 1000
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine)
print("sum", float(jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(x)))

from lm.train.signals import Preemption
with Preemption(every=3) as preemption:
    for step in range(1, 30):
        if step == 7 and plan.process_id == 1:
            os.kill(os.getpid(), signal.SIGTERM)     # one machine alone is preempted
        if preemption.agreed(step):
            print("stop", step)
            break
"""


def test_two_processes_sum_a_value_and_stop_at_the_same_step(start):
    port = free_port()
    processes = [start(TOGETHER, n, port) for n in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        # Gloo itself talks on stdout, and may break into a line of ours.
        assert re.findall(r"(?:sum|stop) [\d.]+", out) == ["sum 1111.0", "stop 9"], out


ALONE = """
from launch.distributed import initialize
try:
    initialize(timeout_seconds=2)
except RuntimeError as error:
    print(error)
"""


def test_a_missing_coordinator_is_an_error_and_no_hang(start):
    port, began = free_port(), time.monotonic()
    out, err = start(ALONE, 1, port).communicate(timeout=60)
    assert f"nothing answers at JAX_COORDINATOR_ADDRESS=127.0.0.1:{port} after 2 s" in out, err
    assert time.monotonic() - began < 40


def test_a_taken_port_is_an_error(start):
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen()
        out, err = start(ALONE, 0, s.getsockname()[1]).communicate(timeout=60)
    assert "another run use it? Take another port" in out, err


@pytest.mark.slow
def test_processes_that_stay_away_end_the_coordinator_with_a_hint(start):
    process = start(ALONE, 0, free_port())
    _, err = process.communicate(timeout=90)
    assert process.returncode == -signal.SIGABRT  # jaxlib's own way
    assert "not all processes have come yet" in err and "Are all of them started" in err
