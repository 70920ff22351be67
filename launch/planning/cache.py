"""Compiled plans kept between calls: by what was asked, by what compiles it, and by the code that it is made of."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from launch.kernels.process import ROOT

# What of this repository a compiled step depends on; data and evaluation are not in it.
_SOURCES = ("pallas_kernels", "lm/core", "lm/layers", "lm/models", "lm/losses", "lm/optim", "lm/adapters", "lm/tasks",
            "lm/train", "lm/generate", "launch/recipe.py", "launch/adapters.py", "launch/planning/program.py",
            "launch/planning/compile_step.py")
KEPT = ("ok", "too large")  # other ends may be those of a busy machine
RESULT, PROGRAM = "result.json", "program.hlo.gz"


def cache_dir() -> pathlib.Path:
    """loomlm/plan in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "loomlm" / "plan"


def entry(asked: Mapping[str, Any], compiler: str) -> pathlib.Path:
    """The folder of this question."""
    text = json.dumps([asked, compiler, source_hash()], sort_keys=True)
    return cache_dir() / hashlib.sha256(text.encode()).hexdigest()[:20]


def load(folder: pathlib.Path) -> dict[str, Any] | None:
    """What is kept there; None for nothing, or a part."""
    try:
        result = json.loads((folder / RESULT).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return result if result["status"] != "ok" or (folder / PROGRAM).exists() else None


def store(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Keeps the result, last, so that what is there is whole."""
    if result["status"] not in KEPT:
        return
    part = folder / f"{RESULT}.{os.getpid()}"
    part.write_text(json.dumps(dict(result), indent=1) + "\n")
    part.replace(folder / RESULT)


@functools.cache
def source_hash() -> str:
    """Twelve hexadecimal digits of the files that a compiled step is made of."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
