"""The process that trains several trials in one program: `python -m launch.sweeps.group_process CONFIG RECORDS FILE`.

CONFIG is the sweep's, FILE lists the trials with their folders and overrides, and RECORDS is a folder of what was
measured: where the trials would not be faster together, this ends with code 78, and they are to be run alone.

The trials are spread over the devices of this process, whole trials each. A CPU is as many devices as it has cores, so
that trials of one core each use all of them.
"""

import functools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)

ALONE = 78  # exit code
STOP = "stop"  # a file in a trial's folder: that one is to be saved and given up
FASTER = 1.05  # times the throughput from which trials are trained together: medians of one program differ by less


def main(argv: Sequence[str]) -> int:
    """Trains the trials, or ends at once where they are better run alone. Exit code 0, 75 or 78."""
    from launch import config as configs
    from launch.console import set_up_logging
    from launch.train import prepare
    from lm.models.build import make_apply
    from lm.train.exit_codes import DONE, PREEMPTED
    set_up_logging()
    base, records, trials = argv[0], pathlib.Path(argv[1]), json.loads(pathlib.Path(argv[2]).read_text())

    resolved = [configs.load(base, [tuple(pair) for pair in trial["overrides"]]) for trial in trials]
    if splits_runs(resolved[0]):
        print("config.mesh splits a run over devices: these trials are run alone", flush=True)
        return ALONE
    a_device_a_core()
    import jax
    devices = jax.local_devices()
    prepared = [prepare(resolved[0], devices=devices[:1])]
    prepared += [prepare(config, corpora=prepared[0].corpora, devices=devices[:1]) for config in resolved[1:]]
    folders = [pathlib.Path(trial["folder"]) for trial in trials]
    mesh = prepared[0].mesh
    with jax.set_mesh(mesh):
        apply = make_apply(prepared[0].model)
        experiments = [one.experiment(str(folder), apply) for one, folder in zip(prepared, folders, strict=True)]
        chosen = choose(prepared, experiments, records / f"{trials[0]['program']}-{len(trials)}.json", devices)
        print(chosen["why"], flush=True)
        if not chosen["together"]:
            return ALONE
        from lm.train.together import train_together
        codes = train_together([member(chosen["why"], *given) for given in zip(prepared, experiments, folders,
                                                                               strict=True)], mesh, devices,
                               chosen["way"])
    return PREEMPTED if all(code == PREEMPTED for code in codes) else DONE


def splits_runs(config: Any) -> bool:
    """Whether a run is to be split over devices in some way, beside over all that there are."""
    from launch import config as configs
    mesh = configs.options(config, "mesh")
    return any(size not in (1, -1) for sizes in (mesh.sizes, mesh.dcn or {}) for size in sizes.values())


def a_device_a_core() -> None:
    """Makes a CPU as many devices as this process has cores, before the backend starts: one where others work beside
    it, or as many as XLA was told to make."""
    import jax

    from launch.claim_grid import ONE_THREAD, default_jobs
    flags = os.environ.get("XLA_FLAGS", "")
    if ONE_THREAD not in flags and "host_platform_device_count" not in flags and default_jobs() > 1:
        jax.config.update("jax_num_cpu_devices", default_jobs())


def choose(prepared: Sequence[Any], experiments: Sequence[Any], record: pathlib.Path,
           devices: Sequence[Any]) -> dict[str, Any]:
    """{"together": bool, "why": str, "way": str, ...}: what was measured on such devices before, else what is measured
    now."""
    import jax

    from lm.core.whole_file import write_text
    from lm.train.group_speed import step_times
    device = f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"
    if record.exists():
        kept = json.loads(record.read_text())
        if kept["device"] == device:
            return kept
    count, reason = len(experiments), why_alone(prepared[0])
    found: dict[str, Any] = {"device": device, "together": False}
    if reason is None:
        try:
            times = step_times(experiments, prepared[0].options, prepared[0].mesh, devices,
                               alone=on_all(prepared[0], devices))
        except Exception as error:  # of any library, while it traces or compiles: alone it may run
            log.warning("trials cannot share a program", exc_info=error)
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        else:
            found |= {"together": times.ratio >= FASTER, "way": times.way, "ratio": times.ratio, "alone": times.alone,
                      "seconds_together": times.together}
            reason = (f"{times.ratio:.2f} times the throughput of one after the other, medians of {len(times.alone)} "
                      f"({times.way}, {min(count, len(devices))} device{'s' * (min(count, len(devices)) > 1)})")
    how = "trained together" if found["together"] else "run alone"
    found["why"] = f"{count} trials that differ in seed, learning rate and weight decay are {how}: {reason}"
    write_text(record, json.dumps(found, indent=1) + "\n")
    return found


def on_all(prepared: Any, devices: Sequence[Any]) -> Any:
    """A run as `lm train` would run it, and its mesh: split over all accelerators. A CPU is one device to it, and None
    stands for the one that `prepared` has."""
    from launch.train import prepare
    if len(devices) == 1 or devices[0].platform == "cpu":
        return None
    whole = prepare(prepared.config, corpora=prepared.corpora, devices=devices)
    return whole.experiment(""), whole.mesh


def why_alone(prepared: Any) -> str | None:
    """Why such runs cannot share a program, None where they can."""
    from launch.preference import objective_of
    options = prepared.options
    for on, why in ((prepared.recipe.optimizer.tables is not None, "optimizer.sparse_tables"),
                    (prepared.goldfish is not None, "loss.goldfish, masked on the device"),
                    (objective_of(prepared.config) is not None, "a loss of preferences"),
                    (prepared.config.log.wandb_project is not None, "log.wandb_project, one run a process"),
                    (options.spike_sigma is not None or options.after_max_skips == "rollback",
                     "train.spike_sigma or train.after_max_skips")):
        if on:
            return why
    return None


def member(why: str, prepared: Any, experiment: Any, folder: pathlib.Path) -> Any:
    """One run for `lm.train.together`, with the files that `lm train` writes."""
    from etils import epath

    from launch import config as configs
    from launch.config_workdir import check_workdir
    from launch.environment import write_environment
    from launch.train import write_parameters
    from lm.train.loop import Schedule
    from lm.train.together import Member
    check_workdir(str(folder), prepared.config, write=False)

    def begun() -> None:
        check_workdir(str(folder), prepared.config)
        write_environment(str(folder))
        write_parameters(str(folder), prepared)
        print(why, prepared.headline, sep="\n", file=told, flush=True)

    told = (folder / "log.txt").open("a")
    evaluation = configs.options(prepared.config, "eval")
    return Member(experiment, epath.Path(folder), prepared.options, configs.options(prepared.config, "checkpoint"),
                  configs.options(prepared.config, "log"), Schedule(evaluation.every, evaluation.final), told,
                  start=functools.partial(prepared.start, workdir=str(folder)), begun=begun,
                  wanted=lambda: not (folder / STOP).exists())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
