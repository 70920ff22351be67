"""Self-speculative decoding: texts are distributed as verification says, and greedy ones as in plain decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.head import logits_of
from lm.core.recurrences import with_recurrences
from lm.generate.decode import generate
from lm.generate.sampling import GREEDY, SamplingOptions
from lm.generate.speculative import Speculation, accept
from lm.models.build import build_model, init_params, make_apply

VOCAB = 5
MODEL = dict(embed_dim=16, num_layers=2, pattern=("attention",), attention=dict(num_heads=2), dtype="float32",
             vocab_multiple=5, embed_std=0.3)


@functools.cache
def made(**depth):
    model = build_model({**MODEL, "recurrent_depth": dict(coda=("attention",), mean=4.0, **depth)}, VOCAB)
    return model, init_params(model, jax.random.key(3)), make_apply(model)


def write(given, prompts, speculation=None, **kwargs):
    model, params, apply = given
    return generate(apply, params, model.initial_state, prompts, speculation=speculation, **kwargs)


def test_acceptance_keeps_the_distribution_of_the_verification():
    """One draft of two tokens, 40,000 times, against the product of the verification's distributions."""
    rng = np.random.default_rng(0)
    q, p = (rng.dirichlet(np.ones(4) * 0.7, n) for n in (2, 3))
    n = 40_000
    drafted = np.stack([rng.choice(4, n, p=q[j]) for j in range(2)], axis=1)
    same = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.float32), (n, *a.shape))
    keys = jax.random.split(jax.random.key(1), (n, 3))
    out = jax.jit(accept)(jnp.asarray(drafted), same(q), same(p), jnp.asarray(rng.random((n, 2)), jnp.float32), keys)
    tokens, kept = np.asarray(out.tokens), np.asarray(out.kept)
    assert (tokens[:, 0] >= 0).all() and ((tokens >= 0).sum(1) == kept + 1).all()
    for place in range(3):
        there = tokens[kept >= place, place]
        want = len(there) * p[place]
        assert ((np.bincount(there, minlength=4) - want) ** 2 / want).sum() < 16.3  # chi-squared of 3 degrees, 0.1%
    expected = np.minimum(p[0], q[0]).sum()
    assert (kept >= 1).mean() == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
def test_greedy_text_is_that_of_plain_decoding_for_every_draft():
    given, prompts = made(), [[1, 2, 3], [4]]
    want = [row.tokens.tolist() for row in write(given, prompts, max_new_tokens=13, options=GREEDY).rows]
    for draft in (2, 4):
        out = write(given, prompts, Speculation(draft, 3), max_new_tokens=13, options=GREEDY, steps_per_sync=8)
        assert [row.tokens.tolist() for row in out.rows] == want
        assert 0 < out.timing.kept <= out.timing.drafted
        if draft == 4:  # the draft is the verification
            assert out.timing.kept == out.timing.drafted


def joint(given, prompt, length):
    """Probability of every text of `length` tokens after the prompt, [VOCAB] * length."""
    _, params, apply = given
    rows = np.stack(np.meshgrid(*[np.arange(VOCAB)] * length, indexing="ij"), -1).reshape(-1, length)
    tokens = jnp.asarray(np.concatenate([np.tile(prompt, (len(rows), 1)), rows], axis=1))
    out = jax.jit(apply)(params, tokens)
    log = np.asarray(jax.nn.log_softmax(logits_of(out.hidden, out.head)[..., :VOCAB], -1), np.float64)
    at = len(prompt) - 1 + np.arange(length)
    return np.exp(np.take_along_axis(log[:, at], rows[..., None], -1)[..., 0].sum(1))


@pytest.mark.slow
def test_drawn_texts_are_distributed_as_all_iterations_say():
    """Three tokens, 4,000 texts; the same with the draft's distribution fails."""
    given, prompt, n = made(), [1, 2], 4000
    out = write(given, [prompt] * n, Speculation(1, 2), max_new_tokens=3, options=SamplingOptions(), seed=7,
                prefill_chunk_size=16)
    texts = np.stack([row.tokens for row in out.rows])
    found = np.bincount(texts @ (VOCAB ** np.arange(2, -1, -1)), minlength=VOCAB**3)
    model, params, apply = given

    def statistic(want):
        want = n * want
        small = want < 5  # one cell of all that are rare
        a, b = (np.append(x[~small], x[small].sum()) for x in (found, want))
        return ((a - b) ** 2 / np.maximum(b, 1e-9)).sum(), len(a) - 1

    value, degrees = statistic(joint(given, prompt, 3))
    assert value < degrees + 4 * np.sqrt(2 * degrees)
    wrong, degrees = statistic(joint((model, with_recurrences(params, 1), apply), prompt, 3))
    assert wrong > degrees + 8 * np.sqrt(2 * degrees)
    assert 0 < out.timing.kept < out.timing.drafted


@pytest.mark.slow
def test_a_row_ends_at_its_stop_token_inside_of_a_draft():
    given, prompts = made(), [[1, 2, 3], [4], [2, 2]]
    plain = write(given, prompts, max_new_tokens=12, options=GREEDY)
    stop = int(plain.rows[0].tokens[4])
    want = [(row.tokens.tolist(), row.finish_reason) for row in
            write(given, prompts, max_new_tokens=12, options=GREEDY, stop_tokens=(stop,)).rows]
    out = write(given, prompts, Speculation(4, 3), max_new_tokens=12, options=GREEDY, stop_tokens=(stop,))
    assert [(row.tokens.tolist(), row.finish_reason) for row in out.rows] == want


@pytest.mark.parametrize("depth", [dict(cache=2), *(pytest.param(d, marks=pytest.mark.slow) for d in (
    dict(warm_start=True), dict(exit_kl=1e-3)))], ids=str)
def test_models_that_predict_otherwise_one_at_a_time_are_refused(depth):
    with pytest.raises(ValueError, match="speculation verifies several tokens at once"):
        write(made(**depth), [[1]], Speculation(1), max_new_tokens=4)


@pytest.mark.parametrize("speculation, options, words", [
    (Speculation(0), GREEDY, "draft=0 must be at least 1"), (Speculation(1, 0), GREEDY, "lookahead=0"),
    (Speculation(1), SamplingOptions(repetition_penalty=1.2), "repetition_penalty=1.2")], ids=str)
def test_speculations_that_cannot_be_are_named(speculation, options, words):
    with pytest.raises(ValueError, match=words):
        write(made(), [[1]], speculation, max_new_tokens=4, options=options)
