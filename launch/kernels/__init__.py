"""`lm kernels`: what the compilers of devices that are not here say of the kernels.

`lm kernels matrix` compiles every operation, direction and target; `lm kernels schedule OP` reads cycles.
"""

import argparse
import difflib

WHAT = {"matrix": "launch.kernels.matrix", "schedule": "launch.kernels.schedule"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm kernels`."""
    parser.add_argument("what", metavar="matrix|schedule",
                        help="matrix: does each kernel compile; schedule: its cycles on one target")
    parser.add_argument("ops", nargs="*", metavar="OP",
                        help="operations, or single rows of the matrix by their name (matrix: all when none is named)")
    parser.add_argument("--target", action="append", metavar="NAME", help="v4, v5e, v5p, v6e, 7x; for the "
                        "matrix also h100, b200, a100; may be repeated (when none is named: all that the python has a "
                        "compiler for; schedule: v5e)")
    parser.add_argument("--direction", choices=("forward", "backward"), help="only this one")
    parser.add_argument("--python", metavar="PATH",
                        help="a python with libtpu or the CUDA plugin, where this one has none")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one compilation")
    parser.add_argument("--json", action="store_true", help="print JSON")
    matrix = parser.add_argument_group("matrix")
    matrix.add_argument("--write", action="store_true",
                        help="compile what changed since docs/kernels.json and update it and docs/kernels.md")
    matrix.add_argument("--all", action="store_true", help="with --write: compile what did not change as well")
    matrix.add_argument("--check", action="store_true",
                        help="compile what changed and a sample of the rest; fails where a cell was OK and is not")
    matrix.add_argument("--sample", type=float, default=0.05, metavar="SHARE",
                        help="of the unchanged cells that --check compiles, drawn by the commit")
    matrix.add_argument("--seconds", type=float, metavar="S", help="start no compilation after this long")


def main(args: argparse.Namespace) -> int:
    """Runs the command. Raises ValueError for an unknown word."""
    import importlib
    if args.what not in WHAT:
        near = difflib.get_close_matches(args.what, WHAT, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`lm kernels` has no {args.what!r}{hint}; it has {', '.join(WHAT)}")
    return importlib.import_module(WHAT[args.what]).run(args)
