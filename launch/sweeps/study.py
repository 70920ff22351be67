"""The study behind a sweep, in Optuna: its storage, how it chooses, and who works on which trial.

A worker holds a lock on the folder of its trial, and hands it on to the training process. Whoever finds a trial that is
said to run and whose folder is not locked takes it up again: its worker was killed, and so was the training, or it has
ended since. So no trial is lost, and none is run by two at a time, on one machine or on several that share the folder.
"""

import fcntl
import logging
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from launch.sweeps.definition import Definition
from launch.sweeps.journal import JournalLock
from launch.sweeps.space import grid, suggest

log = logging.getLogger(__name__)
STUDY = "sweep"
VALUES, ERROR = "values", "error"  # of a trial's user attributes


class Held(NamedTuple):
    """A trial that this worker has, and the descriptor that locks its folder."""

    trial: Any
    folder: pathlib.Path
    lock: int

    @property
    def number(self) -> int:
        """Number in the study."""
        return self.trial.number

    def release(self) -> None:
        """Gives the trial up."""
        os.close(self.lock)


def optuna() -> Any:
    """The package. Raises ValueError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ValueError("lm sweep needs optuna: pip install 'loomlm[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def storage(definition: Definition, workdir: pathlib.Path) -> Any:
    """The storage object that all workers share."""
    package = optuna()
    if definition.storage is None:
        journal = package.storages.journal
        path = str((workdir / "study.journal").absolute())
        return package.storages.JournalStorage(journal.JournalFileBackend(path, lock_obj=JournalLock(path)))
    try:
        return package.storages.RDBStorage(definition.storage)
    except Exception as error:
        raise ValueError(f"--storage={definition.storage} cannot be opened: {error}") from None


def open_study(definition: Definition, workdir: pathlib.Path, kept: Any = None) -> Any:
    """The study, made where there is none, with a sampler that draws trial n from seed + n."""
    package = optuna()
    kept = storage(definition, workdir) if kept is None else kept
    name = STUDY if definition.storage is None else f"{STUDY}-{workdir.absolute().name}"
    study = package.create_study(study_name=name, storage=kept, load_if_exists=True, pruner=pruner(definition),
                                 directions=["maximize" if more else "minimize" for _, more in definition.goals])
    study.sampler = sampler(definition, len(study.get_trials(deepcopy=False)))
    return study


def sampler(definition: Definition, number: int) -> Any:
    """Of the trial with that number."""
    samplers, seed = optuna().samplers, definition.seed + number
    try:
        if definition.engine == "tpe":
            return samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True, group=True)
        if definition.engine == "cmaes":
            return samplers.CmaEsSampler(seed=seed)
        if definition.engine == "gp":
            return samplers.GPSampler(seed=seed)
    except ImportError as error:
        raise ValueError(f"--sampler={definition.engine} needs a package that is not installed: {error}") from None
    return samplers.RandomSampler(seed=seed)  # a grid is queued, and draws nothing


def pruner(definition: Definition) -> Any:
    """What decides when a trial is given up."""
    pruners = optuna().pruners
    return {"none": pruners.NopPruner, "median": pruners.MedianPruner, "asha": pruners.SuccessiveHalvingPruner,
            "hyperband": pruners.HyperbandPruner}[definition.pruner]()


class Queue:
    """Trials to work on, one after the other, for the workers of one process."""

    def __init__(self, definition: Definition, workdir: pathlib.Path):
        self.definition, self.workdir = definition, workdir
        self.storage = storage(definition, workdir)
        with self.locked():
            study = self.study()
            if definition.engine == "grid":  # whoever began with this may have been killed on the way
                there = len(study.get_trials(deepcopy=False))
                for chosen in grid(definition.space)[there:definition.num_trials]:
                    study.enqueue_trial(chosen)

    def study(self) -> Any:
        """The study as it is now."""
        return open_study(self.definition, self.workdir, self.storage)

    def locked(self) -> Any:
        """A block in which no other worker takes a trial."""
        return _Lock(self.workdir / "lock")

    def next(self) -> Held | None:
        """A trial whose worker is gone, or a new one; None where none is left."""
        with self.locked():
            held = next(self.abandoned(), None)
            if held is not None:
                return held
            study = self.study()
            trials = study.get_trials(deepcopy=False)
            states = optuna().trial.TrialState
            begun = sum(trial.state != states.WAITING for trial in trials)
            if begun >= self.definition.num_trials:
                return None
            trial = study.ask()
            self.choose(trial)
            return self.hold(trial)

    def take(self, most: int, workers: int = 1) -> list[Held]:
        """Several trials, as `next` gives them: up to `most`, and no more than the fair share of one of so many workers
        that have begun together."""
        if most > 1:
            trials = self.study().get_trials(deepcopy=False)
            ended = sum(trial.state.is_finished() for trial in trials)
            most = min(most, max(1, -(-(self.definition.num_trials - ended) // workers)))
        taken: list[Held] = []
        while len(taken) < most and (held := self.next()) is not None:
            taken.append(held)
        return taken

    def choose(self, trial: Any) -> None:
        """Settles what the trial's values are."""
        chosen = suggest(trial, self.definition.space)
        trial.set_user_attr(VALUES, {path: _plain(value) for path, value in chosen.items()})

    def abandoned(self) -> Iterator[Held]:
        """Trials that are said to run and that nobody works on."""
        package, study = optuna(), self.study()
        for frozen in study.get_trials(deepcopy=False, states=[package.trial.TrialState.RUNNING]):
            trial = package.trial.Trial(study, frozen._trial_id)
            held = self.hold(trial)
            if held is not None:
                study.sampler = sampler(self.definition, frozen.number)
                self.choose(trial)  # nothing new, but for a worker that was killed before it had chosen
                log.info("trial %d goes on: its worker is gone", frozen.number)
                yield held

    def hold(self, trial: Any) -> Held | None:
        """The trial with its folder locked, or None where another has it."""
        folder = self.workdir / "trials" / f"{trial.number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return Held(trial, folder, lock)


class _Lock:
    """A lock on a file, for the time of a block."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __enter__(self) -> None:
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *exc: Any) -> None:
        self.file.close()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
