"""`lm grow`: the grown run computes the same, what is old stays in training, and mistakes leave nothing behind."""

import json

import jax
import numpy as np
import pytest

from launch import cli
from launch import config as configs
from launch.restore import open_run
from launch.train import prepare
from lm.core.tree import named_leaves
from lm.train.checkpoint import open_checkpoints
from lm.train.init_from import on_host

TEXTS = tuple(f"document {n}: the quick brown fox number {n * n} jumps over {n % 7} lazy dogs." for n in range(40))
OPEN = "--config.model.peer.active_keys=None"


def lm(*words):
    return cli.main([str(word) for word in words])


def save(workdir, **groups):
    """An untrained run with moved parameters and running statistics, on a mesh where `mesh` says so."""
    config = configs.resolve({**dict(
        model=dict(embed_dim=16, num_layers=2, pattern=("attention/peer",), attention=dict(num_heads=2),
                   peer=dict(num_experts=36, num_heads=2, top_k=3), dtype="float32"),
        data=dict(source="memory", texts=TEXTS, tokenizer="bytes"), optimizer=dict(learning_rate=1e-2),
        train=dict(batch_size=8, seq_len=16, steps=3), eval=dict(batches=1), log=dict(tensorboard=False)), **groups})
    configs.check_workdir(str(workdir), config)
    made = prepare(config)
    with jax.set_mesh(made.mesh), open_checkpoints(str(workdir), configs.options(config, "checkpoint")) as checkpoints:
        state = made.recipe.create(1, made.mesh)
        checkpoints.save(3, state._replace(params=jax.tree.map(lambda leaf: leaf * 3 + 0.1, state.params)), {})
    return workdir


def logits(workdir, *overrides):
    run = open_run(str(workdir), overrides=overrides)
    tokens = np.random.default_rng(0).integers(0, 255, (8, 16))
    with jax.set_mesh(run.mesh):
        return np.asarray(jax.jit(lambda params: run.apply(params, tokens).hidden)(run.params))


def arrays(workdir):
    return {name: on_host(leaf) for name, leaf in named_leaves(open_run(str(workdir)).params).items()}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grow")
    assert lm("grow", "--workdir", save(folder / "a"), "--out", folder / "b", "--experts", 64, "--freeze", "rest") == 0
    return folder


def test_a_grown_run_computes_the_same_bits_until_its_keys_are_opened(grown, capsys):
    before, after = logits(grown / "a"), logits(grown / "b")
    np.testing.assert_array_equal(before.view(np.uint32), after.view(np.uint32))
    assert np.abs(logits(grown / "b", ("model.peer.active_keys", "None")) - before).max() > 1e-3
    peer = configs.load(str(grown / "b")).model.peer
    assert (peer.num_experts, peer.active_keys, peer.momentum, peer.numbering) == (64, 6, 1.0, "shell")
    assert json.loads((grown / "b" / "grown.json").read_text())["experts"] == [36, 64]


@pytest.mark.slow
def test_100_steps_leave_every_old_bit_and_move_what_is_new(grown, tmp_path):
    assert lm("train", "--config", grown / "b", "--init-from", grown / "b", "--workdir", tmp_path / "c", OPEN,
              "--config.train.steps=100", "--config.eval.final=False") == 0
    before, after = arrays(grown / "b"), arrays(tmp_path / "c")
    for name, leaf in before.items():
        now, leaf = after[name].view(np.uint32), leaf.view(np.uint32)
        if name.endswith("peer/experts") and not name.startswith("stats"):
            assert (now[:, :36] == leaf[:, :36]).all() and (now[:, 36:] != leaf[:, 36:]).any()
        elif name.endswith("router/keys"):
            assert (now[:, :, :6] == leaf[:, :, :6]).all() and (now[:, :, 6:] != leaf[:, :, 6:]).any()
        elif not name.endswith("usage/idle"):
            assert (now == leaf).all(), name
    text = (tmp_path / "c" / "parameters.txt").read_text()
    assert "(36, -3)" in text and "(6, -2)" in text


@pytest.mark.slow
def test_a_run_grows_again_and_its_first_experts_stay_first(grown, tmp_path):
    assert lm("grow", "--workdir", grown / "b", "--out", tmp_path / "c", "--experts", 100, "--freeze", "experts") == 0
    rules = configs.load(str(tmp_path / "c")).optimizer.rules
    assert [tuple(rule["freeze_first"]) for rule in rules] == [(64, -3), (8, -2)]  # and nothing of the first growth
    np.testing.assert_array_equal(logits(grown / "a"), logits(tmp_path / "c"))


@pytest.mark.slow
def test_tables_split_over_devices_grow(tmp_path):
    mesh = dict(expert=4, data=2)
    assert lm("grow", "--workdir", save(tmp_path / "a", mesh=mesh), "--out", tmp_path / "b", "--experts", 64) == 0
    run = open_run(str(tmp_path / "b"))
    table = run.params["params"]["stack"]["pattern_0"]["peer"]["experts"]
    assert table.shape[1] == 64 and table.addressable_shards[0].data.shape[1] == 16
    # Experts are on other devices than before, and the parts of a sum meet in another order.
    np.testing.assert_allclose(logits(tmp_path / "a"), logits(tmp_path / "b"), rtol=0, atol=1e-4)
    assert lm("train", "--config", tmp_path / "b", "--init-from", tmp_path / "b", "--workdir", tmp_path / "c", OPEN,
              "--config.train.steps=2", "--config.eval.final=False") == 0
    before, after = (arrays(tmp_path / name)["stack/pattern_0/peer/experts"].view(np.uint32) for name in "bc")
    assert (before[:, :36] == after[:, :36]).all() and (before[:, 36:] != after[:, 36:]).any()
    assert lm("grow", "--workdir", tmp_path / "a", "--out", tmp_path / "d", "--experts", 49) == 2


@pytest.mark.parametrize("experts, message", [
    (60, "is not a square n * n, as product keys need; nearest: 64 = 8^2"),
    (25, "experts are added, and none is taken away; nearest: 49 = 7^2")])
def test_a_number_that_cannot_be_leaves_nothing_behind(grown, tmp_path, capsys, experts, message):
    assert lm("grow", "--workdir", grown / "a", "--out", tmp_path / "b", "--experts", experts) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())
    assert lm("grow", "--workdir", grown / "a", "--out", grown / "b", "--experts", 64) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_run_without_peer_is_refused(tmp_path, capsys):
    config = configs.resolve(dict(model=dict(embed_dim=16, num_layers=1, attention=dict(num_heads=1))))
    configs.check_workdir(str(tmp_path / "a"), config)
    assert lm("grow", "--workdir", tmp_path / "a", "--out", tmp_path / "b", "--experts", 64) == 2
    assert "the run has no layer of kind 'peer'" in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert lm("grow", "--workdir", tmp_path / "a", "--experts", 64) == 2
    assert "missing: --out" in capsys.readouterr().err
