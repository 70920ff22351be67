"""muP: multipliers are those of the papers' tables, for model and optimizer; what does not fit is refused."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from launch.recipe import recipe_of
from lm.core.transfer import Transfer
from lm.core.tree import axes_of
from lm.models.build import abstract_params, build_model, init_params, make_apply
from lm.optim.builder import build_optimizer
from lm.optim.mup import resolve
from lm.optim.options import OptimizerOptions
from lm.optim.rules import table
from lm.train.options import TrainOptions

SMALL = dict(embed_dim=64, num_layers=2, pattern=("attention/mlp",), attention=dict(head_dim=8), mlp=dict(),
             tie_embeddings=False, vocab_multiple=8, dtype="float32", base_width=16)


def rows(optimizer=None, **model):
    """Name to row of a model's parameters, blocks' names shortened."""
    model = build_model({**SMALL, **model}, 24)
    options = OptimizerOptions(**{"parametrization": "mup", "weight_decay": 0.1, **(optimizer or {})})
    recipe = recipe_of(model, TrainOptions(steps=100, batch_size=1, seq_len=8), options, {})
    return {row.name.removeprefix("stack/pattern_0/"): row for row in recipe.optimizer.rows}


def applied(model):
    """Compiled: op by op is slow."""
    return jax.jit(make_apply(model))


def test_rates_are_those_of_table_8_and_decay_a_step_does_not_depend_on_width():
    """Yang and Hu 2022, table 8, Adam: 1 / fan_in for hidden weights, 1 for input weights, biases and output weights.
    The width is 4 times the base here."""
    found = rows(mlp=dict(use_bias=True))
    assert {name: row.lr_multiplier for name, row in found.items()} == {
        "embed/embedding": 1.0, "head/kernel": 1.0, "final_norm/scale": 1.0, "norm0/scale": 1.0, "norm1/scale": 1.0,
        "attention/query/kernel": 0.25, "attention/key/kernel": 0.25, "attention/value/kernel": 0.25,
        "attention/out/kernel": 0.25, "mlp/up/kernel": 0.25, "mlp/down/kernel": 0.25, "mlp/up/bias": 1.0,
        "mlp/down/bias": 1.0}
    assert {name: row.weight_decay for name, row in found.items() if row.weight_decay} == {
        "head/kernel": 0.1, **{name: 0.4 for name, row in found.items() if row.lr_multiplier == 0.25}}


@pytest.mark.slow
def test_the_models_part_is_that_of_table_8():
    wide, base = (build_model({**SMALL, "embed_dim": d, "vocab_multiple": 256, "num_layers": 1}, 256) for d in (64, 16))
    params = {m.embed_dim: init_params(m, jax.random.key(0))["params"] for m in (wide, base)}
    spread = lambda d, *path: float(np.std(jax.tree.reduce(lambda t, k: t[k], path, params[d])))
    # Output weights start as at the base width, embeddings as everywhere, hidden weights with 1 / sqrt(fan in).
    assert spread(64, "head", "kernel") == pytest.approx(16**-0.5, rel=0.02)
    assert spread(64, "embed", "embedding") == pytest.approx(0.02, rel=0.02)
    assert spread(64, "stack", "pattern_0", "mlp", "up", "kernel") == pytest.approx(64**-0.5, rel=0.02)
    tokens = np.arange(8)[None]
    plain = build_model({**SMALL, "base_width": None, "vocab_multiple": 256, "num_layers": 1}, 256)
    hidden = [applied(model)({"params": params[64]}, tokens).hidden for model in (wide, plain)]
    np.testing.assert_allclose(hidden[0], 0.25 * hidden[1], rtol=1e-6)  # logits are linear in these
    here = applied(base)({"params": params[16]}, tokens).hidden
    plain = build_model({**SMALL, "embed_dim": 16, "base_width": None, "vocab_multiple": 256, "num_layers": 1}, 256)
    np.testing.assert_array_equal(here, applied(plain)({"params": params[16]}, tokens).hidden)


@pytest.mark.parametrize(("exponent", "branch", "rate"), [(1.0, 1 / 3, 1.0), (0.5, 3**-0.5, 3**-0.5)])
def test_depth_is_that_of_completep_and_of_depth_mup(exponent, branch, rate):
    """Dey et al. 2025, table 1: branches times m_L^-a, rates in the blocks times m_L^(a - 1), here with m_L = 3."""
    model = dict(num_layers=6, base_depth=2, depth_exponent=exponent)
    found = rows(**model)
    assert found["mlp/up/kernel"].lr_multiplier == pytest.approx(0.25 * rate)
    assert found["norm0/scale"].lr_multiplier == pytest.approx(rate)
    assert found["embed/embedding"].lr_multiplier == found["final_norm/scale"].lr_multiplier == 1.0
    built = build_model({**SMALL, **model}, 24)
    assert built.stack.pattern[0].branch == pytest.approx(branch)
    assert built.stack.pattern[0].layers[1].output_scale == 4**-0.5  # of the base depth
    assert build_model({**SMALL, **model, "num_layers": 2}, 24).stack.pattern[0].branch == 1.0


@pytest.mark.slow
def test_a_block_with_its_branches_multiplied_is_one_whose_output_matrices_are():
    built, branch = build_model({**SMALL, "num_layers": 6, "base_depth": 2}, 24), 1 / 3
    params = init_params(built, jax.random.key(0))
    block = params["params"]["stack"]["pattern_0"]
    for name, part in (("attention", "out"), ("mlp", "down")):
        block[name][part]["kernel"] *= branch
    plain = build_model({**SMALL, "num_layers": 6}, 24)
    tokens = np.arange(8)[None]
    got = applied(plain)(params, tokens).hidden
    for name, part in (("attention", "out"), ("mlp", "down")):
        block[name][part]["kernel"] /= branch
    np.testing.assert_allclose(applied(built)(params, tokens).hidden, got, rtol=2e-4, atol=1e-6)


def test_rules_multiply_and_decays_are_those_of_rules():
    found = rows({"rules": ({"match": "mlp/up/kernel$", "lr_multiplier": 2.0, "weight_decay": 0.05},
                            {"match": "norm", "lr_multiplier": 3.0}, {"match": "query", "freeze": True})})
    up = found["mlp/up/kernel"]
    assert (up.lr_multiplier, up.lr_multiplier * up.weight_decay) == (0.5, pytest.approx(2 * 0.05))
    assert found["norm0/scale"].lr_multiplier == 3.0 and found["attention/query/kernel"].frozen


def test_other_optimizers_whose_steps_have_a_size_are_scaled_by_it():
    assert rows({"name": "lion"})["mlp/up/kernel"].lr_multiplier == 0.25
    # Muon, scaled to a root mean square: the spectral norm of a square matrix goes with the root of the width.
    assert rows({"name": "muon"})["mlp/up/kernel"].lr_multiplier == 0.5
    assert rows({"name": "muon", "muon_consistent_rms": None})["mlp/up/kernel"].lr_multiplier == 1.0
    muon = rows({"name": "muon", "adam_learning_rate": 5e-4, "rules": (
        {"match": "mlp/up", "optimizer": "adamw"},)})
    assert muon["mlp/up/kernel"].lr_multiplier == 0.125 and muon["embed/embedding"].lr_multiplier == 0.5


def test_low_rank_maps_and_experts_go_by_their_fan_in():
    found = rows(prefix=("rwkv7_first/mlp",), pattern=("rwkv7/mlp",), rwkv7=dict(head_dim=8),
                 rwkv7_first=dict(kind="rwkv7", head_dim=8, value_residual=False))
    rates = {name.removeprefix("rwkv7/"): row.lr_multiplier for name, row in found.items()}
    assert rates["decay_in/kernel"] == rates["out/kernel"] == 0.25
    assert rates["decay_out/kernel"] == rates["decay"] == 1.0


def test_experts_are_matrices_and_their_router_reads_the_width():
    found = rows(pattern=("attention/moe",), moe=dict(num_experts=2))
    assert {name: row.lr_multiplier for name, row in found.items() if name.startswith("moe")} == {
        "moe/router/kernel": 0.25, "moe/experts_up": 0.25, "moe/experts_down": 0.25}


PEER = dict(pattern=("attention/peer",), peer=dict(num_experts=16, top_k=2, num_heads=1, key_dim=8))


@pytest.mark.parametrize(("model", "optimizer", "message"), [
    ({"base_width": None}, {}, "needs the size at which learning rates were found"),
    ({}, {"parametrization": "standard"}, "set config.optimizer.parametrization='mup'"),
    ({}, {"parametrization": "mpu"}, "did you mean 'mup'"),
    ({}, {"name": "sgd"}, "is trained by sgd"),
    ({"attention": {"num_heads": 4}}, {}, "attention has head_dim 16 here and 4 there"),
    ({"attention": {"num_heads": 4}, "pattern": ("bswa/mlp",), "bswa": {"num_heads": 4}}, {}, "bswa has head_dim 16"),
    ({"base_width": 0}, {}, "base_width=0 must be at least 1"),
    ({"depth_exponent": 2.0}, {}, "from 0.5"),
    (PEER, {}, "does not know how the learning rate of stack/pattern_0/peer/experts"),
    ({"recurrent_depth": {}}, {}, "a core that is looped"),
])
def test_what_does_not_fit_is_refused_with_what_to_do(model, optimizer, message):
    with pytest.raises(ValueError, match=message):
        rows(optimizer, **model)


def test_a_rule_says_what_is_not_known():
    found = rows({"rules": ({"match": "peer/experts$", "lr_multiplier": 0.5},)}, **PEER)
    assert found["peer/experts"].lr_multiplier == 0.5 and found["peer/router/keys"].lr_multiplier == 1.0
    assert found["peer/router/query/kernel"].lr_multiplier == 0.25


def test_unresolved_options_build_no_optimizer():
    options = OptimizerOptions(parametrization="mup")
    with pytest.raises(ValueError, match=r"resolve it with lm.optim.mup.resolve"):
        table(options, {"params": {"kernel": np.zeros((2, 2))}})
    with pytest.raises(ValueError, match="for whole models"):
        resolve(options, {"lora": {"head": {"a": np.zeros((2, 2))}}}, {"lora/head/a": ()}, Transfer(4, 2, 1, None, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_scanned_and_unrolled_stacks_get_equal_updates(name):
    """The stacked tree is the same; gradients and updates of both forms are compared after two steps, with decay."""
    after = []
    for scan in (True, False):
        model = build_model({**SMALL, "scan": scan, "base_depth": 1, "depth_exponent": 0.5}, 24)
        boxed, apply = abstract_params(model), make_apply(model)
        options = resolve(OptimizerOptions(name=name, parametrization="mup", learning_rate=0.01, warmup_steps=0,
                                           eps=1e-4), nn.meta.unbox(boxed), axes_of(boxed), model.transfer)
        tx = build_optimizer(options, nn.meta.unbox(boxed), 10).tx
        tokens = np.arange(16).reshape(2, 8) % 24

        @jax.jit
        def two_steps(params, apply=apply, tx=tx, tokens=tokens):
            state = tx.init(params)
            for _ in range(2):
                grads = jax.grad(lambda p: loss_of(apply, p, tokens))(params)
                updates, state = tx.update(grads, state, params)
                params = jax.tree.map(lambda p, u: p + u, params, updates)
            return params

        after.append(two_steps(init_params(model, jax.random.key(0))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-6), *after)


def loss_of(apply, params, tokens):
    """Next-token loss of a model."""
    out = apply(params, tokens)
    logits = out.hidden @ out.head.kernel.T
    return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).mean()


def changes(steps=4, seeds=3, rate=0.01, rules=(), **model):
    """(of hidden states, of logits): root mean squares of what some Adam steps change on the batch they learn, on
    average over seeds."""
    mup = model.get("base_width") or model.get("base_depth")
    model = build_model({**SMALL, **model}, 24)
    boxed, apply = abstract_params(model), make_apply(model)
    options = resolve(OptimizerOptions(parametrization="mup" if mup else "standard", learning_rate=rate, warmup_steps=0,
                                       schedule="constant", weight_decay=0.0, clip_norm=None, rules=rules),
                      nn.meta.unbox(boxed), axes_of(boxed), model.transfer)
    tx = build_optimizer(options, nn.meta.unbox(boxed), 100).tx

    @jax.jit
    def run(key):
        params = model.init(key, jax.numpy.zeros((1, 1), int))
        params = nn.meta.unbox(params)
        tokens = jax.random.randint(jax.random.fold_in(key, 1), (4, 32), 0, 24)

        def see(params):
            out = apply(params, tokens)
            return out.hidden / (model.transfer.logits if mup else 1.0), out.hidden @ out.head.kernel.T

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(lambda p: loss_of(apply, p, tokens))(params), state, params)
            return (jax.tree.map(lambda p, u: p + u, params, updates), state), None
        (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, steps)
        return [jax.numpy.sqrt(jax.numpy.mean((a - b) ** 2)) for a, b in zip(see(after), see(params), strict=True)]

    return np.mean([run(jax.random.key(seed)) for seed in range(seeds)], axis=0)


def slopes(sizes, found):
    """Exponents with which the changes grow with the size."""
    return np.polyfit(np.log(sizes), np.log(np.array(found)), 1)[0]


@pytest.mark.slow
def test_what_a_step_changes_does_not_grow_with_width():
    """The coordinate check (Yang and Hu 2022, appendix D.1)."""
    sizes = (32, 64, 128, 256)
    with_mup = slopes(sizes, [changes(embed_dim=size, base_width=32) for size in sizes])
    without = slopes(sizes, [changes(embed_dim=size, base_width=None) for size in sizes])
    print("width", with_mup, without)
    assert np.all(np.abs(with_mup) < 0.15), with_mup
    assert without[1] > 0.35, without


@pytest.mark.slow
def test_what_a_step_changes_does_not_grow_with_depth():
    """Of the hidden states, by what blocks learn alone: embedding and head are held."""
    sizes = (2, 4, 8, 16)
    fixed = dict(embed_dim=32, base_width=None, embed_std=1.0, rate=3e-4, seeds=2, rules=(
        {"match": "^(embed|head)/", "freeze": True},))
    without = slopes(sizes, [changes(num_layers=size, **fixed) for size in sizes])[0]
    for exponent in (0.5, 1.0):
        found = slopes(sizes, [changes(num_layers=size, base_depth=2, depth_exponent=exponent, **fixed)
                               for size in sizes])[0]
        print("depth", exponent, found, without)
        assert abs(found) < 0.2
        assert without > found + 0.25
