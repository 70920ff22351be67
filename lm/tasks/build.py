"""From the `loss` group of a config to an objective.

The group names losses of `lm.losses.LOSSES`; a value is the weight, or a mapping of `weight` and the loss's options:

    loss = dict(next_token=1.0, z_loss=1e-4)

At most one of them may be of `lm.losses.preference.PREFERENCE`: it makes the objective one of pairs, and the others
then see the chosen responses.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lm.core.fields import build, check_known, did_you_mean, fill
from lm.core.types import Objective, State
from lm.losses import LOSSES, REPORTED, TAUGHT
from lm.losses.base import Term
from lm.losses.preference import PREFERENCE
from lm.losses.preference.reference import REFERENCES
from lm.tasks.goldfish import GOLDFISH, resolve_goldfish
from lm.tasks.language_modeling import LanguageModeling
from lm.tasks.passed_memory import PassedMemory
from lm.tasks.preference import PreferenceObjective

CHUNK, REFERENCE = "chunk", "reference"  # options that belong to the objective, not to a loss


def terms() -> dict[str, Any]:
    """Every loss that the group may name: those of predictions, of a teacher's predictions, of preferences, and those
    that layers report."""
    return {**LOSSES, **TAUGHT, **PREFERENCE, **REPORTED}


def resolve_loss(given: Mapping[str, Any]) -> dict[str, Any]:
    """The complete `loss` group; raises ValueError for unknown losses, options or types, and for a sum that is empty
    or whose weights are all 0."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        if name == CHUNK:
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"config.loss.chunk must be an int of at least 1, or None; got {value!r}")
            out[name] = value
            continue
        if name == REFERENCE:
            continue
        if name == GOLDFISH:
            continue
        if name not in terms():
            raise ValueError(f"config.loss has no loss {name!r}{did_you_mean(name, (*terms(), GOLDFISH)) or '.'} "
                             f"It takes: {', '.join(terms())}, {CHUNK}, {GOLDFISH}")
        out[name] = _resolve_term(name, value)
    if not any(name in terms() for name in out):
        if given and not set(given) <= {CHUNK, GOLDFISH}:
            raise ValueError("config.loss needs at least one loss, e.g. dict(next_token=1.0)")
        out = {"next_token": 1.0, **out}
    weights = {name: value["weight"] if isinstance(value, Mapping) else value
               for name, value in out.items() if name != CHUNK}
    pairs = [name for name in weights if name in PREFERENCE]
    if len(pairs) > 1:
        raise ValueError(f"config.loss names {' and '.join(pairs)}; one preference loss makes an objective, beside "
                         f"losses of predictions")
    reference = given.get(REFERENCE)
    if reference is not None and (not pairs or reference not in REFERENCES):
        raise ValueError(f"config.loss.reference={reference!r} belongs to a preference loss "
                         f"({', '.join(PREFERENCE)}) and is {', '.join(REFERENCES)} or None")
    if not any(weights.values()):
        raise ValueError(f"config.loss: every weight is 0 ({', '.join(weights)}), so nothing would be learned; give at "
                         f"least one loss a weight")
    if not any(weight for name, weight in weights.items() if name in {**LOSSES, **TAUGHT, **PREFERENCE}):
        raise ValueError(f"config.loss: {', '.join(weights)} only adds to a loss of predictions, and there is none; "
                         f"give one a weight, e.g. next_token=1.0")
    taught = [name for name in weights if name in TAUGHT]
    if taught and (pairs or given.get(GOLDFISH) is not None):
        raise ValueError(f"config.loss.{taught[0]}: there are no predictions of a teacher for "
                         f"{'pairs' if pairs else 'rows that ' + GOLDFISH + ' takes targets out of'}; leave one of "
                         f"them out")
    if pairs and given.get(GOLDFISH) is not None:
        raise ValueError(f"config.loss.{GOLDFISH} takes targets out, and {pairs[0]} needs every token of a response; "
                         f"leave one of them out")
    return {**out, **resolve_goldfish(given.get(GOLDFISH)), CHUNK: out.get(CHUNK),
            **({REFERENCE: reference} if pairs else {})}


def _resolve_term(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        options = {k: v for k, v in value.items() if k != "weight"}
        if isinstance(terms()[name], type):
            build(terms()[name], options, f"config.loss.{name}")  # for its own check
            options = fill(terms()[name], options, f"config.loss.{name}")
        else:
            check_known(options, (), f"config.loss.{name}", "option besides weight:")
        return {"weight": _weight(name, value.get("weight", 1.0)), **options}
    if isinstance(terms()[name], type):
        return {"weight": _weight(name, value), **fill(terms()[name], {}, f"config.loss.{name}")}
    return _weight(name, value)


def _weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"config.loss.{name} must be a number (its weight) or a mapping with `weight`; got {value!r}")
    return float(value)


def build_objective(config: Mapping[str, Any], *, carry_state: bool = False, pass_memory: float | None = None,
                    initial_state: Callable[[int], State] | None = None,
                    not_additive: tuple[str, ...] = ()) -> Objective:
    """The objective that the `loss` group describes (resolved or not). carry_state: rows go on from step to step.
    pass_memory: or begin, as often as that, after the memory of the step before; needs the model's initial_state.
    not_additive: what in the model makes a batch more than the sum of its microbatches."""
    resolved = resolve_loss(config)
    chunk, reference = resolved.pop(CHUNK), resolved.pop(REFERENCE, None)
    resolved.pop(GOLDFISH, None)
    made = {}
    for name, value in resolved.items():
        if isinstance(value, Mapping):
            options = {k: v for k, v in value.items() if k != "weight"}
            loss = terms()[name](**options) if isinstance(terms()[name], type) else terms()[name]
            made[name] = Term(loss, value["weight"])
        else:
            made[name] = Term(terms()[name], value)
    alone = tuple(name for name in made if name in REPORTED and not REPORTED[name].additive)
    for name in (name for name in made if name in PREFERENCE):
        if carry_state or pass_memory is not None:
            raise ValueError(f"config.loss.{name} compares whole responses; leave out train.carry_state and "
                             f"train.pass_memory")
        rest = {other: term for other, term in made.items() if other != name}
        return PreferenceObjective(name, made[name].loss, made[name].weight, rest, reference, chunk,
                                   (*alone, *not_additive))
    inner = LanguageModeling(made, chunk, carry_state or pass_memory is not None, (*alone, *not_additive))
    return inner if pass_memory is None else PassedMemory(inner, initial_state, pass_memory)
