"""Which errors say that the place of a run took no more: a full disk, a lost mount, a bucket that refuses."""

import errno
import re
from collections.abc import Iterator

ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN,
                    errno.ETIMEDOUT})
# What tensorstore, whose errors are ValueErrors and RuntimeErrors, calls the same, and what it was doing.
WORDS = re.compile(r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|UNAUTHENTICATED|DEADLINE_EXCEEDED|DATA_LOSS|"
                   r"No space left|File too large|Disk quota|Read-only file system|Input/output error|"
                   r"Stale file handle")
DOING = re.compile(r"[Ww]rit|gs://|gcs|local_file|file://")
CLIENTS = re.compile(r"(gcsfs|fsspec|s3fs|aiohttp|botocore|google\.(auth|api_core|cloud)|requests|urllib3)(\.|$)")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def refusal(error: BaseException) -> str | None:
    """One line of what the storage said, or None where the error is about something else."""
    for one in chain(error):
        line = next(iter(str(one).splitlines()), "") or type(one).__name__
        if isinstance(one, OSError) and one.errno in ERRNOS:
            return line
        if CLIENTS.match(type(one).__module__):
            return line
        text = str(one)
        found = WORDS.search(text)
        if found and DOING.search(text):
            return line if found.group() in line else f"{found.group()}: {line}"
    return None
