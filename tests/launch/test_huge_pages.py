"""Starting again with huge pages: when, and that the command is the same."""

import os
import subprocess
import sys

import pytest

from launch.huge_pages import VARIABLE, environment

SETTINGS = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=1073741824:"
            "glibc.malloc.arena_max=1:glibc.malloc.mxfast=0:glibc.malloc.tcache_max=24")


@pytest.mark.parametrize("command, environ, want", [
    ("train", {"JAX_PLATFORMS": "cpu"}, SETTINGS),
    ("train", {"JAX_PLATFORMS": "cpu", VARIABLE: "glibc.malloc.check=1"},
     f"glibc.malloc.check=1:{SETTINGS}"),
    ("train", {"JAX_PLATFORMS": "cpu", VARIABLE: "glibc.malloc.arena_max=8"},
     f"glibc.malloc.arena_max=8:{SETTINGS.replace(':glibc.malloc.arena_max=1', '')}"),
    ("train", {"JAX_PLATFORMS": "cpu", VARIABLE: "glibc.malloc.hugetlb=0"}, None),
    ("train", {"JAX_PLATFORMS": "tpu"}, None),
    ("train", {}, None),
    ("config", {"JAX_PLATFORMS": "cpu"}, None),
])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_when(command, environ, want):
    changed = environment(command, environ)
    assert (changed or {}).get(VARIABLE) == want
    assert changed is None or {k: v for k, v in changed.items() if k != VARIABLE}.items() <= environ.items()


def test_the_command_and_its_exit_code_stay_the_same(tmp_path):
    """`lm train` of a file that is not there: one line and code 2, started again or not."""
    command = [sys.executable, "-m", "launch.cli", "train", "--config", "nowhere.py", "--workdir", str(tmp_path)]
    plain = {k: v for k, v in os.environ.items() if k != VARIABLE}
    outs = [subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
            for env in (plain, {**plain, VARIABLE: "glibc.malloc.hugetlb=0"})]
    assert [(out.returncode, out.stderr) for out in outs] == [(2, outs[0].stderr)] * 2
    assert "nowhere.py" in outs[0].stderr
