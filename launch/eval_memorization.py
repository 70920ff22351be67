"""`lm eval --task memorization`: what a run knows by heart, of texts that it was trained on and of matched controls."""

import argparse
import dataclasses
import json
import os

NAME = "memorization"
FLAGS = {"members": "FILE", "controls": "FILE", "prefix": "N", "suffix": "N", "beams": "N", "min_k": "SHARE",
         "limit": "N", "reference": "RUN"}
_ROWS = (("exact continuations", "exact_match", ".1%"), ("ROUGE-L", "rouge_l", ".3f"),
         ("longest common run, tokens", "longest_match", ".1f"),
         ("beam search: exact, best beam", "beam_exact_match", ".1%"),
         ("beam search: exact, any beam", "beam_any_match", ".1%"), ("beam search: ROUGE-L", "beam_rouge_l", ".3f"))
_ATTACKS = (("loss", "loss"), ("loss / zlib", "zlib"), ("Min-K%", "min_k"), ("loss / reference", "reference"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the task; without them the fields of `config.eval.memorization` count."""
    group = parser.add_argument_group("--task memorization")
    group.add_argument("--members", metavar="FILE", help="texts that the run was trained on (text, JSONL, parquet)")
    group.add_argument("--controls", metavar="FILE", help="texts of the same kind that it was not: required with them")
    group.add_argument("--prefix", type=int, metavar="N", help="tokens that the model is given (default: all before)")
    group.add_argument("--suffix", type=int, metavar="N", help="tokens that it has to continue with (default: 50)")
    group.add_argument("--beams", type=int, metavar="N", help="also attack by a beam search of this width, such as 30")
    group.add_argument("--min-k", type=float, metavar="SHARE", help="tokens that Min-K%% looks at (default: 0.2)")
    group.add_argument("--limit", type=int, metavar="N", help="at most N texts of each kind")
    group.add_argument("--reference", metavar="RUN", help="workdir of a run that was not trained on the members")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError where flags of one task are given to the other."""
    given = [name for name in FLAGS if getattr(args, name) is not None]
    if args.task != NAME and given:
        raise ValueError(f"--{given[0].replace('_', '-')} belongs to --task {NAME}; add it")
    if args.task == NAME and (args.sets or args.only_sets or args.batches is not None or args.baseline is not None):
        raise ValueError(f"--set, --only-sets, --batches and --baseline belong to --task perplexity; --task {NAME} "
                         f"takes --members and --controls")


def main(args: argparse.Namespace) -> int:
    """Measures, prints, and keeps <workdir>/eval/memorization-<step>.json and .png."""
    import jax
    from etils import epath

    from launch import eval as command
    from launch.config_workdir import write_text
    from launch.memorization import memorization_of, reference_of
    from launch.restore import open_run
    from lm.eval.memorization_figure import draw
    run = open_run(args.workdir, args.step, overrides=args.overrides, ema=args.ema)
    flags = {name: getattr(args, name) for name in FLAGS if name != "reference" and getattr(args, name) is not None}
    given = {**run.config.eval.to_dict().get("memorization", {}), **flags}
    reference = None
    if args.reference is not None:
        if os.path.realpath(args.reference) == os.path.realpath(args.workdir):
            raise ValueError(f"--reference {args.reference} is the run itself, whose ratio to itself is 1 for every "
                             f"text; give a run that was not trained on the members, or leave it out")
        reference = reference_of(open_run(args.reference), given.get("batch_size", 16))
    evaluator = memorization_of(run.config, given, run.model, run.tokenizer, where=f"--task {NAME}",
                                reference=reference)
    with jax.set_mesh(run.mesh):
        report = evaluator.measure(run.apply, run.params)
    metrics = {f"eval/{NAME}/{name}": value for name, value in report.metrics.items()}
    command.keep(args.workdir, run.step, metrics, ema=args.ema)
    path = epath.Path(args.workdir) / command.FOLDER / f"{NAME}-{run.step}{'-ema' if args.ema else ''}.json"
    out = {"step": run.step, "ema": args.ema, "reference": args.reference,
           "options": dataclasses.asdict(evaluator.options), "metrics": command.plain(report.metrics),
           "texts": report.texts}
    write_text(path, json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    title = f"{args.workdir}, step {run.step}{', averaged parameters' if args.ema else ''}"
    path.with_suffix(".png").write_bytes(draw(report.texts, title))
    if args.json:
        print(json.dumps({key: value for key, value in out.items() if key != "texts"}, indent=2))
    else:
        print_tables(report.metrics, title)
        print(f"{path} holds every text, and {path.with_suffix('.png').name} the curves.")
    return 0


def print_tables(metrics: dict[str, float], title: str) -> None:
    """Extraction beside the controls, then one line an attack."""
    from rich.console import Console
    from rich.table import Table
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=f"{title}: continuations", title_justify="left")
    for heading in ("", f"{metrics['members']:.0f} members", f"{metrics['controls']:.0f} controls"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, name, form in (row for row in _ROWS if row[1] in metrics):
        table.add_row(label, format(metrics[name], form), format(metrics[f"{name}_controls"], form))
    console.print(table)
    table = Table(title="Membership", title_justify="left")
    for heading in ("score", "AUC", "TPR at 1% FPR"):
        table.add_column(heading, justify="right" if heading != "score" else "left")
    for label, name in (row for row in _ATTACKS if f"auc_{row[1]}" in metrics):
        table.add_row(label, f"{metrics[f'auc_{name}']:.3f}", f"{metrics[f'tpr_{name}']:.1%}")
    console.print(table)
    console.print(f"Exposure {metrics['exposure']:.2f} bits in the mean; {metrics['exposure_most']:.2f} is the most "
                  f"that {metrics['controls']:.0f} controls can show, 1.44 what is expected of a text that was not "
                  f"seen.")
    if "misses" in metrics:
        console.print(f"Goldfish: {metrics['dropped_share']:.1%} of the targets of suffixes were dropped; "
                      + (f"{metrics['miss_at_dropped']:.1%} of {metrics['misses']:.0f} continuations leave the text at "
                         f"such a target." if metrics["misses"] else "no continuation leaves the text."))
