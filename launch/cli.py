"""The `lm` command: finds the subcommand, its flags and the config overrides, and turns mistakes into one line.

Nothing heavy is imported here, so that `lm --help` answers at once; a subcommand is the module that the table names,
with `add_arguments(parser)` and `main(args) -> exit code`.
"""

import argparse
import importlib
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence

from lm.core.fields import did_you_mean

# Name, module, and the line that `lm --help` shows.
COMMANDS = {
    "train": ("launch.train", "train a model, or go on from the last checkpoint of --workdir"),
    "eval": ("launch.eval", "evaluate a checkpoint"),
    "generate": ("launch.generate", "sample text from a checkpoint"),
    "config": ("launch.config_command", "print the resolved config; `config diff A B` compares two"),
    "launch": ("launch.launch", "start a run on this machine, Slurm, TPU VMs, GKE, or a cloud's GPUs"),
    "sweep": ("launch.sweep", "many runs with different settings: a grid, or a search"),
    "scale": ("launch.scale", "a ladder of sizes: the laws of their losses, and what the next size comes to"),
    "plan": ("launch.plan", "what a config costs: its layers; memory and least time of a step on a machine not here"),
    "report": ("launch.report", "runs or a sweep as one HTML page and as Markdown"),
    "watch": ("launch.watch", "how runs are going, in the terminal"),
    "distill": ("launch.distill", "a teacher's most probable tokens at every target of prepared data, to disk"),
    "convert": ("launch.convert", "published weights into a workdir, and a run into files for others"),
    "grow": ("launch.grow", "more experts for a trained PEER run, as a new run that computes the same"),
    "data": ("launch.data", "prepare text for training, or show packed rows"),
    "analyze": ("launch.analyze", "what a trained model does inside: decays, and where a fact is"),
    "bench": ("launch.bench", "measure speed and memory"),
    "claim": ("launch.claim", "run the small experiments behind a claim; PASS or FAIL"),
    "kernels": ("launch.kernels", "compile the kernels for devices that are not here; their cycles"),
    "doctor": ("launch.doctor", "versions, devices, known problems, and what would run here"),
}

EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141
_PACKAGES = ("launch", "lm", "experiments", "pallas_kernels")
_ROOT = pathlib.Path(__file__).resolve().parent.parent


class UsageError(ValueError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> None:
        """Raises UsageError."""
        raise UsageError(message)


def help_text() -> str:
    """What `lm --help` prints."""
    rows = "\n".join(f"  {name:<10} {line}" for name, (_, line) in COMMANDS.items())
    return (f"usage: lm COMMAND [flags]\n\n{rows}\n\n"
            "All take --config FILE.py[:ARG], overrides such as --config.model.embed_dim=512, and --workdir DIR.\n"
            "`lm COMMAND --help` lists its flags; `lm --version` prints the version.\n")


def extract_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(the other arguments, [(path, text)]) of `--config.a.b=text` and `--config.a.b text`; what follows `--` stays."""
    rest, overrides, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*rest, word, *words], overrides
        if not word.startswith("--config."):
            rest.append(word)
            continue
        path, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UsageError(f"--config.{path} needs a value: --config.{path}=VALUE")
            text = words.pop(0)
        overrides.append((path, text))
    return rest, overrides


def make_parser(command: str) -> Parser:
    """The parser of one subcommand: the flags that all share, and its own, which win where both define one."""
    parser = Parser(prog=f"lm {command}", description=COMMANDS[command][1], allow_abbrev=False,
                    conflict_handler="resolve", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE.py[:ARG]",
                        help="experiment file, config.json or workdir; --config.GROUP.FIELD=VALUE sets a field")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run, local or gs://")
    parser.add_argument("--compile-cache", metavar="DIR",
                        help="where compiled programs are kept between runs; 'off' keeps none (default: "
                             "$JAX_COMPILATION_CACHE_DIR, else loomlm/xla in the user's cache folder)")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="show messages of libraries; twice: debug")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return parser


def parse(command: str, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a subcommand, with `overrides`: [(path, text)]. Raises UsageError for an unknown flag."""
    rest, overrides = extract_overrides(argv)
    parser = make_parser(command)
    try:
        args, unknown = parser.parse_known_intermixed_args(rest)  # words may stand before and after flags
    except TypeError:  # not with subparsers
        args, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = sorted(set(re.findall(r"--[a-z][\w-]*", parser.format_help())))
        what = "flag" if unknown[0].startswith("-") else "argument"
        near = did_you_mean(unknown[0].partition("=")[0], flags) or f"; `lm {command} --help` lists them"
        raise UsageError(f"unknown {what} {unknown[0]!r}{near}")
    if args.workdir is not None:
        args.workdir = os.path.expanduser(args.workdir)  # the shell leaves --workdir=~/runs as it is
    args.overrides = overrides
    return args


def is_for_user(error: BaseException) -> bool:
    """Whether the message alone says what the user has to change: bad input found by our code, or a file problem.

    A ValueError from inside a library is a defect, and its traceback is what helps.
    """
    if isinstance(error, OSError):
        return isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError))
    if not isinstance(error, ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    path = pathlib.Path(frames[-1].filename)
    return path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _PACKAGES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 a mistake in the config or command line, 130 interrupted;
    `lm train` has more (75 preempted and saved, 76 non-finite, 77 hung). Errors of other kinds are raised."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text(), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        import importlib.metadata
        print(importlib.metadata.version("loomlm"))
        return 0
    command = argv[0]
    if command not in COMMANDS:
        print(f"lm: unknown command {command!r}{did_you_mean(command, COMMANDS)}; commands: {', '.join(COMMANDS)}",
              file=sys.stderr)
        return EXIT_USAGE
    try:
        return _run(command, argv[1:])
    except KeyboardInterrupt:
        print(f"lm {command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (ValueError, OSError) as error:
        if "--debug" in argv or not is_for_user(error):
            raise
        print(f"lm {command}: {error}", file=sys.stderr)
        return EXIT_USAGE


def _run(command: str, argv: Sequence[str]) -> int:
    from launch.accelerators import choose_platform
    from launch.compile_cache import enable_compile_cache
    from launch.console import set_up_logging
    # LAPACK, for orthogonal initial values, runs in XLA's threads: threads of its own contend with them, and on a busy
    # machine one factorisation then takes seconds. OpenBLAS reads this when jax is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    note = choose_platform()  # before any subcommand can import jax
    try:
        args = parse(command, argv)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    args.platform_note = note
    set_up_logging(args.verbose)
    enable_compile_cache(args.compile_cache)
    return importlib.import_module(COMMANDS[command][0]).main(args) or 0


def entry() -> int:
    """The console command: `main` in a process of its own, which may start itself again."""
    from launch.huge_pages import restart_with_huge_pages
    restart_with_huge_pages(sys.argv[1:])
    return main()


if __name__ == "__main__":
    sys.exit(entry())
