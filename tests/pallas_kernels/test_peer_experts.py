"""What is true of peer_experts besides the contract of `tests/contracts/rows_kernels.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from pallas_kernels.dispatch import stated_platform
from pallas_kernels.peer_experts import config, peer_experts

IMPLEMENTATIONS = ("reference", "chunked")
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
tanh_experts = functools.partial(peer_experts, activation=jnp.tanh)


def arrays(rng, batch, time, heads, chosen, experts, kinds, width, lowest=0, highest=None):
    ids = rng.integers(lowest, (experts if highest is None else highest + 1), (batch, time, heads, chosen))
    return (rng.normal(size=(batch, time, width)), ids.astype(np.int32), rng.normal(size=ids.shape),
            rng.normal(size=(experts, kinds, width)) / np.sqrt(width))


def loop(x, ids, gates, table, dy):
    """(y, dx, dgates, dtable) with tanh, pair by pair, from the formula and its derivative written by hand."""
    y, dx, dgates, dtable = (np.zeros(a.shape) for a in (x, x, gates, table))
    for b, t, h, j in np.ndindex(*ids.shape):
        i, gate, token, out = ids[b, t, h, j], gates[b, t, h, j], x[b, t], dy[b, t]
        if not 0 <= i < len(table):
            continue
        down, up = table[i, :2]
        linear = table[i, 2] @ token if table.shape[1] == 3 else 1.0
        hidden = np.tanh(down @ token)
        y[b, t] += gate * hidden * linear * up
        dgates[b, t, h, j] = hidden * linear * (up @ out)
        before = gate * linear * (up @ out) * (1 - hidden ** 2)
        dx[b, t] += before * down
        dtable[i, 0] += before * token
        dtable[i, 1] += gate * hidden * linear * out
        if table.shape[1] == 3:
            dx[b, t] += gate * hidden * (up @ out) * table[i, 2]
            dtable[i, 2] += gate * hidden * (up @ out) * token
    return y, dx, dgates, dtable


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(run, x, ids, gates, table, dy):
    """(y, dx, dgates, dtable)."""
    y, pull = jax.vjp(lambda x, gates, table: run(x, ids, gates, table), x, gates, table)
    return y, *pull(dy.astype(y.dtype))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9),
       st.sampled_from([2, 3]), st.integers(1, 7), st.integers(0, 2 ** 31))
def test_any_shape_equals_a_loop(batch, time, heads, chosen, experts, kinds, width, seed):
    """Values and all gradients; ids below 0 and above N - 1 among them."""
    rng = np.random.default_rng(seed)
    inputs = arrays(rng, batch, time, heads, chosen, experts, kinds, width, lowest=-2, highest=experts + 1)
    dy = rng.normal(size=(batch, time, width))
    want = loop(*inputs, dy)
    with jax.enable_x64(True):
        for implementation in IMPLEMENTATIONS:
            run = functools.partial(tanh_experts, implementation=implementation)
            for got, exact in zip(value_and_gradients(run, *inputs, dy), want, strict=True):
                np.testing.assert_allclose(got, exact, rtol=0, atol=1e-12 * max(1, np.abs(exact).max()))


@pytest.mark.parametrize("kinds", [2, 3])
def test_chunks_change_nothing(monkeypatch, kinds):
    """One token and one pair at a time, with a shorter last chunk, against all at once."""
    rng = np.random.default_rng(0)
    inputs, dy = arrays(rng, 2, 4, 3, 3, 5, kinds, 6), rng.normal(size=(2, 4, 6))
    run = functools.partial(tanh_experts, implementation="chunked")
    with jax.enable_x64(True):
        whole = value_and_gradients(run, *inputs, dy)
        monkeypatch.setitem(config.CHUNK_BYTES, "cpu", 3 * 9 * kinds * 6 * 8 + 1)
        pieces = value_and_gradients(lambda *a: run(*a), *inputs, dy)
    for got, want in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@implementations
def test_one_expert_for_all_tokens_is_a_dense_layer(implementation):
    """All N experts, each once and with gate 1: y = tanh(x down^T) up."""
    rng = np.random.default_rng(0)
    x, _, _, table = (jnp.asarray(a, jnp.float32) for a in arrays(rng, 2, 3, 2, 4, 8, 2, 5))
    ids = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32).reshape(2, 4), (2, 3, 2, 4))
    y = tanh_experts(x, ids, jnp.ones(ids.shape), table, implementation=implementation)
    np.testing.assert_allclose(y, jnp.tanh(x @ table[:, 0].T) @ table[:, 1], rtol=1e-5, atol=1e-6)


@implementations
def test_rows_that_were_not_chosen_have_gradient_zero(implementation):
    rng = np.random.default_rng(0)
    x, ids, gates, table = arrays(rng, 1, 3, 1, 2, 50, 2, 4)
    run = functools.partial(tanh_experts, implementation=implementation)
    dtable = value_and_gradients(run, x, ids, gates, table, np.ones_like(x))[-1]
    touched = np.abs(dtable).max((1, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(touched), np.unique(ids))


@implementations
def test_sums_are_wide_under_bfloat16(implementation):
    """512 equal experts of 1/512: a sum kept in bfloat16 would stop at 0.5; the same for the gradient of a row."""
    ids = jnp.zeros((1, 2, 1, 512), jnp.int32)
    x, table = jnp.ones((1, 2, 1), jnp.bfloat16), jnp.ones((1, 2, 1), jnp.bfloat16)
    run = functools.partial(peer_experts, activation=lambda a: a, implementation=implementation)
    y, _, dgates, dtable = value_and_gradients(run, x, ids, jnp.full(ids.shape, 1 / 512), table, x)
    assert y.dtype == dtable.dtype == jnp.bfloat16 and dgates.dtype == jnp.float32
    np.testing.assert_allclose(np.float32(y), 1, rtol=2 ** -7)
    np.testing.assert_allclose(np.float32(dtable), 2, rtol=2 ** -7)


@implementations
def test_a_bfloat16_token_reads_a_float32_table(implementation):
    rng = np.random.default_rng(0)
    x, ids, gates, table = arrays(rng, 1, 2, 2, 2, 5, 2, 4)
    x, gates, table = jnp.asarray(x, jnp.bfloat16), jnp.asarray(gates, jnp.float32), jnp.asarray(table, jnp.float32)
    out = value_and_gradients(functools.partial(tanh_experts, implementation=implementation), x, ids, gates, table, x)
    assert [a.dtype.name for a in out] == ["bfloat16", "bfloat16", "float32", "float32"]
    want = loop(*(np.asarray(a, np.float64) if a.dtype != np.int32 else a for a in (x, ids, gates, table, x)))
    np.testing.assert_allclose(out[3], want[3], rtol=1e-5, atol=1e-6)


@implementations
def test_an_unknown_id_is_no_expert(implementation):
    """Nothing comes of it, whatever its gate is, and its neighbours are as if it were not there."""
    rng = np.random.default_rng(0)
    x, ids, gates, table = (jnp.asarray(a) for a in arrays(rng, 1, 3, 1, 4, 6, 2, 5))
    run = functools.partial(tanh_experts, implementation=implementation)
    for wrong in (-1, 6, -7, 2 ** 31 - 1, -2 ** 31):
        bad_ids, bad_gates = ids.at[..., 1].set(wrong), gates.at[..., 1].set(jnp.nan)
        got = value_and_gradients(run, x, bad_ids, bad_gates, table, x)
        keep = np.array([0, 2, 3])
        want = value_and_gradients(run, x, ids[..., keep], gates[..., keep], table, x)
        np.testing.assert_array_equal(got[2][..., 1], 0)
        for a, b in zip((got[0], got[1], got[2][..., keep], got[3]), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@implementations
def test_debug_mode_finds_wrong_ids(implementation):
    """Under checkify an id that is neither a row nor -1 is an error, in a compiled gradient too; without it, none."""
    rng = np.random.default_rng(0)
    x, ids, gates, table = arrays(rng, 1, 3, 1, 4, 6, 2, 5)
    loss = lambda x, ids: tanh_experts(x, ids, gates, table, implementation=implementation).sum()
    checked = jax.jit(checkify.checkify(jax.grad(loss), errors=checkify.user_checks))
    ids[0, 0, 0, 0] = -1
    checked(x, ids)[0].throw()
    ids[0, 2, 0, 3] = 6
    jax.jit(jax.grad(loss))(x, ids)
    with pytest.raises(checkify.JaxRuntimeError, match="ids from -1 to 6; table has rows 0 to 5, and -1 chooses none"):
        checked(x, ids)[0].throw()


def test_temporaries_are_a_small_part_of_the_gathering_form():
    """Forward and backward, less the dense gradient of the table that both return."""
    def temporaries(implementation, batch):
        shapes = dict(x=(batch, 128, 256), gates=(batch, 128, 2, 16), table=(256, 2, 256))
        x, gates, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values())
        shapes = x, jax.ShapeDtypeStruct(gates.shape, jnp.int32), gates, table
        loss = lambda *inputs: (tanh_experts(*inputs, implementation=implementation) ** 2).sum()
        return jax.jit(jax.grad(loss, (0, 2, 3))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("chunked", 16) < 0.05 * temporaries("reference", 16)


@pytest.mark.parametrize("kinds,width", [(2, 5), (3, 5), (2, 16)])
def test_rows_of_the_table_on_several_devices(kinds, width):
    """Each device adds the experts that it owns; the psum of that is the whole, and so are the gradients."""
    rng = np.random.default_rng(0)
    x, ids, gates, table = (jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else a.dtype)
                            for a in arrays(rng, 4, 3, 2, 3, 8, kinds, width))
    mesh = jax.make_mesh((2, 2), ("data", "expert"), (jax.sharding.AxisType.Auto,) * 2)
    data, expert = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec("expert")

    def local(x, ids, gates, table):
        mine = ids - jax.lax.axis_index("expert") * table.shape[0]
        mine = jnp.where((mine >= 0) & (mine < table.shape[0]), mine, -1)
        return jax.lax.psum(tanh_experts(x, mine, gates, table, implementation="chunked"), "expert")

    whole = functools.partial(tanh_experts, implementation="reference")
    want = value_and_gradients(whole, x, ids, gates, table, x)
    with jax.set_mesh(mesh):
        split = jax.shard_map(local, in_specs=(data, data, data, expert), out_specs=data)
        got = value_and_gradients(split, x, ids, gates, table, x)
        left_to_the_partitioner = value_and_gradients(functools.partial(tanh_experts, implementation="chunked"), *(
            jax.device_put(a, jax.sharding.NamedSharding(mesh, data)) for a in (x, ids, gates)), table, x)
    for out in (got, left_to_the_partitioner):
        for a, b in zip(out, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


X, GATES, TABLE = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 5, 6)), jnp.ones((9, 2, 4))
IDS = jnp.ones((2, 3, 5, 6), jnp.int32)


@pytest.mark.parametrize("arguments,message", [
    ((X[0], IDS, GATES, TABLE), r"x has shape \(3, 4\); it must be \[B, T, D\]"),
    ((X, IDS[..., 0], GATES, TABLE), r"ids has shape \(2, 3, 5\); it must be \[B, T, H, K\]"),
    ((X, IDS[:, :2], GATES, TABLE), r"ids has shape \(2, 2, 5, 6\); it must be \[B, T, H, K\] with T=3"),
    ((X, IDS, GATES[..., :2], TABLE), r"gates has shape \(2, 3, 5, 2\); it must be \[B, T, H, K\] with K=6"),
    ((X, IDS, GATES, TABLE[:, 0]), r"table has shape \(9, 4\); it must be \[N, R, D\]"),
    ((X, IDS, GATES, TABLE[..., :3]), r"table has shape \(9, 2, 3\); it must be \[N, R, D\] with D=4"),
    ((X, IDS, GATES, TABLE[:, :1]), r"table has shape \(9, 1, 4\); it must be \[N, 2, D\], down and up, or"),
    ((X, IDS, GATES, TABLE[:0]), r"table has shape \(0, 2, 4\); .* with N at least 1"),
    ((X[:, :0], IDS[:, :0], GATES[:, :0], TABLE), r"x has shape \(2, 0, 4\); .* with T at least 1"),
    ((X, GATES, GATES, TABLE), r"ids\[2, 3, 5, 6\] has dtype float32; allowed: int32"),
    ((X, IDS, IDS, TABLE), r"gates\[2, 3, 5, 6\] has dtype int32; allowed: float32"),
    ((X, IDS, GATES, TABLE.astype(int)), r"table\[9, 2, 4\] has dtype int32; allowed: float32"),
    ((X, IDS, GATES, TABLE, "chunkd"), r"no implementation 'chunkd'; did you mean 'chunked'"),
    ((X, IDS, GATES, TABLE, "pallas_tpu"), r"cannot run on cpu as 'pallas_tpu': .* it needs a TPU and this is cpu"),
])
def test_bad_input(arguments, message):
    *arguments, implementation = arguments if len(arguments) == 5 else (*arguments, None)
    with pytest.raises(ValueError, match="peer_experts.*" + message):
        tanh_experts(*arguments, implementation=implementation)


def test_a_cotangent_may_be_a_numpy_array():
    _, pull = jax.vjp(lambda x: tanh_experts(x, IDS, GATES, TABLE, implementation="chunked"), X)
    np.testing.assert_array_equal(pull(np.ones(X.shape, np.float32))[0], pull(jnp.ones_like(X))[0])


@pytest.mark.parametrize("width,kinds,reason", [(768, 2, "D=768 is not a multiple of 512"),
                                                (512, 3, r"it takes tables \[N, 2, D\]")])
def test_the_kernel_says_what_it_cannot_do(width, kinds, reason):
    table = jax.ShapeDtypeStruct((9, kinds, width), jnp.float32)
    x = jax.ShapeDtypeStruct((2, 3, width), jnp.float32)
    run = lambda implementation: jax.eval_shape(functools.partial(tanh_experts, implementation=implementation),
                                                x, IDS, GATES, table)
    with stated_platform("tpu"):
        with pytest.raises(ValueError, match=f"cannot run on tpu as 'pallas_tpu': .*{reason}"):
            run("pallas_tpu")
        assert run(None).shape == x.shape
