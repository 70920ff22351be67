"""The loss plot: the right series in the right unit, and a real picture."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from lm.train import plots
from lm.train.options import LogOptions
from lm.train.plots import plot_loss, series, smoothed
from lm.train.writers import MetricsWriter


def write_run(folder, bits=True, steps=range(10, 1010, 10)):
    rng = np.random.default_rng(0)
    with MetricsWriter(folder, LogOptions(tensorboard=False)) as writer:
        for step in steps:
            loss = 1.4 + 4 * math.exp(-step / 90) + 0.04 * rng.normal()
            row = {"train/loss": loss}
            writer.write(step, row | {"train/bits_per_byte": loss / math.log(2)} if bits else row)
            if step % 200 == 0:
                writer.write(step, {"eval/validation/loss": loss + 0.1, "eval/validation/perplexity": math.exp(loss)}
                             | ({"eval/validation/bits_per_byte": (loss + 0.1) / math.log(2)} if bits else {}))


@pytest.fixture
def drawn(monkeypatch):
    """What plot_loss hands to draw."""
    seen = []
    real = plots.draw
    monkeypatch.setattr(plots, "draw", lambda *args: seen.append(args) or real(*args))
    return seen


def test_a_picture_in_bits_per_byte_with_evaluations_and_baseline(tmp_path, drawn):
    write_run(tmp_path)
    path = plot_loss(tmp_path, baselines={"bigram": 2.6})
    assert path == tmp_path / "plots" / "loss.png" and path.read_bytes().startswith(b"\x89PNG")
    steps, values, evaluations, baselines, unit, _ = drawn[0]
    assert steps[:2] == [10, 20] and len(values) == 100 and unit == "bits per byte"
    assert list(evaluations) == ["validation"] and evaluations["validation"][0] == [200, 400, 600, 800, 1000]
    assert baselines == {"bigram": 2.6}


def test_the_unit_is_nats_where_bytes_are_not_known_and_bits_are_not_drawn_into_it(tmp_path, drawn):
    write_run(tmp_path, bits=False)
    plot_loss(tmp_path, baselines={"bigram": 2.6})
    _, _, evaluations, baselines, unit, _ = drawn[0]
    assert "nats" in unit and baselines == {} and list(evaluations) == ["validation"]


def test_a_run_without_rows_has_no_picture(tmp_path):
    assert plot_loss(tmp_path) is None
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("steps", [[10], [10, 20], range(1, 60)])
def test_short_runs_are_drawn_too(tmp_path, steps):
    write_run(tmp_path, steps=steps)
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_values_that_are_not_finite_are_left_out_and_the_last_row_of_a_step_counts():
    rows = [{"step": 2, "a": 5.0}, {"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 3, "a": math.nan},
            {"step": 4, "a": math.inf}, {"step": 5, "a": None}, {"step": 6}]
    assert series(rows, "a") == ([1, 2], [1.0, 2.0])


def test_smoothing_is_centred_and_agrees_with_numpy():
    values = np.random.default_rng(1).normal(size=50)
    reach = [min(3, n, 49 - n) for n in range(50)]
    expected = [values[n - r:n + r + 1].mean() for n, r in enumerate(reach)]
    np.testing.assert_allclose(smoothed(list(values), 3), expected, atol=1e-12)
    np.testing.assert_allclose(smoothed([float(n) for n in range(20)], 4), np.arange(20))  # a slope is not delayed


def test_nothing_is_printed_and_matplotlib_is_not_imported_at_start(tmp_path):
    write_run(tmp_path, steps=range(1, 60))
    code = ("import sys; from lm.train.plots import plot_loss; assert 'matplotlib' not in sys.modules\n"
            "assert plot_loss(sys.argv[1]) and 'matplotlib.pyplot' not in sys.modules")
    env = os.environ | {"MPLCONFIGDIR": str(tmp_path / "fonts")}  # no font cache yet
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], env=env, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
