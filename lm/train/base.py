"""The run that frozen parameters came from: adapters are saved without them, and they are read there again."""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

BESIDE = ("lora", "state")  # collections that learn beside a frozen model
FOLDER = "checkpoints"


def apart(params: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved of a model whose own parameters stay as they are in another run."""
    return {name: tree for name, tree in params.items() if name in BESIDE}


def own(params: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own variables, without what learns beside them."""
    return {name: tree for name, tree in params.items() if name not in BESIDE}


def describe(base: epath.PathLike, step: int, workdir: epath.PathLike) -> dict[str, Any]:
    """What a checkpoint of `workdir` notes of the run `base` that its frozen parameters are read from."""
    noted = base_of(epath.Path(base) / FOLDER / str(step))
    if noted is not None:  # adapters on adapters: the parameters are where those had them from
        return describe(place(noted, base), noted["step"], workdir)
    path = os.fspath(base)
    remote = "://" in path
    return {"workdir": path if remote else os.path.abspath(path), "step": step,
            "beside": None if remote or "://" in os.fspath(workdir) else os.path.relpath(path, os.fspath(workdir)),
            "identity": identity(epath.Path(base) / FOLDER / str(step))}


def base_of(checkpoint: epath.Path) -> dict[str, Any] | None:
    """What a checkpoint folder notes of its base; None where it holds all parameters itself."""
    file = checkpoint / "meta" / "metadata"
    return json.loads(file.read_text()).get("base") if file.exists() else None


def identity(checkpoint: epath.Path) -> int | None:
    """When a checkpoint was completed, in ns: moved or copied it stays itself, and written anew it does not."""
    file = checkpoint / "_CHECKPOINT_METADATA"
    return json.loads(file.read_text()).get("commit_timestamp_nsecs") if file.exists() else None


def place(base: Mapping[str, Any], workdir: epath.PathLike) -> str:
    """The workdir where the base of a run in `workdir` is now: where it was, or as it lay beside it.

    Raises ValueError where its checkpoint is gone, or is another than the adapters were trained on.
    """
    tried = [base["workdir"]]
    if base.get("beside") and "://" not in os.fspath(workdir):
        tried.append(os.path.normpath(os.path.join(os.fspath(workdir), base["beside"])))
    found = [path for path in tried if (epath.Path(path) / FOLDER / str(base["step"])).exists()]
    if not found:
        raise ValueError(f"{workdir} holds what was trained beside a frozen model, and not the model: that is step "
                         f"{base['step']} of {' or '.join(dict.fromkeys(tried))}, which is not there; bring it back")
    same = [path for path in found if identity(epath.Path(path) / FOLDER / str(base["step"])) == base["identity"]]
    if not same:
        raise ValueError(f"step {base['step']} of {found[0]} is not the checkpoint that {workdir} was trained beside: "
                         f"it was written anew since; bring that one back")
    return same[0]
