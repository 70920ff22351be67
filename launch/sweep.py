"""`lm sweep`: many runs of one experiment with different settings, by a grid or a search; resumable, parallel."""

import argparse
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

ACTIONS = ("run", "worker", "show")
FLAGS = ("sampler", "pruner", "trials", "seed", "storage")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm sweep`."""
    parser.add_argument("action", nargs="?", default="run", metavar="run|worker|show",
                        help="run (default): start or go on; worker: help a sweep that was started, from any machine "
                             "that sees its folder; show: its trials")
    parser.add_argument("--param", action="append", default=[], metavar="PATH=VALUES",
                        help="what varies: loguniform(a,b), uniform(a,b), int(a,b), logint(a,b), or values with commas "
                             "between; PATH,PATH=(1,2),(3,4) varies fields together")
    parser.add_argument("--objective", action="append", default=None, metavar="[max:]METRIC",
                        help="a number of final_result.json (default: eval/validation/loss); may be repeated")
    parser.add_argument("--sampler",
                        help="grid, random, tpe, cmaes or gp (default: grid where all are lists, else tpe)")
    parser.add_argument("--pruner", help="none (default), median, asha or hyperband, at evaluations")
    parser.add_argument("--trials", type=int, help="how many (default: all of a grid, else 20); may grow later")
    parser.add_argument("--seed", type=int, help="of the sampler (default: 0)")
    parser.add_argument("--storage", metavar="URL", help="sqlite:///FILE or postgresql://... (default: a file in DIR)")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="trials at a time here (default: one a GPU; on CPUs one a core)")
    parser.add_argument("--ray", metavar="ADDRESS",
                        help="run the trials on an existing Ray cluster by Ray Tune: auto, or HOST:PORT of its head")
    parser.add_argument("--vmap", type=int, default=1, metavar="N",
                        help="train up to N trials that differ in seed, learning rate and weight decay only as one "
                             "program, where a measurement at the start says that this is faster (default: 1)")


def main(args: argparse.Namespace) -> int:
    """Runs the command. Exit code 0 where all trials ended well, 1 where some failed, 75 where it was told to stop."""
    from launch.sweeps.definition import read
    from lm.core.fields import check_known
    check_known([args.action], ACTIONS, "lm sweep", "action")
    if args.workdir is None or "://" in args.workdir:
        raise ValueError(f"lm sweep needs --workdir DIR, a folder that all workers see; got {args.workdir}")
    workdir = pathlib.Path(args.workdir)
    if args.action == "run":
        definition = begin(args, workdir)
    else:
        given = [f"--{name}" for name in (*FLAGS, "param", "objective") if getattr(args, name)]
        if given or args.config or args.overrides:
            raise ValueError(f"lm sweep {args.action} reads the sweep from --workdir; leave out "
                             f"{', '.join(given) or '--config and its fields'}")
        definition = read(workdir)
    if args.action == "show":
        from launch.sweeps.table import show
        return show(definition, workdir)
    if args.ray is None:
        return work(definition, workdir, args.workers, args.vmap)
    if args.vmap != 1:
        raise ValueError("--ray gives every trial a place of its own; leave out --vmap")
    from launch.sweeps import on_ray
    from launch.sweeps.table import summary
    on_ray.work(definition, workdir, args.ray, args.workers)
    return 1 if summary(definition, workdir) else 0


def begin(args: argparse.Namespace, workdir: pathlib.Path) -> Any:
    """The sweep of this command line, checked against a sweep that the folder may hold, and kept there."""
    from launch import config as configs
    from launch.sweeps.definition import FILE, from_data, read, same
    from launch.sweeps.space import examples, parse_text
    from launch.sweeps.trial import BASE
    from lm.core.whole_file import write_text
    if args.config is None and (workdir / FILE).exists() and not (args.param or args.overrides):
        definition = read(workdir)
        if args.trials is not None:
            definition = grown(definition, args.trials, workdir)
        return definition
    given = from_file(args.config) if not args.param else {}
    for text in args.param:
        path, equals, values = text.partition("=")
        if not equals:
            raise ValueError(f"--param {text!r} must be PATH=VALUES, such as "
                             f"optimizer.learning_rate=loguniform(1e-4,1e-2)")
        given.setdefault("parameters", {})[path] = parse_text(values)
    given |= {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if args.objective is not None:
        given["objectives"] = args.objective
    definition = from_data(given, "the sweep")
    config = configs.from_args(args)
    for overrides in examples(definition.space):  # mistakes are found before the first trial, not in the last
        configs.load(args.config, [*args.overrides, *overrides])
    text = configs.to_json(config)
    if (workdir / FILE).exists():
        old = read(workdir)
        differs = same(old, definition)
        if differs or (workdir / BASE).read_text() != text:
            raise ValueError(f"{workdir} holds another sweep ({differs or 'its config differs'}); use another "
                             f"--workdir")
        return grown(old, definition.num_trials, workdir) if definition.num_trials > old.num_trials else old
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / BASE, text)
    definition.write(workdir)
    return definition


def grown(definition: Any, trials: int, workdir: pathlib.Path) -> Any:
    """The sweep with more trials. Raises ValueError for fewer, and for a grid, which has as many as it has."""
    import dataclasses
    if trials < definition.num_trials or (definition.engine == "grid" and trials != definition.num_trials):
        raise ValueError(f"--trials={trials}: the sweep of {workdir} has {definition.num_trials}"
                         f"{', all of its grid' if definition.engine == 'grid' else ', which can only grow'}")
    definition = dataclasses.replace(definition, trials=trials)
    definition.write(workdir)
    return definition


def from_file(spec: str | None) -> dict[str, Any]:
    """What `sweep()` of an experiment file gives; nothing where it has none."""
    from launch.config_files import experiment_file, experiment_module
    path, _ = experiment_file(spec or "")
    module = None if path is None else experiment_module(path)
    return dict(module.sweep()) if hasattr(module, "sweep") else {}


def work(definition: Any, workdir: pathlib.Path, workers: int | None, together: int = 1) -> int:
    """Works on trials until none is left. together: how many may share a program."""
    from launch.claim_grid import default_jobs
    from launch.places.local import visible_gpus
    from launch.sweeps.study import Queue
    from launch.sweeps.table import summary
    from lm.train.exit_codes import PREEMPTED
    gpus = visible_gpus(os.environ)
    count = (len(gpus) or default_jobs()) if workers is None else workers
    if count < 1 or (gpus and count > len(gpus)):
        raise ValueError(f"--workers={count} must be from 1 to {len(gpus) or 'the number of cores'}, one a device")
    if together < 1:
        raise ValueError(f"--vmap={together} must be at least 1")
    queue, stopping, errors = Queue(definition, workdir), threading.Event(), []
    before = {which: signal.signal(which, lambda *_: stopping.set()) for which in (signal.SIGTERM, signal.SIGINT)}
    environs = [environment(i, count, gpus) for i in range(count)]
    take = lambda: queue.take(together, workers=count)
    threads = [threading.Thread(target=one_worker, args=(queue, take, environ, stopping, errors))
               for environ in environs]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    if errors:
        raise errors[0]
    failed = summary(definition, workdir)
    if stopping.is_set():
        print("stopped; the same command goes on")
        return PREEMPTED
    return 1 if failed else 0


def environment(index: int, count: int, gpus: Sequence[str]) -> dict[str, str]:
    """Of one worker's runs: a GPU of its own, or on a CPU one thread where several share it."""
    from launch.claim_grid import child_environment
    if gpus:
        return {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[index]} if count > 1 else dict(os.environ)
    return child_environment(os.environ) if count > 1 else dict(os.environ)


def one_worker(queue: Any, take: Callable[[], Sequence[Any]], environ: dict[str, str], stopping: threading.Event,
               errors: list[BaseException]) -> None:
    """Takes trials until there are none. An error of ours stops the other workers too."""
    from launch.sweeps.groups import Groups
    from launch.sweeps.table import line
    try:
        groups = Groups(queue.definition, queue.workdir, environ, stopping)
        while not stopping.is_set():
            several = take()
            if not several:
                return
            try:
                for held, ended in groups.run(several):
                    print(line(held, ended), flush=True)
            finally:
                for held in several:
                    held.release()
    except BaseException as error:
        errors.append(error)
        stopping.set()
