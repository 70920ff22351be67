"""Training and decoding with recurrent depth beside everything else: layers, meshes, adapters, remat, microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import config as configs
from launch.train import prepare
from lm.adapters.lora import init_lora
from lm.core.recurrences import STEPS, with_recurrences
from lm.core.sharding import make_mesh, shardings
from lm.core.tree import named_leaves
from lm.models.build import abstract_params, build_model, init_params, make_apply
from lm.models.state_tuning import init_states
from lm.train.step import make_train_step

VOCAB = 16
BASE = dict(embed_dim=16, num_layers=3, prefix=("attention/mlp",), pattern=("attention/mlp",), dtype="float32",
            attention=dict(num_heads=2), mlp=dict(mlp_dim=24), vocab_multiple=8, embed_std=0.2,
            recurrent_depth=dict(coda=("attention/mlp",), mean=3.0, backprop=2))
TOKENS = jax.random.randint(jax.random.key(1), (8, 6), 0, VOCAB)


def made(**changes):
    model = build_model({**BASE, **changes}, VOCAB)
    return model, init_params(model, jax.random.key(0)), make_apply(model)


def loss(apply, key):
    """A number of a training pass; the key draws five iterations here."""
    return lambda params: jnp.mean(jnp.sin(apply(params, TOKENS, key=key).hidden))


KEY = jax.random.key(5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(remat="full"), dict(scan=False, remat="dots")], ids=str)
def test_execution_forms_agree_in_values_and_gradients(changes):
    _, params, apply = made()
    (a, ga), (b, gb) = (jax.jit(jax.value_and_grad(loss(f, KEY)))(params) for f in (apply, made(**changes)[2]))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, data=2)], ids=str)
def test_meshes_give_the_values_and_gradients_of_one_device(sizes):
    model, params, apply = made()
    value, gradient = jax.jit(jax.value_and_grad(loss(apply, KEY)))(params)
    exits = jax.jit(apply)(with_recurrences(params, 6, 1e-3), TOKENS)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(abstract_params(model), mesh))
        other, spread = jax.jit(jax.value_and_grad(loss(make_apply(model), KEY)))(placed)
        out = jax.jit(make_apply(model))(with_recurrences(placed, 6, 1e-3), TOKENS)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(spread), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(out.aux[STEPS], exits.aux[STEPS])
    np.testing.assert_allclose(out.hidden, exits.hidden, atol=1e-5)


CORES = {"rwkv7": dict(pattern=("first/mlp",), first=dict(kind="rwkv7", value_residual=False, head_dim=8)),
         "peer": dict(pattern=("attention/peer",), peer=dict(num_experts=16, num_heads=2, top_k=2, key_dim=4,
                                                             query_norm="batch")),
         "moe": dict(pattern=("attention/moe",), moe=dict(num_experts=4, top_k=2, mlp_dim=8))}


@pytest.mark.slow
@pytest.mark.parametrize("core", CORES)
def test_any_layer_may_be_the_core(core):
    """Gradients reach all of it, what it counts is counted once an iteration, and decoding equals the whole."""
    model, params, apply = made(**CORES[core])
    # Away from the initial values, of which some are zero.
    drawn = lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    params = {**params, "params": jax.tree.map(drawn, params["params"])}
    gradient = jax.jit(jax.grad(loss(apply, KEY)))(params)
    for name, leaf in named_leaves({"params": gradient["params"]}).items():
        assert np.isfinite(leaf).all() and (np.abs(leaf).max() > 0 or name.endswith("norm/bias")), name
    aux = jax.jit(lambda p: apply(p, TOKENS, key=KEY).aux)(params)
    heard = min(2, int(aux["tally"]["depth"]["recurrences"].total))
    if core == "peer":
        count = jax.tree.leaves(aux["tally"]["stack"]["pattern_0"]["peer"], is_leaf=lambda n: hasattr(n, "count"))
        counts = [float(node.count[0]) for node in count if hasattr(node, "count") and hasattr(node, "square")]
        assert counts and set(counts) == {TOKENS.size * heard}
    if core == "moe":
        assert any(name.endswith("load_balance") for name in aux)
    run, state, hidden = jax.jit(apply), model.initial_state(8, capacity=8), []
    for t in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
        out = run(params, TOKENS[:, t], state)
        state = out.state
        hidden.append(out.hidden)
    if core != "moe":  # its capacity is that of a call
        np.testing.assert_allclose(jnp.concatenate(hidden, 1), run(params, TOKENS).hidden, atol=5e-5)


def test_adapters_of_core_and_adapter_change_what_their_merged_kernels_change():
    from lm.adapters.lora import merge
    _, params, apply = made()
    lora = init_lora(jax.random.key(2), params["params"], 2, r"(^|/)(query|up|adapter)/kernel$")
    assert {"adapter", "stack", "prelude", "coda"} <= set(lora)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    run = jax.jit(apply)
    adapted = run({**params, "lora": lora}, TOKENS).hidden
    merged = run({"params": merge(params["params"], lora)}, TOKENS).hidden
    np.testing.assert_allclose(adapted, merged, atol=2e-4)
    assert not np.allclose(adapted, run(params, TOKENS).hidden, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("train", [dict(), dict(microbatches=2), dict(lora_rank=2)], ids=str)
def test_the_train_step_of_a_run_takes_it(train):
    config = configs.resolve(dict(
        model=BASE, data=dict(source="copy_chain", task=dict(width=2, num_values=3)), optimizer=dict(ema_decay=0.9),
        train=dict(batch_size=16, seq_len=8, steps=6, **train), eval=dict(batches=1)))
    run = prepare(config)
    experiment = run.experiment("unused")
    traced = []

    def apply(*args, **kwargs):
        traced.append(None)
        return experiment.apply(*args, **kwargs)

    step = jax.jit(make_train_step(apply, experiment.objective, run.recipe.optimizer,
                                   microbatches=run.options.microbatches),
                   out_shardings=(run.recipe.shardings(run.mesh), None))
    state = run.recipe.create(0, run.mesh)
    seen, programs = [], []
    with jax.set_mesh(run.mesh):
        for n in range(6):
            state, metrics = step(state, run.train_set.batch(n))
            seen.append(float(metrics["train/depth/recurrences"]))
            programs.append(len(traced))
    assert programs[0] == programs[-1] and len(set(seen)) > 1
    assert np.isfinite(metrics["train/loss"]) and float(metrics["train/depth/change"]) > 0
    assert state.ema is not None
    # Four iterations on average, of which two and less have a gradient.
    assert 1 < experiment.passes < (2.0 if "lora_rank" in train else 3.0)


def test_state_tuning_is_refused():
    model, _, _ = made(**CORES["rwkv7"])
    with pytest.raises(ValueError, match=r"core of model\.recurrent_depth has one for each iteration"):
        init_states(model)
