"""`lm plan`: parameters in all and active, granularity and FLOPs a token of a config's model; nothing is allocated.

With --target the whole train step, or with --decode the decode step, is compiled for a machine that is not here: does
it fit, what does a step do, and how long does it take at least.
"""

import argparse
import re
import sys
from typing import Any

TRIES, TRIALS, LIMIT = 4, 8, 7200.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm plan`."""
    parser.add_argument("--devices", type=int, metavar="N", help="devices of the mesh, for the bytes that each holds")
    parser.add_argument("--target", metavar="MACHINE", help="compile the train step for it: v5e-256, v5p:4x4x8, "
                                                            "2xv6e-256, 8xH100, A100, or cpu")
    parser.add_argument("--python", metavar="PATH", help="with --target: a python with libtpu or the CUDA plugin, "
                                                         "where this one has none")
    parser.add_argument("--decode", nargs="?", const="", metavar="ROWSxTOKENS",
                        help="with --target: plan one token of so many rows with room for so many tokens (default: "
                             "batch_size x seq_len) instead of the train step")
    parser.add_argument("--tries", type=int, metavar="N", help=f"with --target: changes that are compiled where the "
                                                               f"step does not fit (default {TRIES}; 0 for none)")
    parser.add_argument("--search", action="store_true", help="with --target: compile and rank meshes and remat "
                                                              "policies")
    parser.add_argument("--trials", type=int, metavar="N", help=f"with --search: how many are compiled (default "
                                                                f"{TRIALS})")
    parser.add_argument("--measure", action="store_true", help="with --target cpu: run the step here too, and compare")
    parser.add_argument("--refresh", action="store_true", help="with --target: compile again what is kept from before")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=f"with --target: for one compilation (default "
                                                                       f"{LIMIT:g})")
    parser.add_argument("--json", action="store_true", help="with --target: print the numbers as JSON")


def main(args: argparse.Namespace) -> int:
    """Prints a table with a row for each kind of layer, and the plan; 1 where it does not fit or compile."""
    from launch import config as configs
    from lm.data.corpora import load_tokenizer
    from lm.models.build import build_model, check_mesh
    from lm.models.plan import format_rows, parameter_bytes, rows
    config = configs.from_args(args)
    check(args)
    tokenizer = load_tokenizer(configs.options(config, "data"))
    model = build_model(config.model.to_dict(), tokenizer.vocab_size)
    if not args.json:
        print(format_rows(rows(model, config.train.seq_len)), flush=True)
    if args.devices is not None:
        mesh = configs.mesh_shape(config, args.devices)
        check_mesh(model, mesh)
        size = parameter_bytes(model, mesh)
        shape = ", ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"
        print(f"parameters on a device ({shape}): {size / 2**30:.3f} GiB; with their gradient and two moments "
              f"{4 * size / 2**30:.3f} GiB")
    return 0 if args.target is None else _on_target(args, config, tokenizer)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    given = [name for name in ("python", "decode", "tries", "search", "trials", "measure", "refresh", "limit", "json")
             if getattr(args, name, None) not in (None, False)]
    if args.target is None and given:
        value = getattr(args, given[0])
        raise ValueError(f"--{given[0]}{'' if value is True else f' {value}'} has no effect without --target MACHINE")
    if args.trials is not None and not args.search:
        raise ValueError(f"--trials {args.trials} has no effect without --search")
    if args.measure and args.target != "cpu":
        raise ValueError(f"--measure runs the step on this machine's CPU; give --target cpu, not {args.target}")
    if args.measure and (args.decode is not None or args.search):
        raise ValueError("--measure runs the train step; leave out --decode and --search")


def rows_of(text: str, config: Any) -> tuple[int, int]:
    """(rows, room) of "8x4096", or the config's own. Raises ValueError for anything else."""
    if not text:
        return config.train.batch_size, config.train.seq_len
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or min(int(n) for n in match.groups()) < 1:
        raise ValueError(f"--decode {text!r} must be ROWSxTOKENS, such as 8x4096, or stand alone for batch_size x "
                         f"seq_len")
    return int(match[1]), int(match[2])


def _on_target(args: argparse.Namespace, config: Any, tokenizer: Any) -> int:
    import json

    from launch import config as configs
    from launch.planning import report
    from launch.planning.compiled import compiler_of
    from launch.planning.machines import find_machine
    from launch.planning.planned import Setting, make_plan
    from launch.planning.propose import propose
    machine, python = find_machine(args.target), args.python or sys.executable
    setting = Setting(machine, python, compiler_of(python, machine), args.limit or LIMIT,
                      None if args.decode is None else rows_of(args.decode, config), tokenizer, args.refresh)

    def resolve(flags: dict[str, Any]) -> Any:
        return configs.resolve(json.loads(configs.to_json(config)), [(path, str(v)) for path, v in flags.items()])

    def tell(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    if args.search:
        return _search(args, config, setting, resolve, tell)
    plan = make_plan(config, setting)
    if not args.json:
        print(report.describe(plan, setting), flush=True)
    if args.measure:
        from launch.planning.measured import measure
        tell(measure(config, plan, setting))
    found = plan
    if not plan.fits and (plan.numbers is not None or plan.result["status"] == "too large"):
        found = propose(plan, setting, resolve, TRIES if args.tries is None else args.tries, tell)
        if found is not None and not args.json:
            print(f"it fits with: {' '.join(found.flags)}\n{report.describe(found, setting)}")
        elif found is None:
            tell("no change that was tried fits; take a larger machine, or fewer or shorter rows")
    if args.json:
        shown = [plan] if found is None or found is plan else [plan, found]
        print(json.dumps([report.data(one, setting) for one in shown], indent=2))
    return 0 if plan.fits else 1


def _search(args: argparse.Namespace, config: Any, setting: Any, resolve: Any, tell: Any) -> int:
    import json

    from launch.planning import report
    from launch.planning.search import line, search
    tell(setting.machine.describe())
    plans = search(config, setting, resolve, TRIALS if args.trials is None else args.trials, tell)
    if args.json:
        print(json.dumps([report.data(plan, setting) for plan in plans], indent=2))
    else:
        print("best first:")
        for n, plan in enumerate(plans, 1):
            print(f"{n:>3}. {' '.join(plan.flags)}\n     {line(plan)}")
    return 0 if plans and plans[0].fits else 1
