"""What a run says on stderr: our own messages, and of the libraries' only what is wrong."""

import logging
import os
import sys

OWN = ("launch", "lm", "experiments", "pallas_kernels")
# These report routine events as warnings (unfinished temporary folders, absent plugins, donated buffers).
CHATTY = ("absl", "etils", "flax", "grain", "jax", "matplotlib", "orbax", "tensorstore")


class Formatter(logging.Formatter):
    """Plain lines; a level in front where it is not INFO, the logger's name only with library messages."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        own = record.name.partition(".")[0] in OWN
        prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{prefix}{'' if own else f'{record.name}: '}{super().format(record)}"


class StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is at that moment: a live progress line replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record."""
        self.stream = sys.stderr
        super().emit(record)


def set_up_logging(verbosity: int = 0) -> None:
    """Routes all logging to stderr. verbosity 0: our messages, errors of libraries; 1: theirs too; 2: debug."""
    handler = StderrHandler()
    handler.setFormatter(Formatter("%(message)s"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    for name in OWN:
        logging.getLogger(name).setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET if verbosity else logging.ERROR)
    if not verbosity:
        # The C++ side of XLA and TensorStore: 2 keeps errors. It is read when jax is imported.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
