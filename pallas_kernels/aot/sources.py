"""Which files of this package a kernel of an operation is made of, and a hash of them: they compile as they did.
"""

import ast
import functools
import hashlib
import pathlib

from pallas_kernels.aot.targets import KERNELS

PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def source_files(operation: str, kernel: str) -> list[pathlib.Path]:
    """Files that `pallas_kernels/<operation>/full_size.py` imports, directly or not, itself included, in order of name.

    Files named after another kernel are left out, with what only they import: a change of the GPU kernels is none of
    the TPU's. So are those of `pallas_kernels/aot`: they ask, and what they ask for is in `full_size.py`.
    """
    waiting, seen = [PACKAGE / operation / "full_size.py"], set()
    while waiting:
        path = waiting.pop()
        other = path.stem in KERNELS and path.stem != kernel
        if path in seen or other or (PACKAGE / "aot") in path.parents:
            continue
        seen.add(path)
        waiting += _imports(path)
    return sorted(seen)


def source_hash(operation: str, kernel: str) -> str:
    """Twelve hexadecimal digits of the names and bytes of `source_files`."""
    digest = hashlib.sha256()
    for path in source_files(operation, kernel):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@functools.cache
def _imports(path: pathlib.Path) -> list[pathlib.Path]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names]
    found = [PACKAGE.joinpath(*rest) for top, *rest in parts if top == PACKAGE.name]
    candidates = [path.with_suffix(".py") for path in found] + [path / "__init__.py" for path in found]
    return [path for path in candidates if path.is_file()]
