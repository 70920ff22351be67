"""Product key memory against PEER with neurons that always fire, a loop, and itself over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.core.sharding import make_mesh, shardings
from lm.core.types import context
from lm.layers.experts import values
from lm.layers.mlp import MLP
from lm.layers.peer import EXPERTS, PEER
from lm.layers.pkm import PKM

B, T, D = 4, 6, 16
LAYER = PKM(num_values=64, num_heads=2, top_k=3, key_dim=6)


@functools.cache
def made(layer):
    """(variables, x, context in training with the last row padded after 2 tokens)."""
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    present = jnp.ones((B, T), bool).at[-1, 2:].set(False)
    ctx = context(B, T, key=jax.random.key(1))._replace(weights=present)
    return nn.meta.unbox(jax.jit(lambda: layer.init(jax.random.key(1), x, (), ctx))()), x, ctx


def test_is_peer_whose_neurons_are_all_one(monkeypatch):
    """Values and the gradients of values, queries and keys."""
    monkeypatch.setitem(EXPERTS, "one", (jnp.ones_like, False))
    variables, x, ctx = made(LAYER)
    peer = PEER(num_experts=64, num_heads=2, top_k=3, key_dim=6, per_head_keys=True, activation="one",
                numbering="grid")
    params = {"router": variables["params"]["router"], "experts": jnp.stack(
        [jnp.ones((64, D)), variables["params"]["values"]], 1)}

    def run(layer, params):
        return jnp.sum(jnp.sin(layer.apply({**variables, "params": params}, x, (), ctx)[0]))

    value, grads = jax.jit(jax.value_and_grad(functools.partial(run, LAYER)))(variables["params"])
    want, want_grads = jax.jit(jax.value_and_grad(functools.partial(run, peer)))(params)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grads["values"], want_grads["experts"][:, 1], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads["router"],
                 want_grads["router"])


@pytest.mark.parametrize("chunk", [1 << 24, 1])
def test_sums_of_rows_and_their_gradients(chunk, monkeypatch):
    monkeypatch.setattr(values, "CHUNK_BYTES", chunk)
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 9, (1, 5, 2, 3)).astype(np.int32)  # -1 and 8 are no rows
    gates, table = rng.normal(size=ids.shape).astype(np.float32), rng.normal(size=(8, 4)).astype(np.float32)
    dy = rng.normal(size=(1, 5, 4)).astype(np.float32)
    y, pull = jax.vjp(lambda g, t: values.weighted_rows(jnp.asarray(ids), g, t), *map(jnp.asarray, (gates, table)))
    dgates, dtable = pull(jnp.asarray(dy))
    want, want_dgates, want_dtable = np.zeros((1, 5, 4)), np.zeros(ids.shape), np.zeros((8, 4))
    for at in np.ndindex(ids.shape):
        if 0 <= ids[at] < 8:
            want[at[:2]] += gates[at] * table[ids[at]]
            want_dgates[at] = dy[at[:2]] @ table[ids[at]]
            want_dtable[ids[at]] += gates[at] * dy[at[:2]]
    for got, expected in ((y, want), (dgates, want_dgates), (dtable, want_dtable)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_starts_at_the_scale_of_an_mlp():
    x, stds = jax.random.normal(jax.random.key(0), (8, 32, 64)), []
    for layer in (MLP(), PKM(num_values=1024, num_heads=4, top_k=16)):
        run = jax.jit(lambda layer=layer: layer.apply(layer.init(jax.random.key(1), x, (), context(8, 32)), x, (),
                                                      context(8, 32, key=jax.random.key(1)))[0])
        stds.append(float(jnp.std(run())))
    assert 0.5 < stds[1] / stds[0] < 2


@pytest.mark.slow
def test_values_split_over_devices_are_read_the_same():
    variables, x, ctx = made(LAYER)
    run = jax.jit(lambda v, x: jax.value_and_grad(
        lambda p: jnp.sum(jnp.sin(LAYER.apply({**v, "params": p}, x, (), ctx)[0])))(v["params"]))
    alone = run(variables, x)
    mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2})
    boxed = jax.eval_shape(lambda: LAYER.init(jax.random.key(0), x, (), ctx))
    with jax.set_mesh(mesh):
        split = jax.jit(run)(jax.device_put(variables, shardings(boxed, mesh)), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, float(jnp.abs(b).max()))),
                 split, alone)


@pytest.mark.parametrize("fields, message", [
    (dict(num_values=1000), "num_values=1000 is not a square"),
    (dict(num_values=64, top_k=9), "from 1 to 8"),
])
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match="pkm") as error:
        PKM(**fields).check(32)
    assert message in str(error.value)
