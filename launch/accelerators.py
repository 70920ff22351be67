"""Which devices the machine has, found without importing jax, and the platform that jax is told to use.

An environment that holds libtpu or a CUDA plugin on a machine without the device prints errors at the first use of jax.
So where no device can be there, jax is pinned to the CPU before it is imported.
"""

import glob
import os
import sys
from collections.abc import MutableMapping

DEVICE_FILES = {
    # /dev/vfio/vfio exists on any machine with the driver loaded; a chip has a numbered group.
    "tpu": ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"),
    "gpu": ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"),
}
# Set on Cloud TPU machines and by pods. Compiling for a topology ahead of time sets others (TPU_WORKER_HOSTNAMES).
TPU_VARIABLES = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_TOPOLOGY", "TPU_VISIBLE_CHIPS")
USER_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")


def present_devices(environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """"tpu" and "gpu", as far as device files or the variables of a TPU machine say so."""
    found = [kind for kind, patterns in DEVICE_FILES.items() if any(glob.glob(pattern) for pattern in patterns)]
    if "tpu" not in found and any(environ.get(name) for name in TPU_VARIABLES):
        found.insert(0, "tpu")
    return found


def choose_platform(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Sets JAX_PLATFORMS=cpu where neither device exists and the user did not choose; returns why, or None.

    Only Linux has these device files; elsewhere jax chooses alone.
    """
    if any(environ.get(name) for name in USER_VARIABLES) or not sys.platform.startswith("linux"):
        return None
    if present_devices(environ):
        return None
    environ["JAX_PLATFORMS"] = "cpu"
    return "no TPU or GPU device file on this machine, so jax is told to use the CPU"
