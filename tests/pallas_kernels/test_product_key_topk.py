"""What is true of product_key_topk besides the contract of `tests/contracts/rows_kernels.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import stated_platform
from pallas_kernels.product_key_topk import config, num_sub_keys, product_key_topk
from pallas_kernels.product_key_topk.chunked import staircase
from pallas_kernels.testing import interpreted_tpu

IMPLEMENTATIONS = ("reference", "chunked")
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def arrays(rng, batch, time, heads, n, width, per_head=False, draw=None):
    draw = draw or (lambda size: rng.normal(size=size))
    keys = (heads, n, width) if per_head else (n, width)
    return [draw((batch, time, heads, width)), draw((batch, time, heads, width)), draw(keys), draw(keys)]


def brute_force(q1, q2, c1, c2, k):
    """Every one of the n * n keys, in Python; ties by rank of the first half, then of the second."""
    scores, ids = np.zeros((*q1.shape[:3], k)), np.zeros((*q1.shape[:3], k), int)
    for where in np.ndindex(*q1.shape[:3]):
        one, two = (c[where[2]] if c.ndim == 3 else c for c in (c1, c2))
        s1, s2 = [float(q1[where] @ key) for key in one], [float(q2[where] @ key) for key in two]
        n = len(s1)
        order1, order2 = sorted(range(n), key=lambda i: (-s1[i], i)), sorted(range(n), key=lambda j: (-s2[j], j))
        ranked = sorted((-(s1[i] + s2[j]), a, b, i * n + j) for a, i in enumerate(order1) for b, j in enumerate(order2))
        scores[where], ids[where] = [-r[0] for r in ranked[:k]], [r[3] for r in ranked[:k]]
    return scores, ids


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.booleans(),
       st.data())
def test_any_shape_equals_brute_force(batch, time, heads, n, width, per_head, data):
    k, rng = data.draw(st.integers(1, n)), np.random.default_rng(data.draw(st.integers(0, 2 ** 31)))
    given_arrays = arrays(rng, batch, time, heads, n, width, per_head)
    want_scores, want_ids = brute_force(*given_arrays, k)
    with jax.enable_x64(True):
        both = jax.jit(lambda *a: [product_key_topk(*a, k, implementation=name) for name in IMPLEMENTATIONS])
        for scores, ids in both(*given_arrays):
            np.testing.assert_allclose(scores, want_scores, rtol=0, atol=1e-12 * max(1, np.abs(want_scores).max()))
            np.testing.assert_array_equal(ids, want_ids)
            assert ids.dtype == jnp.int32


@implementations
@pytest.mark.parametrize("k", [1, 5, 9])
def test_ties_have_one_order(implementation, k):
    """Small whole numbers: most sums occur several times, and exactly."""
    rng = np.random.default_rng(0)
    given_arrays = arrays(rng, 2, 6, 2, 9, 2, draw=lambda size: rng.integers(-1, 2, size).astype(np.float32))
    _, want = brute_force(*given_arrays, k)
    np.testing.assert_array_equal(product_key_topk(*given_arrays, k, implementation=implementation)[1], want)


@implementations
def test_sums_that_rounding_makes_equal(implementation):
    """In float32 1e-9 + 1 is 0 + 1: the larger first half goes first, though its id is the larger one."""
    one = jnp.ones((1, 1, 1, 1))
    c1, c2 = jnp.array([[0.0], [1e-9], [-3]]), jnp.array([[1.0], [1 - 2 ** -20], [0]])
    for k, want in ((1, [3]), (2, [3, 0]), (3, [3, 0, 4])):
        ids = product_key_topk(one, one, c1, c2, k, implementation=implementation)[1]
        np.testing.assert_array_equal(ids[0, 0, 0], want)


@implementations
def test_equal_keys_go_by_id(implementation):
    q, c = jnp.ones((1, 2, 1, 3)), jnp.ones((4, 3))
    ids = product_key_topk(q, q, c, c, 4, implementation=implementation)[1]
    np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(4), (1, 2, 1, 4)))


@pytest.mark.parametrize("k,size", [(1, 1), (2, 3), (16, 50), (32, 119)])
def test_the_staircase_holds_what_can_win(k, size):
    first, second = staircase(k)
    assert len(first) == size
    ranks = list(zip(first.tolist(), second.tolist(), strict=True))
    assert ranks == sorted(ranks) and all((a + 1) * (b + 1) <= k for a, b in ranks)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("per_head", [False, True])
def test_chunks_change_nothing(monkeypatch, per_head, platform):
    """Three whole chunks and a shorter one, against all tokens at once: values and every gradient."""
    rng = np.random.default_rng(0)
    given_arrays = arrays(rng, 2, 7, 3, 6, 5, per_head)
    weights = rng.normal(size=(2, 7, 3, 4))

    def run():
        with jax.enable_x64(True):
            loss = lambda *a: (product_key_topk(*a, 4, implementation="chunked")[0] * weights).sum()
            ids = lambda *a: product_key_topk(*a, 4, implementation="chunked")[1]
            return jax.jit(lambda *a: (ids(*a), *jax.grad(loss, (0, 1, 2, 3))(*a)))(*given_arrays)

    whole = run()
    for most in ("CHUNK_SCORES", "FEW_CHUNKS_SCORES"):
        monkeypatch.setattr(config, most, 4 * 3 * 6)
    with stated_platform(platform):         # what is put among zeros one way on CPUs, another way elsewhere
        pieces = run()
    for got, want in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n,k", [(40, 5), (9, 9), (70, 16)])
@pytest.mark.parametrize("per_head", [False, True])
def test_float32_in_chunks_equals_the_reference(monkeypatch, per_head, n, k):
    """Small whole numbers, so that sums are exact and many are equal; chunks of 4 tokens, the last of 3."""
    monkeypatch.setattr(config, "FEW_CHUNKS_SCORES", 4 * 2 * n)
    rng = np.random.default_rng(0)
    given_arrays = arrays(rng, 1, 11, 2, n, 3, per_head, draw=lambda size: rng.integers(-2, 3, size).astype(np.float32))
    got, want = (product_key_topk(*given_arrays, k, implementation=name) for name in ("chunked", "reference"))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_gradients_reach_chosen_sub_keys_alone():
    """One query, one key: the gradients are the key, the query, and zero for every other sub-key."""
    rng = np.random.default_rng(0)
    q1, q2, c1, c2 = (jnp.asarray(x, jnp.float32) for x in arrays(rng, 1, 1, 1, 5, 3))
    run = functools.partial(product_key_topk, k=1, implementation="chunked")
    i, j = divmod(int(run(q1, q2, c1, c2)[1].item()), 5)
    dq1, dq2, dc1, dc2 = jax.jit(jax.grad(lambda *a: run(*a)[0].sum(), (0, 1, 2, 3)))(q1, q2, c1, c2)
    np.testing.assert_allclose(dq1[0, 0, 0], c1[i])
    np.testing.assert_allclose(dq2[0, 0, 0], c2[j])
    np.testing.assert_allclose(dc1, np.where(np.arange(5)[:, None] == i, q1[0, 0], 0))
    np.testing.assert_allclose(dc2, np.where(np.arange(5)[:, None] == j, q2[0, 0], 0))


@implementations
def test_scores_are_float32_under_bfloat16(implementation):
    """Sub-keys 2^-9 apart around 1 are equal once a score is rounded to bfloat16, and different before."""
    q = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    c = jnp.stack([jnp.ones(8), jnp.arange(8) / 512], axis=1).astype(jnp.bfloat16)
    scores, ids = product_key_topk(q, q, c, c, 3, implementation=implementation)
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(ids[0, 0, 0], [63, 62, 55])
    np.testing.assert_allclose(scores[0, 0, 0], np.array([14, 13, 13]) / 512 + 2)


def test_temporaries_do_not_grow_with_the_batch():
    def temporaries(batch):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(batch, 256, 4, 16)] * 2 + [(256, 16)] * 2]
        return jax.jit(functools.partial(product_key_topk, k=8, implementation="chunked")).lower(
            *shapes).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(8), temporaries(64)
    assert large < 1.5 * small
    assert large < 64 * 256 * 4 * 256 * 4 / 2          # half of one half's scores


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_rows_split_over_devices(kind):
    """Queries split, keys on all devices, inside jax.shard_map and left to the partitioner."""
    rng = np.random.default_rng(0)
    q1, q2, c1, c2 = (jnp.asarray(x, jnp.float32) for x in arrays(rng, 4, 5, 2, 6, 3))
    spec, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    run = functools.partial(product_key_topk, k=3, implementation="chunked")

    def loss(run):
        return jax.jit(jax.value_and_grad(lambda *a: (run(*a)[0] ** 2).sum(), (0, 1, 2, 3)))

    want = loss(run)(q1, q2, c1, c2)
    mesh = jax.make_mesh((2,), ("data",), (getattr(jax.sharding.AxisType, kind),))
    with jax.set_mesh(mesh):
        split = jax.device_put((q1, q2), jax.sharding.NamedSharding(mesh, spec))
        mapped = jax.shard_map(run, in_specs=(spec, spec, everywhere, everywhere), out_specs=spec)
        for how in (mapped, run) if kind == "Auto" else (mapped,):
            for x, y in zip(jax.tree.leaves(loss(how)(*split, c1, c2)), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_head", [pytest.param(True, marks=pytest.mark.slow), False])
def test_ties_in_the_kernel(per_head):
    """The ids of the reference, with most sums occurring several times, more than one block, and k = n."""
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(-1, 2, size).astype(np.float32)
    given_arrays = arrays(rng, 1, 70, 2, 5, 2, per_head, draw)
    with interpreted_tpu():
        got = jax.block_until_ready(jax.jit(functools.partial(product_key_topk, k=5))(*given_arrays))
    for a, b in zip(got, product_key_topk(*given_arrays, 5, implementation="reference"), strict=True):
        np.testing.assert_array_equal(a, b)


Q, C = jnp.ones((2, 3, 4, 5)), jnp.ones((6, 5))


@pytest.mark.parametrize("arguments,message", [
    ((Q[0], Q, C, C, 2), r"q1 has shape \(3, 4, 5\); it must be \[B, T, H, K\]"),
    ((Q, Q[:, :2], C, C, 2), r"q2 has shape \(2, 2, 4, 5\); it must be \[B, T, H, K\] with T=3"),
    ((Q, Q, C[:, :3], C, 2), r"c1 has shape \(6, 3\); it must be \[n, K\] with K=5"),
    ((Q, Q, C, C[:5], 2), r"c1 has shape \(6, 5\) and c2 \(5, 5\); the number of experts must be a square"),
    ((Q, Q, C[0], C[0], 2), r"c1 has shape \(5,\); it must be \[n, K\]"),
    ((Q, Q, jnp.ones((3, 6, 5)), jnp.ones((3, 6, 5)), 2), r"c1 has shape \(3, 6, 5\); it must be \[H, n, K\] with H=4"),
    ((Q[:, :0], Q[:, :0], C, C, 2), r"q1 has shape \(2, 0, 4, 5\); .* with T at least 1"),
    ((Q, Q, C, C, 7), r"k=7; it must be from 1 to n=6, the number of sub-keys in c1 \(6, 5\)"),
    ((Q, Q, C, C, 0), r"k=0; it must be from 1 to n=6"),
    ((Q.astype(int), Q, C, C, 2), r"q1\[2, 3, 4, 5\] has dtype int32; allowed: float32"),
    ((Q, Q, C, C.astype(jnp.bfloat16), 2), r"c2\[6, 5\] has dtype bfloat16; it must be that of q1, float32"),
    ((Q, Q, C, C, 2, "chunkd"), r"no implementation 'chunkd'; did you mean 'chunked'"),
    ((Q, Q, C, C, 2, "pallas_tpu"), r"cannot run on cpu as 'pallas_tpu': .* it needs a TPU and this is cpu"),
])
def test_bad_input(arguments, message):
    *arguments, implementation = arguments if len(arguments) == 6 else (*arguments, None)
    with pytest.raises(ValueError, match="product_key_topk.*" + message):
        product_key_topk(*arguments, implementation=implementation)


def test_ids_have_to_fit():
    keys = jax.ShapeDtypeStruct((46_341, 1), jnp.float32)
    query = jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)
    with pytest.raises(ValueError, match=r"n is at most 46340"):
        jax.eval_shape(lambda *a: product_key_topk(*a, 2), query, query, keys, keys)


def test_squares():
    assert [num_sub_keys(n * n) for n in (1, 2, 1024)] == [1, 2, 1024]
    with pytest.raises(ValueError, match=r"num_experts=1000 is not a square n \* n .*; nearest: 961 or 1024"):
        num_sub_keys(1000)
    with pytest.raises(ValueError, match=r"num_experts=0 .* nearest: 1"):
        num_sub_keys(0)
