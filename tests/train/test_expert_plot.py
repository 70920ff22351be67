"""plots/experts.png shows every metric of every layer with experts, and is not there for a run without."""

from etils import epath

from lm.train import expert_plot
from lm.train.options import LogOptions
from lm.train.writers import MetricsWriter


def write(folder, rows):
    with MetricsWriter(folder, LogOptions(tensorboard=False)) as writer:
        for step, row in enumerate(rows, 1):
            writer.write(step, row)


def test_a_panel_for_each_metric_and_a_curve_for_each_layer(tmp_path, monkeypatch):
    write(tmp_path, [{"train/loss": 1.0, "train/layer_10/peer/usage": 0.5, "train/layer_2/moe/usage": n / 3,
                      "train/layer_10/peer/unevenness": 0.1, "train/layer_2/moe/unevenness": 0.2,
                      "train/layer_10/peer/overlap": 0.0, "train/layer_2/moe/bias": 9.0} for n in range(3)])
    drawn = []
    monkeypatch.setattr(expert_plot, "draw", lambda found, title: drawn.append(found) or b"")
    expert_plot.plot_experts(tmp_path)
    monkeypatch.undo()
    assert drawn == [{"usage": {"layer_10/peer": ([1, 2, 3], [0.5] * 3), "layer_2/moe": ([1, 2, 3], [0, 1 / 3, 2 / 3])},
                      "unevenness": {"layer_10/peer": ([1, 2, 3], [0.1] * 3), "layer_2/moe": ([1, 2, 3], [0.2] * 3)},
                      "overlap": {"layer_10/peer": ([1, 2, 3], [0.0] * 3)}}]
    assert expert_plot.plot_experts(tmp_path) == epath.Path(tmp_path) / "plots" / "experts.png"
    assert (tmp_path / "plots" / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_no_experts_no_figure(tmp_path):
    write(tmp_path, [{"train/loss": 1.0}])
    assert expert_plot.plot_experts(tmp_path) is None and not (tmp_path / "plots").exists()
