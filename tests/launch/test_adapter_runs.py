"""Adapters from the command line: their checkpoints hold nothing of the base, go on bit by bit, and come out again."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import cli
from launch import config as configs
from launch.restore import open_run
from lm.core.tree import named_leaves
from lm.models.convert.safetensors_file import read_safetensors
from lm.train.checkpoint import restore_params, saved_shapes

MODEL = dict(embed_dim=32, num_layers=2, pattern=("attention/mlp",), attention=dict(num_heads=2),
             mlp=dict(mlp_dim=64, activation="swiglu"), tie_embeddings=False, dtype="float32", vocab_size=256)
TEXTS = tuple(f"{'abcdef'[i % 6] * 20} {i}" for i in range(60))
ADAPTERS = dict(lora_rank=2, lora_alpha=8.0, dora=True, lora_match="(query|value|down|head)/kernel$")


def config(steps, **train):
    return dict(model=MODEL, optimizer=dict(learning_rate=1e-2, schedule="constant", warmup_steps=0, ema_decay=0.5),
                data=dict(source="memory", texts=TEXTS, tokenizer="bytes"), checkpoint=dict(every=2, keep=9),
                train=dict(steps=steps, batch_size=8, seq_len=24) | train,
                eval=dict(every=1000, final=False, baseline=False), log=dict(every=1, tensorboard=False))


def write(path, made):
    path.write_text(configs.to_json(configs.resolve(made)))
    return str(path)


def lm(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with `base`, four steps of adapters beside it in `whole`, and the same in two times two in `halves`."""
    folder = tmp_path_factory.mktemp("runs")
    assert lm("train", "--config", write(folder / "base.json", config(2)), "--workdir", folder / "base") == 0
    for name, steps in (("whole", (4,)), ("halves", (2, 4))):
        for count in steps:
            made = write(folder / f"{name}.json", config(count, init_from=str(folder / "base"), **ADAPTERS))
            assert lm("train", "--config", made, "--workdir", folder / name, "--allow-config-change") == 0
    return folder


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def held(folder):
    """Names of the parameters, averages and moments that a checkpoint holds."""
    saved = saved_shapes(folder)
    return [name for part in ("params", "ema") for name in named_leaves(saved[part])], [
        name for name, leaf in named_leaves(saved["opt_state"]).items() if getattr(leaf, "shape", ())]


@pytest.mark.slow
def test_a_checkpoint_of_adapters_holds_nothing_of_the_base(runs):
    names, moments = held(runs / "whole/checkpoints/4")
    assert names and all(name.startswith("lora/") for name in names)
    assert moments and all("/lora/" in name for name in moments)
    params, step = restore_params(runs / "whole", None)
    base, _ = restore_params(runs / "base", None)
    assert step == 4 and set(params) == {"params", "lora"}
    jax.tree.map(np.testing.assert_array_equal, params["params"], base["params"])
    averaged, _ = restore_params(runs / "whole", None, ema=True)
    jax.tree.map(np.testing.assert_array_equal, averaged["params"], base["params"])
    assert not np.array_equal(averaged["lora"]["head"]["b"], params["lora"]["head"]["b"])


@pytest.mark.slow
def test_checkpoints_of_adapters_are_small(tmp_path):
    wide = config(1) | {"model": MODEL | {"embed_dim": 256, "mlp": {"mlp_dim": 1024, "activation": "swiglu"}}}
    assert lm("train", "--config", write(tmp_path / "a.json", wide), "--workdir", tmp_path / "base") == 0
    wide["train"] |= {"init_from": str(tmp_path / "base"), "lora_rank": 4}
    assert lm("train", "--config", write(tmp_path / "b.json", wide), "--workdir", tmp_path / "lora") == 0
    base, lora = (restore_params(tmp_path / name, None)[0] for name in ("base", "lora"))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    adapters = sum(leaf.nbytes for leaf in jax.tree.leaves(lora["lora"]))
    # Adapters, their average and two moments, with what orbax writes beside every array.
    assert size(tmp_path / "lora/checkpoints") < 4 * adapters + 1_000_000 < weights / 4
    assert size(tmp_path / "base/checkpoints") > 2 * weights


@pytest.mark.slow
def test_a_run_of_adapters_goes_on_bit_by_bit(runs):
    whole, halves = (restore_params(runs / name, None)[0] for name in ("whole", "halves"))
    jax.tree.map(np.testing.assert_array_equal, whole, halves)
    assert json.loads((runs / "halves/checkpoints/4/meta/metadata").read_text())["base"]["step"] == 2


@pytest.mark.slow
def test_a_base_may_move_with_its_adapters_and_may_not_change(runs, tmp_path):
    shutil.copytree(runs / "base", tmp_path / "base")
    shutil.copytree(runs / "whole", tmp_path / "whole")
    there, _ = restore_params(runs / "whole", None)
    meta = tmp_path / "whole/checkpoints/4/meta/metadata"
    noted = json.loads(meta.read_text())
    noted["base"]["workdir"] = "/nowhere"
    meta.write_text(json.dumps(noted))
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "whole", None)[0], there)
    file = tmp_path / "base/checkpoints/2/_CHECKPOINT_METADATA"
    file.write_text(json.dumps({**json.loads(file.read_text()), "commit_timestamp_nsecs": 1}))
    with pytest.raises(ValueError, match="written anew since"):
        restore_params(tmp_path / "whole", None)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match="and not the model: that is step 2 of"):
        restore_params(tmp_path / "whole", None)


@pytest.mark.slow
def test_adapters_on_adapters_name_the_run_that_has_the_weights(runs):
    made = write(runs / "more.json", config(1, init_from=str(runs / "whole"), **ADAPTERS))
    assert lm("train", "--config", made, "--workdir", runs / "more") == 0
    base = json.loads((runs / "more/checkpoints/1/meta/metadata").read_text())["base"]
    assert base["workdir"] == str(runs / "base") and base["step"] == 2


@pytest.mark.slow
def test_without_another_run_the_frozen_weights_are_saved(tmp_path):
    made = write(tmp_path / "c.json", config(1, lora_rank=2))
    assert lm("train", "--config", made, "--workdir", tmp_path / "run") == 0
    assert any(not name.startswith("lora/") for name in held(tmp_path / "run/checkpoints/1")[0])


def logits(run):
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) + 97
    with jax.set_mesh(run.mesh):
        out = jax.jit(run.apply)(run.params, tokens)
        return np.asarray(jnp.einsum("btd,vd->btv", out.hidden, out.head.kernel))[..., :256]


@pytest.mark.slow
def test_merged_runs_and_exports_compute_what_the_adapters_did(runs, tmp_path, capsys):
    assert lm("convert", "--to", "run", "--merge", "--workdir", runs / "whole", "--out", tmp_path / "merged") == 0
    run = open_run(str(tmp_path / "merged"))
    assert set(run.params) == {"params"} and run.config.train.lora_rank is None
    want = logits(open_run(str(runs / "whole")))
    assert np.abs(want - logits(open_run(str(runs / "base")))).max() > 1e-3
    np.testing.assert_allclose(logits(run), want, atol=2e-5)

    for name, flags in (("hf", ["--merge"]), ("peft", [])):
        assert lm("convert", "--to", name, *flags, "--workdir", runs / "whole", "--out", tmp_path / name) == 0
    assert lm("convert", "--to", "hf", "--workdir", runs / "base", "--out", tmp_path / "base") == 0
    merged, base = (read_safetensors(tmp_path / name / "model.safetensors") for name in ("hf", "base"))
    found = read_safetensors(tmp_path / "peft/adapter_model.safetensors")
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["use_dora"] and settings["target_modules"] == ["down_proj", "lm_head", "q_proj", "v_proj"]
    changed = 0
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}."
        if stem + "lora_A.weight" not in found:
            np.testing.assert_array_equal(weight, merged[name])
            continue
        # As PEFT computes: weights [out, in], W + B A * lora_alpha / r, rows of the length of the magnitude.
        factor = settings["lora_alpha"] / settings["r"]
        whole = weight + factor * found[stem + "lora_B.weight"] @ found[stem + "lora_A.weight"]
        scale = found[stem + "lora_magnitude_vector"] / np.linalg.norm(whole, axis=1)
        np.testing.assert_allclose(scale[:, None] * whole, merged[name], atol=2e-6)
        changed += 1
    assert changed == 2 * 3 + 1 and len(found) == 3 * changed


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "message"), [
    (["--to", "hf"], "--merge adds them to the weights, --to peft writes them alone"),
    (["--to", "run"], "give --merge"),
    (["--to", "peft", "--merge"], "leave it out"),
])
def test_adapters_are_never_left_out_in_silence(runs, tmp_path, capsys, flags, message):
    assert lm("convert", *flags, "--workdir", runs / "whole", "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_only_runs_with_adapters_are_merged(runs, tmp_path, capsys):
    assert lm("convert", "--to", "hf", "--merge", "--workdir", runs / "base", "--out", tmp_path / "out") == 2
    assert "holds no adapters" in capsys.readouterr().err


def test_alpha_outside_and_inside_of_the_adapter_learn_the_same():
    """Adam on a factor alpha / r outside, as PEFT has it, against `a` that holds it, with the rules of `lm train`."""
    import optax

    from launch.adapters import rules
    from lm.optim.builder import build_optimizer
    from lm.optim.options import OptimizerOptions
    from lm.train.options import TrainOptions
    rng = np.random.default_rng(0)
    w, x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 5), (16, 6), (16, 5)))
    a = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    factor, lr, decay = 4.0, 1e-2, 0.1
    given = OptimizerOptions(learning_rate=lr, schedule="constant", warmup_steps=0, weight_decay=decay, eps=1e-12,
                             clip_norm=None)
    ours = {"params": {"q": {"kernel": w}}, "lora": {"q": {"a": a * factor, "b": jnp.zeros((2, 5))}}}
    optimizer = build_optimizer(rules(TrainOptions(lora_rank=2, lora_alpha=8.0), given), ours, 100)
    theirs = {"a": a, "b": jnp.zeros((2, 5))}
    tx = optax.adamw(lr, b2=0.95, eps=1e-12, weight_decay=decay)
    loss = lambda delta: jnp.mean((x @ (w + delta) - y) ** 2)

    @jax.jit
    def step(ours, state, theirs, other):
        grads = jax.grad(lambda p: loss(p["lora"]["q"]["a"] @ p["lora"]["q"]["b"]))(ours)
        updates, state = optimizer.tx.update(grads, state, ours)
        grads = jax.grad(lambda p: loss(factor * p["a"] @ p["b"]))(theirs)
        moves, other = tx.update(grads, other, theirs)
        return optax.apply_updates(ours, updates), state, optax.apply_updates(theirs, moves), other

    state, other = optimizer.tx.init(ours), tx.init(theirs)
    for _ in range(30):
        ours, state, theirs, other = step(ours, state, theirs, other)
    np.testing.assert_allclose(ours["lora"]["q"]["a"], factor * theirs["a"], rtol=2e-3)
    np.testing.assert_allclose(ours["lora"]["q"]["b"], theirs["b"], rtol=2e-3, atol=1e-5)
