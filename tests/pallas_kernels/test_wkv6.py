"""What is true of wkv6 besides the contract of `tests/contracts/rows_kernels.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_state import assert_chunked_is_exact, gradient_temporaries, with_extreme_decays, with_gradients

from pallas_kernels.dispatch import stated_platform
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv6.api import in_order
from pallas_kernels.wkv6.lanes import Lanes
from pallas_kernels.wkv6.pallas_tpu import unsupported
from pallas_kernels.wkv6.vmem_ops import product

implementations = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def double_sum(r, w, k, v, u, state, reset):
    """y and S_T as sums over all pairs, without a recurrence; [T, N] of one row and head."""
    length = len(r)
    y, start = np.zeros(v.shape), np.concatenate([[0], np.flatnonzero(reset)])
    for t in range(length + 1):             # t = T stands for the state after the end
        document = start[start <= t].max() if t else 0
        total = np.zeros((r.shape[1], v.shape[1]))
        if not reset[:t + 1].any():
            total = np.exp(w[:t].sum(0))[:, None] * state
        for j in range(document, t):
            total = total + np.outer(np.exp(w[j + 1:t].sum(0)) * k[j], v[j])
        if t == length:
            return y, total
        y[t] = (total + np.outer(u * k[t], v[t])).T @ r[t]


def drawn(rng, batch, time, heads, keys, values, strongest=5.0):
    shape = (batch, time, heads)
    return dict(r=rng.normal(size=(*shape, keys)), w=-np.exp(rng.uniform(-12, strongest, (*shape, keys))),
                k=rng.normal(size=(*shape, keys)), v=rng.normal(size=(*shape, values)),
                u=rng.normal(size=(heads, keys)), state=rng.normal(size=(batch, heads, keys, values)))


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5),
       st.floats(0, 1), st.integers(0, 2 ** 31))
def test_any_shape_equals_the_double_sum(batch, time, heads, keys, values, resets, seed):
    rng = np.random.default_rng(seed)
    x, reset = drawn(rng, batch, time, heads, keys, values), rng.random((batch, time)) < resets
    with jax.enable_x64(True):
        out = {name: jax.jit(functools.partial(wkv6, implementation=name))(**x, reset=reset)
               for name in ("chunked", "reference")}
    for i, h in np.ndindex(batch, heads):
        want = double_sum(*(x[n][i, :, h] for n in "rwkv"), x["u"][h], x["state"][i, h], reset[i])
        for y, state in out.values():
            np.testing.assert_allclose(y[i, :, h], want[0], rtol=0, atol=1e-12 * max(1, np.abs(want[0]).max()))
            np.testing.assert_allclose(state[i, h], want[1], rtol=0, atol=1e-12 * max(1, np.abs(want[1]).max()))


@pytest.mark.parametrize("log_decay", [-1e30, 0.0, "mixed"])
def test_extreme_decays(log_decay):
    """One that forgets all, one that forgets nothing, and both in turn: float32 values and gradients stay exact."""
    assert_chunked_is_exact(wkv6, with_extreme_decays(drawn(np.random.default_rng(0), 1, 37, 1, 3, 2), log_decay), 3e-6)


@implementations
def test_constant_decay_is_rwkv5(implementation):
    """w [H, K] serves every position, its gradient is summed, and u serves every row."""
    x = drawn(np.random.default_rng(0), 2, 9, 2, 3, 2)
    with jax.enable_x64(True):
        x["w"] = x["w"][0, 0]
        out, gradient = with_gradients(wkv6, implementation, x)
        spread = {**x, "w": np.broadcast_to(x["w"], x["r"].shape), "u": np.broadcast_to(x["u"], (2, *x["u"].shape))}
        want, spread_gradient = with_gradients(wkv6, implementation, spread)
        for g, e in zip(out, want, strict=True):
            np.testing.assert_array_equal(g, e)
        np.testing.assert_allclose(gradient["w"], spread_gradient["w"].sum((0, 1)), rtol=1e-12)
        np.testing.assert_allclose(gradient["u"], spread_gradient["u"].sum(0), rtol=1e-12)


@implementations
def test_state_is_float32_under_bfloat16(implementation):
    """2,000 steps of 1/2000: in bfloat16 the sum would stop growing at 0.125."""
    ones = jnp.ones((1, 2000, 1, 1), jnp.bfloat16)
    y, state = wkv6(ones, jnp.zeros((1, 1)), ones, ones / 2000, jnp.zeros((1, 1)), implementation=implementation)
    assert state.dtype == jnp.float32 and y.dtype == jnp.bfloat16
    np.testing.assert_allclose(state[0, 0, 0, 0], 2000 * float(ones[0, 0, 0, 0] / jnp.bfloat16(2000)), rtol=1e-4)


def test_no_state_is_zeros():
    x = drawn(np.random.default_rng(0), 2, 5, 1, 3, 2)
    del x["state"]
    for name in ("chunked", "reference"):
        got, want = (wkv6(**x, **given, implementation=name) for given in ({}, {"state": np.zeros((2, 1, 3, 2))}))
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_memory_is_linear_in_time():
    """Four times the length: the gradient needs at most 4.4 times the temporaries."""
    assert gradient_temporaries(wkv6, drawn, 4096) < 4.4 * gradient_temporaries(wkv6, drawn, 1024)


def test_inside_shard_map_with_arguments_that_do_not_vary():
    """Rows split over devices, u and the initial state on all of them: types agree and gradients are summed."""
    x = {name: jnp.asarray(a, jnp.float32) for name, a in drawn(np.random.default_rng(0), 4, 5, 1, 3, 2).items()}
    x["state"] = x["state"][:2]
    rows, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def loss(shared, mesh):
        if not mesh:
            whole = {"u": shared["u"], "state": jnp.concatenate([shared["state"]] * 2)}
            return (wkv6(**{**x, **whole}, implementation="chunked")[0] ** 2).sum()
        run = jax.shard_map(lambda shared, *own: wkv6(*own, **shared, implementation="chunked")[0], mesh=mesh,
                            in_specs=(everywhere, *(rows,) * 4), out_specs=rows)
        return (run(shared, *(x[n] for n in "rwkv")) ** 2).sum()

    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    got, want = (jax.jit(jax.value_and_grad(functools.partial(loss, mesh=m)))({"u": x["u"], "state": x["state"]})
                 for m in (mesh, None))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5)


def test_few_positions_do_not_go_to_the_kernel_unasked(caplog):
    """Decoding on a TPU: the kernel would pad one position to 128."""
    with caplog.at_level("INFO", "pallas_kernels.dispatch"), stated_platform("tpu"):
        wkv6(*(jnp.ones((1, 1, 1, 2)),) * 4, jnp.ones((1, 2)))
    assert not caplog.messages or caplog.messages == ["wkv6 runs as 'chunked' on tpu"]
    kernel = {"pallas_tpu": functools.partial(unsupported, "float32")}
    assert list(in_order(kernel, 1)) == ["chunked", "reference", "pallas_tpu"]
    assert list(in_order(kernel, 256)) == ["pallas_tpu", "chunked", "reference"]


@pytest.mark.parametrize("heads,keys,values", [(1, 3, 4), (2, 64, 64), (3, 64, 5), (2, 70, 64), (1, 128, 200)])
def test_heads_side_by_side_and_back(heads, keys, values):
    """What the kernel gets is whole groups and tiles; packing and unpacking give every array back."""
    rng = np.random.default_rng(0)
    lanes = Lanes.of((2, 5, heads, keys), values, 128)
    assert lanes.time == 128 and (lanes.together * lanes.key) % 128 == (lanes.together * lanes.value) % 128 == 0
    x = jnp.asarray(rng.normal(size=(2, 5, heads, values)))
    np.testing.assert_array_equal(lanes.unpack(lanes.pack(x, lanes.value), values), x)
    state = jnp.asarray(rng.normal(size=(2, heads, keys, values)))
    np.testing.assert_array_equal(lanes.unpack_state(lanes.pack_state(state)), state)
    assert np.count_nonzero(lanes.pack_state(state)) == state.size


@pytest.mark.parametrize("form", ["nn", "nt", "tn"])
@pytest.mark.parametrize("exact,tolerance", [(True, 1e-6), (False, 1e-2)])
def test_products_keep_as_many_bits_as_they_say(form, exact, tolerance):
    """Against float64; and rounding does happen where it is asked for."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 16, 16)).astype(np.float32)
    turn = lambda form: ((x.T if form[0] == "t" else x), (y.T if form[1] == "t" else y))
    a, b = turn(form)
    want = np.float64(a) @ np.float64(b)
    got, pull = jax.vjp(functools.partial(product, form, exact), jnp.asarray(x), jnp.asarray(y))
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= tolerance and (exact or error > 1e-4)
    expected = jax.vjp(lambda x, y: (x.T if form[0] == "t" else x) @ (y.T if form[1] == "t" else y), x, y)[1](got)
    for g, e in zip(pull(got), expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=(1e-6 if exact else 2e-2) * np.abs(e).max())


X, U, S = jnp.ones((2, 3, 4, 5)), jnp.ones((4, 5)), jnp.ones((2, 4, 5, 5))


@pytest.mark.parametrize("change,message", [
    (dict(r=X[0]), r"r has shape \(3, 4, 5\); it must be \[B, T, H, K\]"),
    (dict(w=X[:, :2]), r"w has shape \(2, 2, 4, 5\); it must be \[B, T, H, K\] with T=3"),
    (dict(w=U[:3]), r"w has shape \(3, 5\); it must be \[H, K\] with H=4"),
    (dict(v=X[:, :, :1]), r"v has shape \(2, 3, 1, 5\); it must be \[B, T, H, V\] with H=4"),
    (dict(u=U[0]), r"u has shape \(5,\); it must be \[H, K\]"),
    (dict(u=S[:1, :, 0]), r"u has shape \(1, 4, 5\); it must be \[B, H, K\] with B=2"),
    (dict(state=S[:, :, :, :2]), r"state has shape \(2, 4, 5, 2\); it must be \[B, H, K, V\] with V=5"),
    (dict(reset=jnp.zeros((2, 4), bool)), r"reset has shape \(2, 4\); it must be \[B, T\] with T=3"),
    (dict(reset=jnp.zeros((2, 3))), r"reset\[2, 3\] has dtype float32; allowed: bool"),
    (dict(r=X[:, :0]), r"r has shape \(2, 0, 4, 5\); it must be \[B, T, H, K\] with T at least 1"),
    (dict(r=X.astype(int)), r"r\[2, 3, 4, 5\] has dtype int32; allowed: float32, bfloat16, float16, float64"),
    (dict(k=X.astype(jnp.bfloat16)), r"k\[2, 3, 4, 5\] has dtype bfloat16; it must be that of r, float32"),
    (dict(w=X.astype(int)), r"w\[2, 3, 4, 5\] has dtype int32; it must be a float"),
    (dict(state=S.astype(int)), r"state\[2, 4, 5, 5\] has dtype int32; it must be a float"),
    (dict(implementation="chunkd"), r"no implementation 'chunkd'; did you mean 'chunked'"),
])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match="wkv6.*" + message):
        wkv6(**{**dict(r=X, w=-X, k=X, v=X, u=U, state=S), **change})
