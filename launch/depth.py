"""Flags about recurrent depth that `lm generate` and `lm eval` have: iterations, when tokens stop, what is kept."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

EXIT = "exit"  # name of the setting in which tokens stop by themselves
LOOKAHEAD = 4


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm generate`."""
    group = parser.add_argument_group("recurrent depth")
    group.add_argument("--recurrences", type=int, metavar="R",
                       help="iterations of the core (default: model.recurrent_depth.recurrences)")
    group.add_argument("--exit-kl", type=float, metavar="NATS",
                       help="a token stops where an iteration changes its prediction by less (default: "
                            "model.recurrent_depth.exit_kl)")
    group.add_argument("--cache", type=int, metavar="M",
                       help="states of the core that are kept, shared by iterations (default: one for each)")
    group.add_argument("--warm-start", action="store_true",
                       help="a token begins from the last state of the token before it")
    group.add_argument("--draft", type=int, metavar="R",
                       help="draft tokens with R iterations and verify several at once; the text's distribution stays")
    group.add_argument("--lookahead", type=int, metavar="N", help=f"tokens of a draft (default: {LOOKAHEAD})")
    group.add_argument("--continuous", action="store_true",
                       help="rows whose token has stopped go on to their next one without waiting for the others")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm eval`."""
    group = parser.add_argument_group("recurrent depth")
    group.add_argument("--recurrences", type=int, nargs="+", default=[], metavar="R",
                       help="evaluate with these numbers of iterations too, as sets <set>_r<R>")
    group.add_argument("--exit-kl", type=float, metavar="NATS",
                       help="evaluate with tokens that stop where an iteration changes their prediction by less too, "
                            "as sets <set>_exit, and print how many iterations they took")


def settings(args: argparse.Namespace) -> dict[str, tuple[int | None, float | None]]:
    """The depths at which `lm eval` also evaluates. Raises ValueError for numbers that are none."""
    from lm.core.recurrences import check_exit, check_recurrences
    from lm.eval.depth import at_recurrences
    for count in args.recurrences:
        check_recurrences(count, "--recurrences")
    check_exit(args.exit_kl, "--exit-kl")
    return at_recurrences(args.recurrences) | ({} if args.exit_kl is None else {EXIT: (None, args.exit_kl)})


def evaluators(model: Any, sets: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Any]:
    """What evaluates the sets at these depths. Raises ValueError for a model that loops nothing."""
    if not settings:
        return []
    from lm.eval.depth import AtDepth, StepsHistogram
    from lm.eval.perplexity import Perplexity
    from lm.models.recurrent_depth import check_recurrent
    check_recurrent(model, "--exit-kl" if EXIT in settings else "--recurrences")
    stopping = {name: setting for name, setting in settings.items() if setting[1] is not None}
    return [AtDepth([Perplexity(sets)], settings), AtDepth([StepsHistogram(sets)], stopping)]


def print_histograms(metrics: Mapping[str, float]) -> None:
    """A line a set: how many of its targets took how many iterations."""
    from lm.eval.depth import histograms
    for name, shares in histograms(metrics).items():
        print(f"{name}: " + ", ".join(f"{steps}: {share:.1%}" for steps, share in shares.items()))


def changed(run: Any, args: argparse.Namespace) -> Any:
    """The opened run with what the flags say. Raises ValueError for values out of range, for flags that do not go
    together, and for a model that loops nothing."""
    from lm.models.build import make_apply
    from lm.models.recurrent_depth import check_recurrent
    said = {"recurrences": args.recurrences, "exit_kl": args.exit_kl, "cache": args.cache,
            "warm_start": args.warm_start or None}
    said = {name: value for name, value in said.items() if value is not None}
    draft, continuous = args.draft, args.continuous
    if args.lookahead is not None and draft is None:
        raise ValueError(f"--lookahead {args.lookahead} is the length of a draft, and there is none; give --draft R")
    flags = [*said, *(["draft"] if draft is not None else []), *(["continuous"] if continuous else [])]
    if not flags:
        return run
    check_recurrent(run.model, f"--{flags[0].replace('_', '-')}")
    depth = dataclasses.replace(run.model.depth, **said)
    depth.check()
    if draft is not None:
        if continuous:
            raise ValueError("--draft and --continuous do not go together: rows verify their drafts at the same time")
        if draft >= depth.iterations:
            raise ValueError(f"--draft {draft} must be below the {depth.iterations} iterations that verify")
        if depth.warm_start or depth.exit_kl is not None or depth.slots < depth.iterations:
            raise ValueError("--draft verifies several tokens at once, which with a warm start, a threshold to stop at "
                             "or fewer states than iterations (cache) gives other predictions than one at a time does; "
                             "leave these out")
    model = run.model.clone(depth=depth, sliced=continuous)
    return dataclasses.replace(run, model=model, apply=make_apply(model))


def speculation(args: argparse.Namespace) -> Any | None:
    """How `lm generate` drafts, None where it does not."""
    from lm.generate.speculative import Speculation
    return None if args.draft is None else Speculation(args.draft, LOOKAHEAD if args.lookahead is None
                                                       else args.lookahead)
