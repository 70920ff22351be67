"""From what a user names (file, folder, glob, something inside a package) to a list of files, local or gs://."""

import codecs
import contextlib
import fnmatch
import gzip
import importlib.util
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from lm.core.fields import did_you_mean

_GLOB = "*?["


def package_folder(package: str) -> epath.Path:
    """The folder of an installed package, without importing it (its dependencies may be slow or absent)."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no package {package!r} is installed; pip install {package.replace('_', '-')}, or name "
                         f"another source")
    return epath.Path(next(iter(spec.submodule_search_locations)))


def _matches(base: epath.Path, parts: tuple[str, ...]) -> Iterator[epath.Path]:
    """What a pattern, divided at its slashes, matches under `base`. (epath's own glob refuses `**`.)"""
    head, rest = parts[0], parts[1:]
    if head == "**":
        yield from _matches(base, rest or ("*",))
        for path in base.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                yield from _matches(path, parts)
        return
    for path in base.iterdir():
        if fnmatch.fnmatchcase(path.name, head) and (head.startswith(".") or not path.name.startswith(".")):
            if not rest:
                yield path
            elif path.is_dir():
                yield from _matches(path, rest)


def find_files(path: str, suffixes: tuple[str, ...], *, package: str | None = None) -> list[epath.Path]:
    """Files in sorted order: the file itself, what a glob matches, or everything under a folder that ends in one of
    `suffixes`. Raises ValueError where nothing is found."""
    whole = package_folder(package) / path if package else epath.Path(path).expanduser()
    try:
        whole.exists()
    except ImportError as error:
        raise ValueError(f"data path {str(whole)!r}: {error}; pip install gcsfs (gs://) or s3fs (s3://)") from None
    parts = whole.parts
    first = next((i for i, part in enumerate(parts) if any(c in part for c in _GLOB)), None)
    if first is not None and not whole.exists():
        base = epath.Path(*parts[:first])
        found = sorted({p for p in _matches(base, parts[first:]) if p.is_file()}) if base.is_dir() else []
        if not found:
            raise ValueError(f"no file matches {str(whole)!r}; check the pattern, which may use *, ? and **")
        return found
    if whole.is_dir():
        found = sorted({p for p in _matches(whole, ("**", "*")) if p.name.endswith(suffixes) and p.is_file()})
        if not found:
            raise ValueError(f"folder {str(whole)!r} holds no file ending in {' or '.join(suffixes)}; name other files "
                             f"with a glob such as {str(whole / '*')!r}")
        return found
    if not whole.exists():
        near = ""
        if whole.parent.is_dir():
            near = did_you_mean(whole.name, (p.name for p in whole.parent.iterdir()))
        raise ValueError(f"no file or folder {str(whole)!r}{near}")
    return [whole]


@contextlib.contextmanager
def open_binary(path: epath.Path) -> Iterator[BinaryIO]:
    """The file for reading, decompressed where its name ends in .gz."""
    with path.open("rb") as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as inflated:
                yield inflated
        else:
            yield file


def read_text(path: epath.Path) -> str:
    """The whole file as UTF-8, without the mark that some editors put first. Raises ValueError for bytes that are
    not, naming the first of them."""
    try:
        with open_binary(path) as file:
            data = file.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again, or rename it") from None
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from None


def read_lines(path: epath.Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a UTF-8 file, streamed."""
    number = 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise _not_utf8(f"{path}:{number}", error) from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}:{number + 1} is not a whole gzip file ({error}); fetch it again, or rename "
                         f"it") from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{where} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; convert "
                      f"it, for example with `iconv -t utf-8`")


def one_file(path: str, package: str | None) -> epath.Path:
    """One existing file (a tokenizer's). Raises ValueError where the path is not exactly one file."""
    found = find_files(path, ("",), package=package)
    if len(found) != 1:
        raise ValueError(f"{path!r} must be one file; it names {len(found)}")
    return found[0]
