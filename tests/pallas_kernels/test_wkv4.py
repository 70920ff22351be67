"""What is true of wkv4 besides the contract of `tests/contracts/rows_kernels.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.testing import interpreted_tpu
from pallas_kernels.wkv4 import initial_state, wkv4
from pallas_kernels.wkv4.config import tiles
from pallas_kernels.wkv4.registers import turn

implementations = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def drawn(seed, batch, time, width, resets=0.0):
    rng = np.random.default_rng(seed)
    w, u = np.exp(rng.normal(size=width)), rng.normal(size=width)
    k, v = 3 * rng.normal(size=(batch, time, width)), rng.normal(size=(batch, time, width))
    return w, u, k, v, rng.random((batch, time)) < resets


def double_sum(w, u, k, v, reset):
    """Every pair of positions on its own, as the paper writes it; the past begins at the last reset."""
    y = np.zeros(v.shape)
    for n, t, c in np.ndindex(*v.shape):
        first = max((i for i in range(t + 1) if reset[n, i]), default=0)
        weights = [np.exp(-(t - 1 - i) * w[c] + k[n, i, c]) for i in range(first, t)] + [np.exp(u[c] + k[n, t, c])]
        y[n, t, c] = np.dot(weights, v[n, first:t + 1, c]) / sum(weights)
    return y


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2 ** 31))
def test_any_shape_equals_the_double_sum(batch, time, width, resets, seed):
    w, u, k, v, reset = drawn(seed, batch, time, width, resets)
    want = double_sum(w, u, k, v, reset)
    with jax.enable_x64(True):
        for implementation in ("chunked", "reference"):
            y, _ = jax.jit(functools.partial(wkv4, implementation=implementation))(w, u, k, v, reset=reset)
            np.testing.assert_allclose(y, want, rtol=0, atol=1e-12 * np.abs(v).max())


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(w, u, k, v, state=None, reset=None, *, implementation):
    """y, the state, and the gradients of sum(y^3), by k, v, w and u."""
    def loss(k, v, w, u):
        y, last = wkv4(w, u, k, v, state, reset, implementation=implementation)
        return (y.astype(jnp.float32) ** 3).sum(), (y, last)

    gradients, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(k, v, w, u)
    return *out, gradients


@implementations
def test_exponents_of_any_size(implementation):
    """k + 800 changes nothing but the log weight, k - 800 neither; so the gradients of k sum to 0 over time."""
    w, u, k, v, _ = (np.float32(x) for x in drawn(0, 2, 50, 3))
    run = functools.partial(value_and_gradients, w, u, implementation=implementation)
    y, state, gradients = run(k, v)
    np.testing.assert_allclose(gradients[0].sum(1), 0, atol=1e-5)
    for shift in (800, -800):
        shifted, shifted_state, shifted_gradients = run(k + np.float32(shift), v)
        np.testing.assert_allclose(shifted, y, atol=2e-3)       # float32 holds 800 to 6e-5
        np.testing.assert_allclose(shifted_state[:, 1], state[:, 1] + shift, atol=2e-3)
        for got, want in zip(shifted_gradients, gradients, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-2 * np.abs(want).max())


@implementations
def test_steps_that_differ_by_hundreds(implementation):
    """Exponents that no single scale can hold: each output is the value that then dominates, and nothing is NaN."""
    k = jnp.asarray([[-700.0, 500, -900, 300, 499, -1e38, 2000, 0]])[..., None]
    v = jnp.arange(1.0, 9)[None, :, None]
    y, state, gradients = value_and_gradients(jnp.ones(1), jnp.zeros(1), k, v, implementation=implementation)
    fifth = (2 * np.exp(498 - 499) + 5) / (np.exp(498 - 499) + 1)       # 500 decayed by 2, against 499
    sixth = (2 * np.exp(497 - 499) + 5) / (np.exp(497 - 499) + 1)
    np.testing.assert_allclose(y[0, :, 0], [1, 2, 2, 2, fifth, sixth, 7, 7], rtol=1e-6)
    np.testing.assert_allclose(state[0, :, 0], [7, 1999])
    assert all(np.isfinite(g).all() for g in gradients)


@implementations
def test_averages(implementation):
    """Constant values stay; the first output is the first value; w = u = 0 is the running softmax average; without
    bonus or decay to speak of, only the last two count."""
    w, u, k, v, _ = drawn(1, 2, 12, 3)
    with jax.enable_x64(True):
        run = functools.partial(wkv4, implementation=implementation)
        np.testing.assert_allclose(run(w, u, k, np.full_like(v, 2.5))[0], 2.5, rtol=1e-14)
        np.testing.assert_array_equal(run(w, u, k, v)[0][:, 0], v[:, 0])
        zero = np.zeros_like(w)
        softmax = np.cumsum(np.exp(k) * v, 1) / np.cumsum(np.exp(k), 1)
        y, state = run(zero, zero, k, v)
        np.testing.assert_allclose(y, softmax, rtol=1e-10)
        np.testing.assert_allclose(state[:, 0], softmax[:, -1], rtol=1e-10)
        np.testing.assert_allclose(state[:, 1], np.log(np.exp(k).sum(1)), rtol=1e-10)
        before, now = np.exp(k[:, :-1]), np.exp(u + k[:, 1:])
        np.testing.assert_allclose(run(zero + 1e9, u, k, v)[0][:, 1:],
                                   (before * v[:, :-1] + now * v[:, 1:]) / (before + now), rtol=1e-10)


@implementations
def test_steps_without_a_token_only_decay_the_log_weight(implementation):
    """How padded positions are passed: k = -1e38, and the layer adds n w back."""
    w, u, k, v, _ = (np.float32(x) for x in drawn(2, 2, 9, 3))
    _, state = wkv4(w, u, k, v, implementation=implementation)
    _, padded = wkv4(w, u, np.full_like(k, -1e38), 100 * v, state, implementation=implementation)
    np.testing.assert_array_equal(padded[:, 0], state[:, 0])
    np.testing.assert_allclose(padded[:, 1] + 9 * w, state[:, 1], rtol=1e-5)


@implementations
def test_state_is_float32_under_bfloat16(implementation):
    """4,000 steps of equal weight with almost no decay: in bfloat16 the weights would stop adding up at 256."""
    k = jnp.zeros((1, 4000, 1), jnp.bfloat16)
    y, state = wkv4(jnp.full(1, 1e-6), jnp.zeros(1), k, k + 1, initial_state(1, 1, jnp.bfloat16),
                    implementation=implementation)
    assert state.dtype == jnp.float32 and y.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.exp(state[0, 1, 0]), 4000, rtol=3e-3)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(1, 300), st.floats(0, 0.3), st.integers(0, 2 ** 31))
def test_any_shape_of_the_kernel_equals_the_reference(batch, time, width, resets, seed):
    """To 2e-5 of the largest value: gradients of w and k add up the rounding of a reciprocal a step."""
    w, u, k, v, reset = drawn(seed, batch, time, width, resets)
    w, u, k, v = map(np.float32, (w, u, k, v))
    with interpreted_tpu():
        got = jax.block_until_ready(value_and_gradients(w, u, k, v, None, reset, implementation="pallas_tpu"))
    with jax.enable_x64(True):
        want = value_and_gradients(*map(np.float64, (w, u, k, v)), None, reset, implementation="reference")
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(np.abs(y).max(), 1))


@pytest.mark.slow
def test_exponents_of_any_size_in_the_kernel():
    w, u, k, v, reset = drawn(5, 2, 9, 3, 0.2)
    w, u, k, v = map(np.float32, (w, u, k, v))
    for large in (k + np.float32(800), k - np.float32(800), 300 * k):
        with interpreted_tpu():
            got = jax.block_until_ready(value_and_gradients(w, u, large, v, None, reset, implementation="pallas_tpu"))
        want = value_and_gradients(w, u, large, v, None, reset, implementation="reference")
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-3 * max(np.abs(y).max(), 1))    # float32 holds 800 to 6e-5


def test_turning_is_a_transpose():
    x = np.arange(8 * 8 * 128, dtype=np.float32).reshape(8, 8, 128)
    np.testing.assert_array_equal(jax.jit(lambda x: jnp.stack(turn(list(x))))(x), x.swapaxes(0, 1))


@pytest.mark.parametrize("batch,width,want", [(8, 2048, (8, 1, 4)), (1, 2048, (1, 8, 2)), (3, 2048, (4, 2, 4)),
                                              (9, 768, (8, 1, 3)), (2, 5, (2, 4, 1))])
def test_tiles_fill_the_sublanes_and_waste_no_channels(batch, width, want):
    assert tuple(tiles(batch, width, 4)) == want


def test_kernel_refuses_float64():
    with jax.enable_x64(True), interpreted_tpu():
        x = jnp.ones((1, 3, 2))
        with pytest.raises(ValueError, match="it takes float32 and bfloat16, not float64"):
            wkv4(x[0, 0], x[0, 0], x, x, implementation="pallas_tpu")


def test_other_arguments_keep_their_dtypes_in_gradients():
    k = jnp.ones((1, 3, 2))
    for dtype in (jnp.float32, jnp.bfloat16):
        given = (jnp.ones(2, dtype), jnp.ones(2, dtype), jnp.ones((1, 2, 2), dtype))
        gradients = jax.grad(lambda w, u, s: wkv4(w, u, k, 2 * k, s)[1].sum(), argnums=(0, 1, 2))(*given)
        assert [g.dtype for g in gradients] == [dtype] * 3


def test_a_state_trained_from_none_has_no_gradient():
    """No past has no influence, and its gradients are 0 and not NaN."""
    w, u, k, v, _ = (np.float32(x) for x in drawn(3, 1, 5, 2))
    grad = jax.grad(lambda s: (wkv4(w, u, k, v, s)[0] ** 2).sum())(initial_state(1, 2))
    np.testing.assert_array_equal(grad, 0)


def test_inside_shard_map_with_a_state_that_does_not_vary():
    """Rows split over devices, w, u and the initial state on all of them: the gradients of w and u are summed."""
    w, u, k, v, _ = (np.float32(x) for x in drawn(4, 4, 9, 3))
    spec, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def loss(w, u, mesh):
        run = lambda w, u, k, v: wkv4(w, u, k, v, implementation="chunked")[0]
        if mesh:
            run = jax.shard_map(run, mesh=mesh, in_specs=(everywhere, everywhere, spec, spec), out_specs=spec)
        return (run(w, u, k, v) ** 2).sum()

    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    got, want = (jax.jit(jax.grad(functools.partial(loss, mesh=m), argnums=(0, 1)))(w, u) for m in (mesh, None))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


W, K = jnp.ones(4), jnp.ones((2, 3, 4))


@pytest.mark.parametrize("arguments,message", [
    ((W, W, K[0], K), r"k has shape \(3, 4\); it must be \[B, T, C\]"),
    ((W, W, K, K[:, :2]), r"v has shape \(2, 2, 4\); it must be \[B, T, C\] with T=3"),
    ((W[:3], W, K, K), r"w has shape \(3,\); it must be \[C\] with C=4"),
    ((W, K, K, K), r"u has shape \(2, 3, 4\); it must be \[C\]"),
    ((W, W, K[:, :0], K[:, :0]), r"k has shape \(2, 0, 4\); it must be \[B, T, C\] with T at least 1"),
    ((W, W, K.astype(int), K), r"k\[2, 3, 4\] has dtype int32; allowed: float32, bfloat16, float16, float64"),
    ((W, W, K, K.astype(jnp.bfloat16)), r"v\[2, 3, 4\] has dtype bfloat16; it must be that of k, float32"),
    ((W.astype(int), W, K, K), r"w\[4\] has dtype int32; it must be a float"),
    ((W, W, K, K, K), r"state has shape \(2, 3, 4\); it must be \[B, 2, C\] = \(2, 2, 4\): averages and log weights"),
    ((W, W, K, K, K[:, :2].astype(int)), r"state\[2, 2, 4\] has dtype int32; it must be a float"),
    ((W, W, K, K, None, jnp.zeros((2, 4), bool)), r"reset has shape \(2, 4\); it must be \[B, T\] with T=3"),
    ((W, W, K, K, None, jnp.zeros((2, 3))), r"reset\[2, 3\] has dtype float32; allowed: bool"),
    ((W, W, K, K, None, None, "chunkd"), r"no implementation 'chunkd'; did you mean 'chunked'"),
    ((W, W, K, K, None, None, "pallas_tpu"), r"cannot run on cpu as 'pallas_tpu': .* it needs a TPU and this is cpu"),
])
def test_bad_input(arguments, message):
    w, u, k, v, state, reset, implementation = (*arguments, *(None,) * (7 - len(arguments)))
    with pytest.raises(ValueError, match="wkv4.*" + message):
        wkv4(w, u, k, v, state, reset, implementation=implementation)
