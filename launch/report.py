"""`lm report`: runs, or a whole sweep, as one HTML page that needs no network, and as Markdown."""

import argparse
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from etils import epath


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm report`."""
    parser.add_argument("workdirs", nargs="*", metavar="WORKDIR", help="runs, or folders of runs")
    parser.add_argument("--study", metavar="DIR", help="the folder of a sweep: its trials as well")
    parser.add_argument("--title", help="of the page (default: the names of the runs)")
    parser.add_argument("--out", metavar="DIR", help="where report.html and report.md go (default: the run, the sweep, "
                                                     "or the current folder)")


def main(args: argparse.Namespace) -> int:
    """Writes the pages and prints where they are."""
    from lm.report.page import to_html, to_markdown
    from lm.report.sections import of_runs, of_trials
    places = [place for given in (args.workdirs or filter(None, [args.workdir])) for place in runs_in(given)]
    sections = []
    if args.study is not None:
        study = pathlib.Path(args.study)
        sections += of_trials(trials_of(study))
        places = places or [str(p) for p in sorted((study / "trials").iterdir()) if (p / "config.json").exists()]
    if not places and not sections:
        raise ValueError("lm report needs WORKDIR..., runs or folders of runs, or --study DIR")
    runs = read_runs(places)
    if runs:
        sections += of_runs(runs)
    out = epath.Path(args.out or args.study or (places[0] if len(places) == 1 else "."))
    out.mkdir(parents=True, exist_ok=True)
    title = args.title or (os.path.basename(os.path.abspath(args.study)) if args.study else
                           ", ".join(run.name for run in runs[:4]) + (f" and {len(runs) - 4} more" if runs[4:] else ""))
    (out / "report.html").write_text(to_html(title, sections))
    text, pictures = to_markdown(title, sections, "report_files")
    (out / "report.md").write_text(text)
    folder = out / "report_files"
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        (folder / name).write_bytes(png)
    print(f"{out / 'report.html'}\n{out / 'report.md'}")
    return 0


def runs_in(place: str) -> list[str]:
    """The workdir itself, or those right under a folder. Raises ValueError where there is none."""
    from launch.config import CONFIG_FILE
    path = epath.Path(place)
    if (path / CONFIG_FILE).exists():
        return [place]
    found = sorted(str(p) for p in path.iterdir() if (p / CONFIG_FILE).exists()) if path.is_dir() else []
    if not found:
        raise ValueError(f"{place} is no workdir of a run, and no folder of workdirs: there is no {CONFIG_FILE}")
    return found


def read_runs(places: Sequence[str]) -> list[Any]:
    """The runs, named by the last part of their path that tells them apart."""
    import json

    from launch.config import CONFIG_FILE, flatten
    from lm.report.runs import read
    names = [place.rstrip("/").rpartition("/")[2] or place for place in places]
    if len(set(names)) < len(names):
        names = [place.rstrip("/") for place in places]
    return [read(place, name, flatten(json.loads((epath.Path(place) / CONFIG_FILE).read_text())))
            for place, name in zip(places, names, strict=True)]


def trials_of(folder: pathlib.Path) -> Any:
    """What a sweep found."""
    from launch.sweeps.definition import read
    from launch.sweeps.study import ERROR, VALUES, open_study, optuna
    from lm.report.page import Table
    from lm.report.runs import short
    from lm.report.sections import Trials
    definition = read(folder)
    study = open_study(definition, folder)
    trials = study.get_trials(deepcopy=False)
    name, more = definition.goals[0]
    ended = [(trial.user_attrs[VALUES], trial.values[0]) for trial in trials if trial.values]
    paths = [path for parameter in definition.space for path in parameter.paths]
    rows = [[str(trial.number), trial.state.name.lower(),
             *(short(value) for value in (trial.values or [None] * len(definition.goals))),
             *(short(trial.user_attrs.get(VALUES, {}).get(path)) for path in paths), trial.user_attrs.get(ERROR, "")]
            for trial in trials]
    importance = {}
    if len(ended) >= 4 and len(definition.space) > 1 and len(definition.goals) == 1:
        package = optuna().importance
        importance = package.get_param_importances(study, evaluator=package.PedAnovaImportanceEvaluator())
    return Trials(ended, Table(["trial", "state", *(goal for goal, _ in definition.goals), *paths, "error"], rows),
                  importance, name, more)
