"""What the exit code of a run says to a launcher or a scheduler."""

DONE = 0
CONFIG = 2  # the config or the input is wrong; trying again changes nothing
STORAGE = 74  # the workdir took no more: full disk, lost mount, a bucket that refuses; the last checkpoint is whole
PREEMPTED = 75  # told to stop; saved, and the same command goes on
NONFINITE = 76  # the loss or gradient is NaN or infinite
HUNG = 77  # a step did not finish in time
