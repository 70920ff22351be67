"""What recurrent depth draws: iterations against sampling in two stages and a table, states against their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.depth_draws import STATE_STD, draw_iterations, iteration_pmf, mean_iterations, random_state

# mean of the rate: mean, variance, median, P(r <= 8), 95th, 99th and 99.9th percentile, mean of what exceeds 8.
TABLE = {4: (5, 8.544, 4, .888, 10, 14, 21, .337), 8: (9, 26.178, 8, .544, 19, 26, 37, 2.378),
         16: (17, 88.711, 15, .153, 35, 48, 70, 9.262), 32: (33, 322.842, 29, .0145, 67, 94, 136, 25.018)}


@pytest.mark.parametrize("mean", TABLE)
def test_iterations_have_the_statistics_of_the_table(mean):
    pmf = iteration_pmf(mean, 0.5)
    count, sums = np.arange(1, len(pmf) + 1), np.cumsum(pmf)
    quantile = lambda q: 1 + int(np.searchsorted(sums, q))
    average = pmf @ count
    found = (average, pmf @ count**2 - average**2, quantile(.5), sums[7], quantile(.95), quantile(.99), quantile(.999),
             pmf @ np.maximum(count - 8, 0))
    np.testing.assert_allclose(found, TABLE[mean], rtol=5e-3)
    assert mean_iterations(mean, 0.5) == pytest.approx(mean + 1, rel=1e-6)
    assert mean_iterations(mean, 0.5, 8) == pytest.approx(average - found[-1], rel=1e-6)


def test_draws_are_a_poisson_number_of_a_log_normal_rate():
    """Chi-squared between 20,000 draws and as many by the definition, with cells of at least 50."""
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: draw_iterations(key, 8.0, 0.5)))(
        jax.random.split(jax.random.key(3), 20_000)))
    rng = np.random.default_rng(0)
    defined = 1 + rng.poisson(np.exp(rng.normal(np.log(8.0) - 0.125, 0.5, 20_000)))
    edges = [1, *range(2, 27, 2), 10_000]
    a, b = (np.histogram(values, edges)[0] for values in (drawn, defined))
    assert min(a.min(), b.min()) > 50 and drawn.min() == 1
    statistic = np.sum((a - b) ** 2 / (a + b))  # equal sizes; mean 13 and deviation 5.1 if both are one distribution
    assert statistic < 35


def test_mean_zero_is_always_one_iteration():
    assert int(draw_iterations(jax.random.key(0), 0.0, 0.5)) == 1


@pytest.mark.parametrize("width", [64, 256])
def test_states_have_their_deviation_whatever_the_width_and_stay_inside_three(width):
    positions = jnp.broadcast_to(jnp.arange(400), (2, 400))
    s = np.asarray(random_state(jax.random.key(0), positions, width, STATE_STD, jnp.float32, by_row=True))
    assert s.std() == pytest.approx(0.6325, rel=0.01) and abs(s.mean()) < 0.01
    assert 2.9 * STATE_STD < np.abs(s).max() <= 3.0001 * STATE_STD
    assert (s[0] != s[1]).all()


def test_states_depend_on_position_and_not_on_the_row_or_the_length():
    whole = random_state(jax.random.key(0), jnp.arange(8)[None].repeat(3, 0), 16, 1.0, jnp.float32, by_row=False)
    part = random_state(jax.random.key(0), jnp.array([[5]]), 16, 1.0, jnp.float32, by_row=False)
    np.testing.assert_array_equal(whole[2, 5], part[0, 0])
    assert (whole[:, 4] != whole[:, 5]).all()
