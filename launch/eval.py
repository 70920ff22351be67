"""`lm eval`: evaluates a checkpoint on the run's validation split and on further files, or what it knows by heart."""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from launch import depth, eval_harness, eval_memorization, eval_preference

FOLDER = "eval"
_COLUMNS = (("loss", "loss", ".4f"), ("perplexity", "perplexity", ".3f"),
            ("bits_per_byte", "bits/byte", ".4f"), ("accuracy", "accuracy", ".2%"),
            ("steps", "iterations", ".2f"), ("baseline_bits_per_byte", "bigram bits/byte", ".4f"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm eval`."""
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="use the averaged parameters")
    parser.add_argument("--task", default="perplexity",
                        choices=("perplexity", eval_memorization.NAME, eval_preference.NAME, eval_harness.NAME),
                        help="what is measured (default: loss, perplexity, bits per byte and accuracy)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=PATH", dest="sets",
                        help="a text, JSONL or parquet file, folder or glob, besides those of the config; repeat it "
                             "for several")
    parser.add_argument("--only-sets", action="store_true", help="leave out the validation split of the run")
    parser.add_argument("--batches", type=int, metavar="N",
                        help="at most N batches of each set (default: eval.batches of the config)")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction,
                        help="print a bigram fitted on the training split beside it (default: eval.baseline)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    depth.add_evaluation_arguments(parser)
    eval_memorization.add_arguments(parser)
    eval_preference.add_arguments(parser)
    eval_harness.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Evaluates, prints, and keeps the numbers in <workdir>/eval/<step>.json."""
    if args.workdir is None or args.config is not None:
        raise ValueError("lm eval needs --workdir RUN, the folder of a run, and takes the config from there; "
                         "--config.GROUP.FIELD=VALUE changes a field of it")
    if args.batches is not None and args.batches < 1:
        raise ValueError(f"--batches must be at least 1; got {args.batches}")
    eval_memorization.check(args)
    if args.task == eval_memorization.NAME:
        return eval_memorization.main(args)
    eval_preference.check(args)
    if args.task == eval_preference.NAME:
        return eval_preference.main(args)
    eval_harness.check(args)
    if args.task == eval_harness.NAME:
        return eval_harness.main(args)
    given, settings = parse_sets(args.sets), depth.settings(args)
    from launch.restore import open_run
    run = open_run(args.workdir, args.step, overrides=args.overrides, ema=args.ema)
    def show(metrics: dict[str, float], title: str) -> None:
        print_table(metrics, title)
        depth.print_histograms(metrics)
    return conclude(args, run.step, measure(run, given, args, settings), show)


def conclude(args: argparse.Namespace, step: int, metrics: dict[str, float],
             show: Callable[[dict[str, float], str], None]) -> int:
    """Keeps the metrics of a task and prints them, as JSON or by `show(metrics, title)`. Exit code 0."""
    keep(args.workdir, step, metrics, ema=args.ema)
    if args.json:
        print(json.dumps({"step": step, "ema": args.ema, "metrics": plain(metrics)}, indent=2))
    else:
        show(metrics, f"{args.workdir}, step {step}{', averaged parameters' if args.ema else ''}")
    return 0


def parse_sets(words: list[str]) -> dict[str, str]:
    """{name: path} of NAME=PATH words; raises ValueError for other words and names given twice."""
    out: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path) or "/" in name or name in out:
            raise ValueError(f"--set takes NAME=PATH, each name once and without '/'; got {word!r}")
        out[name] = path
    return out


def measure(run: Any, given: Mapping[str, str], args: argparse.Namespace,
            settings: Mapping[str, tuple[int | None, float | None]] = {}) -> dict[str, float]:
    """All metrics of an opened run: `eval/<set>/<metric>`, and at each of the other depths `eval/<set>_<name>/...`."""
    import jax

    from launch import config as configs
    from launch.preference import holds_pairs
    from lm.eval.base import evaluate
    from lm.eval.options import VALIDATION
    from lm.eval.perplexity import Perplexity
    from lm.eval.sets import load_text, set_of
    options, data = configs.options(run.config, "eval"), configs.options(run.config, "data")
    if holds_pairs(data):
        raise ValueError("the run learned from pairs, which have no perplexity of a text; use --task preference")
    size = {"batch_size": run.config.train.batch_size, "seq_len": options.seq_len or run.config.train.seq_len}
    paths = {**options.sets, **given}
    if VALIDATION in paths:
        raise ValueError(f"--set {VALIDATION}=... is the name of the run's own split; choose another")
    baseline = options.baseline if args.baseline is None else args.baseline
    corpora = None
    if baseline or not args.only_sets:
        from lm.data.corpora import load_corpora
        corpora = load_corpora(data, run.tokenizer)
    datasets = {}
    if not args.only_sets and corpora.validation:
        from lm.data.loader import build_dataset
        datasets[VALIDATION] = build_dataset(data, split="validation", corpora=corpora, **size)
        datasets |= datasets[VALIDATION].slices()
    datasets |= {name: load_text(path, data, run.tokenizer, **size) for name, path in paths.items()}
    if not datasets:
        raise ValueError("there is nothing to evaluate: the run has no validation split and no sets; give "
                         "--set NAME=PATH")
    limit = options.batches if args.batches is None else args.batches
    sets = {name: set_of(dataset, limit) for name, dataset in datasets.items()}
    with jax.set_mesh(run.mesh):
        metrics = evaluate([Perplexity(sets), *depth.evaluators(run.model, sets, settings)], run.apply, run.params)
    baseline = baseline and all(given.token_bytes is not None for given in sets.values())
    return {**metrics, **(bigram(data, corpora, sets, run.config.train) if baseline else {})}


def bigram(data: Any, corpora: Any, sets: Mapping[str, Any], train: Any) -> dict[str, float]:
    """Bits per byte of the interpolated bigram of the training split, on the same targets."""
    from lm.data.loader import build_dataset
    from lm.data.ngram import fit_bigram
    model = fit_bigram(build_dataset(data, split="train", seed=train.seed, corpora=corpora, batch_size=train.batch_size,
                                     seq_len=train.seq_len))
    return {f"eval/{name}/baseline_bits_per_byte": model.score(given.batches(), given.token_bytes).bits_per_byte
            for name, given in sets.items()}


def keep(workdir: str, step: int, metrics: Mapping[str, float], *, ema: bool = False) -> None:
    """Adds the metrics to <workdir>/eval/<step>.json (`<step>-ema.json` for averaged parameters); a metric that is
    there already takes its new value."""
    from etils import epath

    from launch.config_workdir import write_text
    path = epath.Path(workdir) / FOLDER / f"{step}{'-ema' if ema else ''}.json"
    old = json.loads(path.read_text())["metrics"] if path.exists() else {}
    write_text(path, json.dumps({"step": step, "ema": ema, "metrics": {**old, **plain(metrics)}}, indent=2) + "\n")


def plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics as JSON can hold them: null for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def print_table(metrics: dict[str, float], title: str) -> None:
    """One line a set."""
    from rich.console import Console
    from rich.table import Table

    from lm.eval.base import by_set
    rows = by_set(metrics)
    shown = [column for column in _COLUMNS if any(column[0] in row for row in rows.values())]
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    for _, heading, _ in shown:
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(format(row[key], form) if key in row else "" for key, _, form in shown))
    Console(highlight=False, soft_wrap=True).print(table)
