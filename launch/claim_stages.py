"""A cell of a claim that trains more than once: each stage goes on from the parameters of the one before.

A stage of a cell's `then` is a dict of what is wanted of

  set: {path: value} over the config of the stage before.
  grow: {experts: N, freeze: ..., new_keys: ...} as the flags of `lm grow`, before this stage trains.
  evaluate: {name: {path: value}}: every checkpoint of this stage, and the last of the one before as step 0, is
    evaluated with the validation data of its own config under these overrides.

The numbers of the cell are those of its last stage; an evaluation's are `<name>/<metric>@<step>`, of the last step
also without it.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.claim_cell import CONFIG_FILE, RUN, train


def train_stages(folder: pathlib.Path, stages: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, float]]:
    """(exit code, numbers). What was done already, by a process that was killed, is not done again."""
    code, values = train(folder)
    before = RUN
    for n, stage in enumerate(stages, 2):
        if code:
            return code, {}
        source = f"grown_{n}" if "grow" in stage else before
        if source != before and not (folder / source).exists():
            grow(folder / before, folder / source, stage["grow"])
        config, run = f"config_{n}.json", f"{RUN}_{n}"
        write_config(folder / source, folder / config, stage.get("set", {}))
        code, values = train(folder, config, run, str(folder / source))
        if code == 0:
            for name, overrides in stage.get("evaluate", {}).items():
                steps = evaluations(folder / before, overrides, last=True) | evaluations(folder / run, overrides)
                values |= {f"{name}/{metric}@{step}": value for step, found in steps.items()
                           for metric, value in found.items()}
                values |= {f"{name}/{metric}": value for metric, value in steps[max(steps)].items()}
        before = run
    return code, values


def grow(source: pathlib.Path, out: pathlib.Path, flags: Mapping[str, Any]) -> None:
    """`lm grow`."""
    from launch import grow as command
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir")
    parser.add_argument("--config")
    command.add_arguments(parser)
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    args = parser.parse_args(["--workdir", str(source), "--out", str(out), *words])
    args.overrides = []
    command.main(args)


def write_config(source: pathlib.Path, path: pathlib.Path, overrides: Mapping[str, Any]) -> None:
    """The config of a run with overrides."""
    from launch import config as configs
    path.write_text(configs.to_json(configs.load(str(source / CONFIG_FILE), tuple(overrides.items()))))


def evaluations(workdir: pathlib.Path, overrides: Mapping[str, Any], last: bool = False
                ) -> dict[int, dict[str, float]]:
    """Step to metrics of the validation split, without `eval/validation/`; `last` is the newest alone, as step 0."""
    import jax

    from launch import config as configs
    from launch.restore import abstract_variables, open_run
    from lm.data.corpora import load_corpora
    from lm.data.loader import build_dataset
    from lm.eval.base import evaluate
    from lm.eval.options import VALIDATION
    from lm.eval.perplexity import Perplexity
    from lm.eval.sets import set_of
    from lm.train.checkpoint import open_checkpoints, restore_params
    run = open_run(str(workdir), overrides=tuple(overrides.items()))
    data = configs.options(run.config, "data")
    dataset = build_dataset(data, split=VALIDATION, corpora=load_corpora(data, run.tokenizer),
                            batch_size=run.config.train.batch_size, seq_len=run.config.train.seq_len)
    evaluator = Perplexity({VALIDATION: set_of(dataset, configs.options(run.config, "eval").batches)})
    with open_checkpoints(str(workdir), configs.options(run.config, "checkpoint")) as checkpoints:
        steps = [run.step] if last else checkpoints.steps
    out = {}
    for step in steps:
        params = run.params
        if step != run.step:
            params, _ = restore_params(str(workdir), abstract_variables(run.model, run.config, run.mesh), step)
        with jax.set_mesh(run.mesh):
            found = evaluate([evaluator], run.apply, params)
        out[0 if last else step] = {name.removeprefix(f"eval/{VALIDATION}/"): float(v) for name, v in found.items()}
    return out
