"""Stacked layers are optimized exactly as layers held one by one, by every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.optim.builder import build_optimizer
from lm.optim.options import OPTIMIZERS, OptimizerOptions
from lm.optim.per_layer import per_layer

LAYERS, STEPS = 3, 10
# A wide, a tall and two square kernels of one shape, vectors, and layers of very different sizes: whatever is taken
# over the whole stack (a norm, a shape, a root mean square) shows.
SHAPES = {"up/kernel": (8, 20), "down/kernel": (20, 8), "query/kernel": (8, 8), "out/kernel": (8, 8),
          "norm/scale": (8,), "up/bias": (20,)}


def draw(seed, shape):
    scale = (10.0 ** np.arange(LAYERS) / 10).reshape(-1, *[1] * len(shape))
    return (np.random.default_rng(seed).normal(size=(LAYERS, *shape)) * scale).astype(np.float32)


def nest(named):
    tree = {}
    for name, leaf in named.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def stacked(seed):
    rng = 100 * seed
    return {"params": {"embed": {"embedding": draw(rng, (4,))},
                       "stack": {"pattern_0": nest({n: draw(rng + i, s) for i, (n, s) in enumerate(SHAPES.items())})}}}


def separate(tree):
    layers = {f"prefix_{i}": jax.tree.map(lambda x, i=i: x[i], tree["params"]["stack"]["pattern_0"])
              for i in range(LAYERS)}
    return {"params": {"embed": tree["params"]["embed"], "stack": layers}}


def train(options, form):
    params = jax.tree.map(jnp.asarray, form(stacked(0)))
    tx = build_optimizer(options, params, 20).tx
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(STEPS):
        updates, state = update(form(stacked(step + 1)), state, params)
        params = optax.apply_updates(params, updates)
    return params


# Not bfloat16 with clipping: the two norms differ in their last bit, which rounding turns into 1/256 of a moment.
@pytest.mark.parametrize("state_dtype, clip_norm", [("float32", None), ("float32", 1.0), ("bfloat16", None)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_equals_separate(name, state_dtype, clip_norm):
    options = OptimizerOptions(name, learning_rate=1e-2, eps=1e-6, weight_decay=0.3, state_dtype=state_dtype,
                               clip_norm=clip_norm, adafactor_min_dim=8, muon_newton_schulz="gram",
                               momentum=0.8 if name == "adafactor" else None,
                               rules=({"match": "query", "lr_multiplier": 0.5}, {"match": "norm", "weight_decay": 0.1}))
    whole, apart = separate(train(options, lambda tree: tree)), train(options, separate)
    before = separate(stacked(0))
    for (path, a), b, start in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(apart),
                                   jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=jax.tree_util.keystr(path))
        assert np.max(np.abs(a - start)) > 5e-5, f"{jax.tree_util.keystr(path)} hardly moved: the test says nothing"


def test_optax_adafactor_alone_would_mix_the_layers():
    """What `per_layer` is for: without it the update of one layer depends on the size of the others."""
    tx = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=8), optax.scale_by_param_block_rms())
    params, grads = jnp.asarray(draw(0, (8, 20))), jnp.asarray(draw(1, (8, 20)))
    one = jnp.stack([tx.update(g, tx.init(p), p)[0] for p, g in zip(params, grads, strict=True)])
    mixed = tx.update(grads, tx.init(params), params)[0]
    mapped = per_layer(tx).update(grads, per_layer(tx).init(params), params)[0]
    np.testing.assert_allclose(mapped, one, rtol=1e-6)
    assert np.max(np.abs(mixed / one - 1)) > 0.5


def test_step_counts_are_shared_by_the_layers():
    state = per_layer(optax.scale_by_adam()).init({"kernel": jnp.zeros((3, 4, 5))})
    assert state.count.shape == () and state.mu["kernel"].shape == (3, 4, 5)
