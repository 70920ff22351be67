"""`lm launch PLACE`: starts a training, or workers of a sweep, on this machine, Slurm, TPU VMs, GKE or GPU clouds."""

import argparse
import importlib
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from launch.places import PLACES, SAME_FILES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm launch`: those of all places, each with the places that take it."""
    parser.add_argument("place", metavar="|".join(PLACES), help="where")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and start nothing")
    parser.add_argument("--name", help="of the job (default: the workdir's last part)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE",
                        help="variable of the run; no secret")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE",
                        help="shell line before the run, such as 'module load cuda' (not for local)")
    parser.add_argument("--sweep-worker", action="store_true",
                        help="start a worker of the sweep in --workdir, in place of a training")
    parser.add_argument("--vmap", type=int, metavar="N", help="of --sweep-worker: as of lm sweep worker")
    for flag, (hint, words) in flags().items():
        kinds = [arm for arm in (typing.get_args(hint) or (hint,)) if arm is not types.NoneType]
        if typing.get_origin(hint) is tuple:
            parser.add_argument(flag, action="append", default=None, help=words)
        elif kinds == [bool]:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=words)
        else:
            parser.add_argument(flag, type=kinds[0], default=None, help=words, metavar=kinds[0].__name__.upper())


def flags() -> dict[str, tuple[Any, str]]:
    """Flag to the type of its field and its help, over the option classes of all places."""
    import dataclasses

    from lm.core.fields import field_types
    found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for place in PLACES:
        cls = options_class(place)
        hints = field_types(cls)
        for field in dataclasses.fields(cls):
            _, docs = found.setdefault(flag_of(field.name), (hints[field.name], {}))
            default = "" if field.default in (None, (), False, "") else f" (default: {field.default})"
            docs.setdefault(field.metadata["doc"] + default, []).append(place)
    return {flag: (hint, "; ".join(f"{', '.join(places)}: {doc}" for doc, places in docs.items()))
            for flag, (hint, docs) in found.items()}


def flag_of(field: str) -> str:
    """The flag of an option."""
    return "--" + field.replace("_", "-")


def options_class(place: str) -> type:
    """The options of a place."""
    return importlib.import_module(PLACES[place]).Options


def main(args: argparse.Namespace) -> int:
    """Checks the config here, then prints or starts. Returns the exit code of the run where it is waited for."""
    from launch import config as configs
    from launch.config_workdir import check_place
    from launch.places.job import Job, absolute, name_of, parse_env, train_words
    from lm.core.fields import check_known
    check_known([args.place], PLACES, "lm launch", "place")
    if args.workdir is None:
        raise ValueError(f"lm launch {args.place} needs --workdir DIR, where checkpoints and logs go")
    if args.place == "local" or "://" not in args.workdir:  # else the client of the bucket is needed there, not here
        check_place(args.workdir)
    if args.place not in SAME_FILES and args.config is not None and os.path.isabs(args.config):
        raise ValueError(f"--config {args.config}: lm launch {args.place} runs a copy of the project; name the file "
                         f"from its root, such as experiments/quickstart.py")
    options = given_options(args.place, vars(args))
    workdir = absolute(args.workdir)
    words = sweep_words(args, workdir) if args.sweep_worker else train_words(args.config, workdir, args.overrides)
    if not args.sweep_worker:
        if args.vmap is not None:
            raise ValueError("--vmap is for --sweep-worker: a training is one run")
        configs.from_args(args)  # a config that does not resolve must not wait in a queue to say so
    if args.place == "local" and args.setup:
        raise ValueError("--setup is for machines that are set up by the job; local runs use the environment of this "
                         "shell")
    job = Job(name_of(args.name, args.workdir), workdir, words, parse_env(args.env), tuple(args.setup))
    place = importlib.import_module(PLACES[args.place])
    if args.dry_run:
        print(place.render(job, options), end="")
        return 0
    return place.start(job, options)


def sweep_words(args: argparse.Namespace, workdir: str) -> tuple[str, ...]:
    """The worker's command. Raises ValueError where it could not work."""
    import pathlib

    from launch.sweeps.definition import read
    if args.place not in SAME_FILES:
        raise ValueError(f"--sweep-worker is for {' and '.join(SAME_FILES)}: workers share the sweep's folder")
    if args.config is not None or args.overrides:
        raise ValueError("--sweep-worker reads the sweep from --workdir; leave out --config and its fields")
    if (args.processes or args.tasks_per_node or args.nodes or 1) > 1:
        raise ValueError("a worker is one process, which starts a training a GPU of its machine; for more machines "
                         "use --array, such as --array 0-15")
    read(pathlib.Path(workdir))
    if args.vmap is not None and args.vmap < 1:
        raise ValueError(f"--vmap={args.vmap} must be at least 1")
    return ("sweep", "worker", "--workdir", workdir, *(() if args.vmap is None else ("--vmap", str(args.vmap))))


def given_options(place: str, given: Mapping[str, Any]) -> Any:
    """The options of the place. Raises ValueError for a flag that belongs to other places only, or a bad value."""
    from lm.core.fields import build, field_types
    takes = field_types(options_class(place))
    mine: dict[str, Any] = {}
    for other in PLACES:
        for field in field_types(options_class(other)):
            value = given.get(field)
            if value is None:
                continue
            if field not in takes:
                having = [p for p in PLACES if field in field_types(options_class(p))]
                raise ValueError(f"{flag_of(field)} is for {', '.join(having)}; {place} takes "
                                 f"{', '.join(flag_of(name) for name in takes)}")
            mine[field] = value
    return build(options_class(place), mine, f"lm launch {place}")
