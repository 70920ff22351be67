"""`lm eval --task preference`: how a run tells chosen from rejected responses, and how what it writes is judged."""

import argparse
import importlib
from collections.abc import Mapping
from typing import Any

NAME = "preference"
FLAGS = ("against", "judge", "responses", "response_tokens", "on_nonfinite")
_ROWS = (("pairs", "pairs", ".0f"), ("accuracy", "accuracy", ".1%"), ("  interval of 95%, from", "accuracy_low", ".1%"),
         ("  to", "accuracy_high", ".1%"), ("length baseline", "length_baseline", ".1%"),
         ("by mean log-probability", "logp_accuracy", ".1%"), ("chosen, nats a token", "chosen_logp", ".3f"),
         ("rejected, nats a token", "rejected_logp", ".3f"), ("log odds ratio", "log_odds_ratio", ".3f"),
         ("reward margin", "reward_margin", ".3f"), ("KL to the reference, a token", "kl", ".4f"),
         ("good above bad, by reward", "reward_auc", ".1%"),
         ("chosen length", "chosen_length", ".1f"), ("rejected length", "rejected_length", ".1f"),
         ("pairs that are not finite", "nonfinite_pairs", ".0f"),
         ("responses that are not finite", "nonfinite_responses", ".0f"), ("win rate", "win_rate", ".1%"),
         ("  interval of 95%, from", "win_rate_low", ".1%"), ("  to", "win_rate_high", ".1%"),
         ("win rate by length alone", "length_win_rate", ".1%"),
         ("judge prefers the longer", "win_rate_of_longer", ".1%"),
         ("length of its responses", "length", ".1f"), ("length of the others", "other_length", ".1f"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the task."""
    group = parser.add_argument_group("--task preference")
    group.add_argument("--against", metavar="RUN", help="workdir of the reference: rewards and divergence are measured "
                                                        "against it, and it answers the same prompts (default: the "
                                                        "run without its adapters, or else train.init_from; the "
                                                        "chosen responses of the data are then the others)")
    group.add_argument("--on-nonfinite", choices=("skip", "refuse"),
                       help="pairs whose log-probabilities are not finite: skip names and counts them, they are wrong "
                            "in the accuracy and in no mean (default); refuse is an error that names them")
    group.add_argument("--judge", metavar="JUDGE", help="judge of responses: logprob:RUN, or module:function of "
                                                        "(prompt, response), texts, that returns a number")
    group.add_argument("--responses", type=int, metavar="N", help="prompts that are answered for it (default: 64)")
    group.add_argument("--response-tokens", type=int, metavar="N", help="longest answer (default: 128)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError where flags of one task are given to the other."""
    given = [name for name in FLAGS if getattr(args, name) is not None]
    if args.task != NAME and given:
        raise ValueError(f"--{given[0].replace('_', '-')} belongs to --task {NAME}; add it")
    if args.task == NAME and args.judge is None and (args.responses is not None or args.response_tokens is not None):
        raise ValueError("--responses and --response-tokens belong to --judge; add logprob:RUN or module:function")


def main(args: argparse.Namespace) -> int:
    """Measures, prints, and keeps the numbers in <workdir>/eval/<step>.json."""
    from launch import eval as command
    from launch.restore import open_run
    run = open_run(args.workdir, args.step, overrides=args.overrides, ema=args.ema)
    return command.conclude(args, run.step, measure(run, args), print_table)


def measure(run: Any, args: argparse.Namespace) -> dict[str, float]:
    """All metrics: `eval/<set>/<metric>`."""
    import jax

    from launch import config as configs
    from launch import preference
    from launch.eval import parse_sets
    from lm.data.corpora import load_corpora
    from lm.data.loader import build_dataset
    from lm.data.options import PAIRS, DataOptions
    from lm.eval.options import VALIDATION
    from lm.eval.preference import Preference
    from lm.eval.sets import set_of
    from lm.losses.preference import Orpo
    from lm.losses.preference.reference import REFERENCE, split_reference
    data = configs.options(run.config, "data")
    seq_len = configs.options(run.config, "eval").seq_len or run.config.train.seq_len
    size = {"batch_size": run.config.train.batch_size, "seq_len": seq_len}
    datasets = {}
    if preference.holds_pairs(data) and not args.only_sets:
        corpora = load_corpora(data, run.tokenizer)
        if corpora.validation:
            datasets[VALIDATION] = build_dataset(data, split="validation", corpora=corpora, **size)
    for name, path in parse_sets(args.sets).items():
        # As a validation source of its own, whatever split the folder was prepared with: all of it is evaluated.
        given = DataOptions(source=PAIRS, path=path, validation={"source": PAIRS, "path": path}, shuffle=False)
        datasets[name] = build_dataset(given, tokenizer=run.tokenizer, split="validation", **size)
    if not datasets:
        raise ValueError("there are no pairs to evaluate: the run has no validation split of pairs; give --set "
                         "NAME=FOLDER, made by `lm data prepare --kind preference`")
    objective = preference.objective_of(run.config)
    limit = run.config.eval.batches if args.batches is None else args.batches
    sets = {name: set_of(dataset, limit) for name, dataset in datasets.items()}
    params = run.params
    start = args.against or (run.config.train.init_from if split_reference(params)[1] is None else None)
    other = None if start is None else opened(run, start)
    with jax.set_mesh(run.mesh):
        if other is not None:
            params = {**params, REFERENCE: other}
        metrics = dict(Preference(sets, Orpo() if objective is None else objective.loss,
                                  on_nonfinite=args.on_nonfinite or "skip")(run.apply, params))
        if args.judge is not None:
            for name, given in sets.items():
                metrics |= judged(run, name, given, other if args.against else None, args)
    return metrics


def opened(run: Any, workdir: str) -> Any:
    """The variables of another run of the same model, on this run's mesh."""
    from launch.restore import open_run
    other = open_run(workdir)
    if other.config.model != run.config.model:
        raise ValueError(f"{workdir} is of another model than {run.config.model}; rewards and divergence compare runs "
                         f"of one model")
    return other.params


def judged(run: Any, name: str, given: Any, other: Any, args: argparse.Namespace) -> dict[str, float]:
    """Win rate of the run's responses against those of `other`, or the chosen ones of the data."""
    from lm.eval.samples import stop_tokens
    from lm.eval.win_rate import chosen_of, end_tokens, respond, win_rate
    from lm.generate.sampling import SamplingOptions
    written = chosen_of(given.batches(), args.responses or 64)
    prompts = [prompt for prompt, _ in written]
    stop = tuple({*end_tokens(written), *stop_tokens(run.tokenizer)})
    answer = lambda params: respond(run.apply, params, run.model.initial_state, prompts, stop=stop,
                                    max_new_tokens=args.response_tokens or 128, options=SamplingOptions(0.8), seed=0)
    theirs = [response for _, response in written] if other is None else answer(other)
    found = win_rate(prompts, answer(run.params), theirs, judge_of(args.judge, run))
    return {f"eval/{name}/{metric}": value for metric, value in found.items()}


def judge_of(spec: str, run: Any) -> Any:
    """The judge that --judge names. Raises ValueError for one that is none."""
    import numpy as np
    kind, _, rest = spec.partition(":")
    if not rest:
        raise ValueError(f"--judge must be logprob:RUN or module:function; got {spec!r}")
    if kind == "logprob":
        from launch.restore import open_run
        from lm.eval.win_rate import LogProbability
        other = open_run(rest)
        if other.tokenizer.fingerprint != run.tokenizer.fingerprint:
            raise ValueError(f"--judge {spec}: that run has another tokenizer, and would read other words")
        return LogProbability(other.apply, other.params)
    try:
        score = getattr(importlib.import_module(kind), rest)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--judge {spec}: {error}") from None
    decode = run.tokenizer.decode
    return lambda written: np.array([float(score(decode(prompt), decode(response))) for prompt, response in written])


def print_table(metrics: Mapping[str, float], title: str) -> None:
    """One line a metric, one column a set."""
    from rich.console import Console
    from rich.table import Table

    from lm.eval.base import by_set
    sets = by_set(dict(metrics))
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in sets:
        table.add_column(name, justify="right")
    for heading, key, form in _ROWS:
        if any(key in row for row in sets.values()):
            table.add_row(heading, *(format(row[key], form) if key in row else "" for row in sets.values()))
    Console(highlight=False, soft_wrap=True).print(table)
