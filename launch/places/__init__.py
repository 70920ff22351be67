"""Where a run can be started: a module a place, with `Options`, `render(job, options)` and `start(job, options)`."""

PLACES = {
    "local": "launch.places.local",
    "slurm": "launch.places.slurm",
    "tpu-vm": "launch.places.tpu_vm",
    "gke": "launch.places.gke",
    "sky": "launch.places.sky",
}
SAME_FILES = ("local", "slurm")  # places that see this machine's files
