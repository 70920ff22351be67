"""What is true of min_gru and min_lstm besides the contract of `tests/contracts/rows_kernels.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_scan import linear_scan, min_gru, min_lstm
from pallas_kernels.linear_scan.gates import ACTIVATIONS, Gates
from pallas_kernels.linear_scan.reference import ACTIVATIONS as FORMULAS
from pallas_kernels.linear_scan.reference import UNITS

implementations = pytest.mark.parametrize("implementation", ["reference", "chunked"])
SHAPE = (2, 11, 3)


def draw(count, scale=2.0, shape=SHAPE, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(count), count + 1)
    return [(scale * jax.random.normal(key, shape)).astype(dtype) for key in keys[:-1]], jax.random.normal(
        keys[-1], (shape[0], shape[2]))


@implementations
def test_min_lstm_is_min_gru_whose_gate_is_the_log_ratio(implementation):
    (hidden, forget, take), h0 = draw(3)
    gate = jax.nn.log_sigmoid(take) - jax.nn.log_sigmoid(forget)
    np.testing.assert_allclose(min_lstm(hidden, forget, take, h0, implementation=implementation)[0],
                               min_gru(hidden, gate, h0, implementation=implementation)[0], rtol=1e-5, atol=1e-6)


@implementations
def test_equal_gates_of_min_lstm_take_halves(implementation):
    (hidden, gate), h0 = draw(2)
    half = jnp.full(SHAPE, 0.5)
    np.testing.assert_allclose(min_lstm(hidden, gate, gate, h0, activation="tanh", implementation=implementation)[0],
                               linear_scan(half, half * jnp.tanh(hidden), h0)[0], rtol=1e-5, atol=1e-6)


@implementations
def test_open_and_closed_gates_give_the_input_and_the_state(implementation):
    (hidden,), h0 = draw(1)
    far = jnp.full(SHAPE, 500.0)
    run = lambda gate: min_gru(hidden, gate, h0, activation="identity", implementation=implementation)[0]
    np.testing.assert_array_equal(run(far), hidden)
    np.testing.assert_array_equal(run(-far), jnp.broadcast_to(h0[:, None], SHAPE))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("unit", UNITS)
def test_gates_and_their_gradients_equal_the_formulas(unit, activation):
    """Float64, from -30 to 30 and 0 itself; the derivatives by hand against JAX's of the formulas."""
    with jax.enable_x64(True):
        count = {"min_gru": 2, "min_lstm": 3}[unit]
        grid = np.meshgrid(*[np.array([-30, -7.5, -1, -1e-3, 0, 1e-3, 2, 30.0])] * count)
        inputs = [jnp.asarray(x.ravel()) for x in grid]
        rng = np.random.default_rng(0)
        da, db = rng.normal(size=(2, inputs[0].size))
        formula = lambda hidden, *gates: UNITS[unit](FORMULAS[activation](hidden), *gates)
        want, vjp = jax.vjp(formula, *inputs)
        gates = Gates(unit, activation)
        for got, expected in zip(gates(*inputs), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-13)
        np.testing.assert_array_equal(gates.decay(*inputs), gates(*inputs)[0])
        for got, expected in zip(gates.pull(inputs, da, db), vjp((da, db)), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("unit", UNITS)
def test_extreme_gates_are_finite_and_add_to_one(unit):
    ends = jnp.array([-1e30, -1e4, -100, 0, 100, 1e4, 1e30])
    count = {"min_gru": 1, "min_lstm": 2}[unit]
    gates = [x.ravel() for x in jnp.meshgrid(*[ends] * count)]
    one = jnp.ones_like(gates[0])
    keep, take = Gates(unit, "identity")(one, *gates)
    assert jnp.all(jnp.isfinite(keep)) and jnp.all(jnp.abs(keep + take - 1) < 1e-6)
    for gradient in Gates(unit, "g").pull((one, *gates), one, one):
        assert jnp.all(jnp.isfinite(gradient))


def test_small_gates_keep_their_digits():
    """1 - sigmoid(20) is 2e-9: computed by subtraction it would have one digit."""
    keep, _ = Gates("min_gru", "g")(jnp.zeros(1), jnp.full(1, 20.0))
    np.testing.assert_allclose(keep, 1 / (1 + np.exp(20)), rtol=1e-6)


def test_only_h_is_kept_for_the_backward():
    """What the forward saves: the inputs, and one array more of their size."""
    inputs, h0 = draw(2, shape=(2, 64, 32))
    saved = jax.eval_shape(lambda *x: jax.vjp(lambda *x: min_gru(*x, implementation="chunked"), *x)[1], *inputs, h0)
    large = [x for x in jax.tree.leaves(saved) if x.size == inputs[0].size]
    assert len(large) == 3


@pytest.mark.parametrize(("change", "said"), [
    (dict(activation="tanhh"), r"min_gru: no activation 'tanhh'; did you mean 'tanh'\?; activations: g, identity"),
    (dict(gate=jnp.ones((2, 11, 4))), r"min_gru: gate has shape \(2, 11, 4\); it must be \[B, T, C\] with C=3"),
    (dict(gate=jnp.ones(SHAPE, jnp.bfloat16)), r"min_gru: gate\[2, 11, 3\] has dtype bfloat16"),
    (dict(h0=jnp.ones((2, 3), jnp.int32)), r"min_gru: h0\[2, 3\] has dtype int32; it must be a float"),
    (dict(reset=jnp.ones((2, 11))), r"min_gru: reset\[2, 11\] has dtype float32; allowed: bool"),
    (dict(implementation="chunkd"), r"min_gru has no implementation 'chunkd'; did you mean 'chunked'\?"),
])
def test_bad_input_is_named_with_the_rule(change, said):
    given = dict(hidden=jnp.ones(SHAPE), gate=jnp.ones(SHAPE), h0=jnp.ones((2, 3))) | change
    with pytest.raises(ValueError, match=said):
        min_gru(**given)
