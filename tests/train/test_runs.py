"""Runs as users start them: complete, killed, told to stop, broken by the data, in two processes, on another mesh."""

import json
import pathlib
import random
import signal
import socket
import time

import numpy as np
import pytest
from commands import finish, losses, rows, run, start

from lm.core.tree import named_leaves
from lm.train.checkpoint import restore_params

STEPS = 120
LONG = (f"--config.train.steps={STEPS}", "--config.checkpoint.every=7", "--config.eval.every=50")


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> pathlib.Path:
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "complete"
    code, out = run(workdir, *LONG)
    assert code == 0, out
    return workdir


def kill_at(workdir: pathlib.Path, step: int, number: int) -> tuple[int, str]:
    """Starts the run and sends it a signal as soon as its log has reached `step`."""
    process = start(workdir, *LONG)
    deadline = time.monotonic() + 120
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("train/loss") >= step:
            process.send_signal(number)
            break
        time.sleep(0.002)
    return finish(process)


def assert_same_run(a: pathlib.Path, b: pathlib.Path) -> None:
    """Bit-identical losses of every step, and parameters at the end."""
    np.testing.assert_array_equal(losses(a), losses(b))
    (x, step_x), (y, step_y) = restore_params(a, None), restore_params(b, None)
    assert step_x == step_y == STEPS
    x, y = named_leaves(x), named_leaves(y)
    assert x.keys() == y.keys()
    for name in x:
        np.testing.assert_array_equal(x[name], y[name])


def test_a_run_leaves_what_it_promises(complete):
    for name in ("config.json", "environment.json", "parameters.txt", "metrics.jsonl", "final_result.json",
                 "plots/loss.png", f"checkpoints/{STEPS}"):
        assert (complete / name).exists(), name
    result = json.loads((complete / "final_result.json").read_text())
    assert result["exit_code"] == 0 and result["step"] == STEPS and "eval/validation/loss" in result
    assert losses(complete)[-1] < losses(complete)[0]
    row = rows(complete)[STEPS]
    assert {"train/loss", "train/grad_norm", "train/lr", "perf/step_time", "perf/tokens_per_sec"} <= set(row)
    environment = json.loads((complete / "environment.json").read_text())
    assert environment["packages"]["jax"]


def test_the_same_command_again_says_that_the_run_is_complete(complete):
    code, out = run(complete, *LONG)
    assert code == 0 and "complete" in out
    assert "Traceback" not in out


def test_killed_and_resumed_is_bit_identical(complete, tmp_path):
    points = sorted(random.Random(time.time_ns()).sample(range(1, STEPS - 10), 2))
    for point in points:
        code, out = kill_at(tmp_path / "run", point, signal.SIGKILL)
        assert code == -signal.SIGKILL, (points, out)
    code, out = run(tmp_path / "run", *LONG)
    assert code == 0, (points, out)
    assert_same_run(complete, tmp_path / "run")


def test_sigterm_saves_exits_with_75_and_resumes(complete, tmp_path):
    code, out = kill_at(tmp_path / "run", 20, signal.SIGTERM)
    assert code == 75 and "Traceback" not in out, out
    stopped = max(rows(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir()
    code, out = run(tmp_path / "run", *LONG)
    assert code == 0, out
    assert_same_run(complete, tmp_path / "run")


def test_a_half_written_checkpoint_is_never_chosen(complete, tmp_path):
    """What a kill during a save leaves behind: a temporary folder, which is not a checkpoint."""
    workdir = tmp_path / "run"
    code, out = run(workdir, "--config.train.steps=8")
    assert code == 0, out
    torn = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    (torn / "state").mkdir(parents=True)
    (torn / "state" / "_METADATA").write_text("{")
    _, step = restore_params(workdir, None)
    assert step == 8
    code, out = run(workdir, "--config.train.steps=10")
    assert code == 0, out
    assert sorted(rows(workdir)) == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [
    ((4, 8, ("data=2", "fsdp=4")), (12, 2, ("fsdp=2", "data=1"))),
    ((4, 2, ("data=2",)), (8, 8, ("data=1", "fsdp=2", "tensor=2", "context=2")), (12, 1, ("data=1",)))],
    ids=["fewer", "other"])
def test_another_mesh_goes_on_with_the_same_losses(tmp_path, parts):
    """(until step, devices, mesh): a run that changes both on the way, against one device throughout."""
    one = tmp_path / "one"
    assert run(one)[0] == 0
    split = tmp_path / "split"
    for steps, devices, mesh in parts:
        code, out = run(split, f"--config.train.steps={steps}", *(f"--config.mesh.{axis}" for axis in mesh),
                        devices=devices)
        assert code == 0, out
    np.testing.assert_allclose(losses(split), losses(one), rtol=1e-5)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_equal_one(tmp_path):
    flags = ("--config.mesh.fsdp=2", "--config.eval.samples=the loom,word", "--config.eval.sample_tokens=8")
    assert run(tmp_path / "one", *flags, devices=2)[0] == 0
    address = f"127.0.0.1:{free_port()}"
    started = [start(tmp_path / "two", *flags, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2",
                     JAX_PROCESS_ID=str(i)) for i in range(2)]
    outs = [finish(process) for process in started]
    assert [code for code, _ in outs] == [0, 0], outs
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)
    assert outs[1][1].count("step ") == 0, "only the first process prints"
    assert (tmp_path / "two/samples/12.txt").read_text() == (tmp_path / "one/samples/12.txt").read_text()


def test_a_nonfinite_loss_stops_with_76_and_dumps_the_batch(tmp_path):
    code, out = run(tmp_path, "--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=None",
                    "--config.optimizer.warmup_steps=0")
    assert code == 76, out
    assert "not finite" in out and "Traceback" not in out
    dumped = list(tmp_path.glob("nonfinite_step*.npz"))
    assert len(dumped) == 1
    with np.load(dumped[0]) as batch:
        assert batch["tokens"].shape == (8, 32)


def test_the_workdir_of_another_config_is_refused_with_the_difference(complete):
    code, out = run(complete, *LONG, "--config.model.embed_dim=32")
    assert code == 2
    assert "embed_dim" in out and "16" in out and "32" in out and "Traceback" not in out


def test_init_from_takes_what_fits_and_reports(complete, tmp_path):
    code, out = run(tmp_path / "deeper", "--init-from", str(complete), "--config.model.num_layers=3",
                    "--config.train.steps=1", "--config.optimizer.learning_rate=1e-30",
                    "--config.optimizer.warmup_steps=0", "-v")
    assert code == 0, out
    assert "taken over" in out
    old, new = (named_leaves(restore_params(w, None)[0]) for w in (complete, tmp_path / "deeper"))
    kernel = "stack/pattern_0/mlp/up/kernel"
    np.testing.assert_allclose(new[kernel][:2], old[kernel], rtol=1e-6)
    assert new[kernel].shape[0] == 3
    np.testing.assert_allclose(new["embed/embedding"], old["embed/embedding"], rtol=1e-6)


@pytest.mark.slow
def test_only_adapters_train(complete, tmp_path):
    code, out = run(tmp_path / "lora", "--init-from", str(complete), "--config.train.lora_rank=2",
                    "--config.train.steps=6")
    assert code == 0, out
    old, new = (named_leaves(restore_params(w, None)[0]) for w in (complete, tmp_path / "lora"))
    for name, leaf in old.items():
        np.testing.assert_array_equal(new[name], leaf)
    adapters = {name: leaf for name, leaf in new.items() if name.startswith("lora/")}
    assert adapters and all(np.abs(leaf).max() > 0 for leaf in adapters.values())


def test_a_refused_start_leaves_the_workdir_as_it_was(complete, tmp_path):
    before = {name: (complete / name).read_bytes() for name in ("config.json", "environment.json", "parameters.txt")}
    code, out = run(complete, *LONG, "--config.model.embed_dim=32", "--config.train.steps=130", "--allow-config-change")
    assert code == 2 and "does not fit this config" in out and "Traceback" not in out, out
    assert before == {name: (complete / name).read_bytes() for name in before}
    code, out = run(tmp_path / "new", *LONG, "--init-from", str(tmp_path / "nowhere"))
    assert code == 2 and "no checkpoint in" in out, out
    assert not (tmp_path / "new" / "config.json").exists()  # or the right --init-from would be another config


@pytest.mark.slow
def test_a_carried_state_is_resumed_and_needs_its_lanes(tmp_path):
    lanes = ("--config.train.carry_state=True", "--config.data.packing=lanes", "--config.train.steps=12",
             "--config.model.pattern=('rwkv4/channel_mix', 'attention/mlp')", "--config.model.attention.window=16")
    assert run(tmp_path / "whole", *lanes)[0] == 0
    for steps in (5, 12):
        code, out = run(tmp_path / "parts", *lanes, f"--config.train.steps={steps}")
        assert code == 0, out
    np.testing.assert_array_equal(losses(tmp_path / "parts"), losses(tmp_path / "whole"))
    code, out = run(tmp_path / "refused", *lanes[:1])
    assert code == 2 and "a state is carried along lanes" in out
