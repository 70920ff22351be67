"""A sweep on a Ray cluster: the same trials in the same study."""

import os
import pathlib
import subprocess
import sys

import pytest
from test_sweep import TINY, sweep, trials

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_ray_tune_runs_the_trials_of_the_study(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'loomlm[ray]'")
    pytest.importorskip("ray.tune", reason="Ray Tune is not installed: pip install 'loomlm[ray]'")
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_AUTH_MODE", "disabled"), ("PYTHONPATH", str(ROOT)),
                        ("XLA_FLAGS", flags)):  # the cluster's processes inherit them
        monkeypatch.setenv(name, value)
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", "sweep", "--config", TINY, "--workdir", str(tmp_path / "s"), "--ray",
             context.address_info["address"], "--param", "optimizer.learning_rate=1e-3,3e-3",
             "--config.train.steps=6"], cwd=ROOT, text=True, capture_output=True, timeout=500, env=dict(os.environ))
    finally:
        ray.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 complete of 2" in done.stdout
    assert [one.state.name for one in trials(tmp_path / "s")] == ["COMPLETE"] * 2
    assert all((tmp_path / f"s/trials/{n:04d}/final_result.json").exists() for n in range(2))


def test_ray_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sweep("--config", TINY, "--workdir", tmp_path, "--ray=auto", "--param", "optimizer.learning_rate=0.1") == 2
    assert "pip install 'loomlm[ray]'" in capsys.readouterr().err
