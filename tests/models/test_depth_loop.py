"""The loops alone, on cores whose answer is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.depth_loop import exit_loop, fill, fixed_loop, read, train_loop, write
from lm.models.depth_measures import kl

RHO = 0.6
E = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
START = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 5)), jnp.float32)


def contraction(variables, s, e, state, i):
    """s -> rho s + e, which ends at e / (1 - rho); the state is what was seen."""
    return variables * s + e, s[None], {}


def ring(m):
    """m states, [m, 1, B, T, D]."""
    return jnp.full((m, 1, *E.shape), -7.0)


def closed(r):
    end = E / (1 - RHO)
    return end + RHO**r * (START - end)


@pytest.mark.parametrize("r", [1, 2, 6])
def test_a_contraction_comes_nearer_by_its_factor(r):
    found = jax.jit(lambda r: fixed_loop(contraction, RHO, START, E, ring(1), r))(jnp.int32(r))
    np.testing.assert_allclose(found.s, closed(r), atol=1e-5)
    step = np.linalg.norm(closed(r) - closed(r - 1)) / np.linalg.norm(closed(r))
    assert float(found.change) == pytest.approx(step, rel=1e-4)


def test_the_divergence_of_what_comes_nearer_falls_to_nothing():
    moved = np.stack([np.asarray(kl(closed(r - 1), closed(r))) for r in range(1, 25)])
    assert (np.diff(moved[2:8], axis=0) < 0).all() and moved[7].max() < 2e-3 and moved[-1].max() < 1e-6


@pytest.mark.parametrize("threshold", [1e-2, 1e-4, 0.0])
def test_each_token_stops_after_the_first_move_that_is_small_enough(threshold):
    most = 9
    out = jax.jit(lambda t: exit_loop(contraction, lambda s: s, kl, RHO, START, E, ring(1), most, threshold=t,
                                      present=jnp.ones((3, 4), bool)))(threshold)
    shown = [np.zeros(E.shape), *(closed(r) for r in range(1, most + 1))]
    small = np.stack([np.asarray(kl(a, b)) for a, b in itertools.pairwise(shown)]) < threshold
    steps = np.where(small.any(0), small.argmax(0) + 1, most)
    np.testing.assert_array_equal(out.steps, steps)
    want = np.stack([closed(r) for r in range(most + 1)])
    at = lambda n: np.take_along_axis(want, n[None, :, :, None], 0)[0]
    np.testing.assert_allclose(out.s, at(steps), atol=1e-5)
    # What a token shows to others is the input of its last iteration, not a later one.
    np.testing.assert_allclose(out.ring[0, 0], at(steps - 1), atol=1e-5)


def test_padding_is_not_waited_for_and_writes_nothing():
    present = jnp.asarray([[True] * 4, [True] * 4, [False] * 4])
    out = exit_loop(contraction, lambda s: s, kl, RHO, START, E, ring(2), 5, threshold=1e9, present=present)
    np.testing.assert_array_equal(out.steps, [[2] * 4, [2] * 4, [0] * 4])
    np.testing.assert_array_equal(out.ring[:, :, 2], -7.0)


def test_iterations_read_what_was_there_before_the_call_and_the_last_to_write_stays():
    m, r = 3, 5
    seen = []

    def core(variables, s, e, state, i):
        seen.append(state)
        return s, jnp.full_like(state, i), {}

    before = jnp.arange(3.0).reshape(3, 1, 1, 1, 1) * jnp.ones((3, 1, *E.shape))
    with jax.disable_jit():
        after = fixed_loop(core, None, START, E, before, r).ring
    assert [float(s.max()) for s in seen[-r:]] == [0, 1, 2, 0, 1]
    assert [float(after[n].max()) for n in range(m)] == [3, 4, 2]
    np.testing.assert_array_equal(read(write(before, 4, before[0] + 9), 1), before[0] + 9)


@pytest.mark.parametrize("r", [1, 2, 3, 7])
def test_states_that_were_not_reached_are_filled_whether_the_number_is_known_or_traced(r):
    states = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 1, 2))
    want = np.minimum(np.arange(3), r - 1)
    np.testing.assert_array_equal(fill(states, r)[:, 0, 0], want)
    np.testing.assert_array_equal(jax.jit(fill)(states, r)[:, 0, 0], want)


@pytest.mark.parametrize("r", [1, 3, 5])
def test_gradient_is_that_of_the_last_iterations_written_down(r):
    """k = 3: of rho, d/d rho of rho^n s + e (1 + ... ) with what came before held fixed; of e, the sum of powers."""
    def value(rho, e):
        return train_loop(contraction, rho, START, e, ring(1), jnp.int32(r), 3).s.sum()

    d_rho, d_e = jax.jit(jax.grad(value, (0, 1)))(RHO, E)
    n = min(r, 3)
    held = closed(r - n)
    np.testing.assert_allclose(d_e, sum(RHO**j for j in range(n)), rtol=1e-5)
    want = n * RHO ** (n - 1) * held.sum() + sum(j * RHO ** (j - 1) for j in range(1, n)) * E.sum()
    np.testing.assert_allclose(d_rho, want, rtol=1e-4)
