"""One side of a benchmark as a process: it answers each line of its input with a line of JSON.

`warm N` runs N steps that do not count; `time N` gives the seconds of N steps; `report` says what was run, and the peak
resident memory above that after imports.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def resident_mib() -> float:
    """Resident memory of this process now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def peak_mib() -> float:
    """Highest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(build: Callable[[], tuple[Callable[[], float], dict[str, Any]]]) -> None:
    """Builds the step, then answers until the input ends. `build` returns (step, facts); a step returns its loss and
    must have finished when it returns."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing but answers may go to the pipe
    before = resident_mib()
    step, facts = build()
    first = step()

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(first_loss=first)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "report":
            answer(**facts, peak_above_imports_mib=peak_mib() - before)
            continue
        seconds = []
        for _ in range(int(rest[0])):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        answer(seconds=seconds)
