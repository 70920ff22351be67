"""The config of a run: read, completed with defaults, overridden, checked, and compared with that of a workdir.

    config = load("experiments/quickstart.py", [("train.steps", "100"), ("model.attention.window", "None")])

What comes out holds every field of every group, so it alone rebuilds the model, resumes and evaluates.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from launch import adapters, preference
from launch.config_files import ABSENT, CONFIG_FILE, config_hash, diff, from_json, read, to_json
from launch.config_groups import GROUPS, option_class, resolve_group
from launch.config_overrides import apply_overrides, flatten
from launch.config_values import plain
from launch.config_workdir import check_workdir
from lm.core.fields import check_known, did_you_mean

__all__ = ["ABSENT", "CONFIG_FILE", "GROUPS", "apply_overrides", "check", "check_workdir", "config_hash", "diff",
           "flatten", "from_args", "from_json", "load", "options", "read", "resolve", "to_json"]


def load(spec: str, overrides: Sequence[tuple[str, Any]] = ()) -> ConfigDict:
    """The resolved config of an experiment file "FILE.py[:ARG]", a config.json or a workdir, with overrides.

    overrides: (path, value), the path with or without "config." in front; text is parsed by the type of its field.
    Raises ValueError or FileNotFoundError with a message for the user.
    """
    return resolve(read(spec), overrides)


def resolve(config: Any, overrides: Sequence[tuple[str, Any]] = ()) -> ConfigDict:
    """The complete config, locked: each group is filled from its option class, overridden, and checked."""
    given = plain(config, "config")
    check_known(given, GROUPS, "config", "group")
    for group, value in given.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"config.{group} must be a group of fields; got {value!r} ({type(value).__name__})")
    given = apply_overrides(given, overrides)
    filled = {group: resolve_group(group, given.get(group, {})) for group in GROUPS}
    # Filling may turn tuples into the lists a field asks for, and a default may be no data.
    made = ConfigDict(plain(filled, "config"), allow_dotted_keys=True)
    check(made)
    return made.lock()


def options(config: ConfigDict, group: str) -> Any:
    """The group as an instance of its option class (not for `model` and `loss`)."""
    return option_class(group)(**resolve_group(group, plain(config[group], f"config.{group}")))


def from_args(args: argparse.Namespace) -> ConfigDict:
    """The config that a command line asks for: `--config`, else that of an existing `--workdir`, with overrides."""
    overrides = getattr(args, "overrides", ())
    if args.config is not None:
        return load(args.config, overrides)
    if args.workdir is not None and (epath.Path(args.workdir) / CONFIG_FILE).exists():
        return load(args.workdir, overrides)
    raise ValueError("give --config FILE.py[:ARG]" + (
        "" if args.workdir is None else f", or a --workdir that has a {CONFIG_FILE} ({args.workdir} has none)"))


def check(config: ConfigDict, num_devices: int | None = None) -> None:
    """Raises ValueError for groups that do not fit each other or, where their number is given, the devices.

    Compiles nothing and allocates nothing. num_devices counts the devices of all processes.
    """
    from lm.optim.schedules import make_schedule
    make_schedule(options(config, "optimizer"), config.train.steps)
    if config.checkpoint.keep_best and config.checkpoint.every % config.eval.every:
        raise ValueError(
            f"config.checkpoint.keep_best={config.checkpoint.keep_best} needs an evaluation at every checkpoint: "
            f"checkpoint.every={config.checkpoint.every} must be a multiple of eval.every={config.eval.every}")
    if config.checkpoint.keep_best:
        _check_best_metric(config)
    adapters.check(options(config, "train"), options(config, "data"))
    preference.check(config, options(config, "data"), options(config, "train"))
    longest = config.model.get("max_positions")
    if longest is not None and config.train.seq_len > longest:
        raise ValueError(f"config.train.seq_len={config.train.seq_len} is longer than the table of positions, "
                         f"config.model.max_positions={longest}; raise that, or set it to None")
    if num_devices is not None:
        _check_devices(config, num_devices)


def _check_best_metric(config: ConfigDict) -> None:
    """A metric that no evaluation gives would keep no best checkpoint, and say nothing."""
    from lm.eval.options import VALIDATION
    known = [f"eval/{name}/{metric}" for name in (VALIDATION, *config.eval.sets)
             for metric in ("loss", "perplexity", "bits_per_byte")]
    name = config.checkpoint.best_metric
    if name not in known:
        raise ValueError(f"config.checkpoint.best_metric={name!r} is no metric of which less is better"
                         f"{did_you_mean(name, known)}; there are {', '.join(known)}")
    if name.split("/")[1] == VALIDATION and config.data.validation_fraction == 0 and not config.data.validation:
        raise ValueError(f"config.checkpoint.best_metric={name!r} needs a validation split, and "
                         f"config.data.validation_fraction is 0; set that, config.data.validation, or a metric of "
                         f"eval.sets")


def mesh_shape(config: ConfigDict, num_devices: int) -> dict[str, int]:
    """Size of every mesh axis over all slices. Raises ValueError where the devices do not fit."""
    from lm.core.sharding import resolve_mesh_shape
    mesh = options(config, "mesh")
    across = dict(mesh.dcn or {})
    slices = math.prod(across.values())
    if slices < 1 or num_devices % slices:
        raise ValueError(f"config.mesh.dcn={across} needs a multiple of {slices} devices; there are {num_devices}")
    within = resolve_mesh_shape(mesh.sizes, num_devices // slices)
    return {axis: n * across.get(axis, 1) for axis, n in within.items()}


def _check_devices(config: ConfigDict, num_devices: int) -> None:
    from lm.core.axes import BATCH_AXES
    shape = mesh_shape(config, num_devices)
    rows = math.prod(shape[axis] for axis in BATCH_AXES)
    batch, pieces = config.train.batch_size, config.train.microbatches
    if batch % (rows * pieces):
        raise ValueError(
            f"config.train.batch_size={batch} in microbatches={pieces} must be divisible by the {rows} rows that "
            f"{' x '.join(BATCH_AXES)} split it into on {num_devices} devices; nearest: "
            f"{max(1, round(batch / (rows * pieces))) * rows * pieces}")
    if config.train.seq_len % shape["context"]:
        raise ValueError(f"config.train.seq_len={config.train.seq_len} must be divisible by config.mesh.context="
                         f"{shape['context']}")
