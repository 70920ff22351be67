"""From a definition to the runs of a ladder: config, steps, parameters, tokens and FLOPs of each, before any runs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.scales.definition import Definition, label
from lm.claims.definition import Cell
from lm.scaling.analysis import Next, Run

BODY_IS_NOT = ("embed", "position", "head")


class Rung(NamedTuple):
    """One run: the process that trains it, its config, and what it costs. ahead: whether it is a size to predict."""

    cell: Cell
    config: Any
    size: str
    params: int
    tokens: int
    flops: float
    ratio: float | None
    budget: float | None
    ahead: bool

    def run(self, loss: float) -> Run:
        """The run with its loss."""
        return Run(self.size, self.cell.seed, float(self.params), float(self.tokens), self.flops, loss, self.ratio,
                   self.budget)


def ladder(definition: Definition, config: str, overrides: Sequence[tuple[str, Any]]) -> list[Rung]:
    """All runs, the cheapest first, those of the next sizes after them. Raises ValueError for a size that cannot be
    built, and for one that would be trained for less than ten steps."""
    out = []
    for ahead, values in ((False, definition.parameter.values), (True, definition.next)):
        rungs = [rung for value in values for rung in rungs_of(definition, config, overrides, value, ahead)]
        out += sorted(rungs, key=lambda rung: rung.flops)
    return out


def rungs_of(definition: Definition, spec: str, overrides: Sequence[tuple[str, Any]], value: Any, ahead: bool
             ) -> list[Rung]:
    """The runs of one size. A size ahead is trained at the ratios alone, as no parabola predicts a loss."""
    from launch import config as configs
    chosen = [*overrides, *definition.overrides(value)]
    config = configs.load(spec, chosen)
    params, a_token = cost(config, definition.count)
    a_step = config.train.batch_size * config.train.seq_len
    lengths = [(f"tpp{ratio:g}", ratio * params, ratio, None) for ratio in definition.tokens_per_parameter]
    if not ahead:
        lengths += [(f"c{budget:g}", budget / a_token, None, budget) for budget in definition.flops]
    out = []
    for name, tokens, ratio, budget in lengths:
        steps = round(tokens / a_step)
        if steps < 10:
            raise ValueError(f"size {label(value)} with {name} would be trained for {tokens:,.0f} tokens, {steps} "
                             f"steps of {a_step:,}; give more tokens, or a smaller config.train.batch_size")
        for seed in definition.seeds:
            set_ = (*chosen, ("train.steps", steps), ("train.seed", seed))
            tokens = steps * a_step
            out.append(Rung(Cell(f"{label(value)}-{name}", seed, tuple(set_)), configs.load(spec, set_), label(value),
                            params, tokens, a_token * tokens, ratio, budget, ahead))
    return out


def cost(config: Any, count: str) -> tuple[int, float]:
    """(N, training FLOPs a token) of a config's model."""
    from launch import adapters
    from launch import config as configs
    from lm.core.tree import named_leaves
    from lm.data.corpora import load_tokenizer
    from lm.models.build import abstract_params, build_model
    if adapters.used(configs.options(config, "train")):
        raise ValueError("lm scale trains whole models, and this config trains adapters or states beside a frozen one; "
                         "leave out train.lora_rank and train.state_tuning")
    model = build_model(config.model.to_dict(), load_tokenizer(configs.options(config, "data")).vocab_size)
    leaves = named_leaves({"params": abstract_params(model)["params"]})
    # The value of a boxed leaf is the last step of its path.
    kept = [leaf for name, leaf in leaves.items() if count == "all" or name.split("/")[0] not in BODY_IS_NOT]
    length = config.train.seq_len
    return sum(math.prod(leaf.shape) for leaf in kept), model.passes(length) * model.flops_per_token(length)


def ahead_of(rungs: Sequence[Rung]) -> list[Next]:
    """What is predicted: each next size at each ratio, once."""
    found = {(rung.size, rung.ratio): Next(rung.size, float(rung.params), float(rung.tokens), rung.flops, rung.ratio)
             for rung in rungs if rung.ahead}
    return list(found.values())
