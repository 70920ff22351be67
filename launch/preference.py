"""What a config that learns from preferences needs: its reference model, and a loss that fits the data."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch import adapters

MESSAGES = 20  # steps whose pairs are named one by one; later ones are counted
CACHE = "reference.npy"  # in the workdir: log-probabilities of the reference model, see `lm.tasks.reference_cache`


def loss_of(config: Any) -> str | None:
    """The name of the config's preference loss, None where it has none."""
    from lm.losses.preference import PREFERENCE
    return next((name for name in config.loss if name in PREFERENCE), None)


def objective_of(config: Any) -> Any:
    """The config's `PreferenceObjective`, None where it has none."""
    return None if loss_of(config) is None else _made(config.loss.to_dict())


def _made(loss: Mapping[str, Any]) -> Any:
    from lm.tasks.build import build_objective
    return build_objective(loss)


def holds_pairs(data: Any) -> bool:
    """Whether a data group's rows are pairs."""
    from lm.data.options import PAIRS
    task = None if data.sources else data.build_task()
    return getattr(task, "pairs", False) or data.kind == PAIRS


def check(config: Any, data: Any, train: Any) -> None:
    """Raises ValueError where loss and data do not fit each other."""
    objective, pairs, name = objective_of(config), holds_pairs(data), loss_of(config)
    if (objective is not None) != pairs:
        what = f"config.loss.{name} needs pairs, and" if objective is not None else \
            "config.loss has no preference loss (such as orpo=1.0), and"
        raise ValueError(f"{what} config.data.source={data.kind!r} holds {'pairs' if pairs else 'none'}; "
                         f"docs/preferences.md says how they are prepared")
    if objective is None:
        return
    if train.state_tuning:
        raise ValueError("config.train.state_tuning needs rows of one document, and a row of pairs holds several")
    if config.loss.get("goldfish"):
        raise ValueError(f"config.loss.goldfish takes targets out of texts, and {name} compares whole responses; leave "
                         f"one of them out")
    if objective.loss.needs_mismatched and not mismatched(data):
        raise ValueError(f"config.loss.{name} estimates its baseline from responses to other prompts; set "
                         f"config.data.mismatched=True (made rows: config.data.task.mismatched)")
    if objective.loss.needs_reference and objective.reference == "adapters_off" and not adapters.used(train):
        raise ValueError("config.loss.reference='adapters_off' is the model without its adapters, and there are none; "
                         "set config.train.lora_rank, or reference='copy'")


def check_rows(config: Any, train_set: Any) -> None:
    """Raises ValueError where the loss compares pairs, and the rows hold none."""
    from lm.losses.preference import Kto
    objective = objective_of(config)
    if objective is not None and not isinstance(objective.loss, Kto) and getattr(train_set, "num_pairs", None) == 0:
        raise ValueError(f"config.loss.{loss_of(config)} compares the responses of pairs, and config.data holds "
                         f"{train_set.num_documents} responses that stand alone and no pair; use config.loss.kto, "
                         f"which learns from these, or data with chosen and rejected responses")


def mismatched(data: Any) -> bool:
    """Whether rows hold responses to other prompts."""
    return data.build_task().mismatched if data.kind != "pairs" else data.mismatched


def copy_of(loss: Mapping[str, Any], options: Any, boxed: Any) -> Callable[[], Any] | None:
    """What makes the carry of a run whose reference is a copy of the variables, None for others. loss: the group;
    boxed: their shapes with logical axes. `with_reference` takes the copy itself, when the variables are there."""
    import jax
    import jax.numpy as jnp

    from lm.losses.preference import PREFERENCE
    if not any(name in PREFERENCE for name in loss) or not _made(loss).keeps_copy(adapters.used(options)):
        return None
    return lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxed)


def with_reference(prepared: Any, state: Any, workdir: str) -> Any:
    """A fresh state whose carry, where it is to be a copy, is that of its own variables; where log-probabilities of the
    reference are to be cached, they are computed and written into the workdir now."""
    import jax
    import jax.numpy as jnp
    objective = objective_of(prepared.config)
    if objective is None:
        return state
    if objective.reference == "cached":
        _cache(prepared, state.params, workdir)
    return state._replace(carry=jax.tree.map(jnp.copy, state.params)) if jax.tree.leaves(state.carry) else state


def _cache(prepared: Any, params: Any, workdir: str) -> None:
    import functools

    import jax
    from etils import epath

    from lm.models.build import make_apply
    from lm.tasks.reference_cache import write
    from lm.train.feed import to_device
    if jax.process_count() > 1:
        raise ValueError("config.loss.reference='cached' is computed by one process; use reference='copy' or "
                         "'adapters_off' with several")
    if not hasattr(prepared.train_set, "row_places"):
        raise ValueError(f"config.loss.reference='cached' is for pairs that come again (source='pairs'), and "
                         f"{prepared.train_set.name} makes new ones at every step; use reference='copy'")
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    place = functools.partial(to_device, mesh=prepared.mesh, index=0, count=1)
    prepared.train_set.reader.reference = write(epath.Path(workdir) / CACHE, make_apply(prepared.model), params,
                                                prepared.train_set, place, on_nonfinite=prepared.options.on_nonfinite)


def attach(prepared: Any, workdir: str) -> None:
    """Reads the cached log-probabilities of a run that goes on."""
    from etils import epath

    from lm.tasks.reference_cache import read
    objective = objective_of(prepared.config)
    if objective is not None and objective.reference == "cached" and prepared.train_set.reader.reference is None:
        prepared.train_set.reader.reference = read(epath.Path(workdir) / CACHE, prepared.train_set,
                                                   on_nonfinite=prepared.options.on_nonfinite)


def telling(train_set: Any, on_nonfinite: str) -> Callable[[int, Sequence[tuple[int, int]]], None]:
    """Told of a step and the (row, group) of its batch whose log-probabilities are not finite, it names their lines, of
    the first MESSAGES such steps; then it counts."""
    from lm.data.preference.places import first_of
    place = getattr(train_set, "place", lambda step, row, group: f"row {row}, pair {group}")
    steps = pairs = 0

    def tell(step: int, marked: Sequence[tuple[int, int]]) -> None:
        nonlocal steps, pairs
        steps, pairs = steps + 1, pairs + len(marked)
        so_far = f"; {pairs} in {steps} steps so far" if steps > 1 else ""
        if steps > MESSAGES:
            if steps & (steps - 1) == 0:  # every power of two
                logging.warning("pairs with log-probabilities that are not finite, up to step %d%s", step, so_far)
            return
        logging.warning("step %d: %d of the pairs have log-probabilities that are not finite%s: %s%s", step,
                        len(marked), ", and are left out" if on_nonfinite == "skip" else "",
                        first_of([place(step - 1, *where) for where in marked]), so_far)
    return tell


def reporting(train_set: Any) -> Callable[[int, int, int], Any]:
    """`train_set.batch` for a step that went wrong: it also says which lines the pairs of that batch come from."""
    if not hasattr(train_set, "places"):
        return train_set.batch

    def batch_at(step: int, index: int, count: int) -> Any:
        logging.error("the batch of step %d holds the pairs of %s", step + 1, ", ".join(train_set.places(step)))
        return train_set.batch(step, index, count)
    return batch_at
