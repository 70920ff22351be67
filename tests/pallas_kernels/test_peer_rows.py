"""The table's gradient as the touched rows alone: through the sink of peer_experts_with_sink."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.peer_experts import merge_rows, num_touched, peer_experts, peer_experts_with_sink

implementations = pytest.mark.parametrize("implementation", ["reference", "chunked"])
dense = functools.partial(peer_experts, activation=jnp.tanh, implementation="reference")


def arrays(seed, batch, experts, kinds=2, lowest=-1):
    """5 positions, 2 heads of 3, width 4."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(lowest, experts, (batch, 5, 2, 3)).astype(np.int32)
    floats = rng.normal(size=(batch, 5, 4)), rng.normal(size=ids.shape), rng.normal(size=(experts, kinds, 4))
    x, gates, table = (jnp.asarray(a, jnp.float32) for a in floats)
    return x, jnp.asarray(ids), gates, table


def sink_for(ids, table):
    return jnp.zeros((num_touched(ids.size, len(table)), *table.shape[1:]))


def gradients(run, x, ids, gates, table):
    """(y, touched, dx, dgates, dsink) of the sum of squares."""
    def loss(x, gates, sink):
        y, touched = run(x, ids, gates, table, sink)
        return (y ** 2).sum(), (y, touched)

    got, aux = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, gates, sink_for(ids, table))
    return *aux, *got


def as_dense(touched, rows, num_experts):
    return jnp.zeros((num_experts, *rows.shape[1:])).at[touched.ids].add(rows, mode="drop")


@implementations
@pytest.mark.parametrize("experts,kinds", [(7, 2), (200, 2), (200, 3), (1, 2)])
def test_the_sink_gets_the_dense_gradient_of_the_touched_rows(implementation, experts, kinds):
    """Fewer experts than pairs and more; values and the other gradients are those of peer_experts."""
    x, ids, gates, table = arrays(0, 2, experts, kinds)
    run = functools.partial(peer_experts_with_sink, activation=jnp.tanh, implementation=implementation)
    y, touched, dx, dgates, rows = gradients(run, x, ids, gates, table)
    want = jax.grad(lambda x, gates, table: (dense(x, ids, gates, table) ** 2).sum(), (0, 1, 2))(x, gates, table)
    np.testing.assert_allclose(y, dense(x, ids, gates, table), rtol=1e-5, atol=1e-5)
    for got, expected in zip((dx, dgates, as_dense(touched, rows, experts)), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    chosen = np.unique(ids[ids >= 0])
    assert touched.ids.shape == (min(60, experts),) and touched.count == len(chosen)
    np.testing.assert_array_equal(touched.ids[:len(chosen)], chosen)
    np.testing.assert_array_equal(touched.ids[len(chosen):], experts)
    np.testing.assert_array_equal(rows[len(chosen):], 0)
    np.testing.assert_allclose(jnp.linalg.norm(rows), jnp.linalg.norm(want[2]), rtol=1e-5)    # clipping needs no table


@implementations
def test_the_table_gets_no_gradient(implementation):
    x, ids, gates, table = arrays(0, 2, 20)
    run = functools.partial(peer_experts_with_sink, activation=jnp.tanh, implementation=implementation)
    loss = lambda table: run(x, ids, gates, table, sink_for(ids, table))[0].sum()
    np.testing.assert_array_equal(jax.grad(loss)(table), 0)


def test_no_array_of_the_tables_size():
    """2^30 experts: 16 GB a float32 row set, if one were made."""
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((2, 5, 4), jnp.float32), ((2, 5, 2, 3), jnp.int32),
                                                      ((2, 5, 2, 3), jnp.float32), ((2 ** 30, 2, 4), jnp.float32))]
    run = functools.partial(peer_experts_with_sink, activation=jnp.tanh, implementation="chunked")

    def loss(x, gates, sink, ids, table):
        return (run(x, ids, gates, table, sink)[0] ** 2).sum()

    x, ids, gates, table = shapes
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, gates, jax.ShapeDtypeStruct((60, 2, 4), jnp.float32), ids,
                                                        table).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 2 ** 20


def test_layers_in_a_scan_with_remat():
    """A sink a layer, scanned over beside the tables, gives each layer's rows."""
    x, ids, gates, _ = arrays(0, 2, 30)
    tables = jnp.stack([arrays(seed, 2, 30)[3] for seed in range(3)])

    @jax.checkpoint
    def layer(x, inputs):
        table, sink = inputs
        y, touched = peer_experts_with_sink(x, ids, gates, table, sink, activation=jnp.tanh, implementation="chunked")
        return x + y, touched

    def loss(sinks):
        y, touched = jax.lax.scan(layer, x, (tables, sinks))
        return (y ** 2).sum(), touched

    def plain(tables):
        return (jax.lax.scan(lambda x, table: (x + dense(x, ids, gates, table), None), x, tables)[0] ** 2).sum()

    rows, touched = jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros((3, 30, 2, 4)))
    want = jax.jit(jax.grad(plain))(tables)
    for i in range(3):
        got = as_dense(jax.tree.map(lambda a, i=i: a[i], touched), rows[i], 30)
        np.testing.assert_allclose(got, want[i], rtol=1e-4, atol=1e-4 * jnp.abs(want[i]).max())


@pytest.mark.parametrize("experts", [9, 500])
def test_rows_of_microbatches_merge(experts):
    """Two halves of a batch, their rows merged, are the rows of the whole batch."""
    x, ids, gates, table = arrays(0, 4, experts)
    run = functools.partial(peer_experts_with_sink, activation=jnp.tanh, implementation="chunked")
    _, touched, _, _, rows = gradients(run, x, ids, gates, table)
    parts = [gradients(run, x[half], ids[half], gates[half], table) for half in (slice(0, 2), slice(2, 4))]
    merged, total = jax.jit(functools.partial(merge_rows, num_experts=experts))(
        jnp.concatenate([part[1].ids for part in parts]), jnp.concatenate([part[4] for part in parts]))
    np.testing.assert_array_equal(merged.ids, touched.ids)
    np.testing.assert_array_equal(merged.count, touched.count)
    np.testing.assert_allclose(total, rows, rtol=1e-5, atol=1e-5)


def test_rows_of_devices_merge_after_a_gather():
    """Tokens split over devices, every device its own rows; gathered and merged they are those of all tokens."""
    x, ids, gates, table = arrays(0, 4, 40)
    run = functools.partial(peer_experts_with_sink, activation=jnp.tanh, implementation="chunked")
    _, touched, _, _, rows = gradients(run, x, ids, gates, table)
    spec, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def local(x, ids, gates, table):
        _, mine, _, _, rows = gradients(run, x, ids, gates, table)
        every = lambda a: jax.lax.all_gather(a, "data", tiled=True)
        return merge_rows(every(mine.ids), every(rows), 40)

    with jax.set_mesh(jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))):
        merged, total = jax.jit(jax.shard_map(local, in_specs=(spec, spec, spec, everywhere), out_specs=everywhere,
                                              check_vma=False))(x, ids, gates, table)
    np.testing.assert_array_equal(merged.ids, touched.ids)
    np.testing.assert_allclose(total, rows, rtol=1e-5, atol=1e-5)


def test_a_sink_of_another_size():
    x, ids, gates, table = arrays(0, 2, 30)
    with pytest.raises(ValueError, match=r"peer_experts_with_sink: sink has shape \(29, 2, 4\); it must be "
                       r"\[min\(B\*T\*H\*K, N\), R, D\] = \(30, 2, 4\)"):
        peer_experts_with_sink(x, ids, gates, table, jnp.zeros((29, 2, 4)), activation=jnp.tanh)
