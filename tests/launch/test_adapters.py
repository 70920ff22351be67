"""State tuning from the command line: only the states learn, they help, and they are used wherever the run is."""

import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import cli
from launch import config as configs
from launch.restore import open_run
from launch.train import prepare
from lm.core.tree import named_leaves
from lm.train.checkpoint import restore_params
from lm.train.feed import to_device
from lm.train.step import make_train_step

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "recurrent.md"
MODEL = dict(embed_dim=16, num_layers=2, pattern=("rwkv4/mlp", "min_gru/mlp"), mlp=dict(mlp_dim=32), dtype="float32",
             vocab_size=256)


def texts(letters):
    """Documents that keep to three of these letters each."""
    rng = np.random.default_rng(len(letters))
    return tuple("".join(rng.choice(rng.choice(list(letters), 3, replace=False), 25)) for _ in range(8 * len(letters)))


def config(texts, **train):
    return dict(model=MODEL, optimizer=dict(learning_rate=1e-2, schedule="constant", warmup_steps=0),
                data=dict(source="memory", texts=texts, tokenizer="bytes", packing="single",
                          validation=dict(source="memory", texts=texts)),
                train=dict(steps=200, batch_size=8, seq_len=24) | train,
                eval=dict(every=1000, batches=None, baseline=False), log=dict(every=10, tensorboard=False))


def write(folder, name, made):
    path = folder / f"{name}.json"
    path.write_text(configs.to_json(configs.resolve(made)))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, exit code of the tuning run): `base` finds out which three of ten letters a document has, `tuned` had to
    learn that they are always the same, with the flags that the page gives."""
    folder = tmp_path_factory.mktemp("runs")
    base = write(folder, "base", config(texts("abcdefghij")))
    assert cli.main(["train", "--config", base, "--workdir", str(folder / "base")]) == 0
    (command,) = (part for part in PAGE.read_text().split("\n\n") if "--config.train.state_tuning=True" in part)
    flags = [word for word in shlex.split(command.replace("\\\n", " ")) if word.startswith("--config.")]
    tuned = write(folder, "tuned", config(texts("abc"), steps=60))
    code = cli.main(["train", "--config", tuned, "--workdir", str(folder / "tuned"), "--init-from",
                     str(folder / "base"), *flags])
    return folder, code


def result(workdir):
    return json.loads((workdir / "final_result.json").read_text())


@pytest.mark.slow
def test_only_the_states_learn(runs):
    folder, code = runs
    assert code == 0
    old, new = (named_leaves(restore_params(folder / name, None)[0]) for name in ("base", "tuned"))
    for name, leaf in old.items():
        np.testing.assert_array_equal(new[name], leaf)
    states = {name: leaf for name, leaf in new.items() if name not in old}
    assert sorted(states) == ["state/stack/pattern_0/rwkv4/wkv", "state/stack/pattern_1/min_gru/hidden"]
    assert all(np.abs(leaf[0]).max() > 0.01 for leaf in states.values())
    table = (folder / "tuned" / "parameters.txt").read_text()
    assert re.search(r"state/stack/pattern_0/rwkv4/wkv .* False", table)


@pytest.mark.slow
def test_evaluation_and_generation_start_from_them(runs, capsys):
    folder, _ = runs
    tuned = open_run(str(folder / "tuned"))
    without = {"params": tuned.params["params"]}
    tokens, forward = jnp.asarray([list(text.encode()) for text in texts("abc")]), jax.jit(tuned.apply)
    losses = []
    for params in (tuned.params, without):
        out = forward(params, tokens[:, :-1])
        logp = jax.nn.log_softmax(out.hidden @ out.head.kernel.T)
        losses.append(-float(jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))))
    assert losses[0] < losses[1] - 0.1, losses
    assert cli.main(["eval", "--workdir", str(folder / "tuned"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]["eval/validation/loss"]
    assert found == pytest.approx(result(folder / "tuned")["eval/validation/loss"], rel=1e-6)
    assert found == pytest.approx(losses[0], rel=1e-4)
    assert cli.main(["generate", "--workdir", str(folder / "tuned"), "--prompt", "abca", "--max-new-tokens", "6",
                     "--temperature", "0"]) == 0
    ids = list(b"abca")
    for _ in range(6):
        out = forward(tuned.params, jnp.asarray([ids + [0] * (10 - len(ids))]))
        ids.append(int(jnp.argmax(out.hidden[0, len(ids) - 1] @ out.head.kernel[:256].T)))
    assert capsys.readouterr().out == bytes(ids).decode(errors="replace") + "\n"


def test_a_step_changes_the_states_alone_and_off_there_are_none():
    given = config(texts("abcde"))
    assert set(prepare(configs.resolve(given)).recipe.boxed) == {"params"}
    made = prepare(configs.resolve(given, [("train.state_tuning", True)]))
    fresh = made.recipe.create(0, made.mesh)  # its layers give nothing yet: their output kernels are zero
    before = fresh._replace(params={**fresh.params, "params": jax.tree.map(lambda a: a + 0.1, fresh.params["params"])})
    names = {row.name for row in made.recipe.optimizer.rows if not row.frozen}
    assert names == {"state/stack/pattern_0/rwkv4/wkv", "state/stack/pattern_1/min_gru/hidden"}
    held = [leaf.shape for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim > 1]
    assert set(held) == {before.params["state"]["stack"]["pattern_0"]["rwkv4"]["wkv"].shape,
                         before.params["state"]["stack"]["pattern_1"]["min_gru"]["hidden"].shape}
    experiment = made.experiment("unused")
    step = jax.jit(make_train_step(experiment.apply, experiment.objective, made.recipe.optimizer))
    with jax.set_mesh(made.mesh):
        after, metrics = step(before, to_device(made.train_set.batch(0), made.mesh, 0, 1))
    assert float(metrics["train/grad_norm"]) > 0
    new = named_leaves(after.params)
    changed = {name for name, leaf in named_leaves(before.params).items() if np.any(leaf != new[name])}
    assert changed == names


def test_documents_that_start_inside_a_row_are_refused():
    made = config(("abc abc",), state_tuning=True)
    for packing in ("first_fit", "concat"):
        with pytest.raises(ValueError, match=r"set data\.packing='single'"):
            configs.resolve(made, [("data.packing", packing)])
    word = dict(source="word_problem", task=dict(length=4))
    with pytest.raises(ValueError, match=r"one word a row, and config\.data\.task\.length=4"):
        configs.resolve({**made, "data": word})
    with pytest.raises(ValueError, match=r"config\.data\.validation\.task\.length=4"):
        configs.resolve({**made, "data": dict(source="word_problem", validation=word)})


def test_a_model_without_a_recurrent_layer_is_refused():
    made = config(("abc abc abc abc abc abc abc",), state_tuning=True)
    made["train"]["seq_len"] = 8
    made["model"] = dict(embed_dim=16, num_layers=1, attention=dict(num_heads=2))
    with pytest.raises(ValueError, match="this model has none"):
        prepare(configs.resolve(made))
