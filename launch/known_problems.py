"""Combinations of versions and machines that are known to fail or to surprise, as data; `lm doctor` tests each."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

BROKEN, NOTE = "broken", "note"


class Facts(NamedTuple):
    """What the rules look at. versions: installed packages; devices: "tpu", "gpu" as present_devices found them;
    platforms: JAX_PLATFORMS; python: (3, 12)."""

    versions: Mapping[str, str]
    devices: tuple[str, ...]
    platforms: str
    python: tuple[int, int]

    def at_least(self, package: str, version: str) -> bool:
        """Installed, and this version or newer."""
        return package in self.versions and Version(self.versions[package]) >= Version(version)

    def below(self, package: str, version: str) -> bool:
        """Installed, and older than this version."""
        return package in self.versions and not self.at_least(package, version)


class Problem(NamedTuple):
    """level: `BROKEN` or `NOTE`; what: what is wrong; remedy: what to do."""

    level: str
    what: str
    remedy: str


def _cuda_plugins(facts: Facts) -> list[str]:
    return [name for name in facts.versions if name.startswith("jax-cuda") and name.endswith("-plugin")]


RULES: tuple[tuple[str, Callable[[Facts], bool], str, str], ...] = (
    (BROKEN, lambda f: f.python < (3, 11), "Python is older than 3.11", "use Python 3.11 or newer"),
    (BROKEN, lambda f: f.below("jax", "0.10.2"), "jax is older than 0.10.2, the oldest that is tested",
     "pip install -U jax"),
    (BROKEN, lambda f: f.below("flax", "0.12.8"), "flax is older than 0.12.8, the oldest that is tested",
     "pip install -U flax"),
    (BROKEN, lambda f: f.at_least("jax", "0.11.1") and f.below("flax", "0.12.9"),
     "jax 0.11.1 removed a class that flax up to 0.12.8 subclasses", "pip install -U flax"),
    (BROKEN, lambda f: len(_cuda_plugins(f)) > 1, "plugins for two CUDA versions are installed",
     "pip uninstall the one of the older CUDA, with its -pjrt package"),
    (NOTE, lambda f: "libtpu" in f.versions and bool(_cuda_plugins(f)) and not f.platforms,
     "libtpu and a CUDA plugin are both installed: each prints errors on the other's machine",
     "set JAX_PLATFORMS to tpu, cuda or cpu, or keep one environment for each"),
    (NOTE, lambda f: f.python < (3, 12) and not f.at_least("jax", "0.11"),
     "Python 3.11 gets at most jax 0.10.2 and flax 0.12.8", "use Python 3.12 or newer for the current ones"),
    (NOTE, lambda f: "tokamax" in f.versions and (f.python < (3, 12) or f.below("jax", "0.11.1")),
     "current tokamax needs Python 3.12 and jax 0.11.1 or newer; its kernels are not used with this one",
     "use Python 3.12 or newer, or uninstall tokamax (it is optional)"),
    (NOTE, lambda f: "gpu" in f.devices and f.at_least("jax", "0.11"),
     "Pallas-Triton is deprecated since jax 0.11 and warns at each lowering; GPUs before Hopper have no other Pallas",
     "nothing to do: XLA serves where no kernel does"),
    (NOTE, lambda f: "libtpu" in f.versions and "tpu" not in f.devices,
     "libtpu is installed and this machine has no TPU: good for compiling ahead of time, noisy at run time",
     "set JAX_PLATFORMS=cpu outside of `lm`, which sets it itself"),
    (NOTE, lambda f: bool(_cuda_plugins(f)) and "gpu" not in f.devices,
     "a CUDA plugin is installed and this machine shows no NVIDIA device: noisy at run time",
     "check the driver (nvidia-smi), or set JAX_PLATFORMS=cpu outside of `lm`, which sets it itself"),
    (BROKEN, lambda f: "gpu" in f.devices and not f.platforms.startswith("cpu") and not _cuda_plugins(f)
     and not any("rocm" in name for name in f.versions),
     "this machine has a GPU and no plugin of jax for it is installed: it would run on the CPU",
     "pip install 'loomlm[cuda]', or set JAX_PLATFORMS=cpu to mean it"),
    (BROKEN, lambda f: "tpu" in f.devices and not f.platforms.startswith("cpu") and "libtpu" not in f.versions,
     "this machine has a TPU and libtpu is not installed: it would run on the CPU",
     "pip install 'loomlm[tpu]', or set JAX_PLATFORMS=cpu to mean it"),
)


def known_problems(facts: Facts) -> list[Problem]:
    """The rules that apply."""
    return [Problem(level, what, remedy) for level, applies, what, remedy in RULES if applies(facts)]


def unmet_requirements(versions: Mapping[str, str], requires: Mapping[str, list[str]]) -> list[Problem]:
    """Installed packages whose own declared requirements the installed versions do not meet.

    requires: package to its requirement lines. Extras count where the package they pin (libtpu, a CUDA plugin) is
    installed: jax says which libtpu belongs to it. A package that an extra asks for and that is absent is no problem.
    """
    out = []
    for package, lines in requires.items():
        for line in lines:
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                continue
            found = versions.get(canonicalize_name(wanted.name))
            device_pin = wanted.name == "libtpu" and 'extra == "tpu"' in str(wanted.marker)
            if found is None or not (device_pin or wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                continue
            if not wanted.specifier.contains(found, prereleases=True):
                level = NOTE if device_pin else BROKEN
                out.append(Problem(level, f"{package} {versions[package]} asks for {wanted.name}{wanted.specifier}; "
                                          f"{found} is installed",
                                   f"pip install '{wanted.name}{wanted.specifier}', or a {package} that goes with it"))
    return out
