"""Read the final instruction schedule that libtpu writes when it compiles: cycles without a TPU.

A TPU core issues one bundle a cycle, in the order that the compiler laid down. So the bundles of a loop body times its
trips are the cycles of the kernel, waiting for memory excluded. Every bundle is counted as if it ran in each trip:
bundles under a condition, such as filling the state in a row's first block, make the sum an upper bound.

libtpu writes the schedule when LIBTPU_INIT_ARGS holds `dump_flags(folder)` as it is loaded. Per kernel there are
`*-final_bundles.txt`, the bundles with loop bodies marked, and `*-final_hlo-static-per-bundle-utilization.txt`, the
issue slots that each bundle uses, with their names and number in its head.
"""

import math
import pathlib
import re
from typing import NamedTuple

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:(LB|LH|LE|PB|PF|CT):?\s*)?:?\s*((?:>\s*)*)\{")
_PHI = re.compile(r"= sphi (%\w+), (%\w+)")      # of a loop's head: from before it, from its trip before
# The pipeline over the grid takes as many trips more as it has stages, in which the loops inside are jumped over.
_STAGE = re.compile(r"/\* (?:phi copy :: )?iteration index, stage = (\d+)")
_SPILLS = ("VLOAD:FILL", "VSTORE:SPILL", "FILL", "SPILL")


class Body(NamedTuple):
    """A loop body, without the bodies of the loops inside. depth 0 is straight code, 1 the grid, 2.. loops inside."""
    at: str                    # address of its first bundle
    depth: int
    bundles: int
    trips: int | None          # of this loop alone; None where the bound is not a constant
    runs: int | None           # trips of it and of all loops around it
    shares: dict[str, float]   # of the issue slots of each unit that its bundles use
    spills: int                # loads and stores of spilled vector registers


class Schedule(NamedTuple):
    kernel: str
    bodies: list[Body]
    slots: dict[str, int]      # issue slots of each unit, a cycle

    @property
    def cycles(self) -> int:
        """Bundles times trips, over all bodies whose trips are known."""
        return sum(body.bundles * body.runs for body in self.bodies if body.runs is not None)

    @property
    def complete(self) -> bool:
        """Whether the trips of every body are known."""
        return all(body.runs is not None for body in self.bodies)

    @property
    def inner(self) -> Body:
        """The body that takes the most cycles."""
        return max(self.bodies, key=lambda body: body.bundles * (body.runs or 1))


def dump_flags(folder: str) -> str:
    """What LIBTPU_INIT_ARGS has to be."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def read_schedules(folder: pathlib.Path, kernels: list[str], trips: int | None = None) -> list[Schedule]:
    """Schedules of the named kernels, in that order; trips: of loops inside whose bound is not a constant.

    Raises FileNotFoundError where the compiler wrote none.
    """
    out = []
    for kernel in kernels:
        pattern = re.compile(rf"^\d+-{re.escape(kernel)}(\.\d+)?-\d+-final_bundles\.txt$")
        finals = sorted(path for path in folder.iterdir() if pattern.match(path.name))
        if not finals:
            raise FileNotFoundError(f"the compiler wrote no schedule of {kernel!r} to {folder}")
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", finals[-1].name)
        tables = sorted(folder.glob(f"{stem}-*final_hlo-static-per-bundle-utilization.txt"))
        out.append(parse(kernel, finals[-1].read_text(errors="replace"), tables[-1].read_text() if tables else "",
                         trips))
    return out


def parse(kernel: str, bundles: str, utilization: str, unknown: int | None = None) -> Schedule:
    """One schedule from the text of the two files; unknown: trips of loops inside whose bound is not a constant."""
    slots, used = parse_utilization(utilization)
    groups = _bodies(bundles)
    trips = [_trips(group["text"], bundles) if group["depth"] else 1 for group in groups]
    trips = [unknown if own is None and group["depth"] > 1 else own for own, group in zip(trips, groups, strict=True)]
    bodies = []
    for group, own in zip(groups, trips, strict=True):
        if not group["rows"]:
            continue
        around = [None if trips[i] is None else trips[i] - groups[i]["stages"] for i in group["chain"][:-1]]
        runs = None if None in around or own is None else math.prod([*around, own])
        counts = {unit: sum(used[row][i] for row in group["rows"] if row < len(used)) for i, unit in enumerate(slots)}
        shares = {unit: counts[unit] / (slots[unit] * len(group["rows"])) for unit in slots if unit not in _SPILLS}
        bodies.append(Body(group["at"], group["depth"], len(group["rows"]), own, runs, shares,
                           sum(count for unit, count in counts.items() if unit in _SPILLS)))
    return Schedule(kernel, bodies, slots)


def parse_utilization(text: str) -> tuple[dict[str, int], list[list[int]]]:
    """(issue slots a unit, slots used by each bundle). Units and their number differ between versions of libtpu."""
    names: list[str] = []
    numbers: list[list[int]] = []
    for line in text.splitlines():
        if "," in line and not names:
            names = [name.strip() for name in line.split(",")]
        elif re.match(r"^\s*\d", line):
            numbers.append([int(x) for x in line.split()])
    if not names or not numbers:
        return {}, []
    return dict(zip(names, numbers[0], strict=True)), numbers[1:]


def _bodies(text: str) -> list[dict]:
    """Loop bodies in order of their first bundle: rows, text, the loops around with itself, and pipeline stages.

    A bundle's arrows are its depth, but code from after a loop may stand, under a condition, in bundles of the loop and
    shows the lesser depth, and empty bundles show none. So a body goes on to the last bundle of its depth.
    """
    bundles = []                      # (address, depth or None, whether a loop begins, text)
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            address, tag, arrows = match.groups()
            empty = line[match.end():].lstrip()[:1] == "}"
            bundles.append([address, None if empty else arrows.count(">"), tag == "LB", line])
        elif bundles:                 # the rest of a long comment
            bundles[-1][3] += "\n" + line
    out = [dict(at="0x0", depth=0, end=len(bundles), rows=[], text="", chain=[0])]
    open_bodies = [0]
    for row, (address, depth, begins, line) in enumerate(bundles):
        while out[open_bodies[-1]]["end"] <= row:
            open_bodies.pop()
        if begins:
            open_bodies.append(len(out))
            out.append(dict(at=address, depth=depth, end=_end(bundles, row), rows=[], text="", chain=[*open_bodies]))
        body = out[open_bodies[-1]]
        body["rows"].append(row)
        body["text"] += line + "\n"
    for body in out:
        body["stages"] = max(map(int, _STAGE.findall(body["text"])), default=0)
    return out


def _end(bundles: list, first: int) -> int:
    """The row after the last one of the loop that begins at `first`."""
    depth, end = bundles[first][1], first + 1
    for row in range(first + 1, len(bundles)):
        _, other, begins, _ = bundles[row]
        if other is None:
            continue
        if begins and other <= depth:
            break
        if other >= depth:
            end = row + 1
    return end


def _trips(own: str, everything: str) -> int | None:
    """Trips of the loop with this body, where they are constant: from its exit test, its step and its start.

    The exit test may stand in the bundles of a loop inside. It is that on a value that the loop's head takes from the
    trip before.
    """
    for start, counter in _PHI.findall(own):
        test = re.search(rf"scmp\.(ge|gt)\.s32\.totalorder (?:\(!?%\w+\), )?{counter}, (\d+) /\* loop exit test",
                         everything)
        begin = re.search(rf"{start} = smov (?:\(!?%\w+\), )?(\d+)\b", everything)
        step = _step(counter, everything)
        if test and begin and step:
            return -(-(int(test[2]) + (test[1] == "gt") - int(begin[1])) // step)
    return None


def _step(counter: str, text: str) -> int | None:
    """What is added to the counter a trip; the sum may have been spilled to scalar memory and read back."""
    spilled = re.search(rf"{counter} = sld \[smem:\[(#\w+)\]\]", text)
    if spilled:
        stored = re.search(rf"sst \[smem:\[{spilled[1]}\]\] (%\w+)", text)
        return _step(stored[1], text) if stored and stored[1] != counter else None
    added = re.search(rf"{counter} = sadd\.s32 (?:\(!?%\w+\), )?(\d+), %\w+", text)
    return int(added[1]) if added else None
