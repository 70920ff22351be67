"""The lock on a study's journal file, and what it does about a half-written last line.

Optuna's own lock is a file that a killed process leaves behind: others then wait for half a minute, and where the path
is relative for ever. This one is the kernel's, which lets go when its holder ends, and asks no clock.
"""

import fcntl
import os


class JournalLock:
    """What `optuna.storages.journal.JournalFileBackend(path, lock_obj=...)` asks of a lock."""

    def __init__(self, path: str):
        self._path = path
        self._held: int | None = None

    def acquire(self) -> bool:
        """Waits for the lock; then a record that was cut off by a kill or a full disk is dropped: it was never told to
        anybody, and the next record would be glued to it."""
        held = os.open(f"{self._path}.flock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(held, fcntl.LOCK_EX)
        self._held = held
        drop_torn_line(self._path)
        return True

    def release(self) -> None:
        """Gives it up."""
        held, self._held = self._held, None
        os.close(held)


def drop_torn_line(path: str) -> None:
    """Cuts the file off after its last newline."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        end, piece = size, b""
        while end and b"\n" not in piece:
            start = max(end - 4096, 0)
            file.seek(start)
            piece = file.read(end - start)
            if b"\n" in piece:
                start += piece.rindex(b"\n") + 1
            end = start
        if end < size:
            file.truncate(end)
