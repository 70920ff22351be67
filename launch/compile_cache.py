"""Compiled programs kept on disk between runs, so that a restart does not compile again."""

import hashlib
import logging
import os
import pathlib
import sys
from typing import Any

from etils import epath

log = logging.getLogger(__name__)

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
OFF = ("off", "none", "")
MIN_SECONDS_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
MIN_SECONDS = 0.2  # jax keeps programs that took a second to compile; a small model is made of many that took less


def default_cache_dir() -> pathlib.Path:
    """loomlm/xla/<kind of CPU> in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache).

    A program for the CPU uses the instructions of the machine that compiled it, and homes are shared by machines of
    several kinds: each kind has its own folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "loomlm" / "xla" / _cpu_kind()


def _cpu_kind() -> str:
    """A short hash of the CPU's instruction sets; "any" where the system does not list them."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "any"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "any")
    return hashlib.sha256(flags.encode()).hexdigest()[:8]


def cache_dir(path: str | None = None) -> str | None:
    """The folder that will be used: `path`, else $JAX_COMPILATION_CACHE_DIR, else the default; None for 'off'."""
    chosen = os.environ.get(VARIABLE, str(default_cache_dir())) if path is None else path
    return None if chosen.lower() in OFF else os.path.expanduser(chosen)


def enable_compile_cache(path: str | None = None) -> str | None:
    """Turns jax's persistent compile cache on and returns its folder; `path` 'off' turns it off and returns None.

    Works before jax is imported (by environment variables, which child processes inherit) and after. A folder that
    cannot be made turns the cache off with a warning: a run must not fail for it.
    """
    chosen = cache_dir(path)
    if chosen is not None:
        try:
            epath.Path(chosen).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("no compile cache: %s cannot be used (%s); set --compile-cache", chosen, error)
            chosen = None
    settings: dict[str, Any] = {
        "jax_enable_compilation_cache": chosen is not None,
        "jax_compilation_cache_dir": chosen,
        "jax_persistent_cache_min_compile_time_secs": float(os.environ.get(MIN_SECONDS_VARIABLE, MIN_SECONDS)),
    }
    for name, value in settings.items():
        if value is not None:
            os.environ[name.upper()] = str(value)
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name, value)
    return chosen
