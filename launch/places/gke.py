"""TPUs or GPUs in Google Kubernetes Engine: a JobSet with a job a slice and a pod a machine.

The labels, and one job a slice exclusively on a node pool, are xpk's conventions, so clusters made by `xpk cluster
create` take it, with their Kueue queue named. A pod that ends with 75 has saved: the whole JobSet starts again.
"""

import dataclasses
import shutil
import subprocess
from typing import Any

from launch.places.job import Job, quoted, yaml_text
from launch.tpu_slices import find_slice
from lm.core.fields import option
from lm.train.exit_codes import CONFIG

# Node label, GPUs of a machine.
GPUS = {"a100": ("nvidia-a100-80gb", 8), "h100": ("nvidia-h100-mega-80gb", 8), "h200": ("nvidia-h200-141gb", 8),
        "b200": ("nvidia-b200", 8), "l4": ("nvidia-l4", 8)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of `lm launch gke`."""

    accelerator: str | None = option(None, "slice, such as v5e-256 or 7x:4x4x4, or GPUs of a machine, such as h100:8")
    slices: int = option(1, "slices that train together; with GPUs, machines")
    image: str | None = option(None, "container image (docs/launch.md says how to build it)")
    namespace: str = option("default", "Kubernetes namespace")
    service_account: str | None = option(None, "Kubernetes service account, for access to buckets")
    secret: str | None = option(None, "Kubernetes secret whose entries become variables of the run")
    queue: str | None = option(None, "Kueue queue, such as multislice-queue")
    priority: str | None = option(None, "priority class")
    max_restarts: int = option(100, "restarts after preemption or failure")
    grace: int = option(120, "seconds that pods have to save when they are told to stop")
    spot: bool = option(False, "on spot machines")
    shared_workdir: bool = option(False, "the workdir is a path that the image mounts on all machines")

    def check(self) -> None:
        """Raises ValueError for what is missing or impossible."""
        for name, example in (("accelerator", "v5e-256"), ("image", "REGION-docker.pkg.dev/PROJECT/REPO/loomlm:TAG")):
            if getattr(self, name) is None:
                raise ValueError(f"lm launch gke needs --{name}, such as {example}")
        machine(self)
        for name, least in (("slices", 1), ("max_restarts", 0), ("grace", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}={getattr(self, name)} must be at least {least}")


def machine(options: Options) -> tuple[dict[str, str], dict[str, int], int]:
    """(labels of the nodes, devices of a pod, pods of a job)."""
    kind, _, count = options.accelerator.lower().partition(":")
    if kind not in GPUS:
        tpu = find_slice(options.accelerator)
        return ({"cloud.google.com/gke-tpu-accelerator": tpu.generation.label,
                 "cloud.google.com/gke-tpu-topology": tpu.shape}, {"google.com/tpu": tpu.chips_per_host}, tpu.hosts)
    label, most = GPUS[kind]
    if count and not (count.isdecimal() and 1 <= int(count) <= most):
        raise ValueError(f"--accelerator={options.accelerator}: a machine has 1 to {most} of them; more machines are "
                         f"--slices")
    return {"cloud.google.com/gke-accelerator": label}, {"nvidia.com/gpu": int(count or most)}, 1


def job_set(job: Job, options: Options) -> dict[str, Any]:
    """The JobSet as plain data."""
    job.needs_bucket("gke", options.shared_workdir)
    labels, devices, pods = machine(options)
    gpus = "nvidia.com/gpu" in devices
    if options.spot:
        labels = {**labels, "cloud.google.com/gke-spot": "true"}
    env = [{"name": name, "value": value} for name, value in job.env.items()]
    if gpus and options.slices > 1:
        # GKE names the machines of TPU slices itself; for GPUs the pods of the jobs are known by the JobSet's names.
        env += [{"name": "JAX_COORDINATOR_ADDRESS", "value": f"{job.name}-machine-0-0.{job.name}:8476"},
                {"name": "JAX_NUM_PROCESSES", "value": str(options.slices)},
                {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {
                    "fieldPath": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}}]
    script = "\n".join([*job.setup, f"exec {quoted(job.installed)}"])
    container: dict[str, Any] = {
        "name": "train", "image": options.image, "command": ["bash", "-c", script], "env": env,
        "ports": [{"containerPort": 8471}, {"containerPort": 8476}, {"containerPort": 8431}],
        "resources": {"requests": dict(devices), "limits": dict(devices)},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never", "nodeSelector": labels, "terminationGracePeriodSeconds": options.grace,
        "containers": [container], "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]}
    if gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.priority:
        pod["priorityClassName"] = options.priority
    template = {"spec": {
        "parallelism": pods, "completions": pods, "completionMode": "Indexed", "backoffLimit": 0,
        # A mistake in the config is the same after a restart.
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {
            "containerName": "train", "operator": "In", "values": [CONFIG]}}]},
        "template": {"spec": pod}}}
    metadata: dict[str, Any] = {"name": job.name, "namespace": options.namespace}
    if not gpus:
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    failures = {"maxRestarts": options.max_restarts, "rules": [
        {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": {
        "failurePolicy": failures, "network": {"enableDNSHostnames": True, "subdomain": job.name},
        "replicatedJobs": [{"name": "machine" if gpus else "slice", "replicas": options.slices,
                            "template": template}]}}


def render(job: Job, options: Options) -> str:
    """The JobSet as YAML."""
    return yaml_text(job_set(job, options))


def start(job: Job, options: Options) -> int:
    """Gives the JobSet to the cluster that kubectl is set to; says how to follow and end it."""
    text = render(job, options)
    if shutil.which("kubectl") is None:
        raise ValueError("there is no kubectl on this machine; install it, or see the YAML with --dry-run")
    code = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode
    if code == 0:
        where = f"--namespace {options.namespace}"
        print(f"follow:  kubectl logs {where} -f -l jobset.sigs.k8s.io/jobset-name={job.name}\n"
              f"end:     kubectl delete {where} jobset {job.name}")
    return code
