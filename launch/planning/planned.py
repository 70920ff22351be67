"""One plan: a config on a machine, compiled, and what came of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from launch.planning.ask import ask, full_mesh
from launch.planning.compiled import compiled
from launch.planning.figures import GIB, figures
from launch.planning.machines import Machine
from lm.core.undivided import Undivided, undivided


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all plans of one call share. compiler: its name and versions. limit: seconds for one compilation. decode:
    rows and their room, or None for the train step. tokenizer: the config's."""

    machine: Machine
    python: str
    compiler: str
    limit: float
    decode: tuple[int, int] | None
    tokenizer: Any
    refresh: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """flags: overrides of the config that it was asked for. result: of the compiler; numbers: of
    `launch.planning.figures` where it compiled, else None. undivided: mesh axes that leave parameters whole."""

    config: Any
    mesh: Mapping[str, int]
    flags: Sequence[str]
    result: Mapping[str, Any]
    numbers: Mapping[str, Any] | None
    undivided: Sequence[Undivided] = ()

    @property
    def fits(self) -> bool:
        """Compiled, and within a device's memory."""
        return self.numbers is not None and self.numbers["fits"]

    @property
    def seconds(self) -> float:
        """Of a step whose collectives are hidden; infinite where none is known."""
        return self.numbers["overlapped"]["seconds"] if self.numbers and "overlapped" in self.numbers else float("inf")


def make_plan(config: Any, setting: Setting, flags: Sequence[str] = ()) -> Plan:
    """Compiles, or takes what is kept. Raises ValueError for what the machine cannot split."""
    from lm.data.tokenizer import special_ids
    from lm.models.build import abstract_params, build_model
    machine, tokenizer = setting.machine, setting.tokenizer
    asked = ask(config, machine, vocab_size=tokenizer.vocab_size, special=special_ids(tokenizer),
                teacher_k=teacher_k(config), decode=setting.decode)
    result = compiled(asked, setting.python, setting.compiler, setting.limit, refresh=setting.refresh)
    numbers, mesh = None, full_mesh(config, machine)
    model = build_model(config.model.to_dict(), tokenizer.vocab_size)
    if result["status"] == "ok":
        numbers = figures(result, machine, unknown_trips=1.0 if setting.decode else unheard(model),
                          causal=causal(model), **needed(config, model, setting.decode))
    return Plan(config, mesh, tuple(flags), result, numbers, tuple(undivided(abstract_params(model), mesh)))


def needed(config: Any, model: Any, decode: tuple[int, int] | None) -> dict[str, Any]:
    """tokens of a step, FLOPs that the model needs for them, and steps of the run, as MFU is defined in docs/flops.md;
    of decoding, forward FLOPs at the mean length."""
    from launch import adapters
    from launch import config as configs
    if decode is not None:
        return dict(tokens=decode[0], flops=decode[0] * model.flops_per_token(decode[1]), steps=1)
    train = configs.options(config, "train")
    passes = model.passes(train.seq_len, 1.0 if adapters.used(train) else 2.0)
    tokens = train.batch_size * train.seq_len
    return dict(tokens=tokens, flops=passes * model.flops_per_token(train.seq_len) * tokens, steps=train.steps)


def unheard(model: Any) -> float:
    """Mean trips of the one loop whose number a train step draws: iterations of recurrent depth without gradient."""
    from lm.models.depth_draws import mean_iterations
    depth = getattr(model, "depth", None)
    if depth is None:
        return 1.0
    return mean_iterations(depth.mean, depth.sigma) - mean_iterations(depth.mean, depth.sigma, depth.backprop)


def causal(model: Any) -> bool:
    """Whether all attention is to every position before."""
    from lm.models.build import layers_of
    return all(getattr(layer, "window", None) is None and not hasattr(layer, "block") for layer in layers_of(model))


def teacher_k(config: Any) -> int | None:
    """How many tokens of a teacher each target comes with; None without one."""
    from launch import config as configs
    data = configs.options(config, "data")
    if config.loss.get("distill") is None or data.teacher is None:
        return None
    import json

    from etils import epath

    from lm.data.teacher import MANIFEST
    return json.loads((epath.Path(data.teacher) / MANIFEST).read_text())["k"]


def needs(plan: Plan) -> float | None:
    """GiB of a device that the program needs, as far as it is known."""
    if plan.numbers is not None:
        return plan.numbers["total"] / GIB
    return plan.result["used"] / GIB if plan.result["status"] == "too large" else None
