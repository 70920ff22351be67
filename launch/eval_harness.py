"""`lm eval --task harness`: tasks of lm-evaluation-harness, from local files, on any run."""

import argparse
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

NAME = "harness"
STDERR = "_stderr"     # ends the names of standard errors
FLAGS = ("harness_tasks", "harness_path", "fewshot", "questions")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the task."""
    group = parser.add_argument_group(f"--task {NAME}")
    group.add_argument("--harness-tasks", metavar="NAME,NAME", help="tasks and groups, by name")
    group.add_argument("--harness-path", metavar="DIR", help="folder of task files (YAML). Without it the tasks that "
                                                             "lm-eval ships are meant, whose data it downloads")
    group.add_argument("--fewshot", type=int, metavar="N", help="examples in front of each question (default: the "
                                                                "task's own number)")
    group.add_argument("--questions", type=int, metavar="N", help="at most N questions of each task")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags of another task, and for what is missing, before anything is loaded."""
    given = [name for name in FLAGS if getattr(args, name) is not None]
    if args.task != NAME:
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} belongs to --task {NAME}; add it")
        return
    if not args.harness_tasks:
        raise ValueError("--task harness needs --harness-tasks NAME,NAME")
    if args.harness_path is not None and not pathlib.Path(args.harness_path).is_dir():
        raise ValueError(f"--harness-path {args.harness_path} is no folder; give one with the YAML files of tasks")
    for name, least in (("fewshot", 0), ("questions", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}; got {getattr(args, name)}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--task harness runs lm-evaluation-harness, which is not installed; pip install "
                         "'loomlm[harness]'")


def main(args: argparse.Namespace) -> int:
    """Measures, prints, and keeps the numbers in <workdir>/eval/<step>.json."""
    from launch import eval as command
    from launch.restore import open_run
    names, manager = tasks(args.harness_tasks.split(","), args.harness_path)
    run = open_run(args.workdir, args.step, overrides=args.overrides, ema=args.ema)
    return command.conclude(args, run.step, measure(run, names, manager, args), print_table)


def tasks(names: list[str], path: str | None) -> tuple[list[str], Any]:
    """(names, lm-eval's manager of tasks). Raises ValueError for names that are not among its tasks."""
    import difflib

    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=path, include_defaults=path is None)
    names = [name.strip() for name in names]
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            known = f"did you mean {near[0]!r}?" if near else f"tasks: {', '.join(sorted(manager.all_tasks)[:20])}"
            raise ValueError(f"--harness-tasks has no {name!r}; {known}")
    return names, manager


def measure(run: Any, names: list[str], manager: Any, args: argparse.Namespace) -> dict[str, float]:
    """`eval/<task>/<metric>`, with `<metric>_stderr` where the harness estimates it."""
    import jax
    import lm_eval

    from lm.eval.harness import HarnessModel
    with jax.set_mesh(run.mesh):
        model = HarnessModel(run.apply, run.params, run.model.initial_state, run.tokenizer,
                             add_bos=run.config.data.add_bos, max_length=run.model.max_positions,
                             batch_size=run.config.train.batch_size)
        found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, num_fewshot=args.fewshot,
                                        limit=args.questions, log_samples=False, bootstrap_iters=1000)
    return flat({**found["results"], **found.get("groups", {})})


def flat(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness' results, {task: {"acc,none": ..., "acc_stderr,none": ...}}, under our names. A filter other than
    none stays part of the metric's name."""
    out = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if kind and isinstance(value, int | float) and not isinstance(value, bool):
                whole = metric.removesuffix(STDERR) + ("" if kind == "none" else f"_{kind}")
                out[f"eval/{task}/{whole}{STDERR if metric.endswith(STDERR) else ''}"] = float(value)
    return out


def print_table(metrics: Mapping[str, float], title: str) -> None:
    """One line a task and metric."""
    from rich.console import Console
    from rich.table import Table
    table = Table(title=title, title_justify="left")
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("value", "standard error"):
        table.add_column(heading, justify="right")
    for name, value in metrics.items():
        task, _, metric = name.removeprefix("eval/").rpartition("/")
        error = metrics.get(f"{name}{STDERR}")
        if not metric.endswith(STDERR):
            table.add_row(task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    Console(highlight=False, soft_wrap=True).print(table)

