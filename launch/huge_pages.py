"""Large buffers on huge pages and kept from step to step, for training on CPUs.

XLA's CPU backend takes the temporary memory of a step from the system at every step and gives it back after: hundreds
of MiB that the kernel maps and clears page by page. With glibc's `hugetlb=1` it asks for huge pages, 512 times fewer;
with large buffers in the heap, one heap for all threads, and up to 1 GiB of it kept when freed, the next step finds
the memory of the last. glibc reads the settings when a process starts, so the command starts itself again, once.

XLA asks for aligned memory, and glibc cuts the ends off what it takes for that. In its lists of small pieces to be used
again they stay apart from what they were cut off; freed, that is then too small for the same request, and the temporary
memory of several steps piles up. Without these lists (all but that of the smallest pieces) freed memory grows together.
"""

import os
import sys
from collections.abc import Mapping

from launch.accelerators import choose_platform

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
TUNABLES = (f"{SETTING}=1", f"glibc.malloc.mmap_threshold={2**32}", f"glibc.malloc.trim_threshold={2**30}",
            "glibc.malloc.arena_max=1",     # heaps of other threads hold at most 64 MiB
            "glibc.malloc.mxfast=0", "glibc.malloc.tcache_max=24")
COMMANDS = ("train", "bench")


def environment(command: str, environ: Mapping[str, str]) -> dict[str, str] | None:
    """The environment to start again with, or None where that would not help: another command, no Linux, an
    accelerator that does the work, or a choice that the user has made (also `glibc.malloc.hugetlb=0`)."""
    tunables = environ.get(VARIABLE, "")
    if command not in COMMANDS or not sys.platform.startswith("linux") or SETTING in tunables:
        return None
    if environ.get("JAX_PLATFORMS") != "cpu":
        return None
    ours = (tunable for tunable in TUNABLES if tunable.split("=")[0] not in tunables)  # the user's stay
    return {**environ, VARIABLE: ":".join(part for part in (tunables, *ours) if part)}


def restart_with_huge_pages(argv: list[str]) -> None:
    """Replaces this process by the same command with the setting, where that helps; returns where it does not."""
    if not argv or argv[0] not in COMMANDS:
        return
    choose_platform()
    changed = environment(argv[0], os.environ)
    if changed is not None:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], changed)
