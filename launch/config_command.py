"""`lm config`: prints the resolved config and its learning-rate schedule; `lm config diff A B` compares two configs."""

import argparse
from typing import Any

from launch import config as configs
from launch.config_workdir import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm config`."""
    parser.add_argument("words", nargs="*", metavar="diff A B",
                        help="compare two configs: experiment files, config.json files or workdirs")
    parser.add_argument("--json", action="store_true", help="print JSON, as it is written to the workdir")


def main(args: argparse.Namespace) -> int:
    """Prints the config, or what differs. Like `diff`, 1 is the exit code where something does."""
    if args.words:
        if args.words[0] != "diff" or len(args.words) != 3:
            raise ValueError(f"`lm config` takes no words, or `diff A B`; got {' '.join(args.words)!r}")
        return _diff(*args.words[1:], args)
    config = configs.from_args(args)
    if args.json:
        print(configs.to_json(config), end="")
        return 0
    for path, value in configs.flatten(config.to_dict()).items():
        print(f"{path} = {value!r}")
    print(f"\nconfig hash {configs.config_hash(config)}")
    print("\n".join(schedule_lines(config)))
    return 0


def _diff(left: str, right: str, args: argparse.Namespace) -> int:
    changes = configs.diff(configs.load(left, args.overrides), configs.load(right, args.overrides))
    if args.json:
        print(configs.to_json({path: {"a": _shown(a), "b": _shown(b)} for path, a, b in changes}), end="")
    else:
        print(table(changes, left, right) if changes else "the resolved configs are equal")
    return 1 if changes else 0


def _shown(value: Any) -> Any:
    return None if value is configs.ABSENT else value


def schedule_lines(config: Any) -> list[str]:
    """The learning rate over the run: a line of bars, and its value at the steps where its shape changes."""
    from lm.optim.schedules import describe, sparkline
    optimizer = configs.options(config, "optimizer")
    steps = config.train.steps
    rows = [f"  step {step:>{len(str(steps))}}  {rate:.3e}" for step, rate in describe(optimizer, steps)]
    return [f"learning rate over {steps} steps ({optimizer.schedule})", f"  {sparkline(optimizer, steps)}", *rows]
