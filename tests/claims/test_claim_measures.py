"""What claims measure is what they say: the oracle of the scans, and the state that a token is decoded from."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lm.claims.measures.decode_cost import decode_cost, full_state, state_bytes
from lm.claims.measures.length_cost import product_flops
from lm.claims.measures.scan_error import direct, exact, inputs, log_scan_error, log_space, scan_error
from lm.models.build import build_model, init_params, make_apply

ATTENTION = dict(embed_dim=16, num_layers=2, pattern=("attention/mlp",), attention=dict(num_heads=2),
                 mlp=dict(mlp_dim=16), dtype="float32", scan=False, vocab_multiple=8)
RWKV4 = dict(embed_dim=16, num_layers=2, pattern=("rwkv4/channel_mix",), channel_mix=dict(mlp_dim=16), norm="layer",
             embed_norm=True, dtype="float32", scan=False, vocab_multiple=8)


def config(model, seq_len, **train):
    return ConfigDict({"model": model, "train": {"seq_len": seq_len, "batch_size": 2, "seed": 0, **train}},
                      allow_dotted_keys=True)


def test_the_oracle_is_the_recurrence_and_both_scans_are_near_it():
    hidden, gate = inputs(0, (2, 9, 3))
    right = exact(hidden, gate)
    h = np.zeros((2, 3))
    for t in range(9):  # by the formula of one gate at a time
        for b in range(2):
            for c in range(3):
                z, x = 1 / (1 + np.exp(-float(gate[b, t, c]))), float(hidden[b, t, c])
                h[b, c] = (1 - z) * h[b, c] + z * (x + 0.5 if x >= 0 else 1 / (1 + np.exp(-x)))
        np.testing.assert_allclose(right[:, t], h, rtol=1e-12)
    np.testing.assert_allclose(direct(jnp.asarray(hidden), jnp.asarray(gate), None), right, rtol=2e-6)
    np.testing.assert_allclose(log_space(jnp.asarray(hidden), jnp.asarray(gate)), right, rtol=1e-4)


def test_errors_are_those_of_the_scan_that_is_named():
    given = config({"min_gru": {"hidden_dim": 4, "implementation": None}}, 2048)
    ours, logs = scan_error(given)["error"], log_scan_error(given)["error"]
    assert 0 < ours < 2e-6 and logs > 10 * ours


def test_bytes_of_state_are_the_cache_of_attention_and_constant_for_rwkv():
    attention, rwkv = build_model(ATTENTION, 256), build_model(RWKV4, 256)
    # Two layers: keys and values of 16 floats, and the order and document number of each slot.
    assert state_bytes(attention, 200) - state_bytes(attention, 100) == 100 * 2 * (2 * 16 * 4 + 2 * 4)
    assert state_bytes(rwkv, 100) == state_bytes(rwkv, 10**6)


@pytest.mark.slow
def test_a_full_state_is_what_a_prompt_of_that_length_leaves():
    model = build_model(ATTENTION, 256)
    params = init_params(model, jax.random.key(0))
    tokens = jnp.arange(12)[None] % 7
    ran = jax.jit(make_apply(model))(params, tokens, model.initial_state(1, capacity=12),
                                     reset=jnp.zeros((1, 12), bool)).state
    made = full_state(model, 12)
    assert made.positions.tolist() == ran.positions.tolist() == [12]
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(ran), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if one.dtype == jnp.int32:
            assert one.tolist() == other.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("model", [ATTENTION, RWKV4], ids=["attention", "rwkv4"])
def test_a_token_is_timed(model, monkeypatch):
    monkeypatch.setattr(sys.modules[decode_cost.__module__], "SECONDS", 0.1)
    found = decode_cost(config(model, 32))
    assert 0 < found["seconds_low"] <= found["seconds_per_token"] <= found["seconds_high"] < 1
    assert found["state_bytes"] == state_bytes(build_model(model, 256), 32) and found["tokens"] == 32


def test_products_are_counted_as_often_as_a_loop_runs_and_of_a_choice_the_larger_one():
    def body(x, _):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), None

    @jax.jit
    def program(x):
        looped = jax.lax.scan(body, x, None, length=5)[0]
        return jax.checkpoint(lambda x: jnp.einsum("ij,ik->jk", x, x))(looped)

    count = product_flops(jax.make_jaxpr(program)(jnp.ones((3, 3))).jaxpr)
    assert count == (5 * 2 + 1) * 2 * 27


def test_block_sliding_attention_costs_the_same_a_token_at_any_length_and_attention_does_not():
    blocks = dict(num_heads=2, block=16, memory=1)
    for layer, fields, more in (("bswa", blocks, False), ("attention", dict(num_heads=2), True)):
        model = {**ATTENTION, "pattern": (f"{layer}/mlp",), layer: fields}
        short, long = (traced_flops(model, length) / length for length in (64, 256))
        assert long > 1.5 * short if more else long == pytest.approx(short, rel=0.01)


def traced_flops(model, length):
    built = build_model(model, 16)
    params, apply = jax.eval_shape(lambda: init_params(built, jax.random.key(0))), make_apply(built)
    gradient = jax.grad(lambda params: jnp.sum(apply(params, jnp.zeros((1, length), jnp.int32)).hidden))
    return product_flops(jax.make_jaxpr(gradient)(params).jaxpr)
