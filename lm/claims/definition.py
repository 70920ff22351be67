"""What a claim is: a file with `get_config()`, `grid()` and `check(results)`, read and checked before anything runs."""

import ast
import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lm.core.fields import check_known, conform, did_you_mean

FUNCTIONS = ("get_config", "grid", "check")
NOT_CLAIMS = ("__init__", "base")
MIN_SEEDS = 3
TITLES = ("Claim", "Command", "Hardware", "Expected")
# What an entry of `grid()` may say: type, and what counts where it is not given.
ENTRY = {"arm": (str, None), "seed": (int, None), "set": (dict, {}), "measure": (str, "train"), "alone": (bool, False),
         "then": (list, [])}
STAGE = {"set": dict, "grow": dict, "evaluate": dict}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid. arm: what is compared. seed: of `train.seed`. overrides: (path, value) over the claim's
    config. measure: "train" runs the train loop, other names are those of `lm.claims.measures`. alone: no other cell
    runs at the same time, for timings. then: what is trained after that, see `launch/claim_stages.py`."""

    arm: str
    seed: int
    overrides: tuple[tuple[str, Any], ...]
    measure: str = "train"
    alone: bool = False
    then: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Unique in the grid; also the name of its folder."""
        return f"{self.arm}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim file that was read: its name, docstring and module."""

    name: str
    path: pathlib.Path
    module: ModuleType

    @property
    def text(self) -> dict[str, str]:
        """The lines of the docstring that begin with a title of `TITLES`, each with the lines that go on after it."""
        out: dict[str, str] = {}
        title = None
        for line in (ast.get_docstring(ast.parse(self.path.read_text())) or "").splitlines():
            head, colon, rest = line.partition(": ")
            if colon and head in TITLES:
                title, line = head, rest
            out |= {title: f"{out.get(title, '')} {line.strip()}".strip()} if title and line.strip() else {}
            title = title if line.strip() else None
        return out

    def cells(self, full: bool = False) -> list[Cell]:
        """The grid, or the long one. Raises ValueError for entries that are none, and names that come twice."""
        cells = [_cell(entry, f"grid() of {self.path.name}, entry {n}")
                 for n, entry in enumerate(self.module.grid(full=full))]
        names = [cell.name for cell in cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"grid() of {self.path.name} has {twice[0]!r} twice; give each setting an arm of its own")
        few = [arm for arm in {c.arm: 0 for c in cells} if sum(c.arm == arm for c in cells) < MIN_SEEDS]
        if few or not cells:
            raise ValueError(f"grid() of {self.path.name} needs at least {MIN_SEEDS} seeds of every arm; "
                             f"{few[0] if few else 'it is empty'!r} has fewer")
        return cells


def _cell(entry: Any, where: str) -> Cell:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a dict of {', '.join(ENTRY)}; got {entry!r}")
    check_known(entry, ENTRY, where, "key")
    given = {name: entry.get(name, default) for name, (_, default) in ENTRY.items()}
    for name, (kind, _) in ENTRY.items():
        try:
            conform(given[name], kind)
        except TypeError:
            raise ValueError(f"{where}: {name} must be {kind.__name__}; got {given[name]!r}") from None
    if "/" in given["arm"] or not given["arm"]:
        raise ValueError(f"{where}: arm={given['arm']!r} names a folder; it must not be empty or hold '/'")
    for n, stage in enumerate(given["then"]):
        check_known(stage, STAGE, f"{where}, then[{n}]", "key")
    if given["then"] and given["measure"] != "train":
        raise ValueError(f"{where}: then= is for cells that train; this one measures {given['measure']!r}")
    overrides = (*given["set"].items(), ("train.seed", given["seed"]))
    return Cell(given["arm"], given["seed"], overrides, given["measure"], given["alone"], tuple(given["then"]))


def names(folder: pathlib.Path) -> list[str]:
    """The claims of a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in NOT_CLAIMS)


def read(spec: str, folder: pathlib.Path) -> Claim:
    """The claim of that name in `folder`, or of a file FILE.py.

    Raises ValueError or FileNotFoundError where there is none, or where it lacks one of the three functions.
    """
    path = pathlib.Path(spec) if spec.endswith(".py") else folder / f"{spec}.py"
    if not path.is_file() or (path.parent == folder and path.stem in NOT_CLAIMS):
        known = names(folder)
        raise FileNotFoundError(f"there is no claim {spec!r}{did_you_mean(spec, known)}; claims: {', '.join(known)}, "
                                f"or a file FILE.py")
    module_spec = importlib.util.spec_from_file_location(f"claim_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    missing = [name for name in FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        raise ValueError(f"{path} has no function {missing[0]}(); a claim defines {', '.join(FUNCTIONS)}")
    return Claim(path.stem, path, module)
