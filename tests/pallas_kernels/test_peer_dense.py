"""The dense gradient of a table whose rows fetch their own pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.peer_experts import config, dense, rows


def arrays(experts, tokens=6, chosen=5, kinds=2, width=4, lowest=0):
    rng = np.random.default_rng(0)
    ids = rng.integers(lowest, experts + 1, (tokens, chosen)).astype(np.int32)     # some are none
    return ids, rng.normal(size=(*ids.shape, kinds)), rng.normal(size=(tokens, width)), rng.normal(size=(tokens, width))


def loop(ids, factors, x, dy, experts):
    total = np.zeros((experts, factors.shape[-1], x.shape[-1]))
    for (m, p), i in np.ndenumerate(ids):
        if i < experts:
            for kind, source in zip(range(factors.shape[-1]), (x, dy, x), strict=False):
                total[i, kind] += factors[m, p, kind] * source[m]
    return total


@pytest.mark.parametrize("experts,kinds,chunk", [(1, 2, 2**20), (3, 3, 1), (3, 2, 200), (70, 2, 2**20), (130, 2, 1)])
def test_it_equals_a_loop(monkeypatch, experts, kinds, chunk):
    """Experts with many more pairs than a row fetches, added one, some or all at a time, and experts with none."""
    monkeypatch.setitem(config.CHUNK_BYTES, "cpu", chunk)
    given = arrays(experts, kinds=kinds)
    with jax.enable_x64(True):
        got = jax.jit(functools.partial(dense.sum_dense, num_experts=experts))(*given)
    np.testing.assert_allclose(got, loop(*given, experts), rtol=0, atol=1e-13)


def test_the_number_of_pairs_that_a_row_fetches():
    """Each number of rounds is among the cases above."""
    assert [dense.rounds(30, experts) for experts in (1, 3, 59, 60, 70, 119, 120, 130)] == [4, 4, 4, 3, 3, 3, 2, 2]


def test_what_is_not_a_number_stays_in_its_rows():
    ids, factors, x, dy = arrays(40)
    x[-1] = dy[0] = np.nan
    got = jax.jit(functools.partial(dense.sum_dense, num_experts=40))(ids, factors, x, dy)
    touched = np.unique(ids[[0, -1]])
    assert set(np.flatnonzero(np.isnan(got).any((1, 2)))) == set(touched[touched < 40])


def test_pairs_that_are_known_while_compiling():
    """A few pairs are left when rows have fetched theirs: the loop over them has constant bounds."""
    ids, *given = arrays(49, tokens=5, chosen=18, width=16)
    with jax.enable_x64(True):
        got = jax.jit(lambda *given: dense.sum_dense(jnp.asarray(ids), *given, 49))(*given)
    assert np.bincount(ids.ravel())[:49].max() > dense.rounds(ids.size, 49)
    np.testing.assert_allclose(got, loop(ids, *given, 49), rtol=0, atol=1e-13)


def test_its_gradients_are_those_of_the_sorted_sum():
    ids, *given = arrays(9)
    with jax.enable_x64(True):
        given = [jnp.asarray(x) for x in given]
        square = lambda add: lambda *given: (jnp.sin(add(*given)) ** 2).sum()
        ours, want = (jax.jit(jax.grad(square(add), (0, 1, 2)))(*given) for add in (
            lambda *given: dense.sum_dense(ids, *given, 9),
            lambda *given: rows.sum_pairs(rows.sort_pairs(ids), *given, 9)))
    for one, two in zip(ours, want, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)
