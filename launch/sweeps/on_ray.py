"""The trials of a sweep on an existing Ray cluster: Ray Tune gives the places, and the study stays what it is.

Each trial of Tune takes one of the study, as `lm sweep worker` would on that machine, so that resuming, pruning and
locks are the same, and workers outside of Ray may help. All machines see the sweep's folder and have this package.
"""

import os
import pathlib
import threading
from typing import Any

from launch.sweeps import trial
from launch.sweeps.definition import Definition, read
from launch.sweeps.study import Queue


def ray() -> Any:
    """The package. Raises ValueError where it is not installed."""
    try:
        import ray
        import ray.tune
    except ImportError:
        raise ValueError("--ray needs Ray Tune: pip install 'loomlm[ray]'") from None
    return ray


def take_one(config: dict[str, Any]) -> None:
    """On a machine of the cluster: takes a trial, runs it, and reports what came of it to Tune."""
    from launch.accelerators import choose_platform
    from launch.claim_grid import child_environment
    choose_platform()
    workdir = pathlib.Path(config["workdir"])
    queue, found = Queue(read(workdir), workdir), {"ended": "nothing left"}
    while (held := queue.next()) is not None:
        try:
            ended = trial.run(held, queue.definition, workdir, child_environment(os.environ), threading.Event())
        finally:
            held.release()
        values = queue.study().get_trials(deepcopy=False)[held.number].values or []
        goals = zip(queue.definition.goals, values, strict=False)
        found = {"trial": held.number, "ended": ended, **{name: value for (name, _), value in goals}}
        if ended != "killed":
            break
    ray().tune.report(found)


def work(definition: Definition, workdir: pathlib.Path, address: str, at_once: int | None) -> None:
    """Runs what is left of the sweep on the cluster at `address` ("auto", or HOST:PORT of its head), one CPU a trial
    and, where the cluster has any, one GPU; at_once: trials at a time, None for as many as there is room for."""
    package = ray()
    try:
        package.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"--ray={address}: no Ray cluster answers there ({str(error).splitlines()[0]})") from None
    try:
        ended = sum(one.state.is_finished() for one in Queue(definition, workdir).study().get_trials(deepcopy=False))
        left = definition.num_trials - ended
        if left:
            room = {"cpu": 1, **({"gpu": 1} if package.cluster_resources().get("GPU") else {})}
            tune = package.tune
            tune.Tuner(tune.with_resources(take_one, room), param_space={"workdir": str(workdir.absolute())},
                       tune_config=tune.TuneConfig(num_samples=left, max_concurrent_trials=at_once),
                       run_config=tune.RunConfig(storage_path=str(workdir.absolute()), name="ray", verbose=1)).fit()
    finally:
        package.shutdown()
