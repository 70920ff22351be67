"""What a run says on stderr: our own messages, and of the libraries' only what is wrong."""

import logging
import os
import pathlib
import sys

import absl.logging  # noqa: F401 (it must make the logger "absl" itself, of a class that finds the caller)

OWN = ("launch", "lm", "experiments", "pallas_kernels")
# These report routine events as warnings (unfinished temporary folders, absent plugins, donated buffers).
CHATTY = ("absl", "etils", "flax", "grain", "jax", "matplotlib", "orbax", "tensorstore")
_FOLDERS = tuple(str(pathlib.Path(__file__).resolve().parent.parent / name) + os.sep for name in OWN)


def is_own(record: logging.LogRecord) -> bool:
    """Whether our code said it, by a logger of its own or by absl's, which we share with orbax and others."""
    name = record.name.partition(".")[0]
    return name in OWN or (name == "absl" and record.pathname.startswith(_FOLDERS))


class Formatter(logging.Formatter):
    """Plain lines; a level in front where it is not INFO, the logger's name only with library messages."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{prefix}{'' if is_own(record) else f'{record.name}: '}{super().format(record)}"


class StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is at that moment: a live progress line replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record."""
        self.stream = sys.stderr
        super().emit(record)


def _is_wanted(record: logging.LogRecord) -> bool:
    """Our messages, errors of chatty libraries, warnings of the others."""
    chatty = record.name.partition(".")[0] in CHATTY
    return is_own(record) or record.levelno >= (logging.ERROR if chatty else logging.WARNING)


def set_up_logging(verbosity: int = 0) -> None:
    """Routes all logging to stderr. verbosity 0: our messages, errors of libraries; 1: theirs too; 2: debug."""
    handler = StderrHandler()
    handler.setFormatter(Formatter("%(message)s"))
    if not verbosity:
        handler.addFilter(_is_wanted)
        # The C++ side of XLA and TensorStore: 2 keeps errors. It is read when jax is imported.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    own = logging.DEBUG if verbosity > 1 else logging.INFO
    for name in (*OWN, "absl"):
        logging.getLogger(name).setLevel(own)
    for name in CHATTY[1:]:
        logging.getLogger(name).setLevel(logging.NOTSET if verbosity else logging.ERROR)
