"""What a sweep is, as it is kept in its workdir (`sweep.json`): every worker on every machine reads it from there."""

import dataclasses
import json
import pathlib
from typing import Any

from launch.sweeps.space import Parameter, grid, read_space
from lm.core.fields import check_known, did_you_mean, option
from lm.core.whole_file import write_text

FILE = "sweep.json"
SAMPLERS = ("grid", "random", "tpe", "cmaes", "gp")
PRUNERS = ("none", "median", "asha", "hyperband")
FIELDS = ("parameters", "objectives", "sampler", "pruner", "trials", "seed", "storage")


@dataclasses.dataclass(frozen=True)
class Definition:
    """parameters: see `space`. objectives: metrics of final_result.json of which less is better, or more with "max:" in
    front; the first is the one that pruning looks at."""

    parameters: dict[str, Any] = option({}, "what varies")
    objectives: tuple[str, ...] = option(("eval/validation/loss",), "metrics; 'max:NAME' where more is better")
    sampler: str | None = option(None, "grid, random, tpe, cmaes or gp (default: grid where all are lists, else tpe)")
    pruner: str = option("none", "none, median, asha or hyperband: ends trials that fall behind at evaluations")
    trials: int | None = option(None, "how many trials (default: all of a grid, else 20)")
    seed: int = option(0, "of the sampler")
    storage: str | None = option(None, "sqlite:///FILE, postgresql://..., or None for a journal file in the workdir")

    @property
    def space(self) -> list[Parameter]:
        """What varies, in order."""
        return read_space(self.parameters)

    @property
    def engine(self) -> str:
        """The sampler."""
        return self.sampler or ("grid" if all(p.values is not None for p in self.space) else "tpe")

    @property
    def num_trials(self) -> int:
        """How many trials."""
        return self.trials or (len(grid(self.space)) if self.engine == "grid" else 20)

    @property
    def goals(self) -> list[tuple[str, bool]]:
        """(metric, whether more is better)."""
        return [(goal.removeprefix("max:"), goal.startswith("max:")) for goal in self.objectives]

    def check(self) -> None:
        """Raises ValueError for what cannot be swept."""
        if not self.parameters:
            raise ValueError("the sweep varies nothing: give --param PATH=VALUES, or a sweep() in the experiment file")
        space = self.space
        for name, value, known in (("sampler", self.engine, SAMPLERS), ("pruner", self.pruner, PRUNERS)):
            if value not in known:
                raise ValueError(f"--{name}={value}{did_you_mean(value, known) or ''}; there are {', '.join(known)}")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"--trials={self.trials} must be at least 1")
        if self.engine == "grid":
            grid(space)
        if self.engine == "cmaes" and any(p.values is not None or p.when for p in space):
            raise ValueError("--sampler=cmaes searches ranges of numbers, without lists and conditions; use tpe")
        if not self.objectives or (len(self.objectives) > 1 and self.pruner != "none"):
            raise ValueError(f"pruning compares one objective, and there are {len(self.objectives)}; leave out "
                             f"--pruner")

    def write(self, workdir: pathlib.Path) -> None:
        """Keeps it."""
        write_text(workdir / FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def from_data(given: dict[str, Any], where: str) -> Definition:
    """A definition of plain data, checked. Raises ValueError naming `where`."""
    from lm.core.fields import build
    check_known(given, FIELDS, where, "entry")
    return build(Definition, json.loads(json.dumps(given)), where)


def read(workdir: pathlib.Path) -> Definition:
    """The definition of a workdir. Raises ValueError where there is none."""
    if not (workdir / FILE).exists():
        raise ValueError(f"{workdir} has no {FILE}: it is no sweep; start one with lm sweep --config FILE.py --workdir "
                         f"{workdir}")
    return from_data(json.loads((workdir / FILE).read_text()), str(workdir / FILE))


def same(old: Definition, new: Definition) -> str | None:
    """What differs between two definitions of one workdir, beside the number of trials, which may grow; or None."""
    for field in dataclasses.fields(Definition):
        a, b = (json.loads(json.dumps(getattr(d, field.name))) for d in (old, new))
        if field.name == "trials":
            if new.num_trials < old.num_trials:
                return f"trials from {old.num_trials} to {new.num_trials}"
        elif a != b:
            return f"{field.name} from {a!r} to {b!r}"
    return None
