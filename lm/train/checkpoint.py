"""Checkpoints: step, parameters, optimizer, objective's carry, RNG and the position in the data, as one unit.

<workdir>/checkpoints/<step>/state holds the arrays, .../meta what identifies the data. Orbax writes into a temporary
folder and renames it when everything is there, so that a half-written checkpoint is never chosen. Where meta names a
`base`, the frozen parameters are read from that run (`lm.train.base`), and nothing of them is here.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from lm.core.tree import named_leaves
from lm.train import base as bases
from lm.train.base import FOLDER
from lm.train.guard import Guard, fresh_guard
from lm.train.options import CheckpointOptions
from lm.train.state import TrainState

log = logging.getLogger(__name__)


def checkpoint_folder(workdir: epath.PathLike) -> epath.Path:
    """<workdir>/checkpoints, absolute: orbax refuses to write below a relative path, and only when it saves."""
    folder = epath.Path(workdir) / FOLDER
    # `absolute()` would make a local path of gs://, which is absolute already.
    return folder if folder.is_absolute() else folder.absolute()


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous; `close` waits for it."""

    def __init__(self, workdir: epath.PathLike, options: CheckpointOptions):
        keep = [policies.LatestN(options.keep)]
        if options.keep_best:
            keep.append(policies.BestN(get_metric_fn=lambda m: m[options.best_metric], reverse=True,
                                       n=options.keep_best, keep_checkpoints_without_metrics=False))
        self._options = options
        self._folder = checkpoint_folder(workdir)
        self._manager = ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True,
                # Without it metrics are not written, and a resumed run would not know its best checkpoint.
                best_fn=(lambda m: m[options.best_metric]) if options.keep_best else None, best_mode="min",
                enable_async_checkpointing=True))

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any],
             metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save the state after `step` updates; does nothing where that step is saved already. Where meta
        names a `base`, what that run has is left out."""
        if step in self._manager.all_steps():
            return
        if meta.get("base") is not None:
            state = _replaced(state, bases.apart)
        best = {name: value for name, value in (metrics or {}).items() if name == self._options.best_metric}
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state),
                                                         meta=ocp.args.JsonSave(dict(meta))), metrics=best or None)

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """(state, meta) of a step, the newest by default, on the devices and in the shardings that `abstract` names.
        Waits for what is being saved."""
        self.wait()
        step = self._choose(step)
        base = bases.base_of(self._folder / str(step))
        held = abstract if base is None else _replaced(abstract, bases.apart)
        try:
            saved = saved_shapes(self._folder / str(step))
            held = held._replace(guard=_guard_like(saved, held))
            wrong = misfit(saved, held)
            if wrong:
                raise ValueError(wrong)
            out = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_of_its_age(saved, held)), meta=ocp.args.JsonRestore()))
        except (ValueError, KeyError, FileNotFoundError) as error:
            # Libraries add pages about the file that they were reading; the first line says what is wrong.
            raise ValueError(f"checkpoint {self._folder / str(step)} does not fit this config or is damaged: "
                             f"{next(iter(str(error).splitlines()), type(error).__name__)}. Start with the config it "
                             f"was made by, or delete that folder to go on from the one before") from error
        state = TrainState(**out["state"])
        if not _same_shapes(held.guard, abstract.guard):
            state = state._replace(guard=_fresh_guard(abstract.guard))
        if base is not None:
            frozen = _base_params(self._folder.parent, base, bases.own(abstract.params))
            state = state._replace(params={**frozen, **state.params}, ema=state.ema and {
                **jax.tree.map(jnp.copy, frozen), **state.ema})
        return state, dict(out["meta"])

    def _choose(self, step: int | None) -> int:
        steps = self.steps
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self._folder}; train there first, or check the path")
        if step is not None and step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self._folder}; there are {steps}")
        return steps[-1] if step is None else step

    def wait(self) -> None:
        """Until everything that was saved is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go."""
        self._manager.wait_until_finished()
        self._manager.close()

    def remove_if_empty(self) -> None:
        """A run that was refused before its first save leaves no folder behind. Object stores have no empty ones."""
        if "://" not in os.fspath(self._folder):
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)


@contextlib.contextmanager
def open_checkpoints(workdir: epath.PathLike, options: CheckpointOptions) -> Iterator[Checkpoints]:
    """`Checkpoints` that is closed at the end, whatever happens."""
    checkpoints = Checkpoints(workdir, options)
    try:
        yield checkpoints
    finally:
        checkpoints.close()
        checkpoints.remove_if_empty()


def _guard_like(saved: Mapping[str, Any], abstract: TrainState) -> Guard | None:
    """The guard that a checkpoint holds, to be read with it: it may have none, or one of another window."""
    there = saved.get("guard")
    if there is None:
        return None
    return Guard(**{name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=abstract.step.sharding)
                    for name, leaf in there.items()})


def _of_its_age(saved: Mapping[str, Any], abstract: TrainState) -> dict[str, Any]:
    """What orbax is asked for: the fields that there were when the checkpoint was written, also where they are None."""
    return {name: value for name, value in abstract._asdict().items() if name in saved or value is not None}


def _same_shapes(a: Any, b: Any) -> bool:
    return jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)


def _fresh_guard(abstract: Guard | None) -> Guard | None:
    """For a run that gets a guard, or another window, on its way."""
    if abstract is None:
        return None
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: fresh_guard(abstract.seen.shape[1]), out_shardings=placed)()


def _replaced(state: TrainState, part: Callable[[Any], Any]) -> TrainState:
    """The state with a part of its variables."""
    return state._replace(params=part(state.params), ema=state.ema and part(state.ema))


def saved_shapes(path: epath.Path) -> Any:
    """What the checkpoint folder `path` holds: the tree of a `TrainState` as dicts, with leaves that have a shape."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.metadata(path / "state").item_metadata
    if found is None:
        raise ValueError("it does not say which arrays it holds (its _METADATA is missing)")
    return found.tree


def misfit(saved: Any, abstract: Any) -> str:
    """Where the two trees differ in names or shapes, the first three leaves; empty where they agree.

    Asked before anything is read: orbax names no leaf, and its threads complain after it has given up.
    """
    held, asked = ({name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items() if hasattr(leaf, "shape")}
                   for tree in (saved, abstract))
    # A typed key is saved as the numbers in it.
    keys = {name for name, leaf in named_leaves(abstract).items() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)}
    wrong = [f"{name} is {held.get(name, 'absent')} there and {asked.get(name, 'absent')} in this config"
             for name in {**held, **asked} if held.get(name) != asked.get(name) and name not in keys]
    wrong.sort(key=lambda line: line.startswith("opt_state/"))  # a parameter says more than its moments
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def restore_params(workdir: epath.PathLike, abstract: Any, step: int | None = None, *,
                   ema: bool = False) -> tuple[Any, int]:
    """(parameters, step) of a run without its optimizer: for evaluation, sampling and `init_from`.

    abstract: tree of `jax.ShapeDtypeStruct` for the variables to load, with shardings where they should go; None loads
    everything as it was saved, as numpy arrays on the host.
    ema: the averaged parameters instead, where the run kept them.
    """
    folder = checkpoint_folder(workdir)
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint in {folder}; train there first, or check the path")
    steps = ocp.utils.checkpoint_steps(folder)
    if not steps:
        raise FileNotFoundError(f"no complete checkpoint in {folder}; train there first, or check the path")
    if step is not None and step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {folder}; there are {sorted(steps)}")
    step = max(steps) if step is None else step
    name = "ema" if ema else "params"
    path = folder / str(step) / "state"
    saved = saved_shapes(path.parent)
    if saved.get(name) is None:
        raise ValueError(f"checkpoint {path} holds no {name!r}" + (
            "; it is kept where config.optimizer.ema_decay is set" if ema else ""))
    base = bases.base_of(path.parent)
    if base is None:
        return _read(path, name, saved[name], abstract), step
    frozen = _base_params(epath.Path(workdir), base, None if abstract is None else bases.own(abstract))
    return {**frozen, **_read(path, name, saved[name], abstract and bases.apart(abstract))}, step


def _base_params(workdir: epath.Path, base: Mapping[str, Any], abstract: Any) -> dict[str, Any]:
    """The frozen variables of a run, from the run that has them."""
    path = epath.Path(bases.place(base, workdir)) / FOLDER / str(base["step"]) / "state"
    return _read(path, "params", bases.own(saved_shapes(path.parent)["params"]), abstract)


def _read(path: epath.Path, name: str, saved: Any, abstract: Any) -> Any:
    """The tree `name` of the checkpoint folder `path`, as `abstract` says or whole; saved: its shapes."""
    wrong = "" if abstract is None else misfit(saved, abstract)
    if wrong:
        raise ValueError(f"checkpoint {path.parent} does not fit this config: {wrong}")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        if abstract is None:
            abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), saved)
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
        else:
            args = ocp.checkpoint_utils.construct_restore_args(abstract)
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(
            item={name: abstract}, partial_restore=True, restore_args={name: args}))
    return tree[name]
