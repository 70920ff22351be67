"""What is true of linear_scan besides the contract of `tests/contracts/rows_kernels.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.testing import interpreted_tpu

implementations = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def loop(a, b, h0, reset):
    """Element by element, in Python."""
    h = np.zeros(b.shape)
    for i, t, c in np.ndindex(*b.shape):
        before = h0[i, c] if t == 0 else h[i, t - 1, c]
        h[i, t, c] = a[i, t, c] * (0.0 if reset[i, t] else before) + b[i, t, c]
    return h


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2 ** 31))
def test_any_shape_equals_a_loop(batch, time, width, resets, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(-1.2, 1.2, (batch, time, width)), rng.normal(size=(batch, time, width))
    h0, reset = rng.normal(size=(batch, width)), rng.random((batch, time)) < resets
    want = loop(a, b, h0, reset)
    scale = np.abs(want).max()
    with jax.enable_x64(True):
        for implementation in ("chunked", "reference"):
            h, last = jax.jit(functools.partial(linear_scan, implementation=implementation))(a, b, h0, reset=reset)
            assert np.abs(h - want).max() <= 1e-12 * scale
            np.testing.assert_array_equal(last, h[:, -1])


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 700), st.integers(1, 300), st.floats(0, 0.3), st.integers(0, 2 ** 31))
def test_any_shape_of_the_kernel_equals_a_loop(batch, time, width, resets, seed):
    rng = np.random.default_rng(seed)
    a, b = np.float32(rng.random((batch, time, width))), np.float32(rng.normal(size=(batch, time, width)))
    h0, reset = np.float32(rng.normal(size=(batch, width))), rng.random((batch, time)) < resets
    with interpreted_tpu():
        h, last = jax.block_until_ready(jax.jit(functools.partial(linear_scan, implementation="pallas_tpu"))(
            a, b, h0, reset=reset))
    want = linear_scan(a, b, h0, reset=reset, implementation="reference")
    np.testing.assert_allclose(h, want[0], rtol=0, atol=2e-6 * np.abs(want[0]).max())
    np.testing.assert_allclose(last, want[1], rtol=0, atol=2e-6 * np.abs(want[0]).max())


@implementations
def test_open_and_closed_gates(implementation):
    """minGRU at its ends, a = 1 - z and b = z x: z = 1 gives x, z = 0 keeps h0, and constants give a known sum."""
    x, h0 = jax.random.normal(jax.random.key(0), (2, 20, 3)), jnp.array([[1.0, -2, 3], [4, 5, -6]])
    run = functools.partial(linear_scan, implementation=implementation)
    np.testing.assert_array_equal(run(jnp.zeros_like(x), x, h0)[0], x)
    np.testing.assert_array_equal(run(jnp.ones_like(x), jnp.zeros_like(x), h0)[1], h0)
    with jax.enable_x64(True):
        z, value, steps = 0.25, 2.0, np.arange(1, 21)[:, None]
        h, _ = run(np.full((2, 20, 3), 1 - z), np.full((2, 20, 3), z * value), np.asarray(h0, np.float64))
        np.testing.assert_allclose(h, value + (1 - z) ** steps * (np.asarray(h0, np.float64)[:, None] - value),
                                   rtol=1e-12)


def test_long_rows_stay_exact():
    """65,536 steps in float32: the direct form keeps 1e-5 where the log-space form loses percents."""
    rng = np.random.default_rng(0)
    z = 1 / (1 + np.exp(-rng.normal(size=(1, 65_536, 2))))
    a, b = np.float32(1 - z), np.float32(z * rng.normal(size=z.shape))
    h, _ = linear_scan(a, b, jnp.zeros((1, 2)), implementation="chunked")
    with jax.enable_x64(True):
        want, _ = linear_scan(np.float64(a), np.float64(b), jnp.zeros((1, 2)), implementation="reference")
        want = np.asarray(want)
    assert np.abs(np.asarray(h) - want).max() < 1e-5 * np.abs(want).max()


@implementations
def test_state_is_float32_under_bfloat16(implementation):
    """2,000 steps of 1/2000: in bfloat16 the sum would stop growing at 0.125."""
    b = jnp.full((1, 2000, 1), 1 / 2000, jnp.bfloat16)
    h, last = linear_scan(jnp.ones_like(b), b, jnp.zeros((1, 1), jnp.bfloat16), implementation=implementation)
    assert last.dtype == jnp.float32 and h.dtype == jnp.bfloat16
    np.testing.assert_allclose(last, 2000 * float(b[0, 0, 0]), rtol=1e-4)


def test_initial_state_keeps_its_dtype_in_gradients():
    x = jnp.ones((1, 3, 2))
    for dtype in (jnp.float32, jnp.bfloat16):
        grad = jax.grad(lambda h0: linear_scan(x, x, h0)[1].sum())(jnp.ones((1, 2), dtype))
        assert grad.dtype == dtype
        np.testing.assert_array_equal(grad, 1)


def test_inside_shard_map_with_a_state_that_does_not_vary():
    """Rows split over devices, the zero initial state on all of them: types agree and the gradient is summed."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.random((4, 11, 3)), jnp.float32) for _ in range(2))
    h0 = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    spec = jax.sharding.PartitionSpec("data")

    def loss(h0, mesh):
        run = lambda a, b, h0: linear_scan(a, b, h0, implementation="chunked")[0]
        if mesh:
            run = jax.shard_map(run, mesh=mesh, in_specs=(spec, spec, jax.sharding.PartitionSpec()), out_specs=spec)
            return (run(a, b, h0) ** 2).sum()
        return (run(a, b, jnp.concatenate([h0, h0])) ** 2).sum()

    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    got, want = (jax.jit(jax.value_and_grad(functools.partial(loss, mesh=m)))(h0) for m in (mesh, None))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


A, H0 = jnp.ones((2, 3, 4)), jnp.ones((2, 4))


@pytest.mark.parametrize("arguments,message", [
    ((A[0], A, H0), r"a has shape \(3, 4\); it must be \[B, T, C\]"),
    ((A, A[:, :2], H0), r"b has shape \(2, 2, 4\); it must be \[B, T, C\] with T=3"),
    ((A, A, H0[:1]), r"h0 has shape \(1, 4\); it must be \[B, C\] with B=2"),
    ((A[:, :0], A[:, :0], H0), r"a has shape \(2, 0, 4\); it must be \[B, T, C\] with T at least 1"),
    ((A.astype(int), A, H0), r"a\[2, 3, 4\] has dtype int32; allowed: float32, bfloat16, float16, float64"),
    ((A, A.astype(jnp.bfloat16), H0), r"b\[2, 3, 4\] has dtype bfloat16; it must be that of a, float32"),
    ((A, A, H0.astype(int)), r"h0\[2, 4\] has dtype int32; it must be a float"),
    ((A, A, H0, jnp.zeros((2, 4), bool)), r"reset has shape \(2, 4\); it must be \[B, T\] with T=3"),
    ((A, A, H0, jnp.zeros((2, 3))), r"reset\[2, 3\] has dtype float32; allowed: bool"),
    ((A, A, H0, None, "chunkd"), r"no implementation 'chunkd'; did you mean 'chunked'"),
    ((A, A, H0, None, "pallas_tpu"), r"cannot run on cpu as 'pallas_tpu': .* it needs a TPU and this is cpu"),
])
def test_bad_input(arguments, message):
    a, b, h0, reset, implementation = (*arguments, *(None,) * (5 - len(arguments)))
    with pytest.raises(ValueError, match="linear_scan.*" + message):
        linear_scan(a, b, h0, reset=reset, implementation=implementation)


def test_kernel_refuses_float64():
    with jax.enable_x64(True), interpreted_tpu():
        x = jnp.ones((1, 3, 2))
        with pytest.raises(ValueError, match="it takes float32 and bfloat16, not float64"):
            linear_scan(x, x, x[:, 0], implementation="pallas_tpu")
