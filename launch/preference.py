"""What a config that learns from preferences needs: its reference model, and a loss that fits the data."""

from collections.abc import Callable
from typing import Any

from launch import adapters


def loss_of(config: Any) -> str | None:
    """The name of the config's preference loss, None where it has none."""
    from lm.losses.preference import PREFERENCE
    return next((name for name in config.loss if name in PREFERENCE), None)


def objective_of(config: Any) -> Any:
    """The config's `PreferenceObjective`, None where it has none."""
    from lm.tasks.build import build_objective
    return None if loss_of(config) is None else build_objective(config.loss.to_dict())


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
    if objective.loss.needs_mismatched and not mismatched(data):
        raise ValueError(f"config.loss.{name} estimates its baseline from responses to other prompts; set "
                         f"config.data.mismatched=True (made rows: config.data.task.mismatched)")
    if objective.loss.needs_reference and objective.reference == "adapters_off" and not adapters.used(train):
        raise ValueError("config.loss.reference='adapters_off' is the model without its adapters, and there are none; "
                         "set config.train.lora_rank, or reference='copy'")


def mismatched(data: Any) -> bool:
    """Whether rows hold responses to other prompts."""
    return data.build_task().mismatched if data.kind != "pairs" else data.mismatched


def copy_of(config: Any, options: Any, boxed: Any) -> Callable[[], Any] | None:
    """What makes the carry of a run whose reference is a copy of the variables, None for others. boxed: their shapes
    with logical axes. The copy itself is taken by `with_reference`, when the variables are there."""
    import jax
    import jax.numpy as jnp
    objective = objective_of(config)
    if objective is None or not objective.keeps_copy(adapters.used(options)):
        return None
    return lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxed)


def with_reference(config: Any, state: Any) -> Any:
    """A fresh state whose carry, where it is to be a copy, is that of its own variables."""
    import jax
    import jax.numpy as jnp
    if objective_of(config) is None or not jax.tree.leaves(state.carry):
        return state
    return state._replace(carry=jax.tree.map(jnp.copy, state.params))
