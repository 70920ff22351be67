"""Rows of a table that CPUs read where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu_rows


@pytest.mark.parametrize("columns,tokens,chosen", [(16, 1, 1), (32, 130, 17), (272, 64, 3)])
def test_rows_where_they_lie(monkeypatch, columns, tokens, chosen):
    """Fewer tokens than a loop takes, some of its trips and a rest, one trip."""
    monkeypatch.setattr(cpu_rows, "TOKENS", 64)
    rng = np.random.default_rng(0)
    table, at = rng.normal(size=(9, columns)), rng.integers(0, 9, (tokens, chosen)).astype(np.int32)
    x, weights = rng.normal(size=(tokens, columns)), rng.normal(size=at.shape)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(cpu_rows.dots)(table, at, jnp.asarray(x)),
                                   np.einsum("md,mpd->mp", x, table[at]), atol=1e-12)
        np.testing.assert_allclose(jax.jit(cpu_rows.combine)(table, at, jnp.asarray(weights)),
                                   np.einsum("mp,mpd->md", weights, table[at]), atol=1e-12)


def test_the_table_is_not_copied():
    """Temporaries of reading rows of a table of 64 MiB."""
    array = jax.ShapeDtypeStruct
    table, at = array((2**16, 256), jnp.float32), array((128, 8), jnp.int32)
    others = {cpu_rows.dots: array((128, 256), jnp.float32), cpu_rows.combine: array((128, 8), jnp.float32)}
    for run, other in others.items():
        assert jax.jit(run).lower(table, at, other).compile().memory_analysis().temp_size_in_bytes < 2**20
