"""The compile cache: where it is, that it is used, that results do not change, and that it can be turned off."""

import os
import pathlib
import subprocess
import sys

import pytest

from launch import compile_cache
from launch.compile_cache import cache_dir, default_cache_dir, enable_compile_cache

PROGRAM = """
import sys
from launch.compile_cache import enable_compile_cache
folder = enable_compile_cache(None if sys.argv[1] == "default" else sys.argv[1])
import jax, jax.numpy as jnp, numpy as np
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
made = jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.arange(9.0).reshape(3, 3) / 7)
print(np.asarray(made).tobytes().hex())
print(sum(name.endswith("compilation_cache/cache_hits") for name in events))
print(folder)
"""


def start(argument, **environ):
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, timeout=120,
                          check=False, env={**keep, "JAX_PLATFORMS": "cpu", **environ})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    value, hits, folder = done.stdout.split("\n")[:3]
    return value, int(hits), folder


def test_a_second_process_takes_the_program_from_the_cache_with_the_same_bits(tmp_path):
    variables = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first, hits, folder = start("default", **variables)
    assert hits == 0
    assert pathlib.Path(folder).is_relative_to(tmp_path / "loomlm" / "xla")
    assert list(pathlib.Path(folder).iterdir())
    again, hits, _ = start("default", **variables)
    assert hits > 0
    assert again == first
    off, hits, folder = start("off", **variables)
    assert (off, hits, folder) == (first, 0, "None")


def test_the_folder_is_the_argument_else_the_variable_else_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == str(default_cache_dir())
    assert default_cache_dir().parent == tmp_path / "loomlm" / "xla"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert cache_dir() == "/elsewhere"
    assert cache_dir("~/mine") == str(pathlib.Path.home() / "mine")
    assert cache_dir("off") is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "off")
    assert cache_dir() is None


def test_a_folder_that_cannot_be_made_turns_the_cache_off_with_a_warning(monkeypatch, tmp_path, caplog):
    for name in ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", compile_cache.MIN_SECONDS_VARIABLE):
        monkeypatch.setenv(name, "0")
    monkeypatch.setitem(sys.modules, "jax", None)  # as before its import: nothing to configure
    monkeypatch.delitem(sys.modules, "jax")
    (tmp_path / "file").write_text("x")
    assert enable_compile_cache(str(tmp_path / "file" / "below")) is None
    assert "no compile cache" in caplog.text
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "False"


@pytest.mark.parametrize("flags", ["flags : fpu avx512f", None])
def test_each_kind_of_cpu_has_its_own_folder(monkeypatch, flags):
    here = default_cache_dir()

    def read_text(path):
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor : 0\n{flags}\n"

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    assert default_cache_dir() != here
    assert default_cache_dir().parent == here.parent
