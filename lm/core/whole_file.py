"""Small files that are written in one piece."""

import os
import secrets

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """Writes the file in one piece: a reader, or a crash, finds the old text or the new, never half of it."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(path):  # object stores publish an object when it is complete
        path.write_text(text)
        return
    beside = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
