"""Causal traces: what must come back when everything that matters is restored, against runs by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.analysis.trace import trace
from lm.core.head import logits_of
from lm.models.build import build_model, init_params, make_apply

PROMPT, ANSWER = [3, 9, 4, 7, 1], [5, 2]


@functools.cache
def made(pattern):
    model = build_model(dict(embed_dim=32, num_layers=3, prefix=pattern[:1], pattern=pattern[1:], dtype="float32",
                             rwkv4=dict(attention_dim=32), attention=dict(num_heads=4), vocab_multiple=16), 30)
    params = init_params(model, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return model, jax.tree.unflatten(tree, [a + 0.3 * jax.random.normal(k, a.shape)
                                            for a, k in zip(leaves, keys, strict=True)])


def log_probability(model, params):
    out = make_apply(model)(params, jnp.array([[*PROMPT, *ANSWER]]))
    logp = jax.nn.log_softmax(logits_of(out.hidden, out.head))[0]
    return float(logp[4, 5] + logp[5, 2])


RECURRENT = ("rwkv4/channel_mix", "rwkv4/channel_mix")
MIXED = ("rwkv4/mlp", "attention/mlp")


def test_the_clean_run_is_the_models_and_nothing_before_the_subject_matters():
    model, params = made(RECURRENT)
    found = trace(model, params, PROMPT, (1, 3), ANSWER, draws=2, rows=7)
    assert found.clean == pytest.approx(log_probability(model, params), abs=1e-4)
    assert found.restored.shape == (3, 5)
    assert abs(found.corrupted - found.clean) > 1e-2
    np.testing.assert_allclose(found.restored[:, 0], found.corrupted, atol=1e-4)
    assert np.ptp(found.restored[:, 1:], axis=0).min() > 1e-3, "each layer brings something else back"


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [RECURRENT, MIXED])
def test_the_last_block_at_the_last_token_decides_the_next_token(pattern):
    model, params = made(pattern)
    found = trace(model, params, PROMPT, (1, 3), ANSWER[:1], draws=2)
    assert found.restored[2, 4] == pytest.approx(found.clean, abs=1e-4)
    assert (np.abs(found.restored[:2, 2] - found.corrupted) > 1e-3).all()


def test_a_layer_that_nothing_else_carries_restores_all_when_its_state_is_there():
    """With one layer and one corrupted token, its output and state there are all that the corruption reached."""
    model = build_model(dict(embed_dim=32, num_layers=1, pattern=("min_gru",), min_gru={}, dtype="float32",
                             vocab_multiple=16), 30)
    params = init_params(model, jax.random.key(0))
    found = trace(model, params, PROMPT, (2, 3), ANSWER, draws=1, noise=10.0)
    assert found.restored[0, 2] == pytest.approx(found.clean, abs=1e-5)
    assert abs(found.corrupted - found.clean) > 1e-4


def test_what_cannot_be_traced_is_refused():
    model, params = made(RECURRENT)
    with pytest.raises(ValueError, match=r"subject \(3, 9\) must be a part of the prompt, which has 5 tokens"):
        trace(model, params, PROMPT, (3, 9), ANSWER)
    with pytest.raises(ValueError, match="needs an answer of at least one token"):
        trace(model, params, PROMPT, (1, 2), [])
