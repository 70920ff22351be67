"""Beam search against the enumeration of all continuations, greedy decoding, and the model's own scores."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.head import logits_of
from lm.generate.beam import beam_search, row_axes
from lm.generate.decode import generate
from lm.generate.sampling import GREEDY
from lm.models.build import build_model, init_params, make_apply

VOCAB = 5
MODELS = {
    "attention": dict(embed_dim=16, num_layers=2, attention=dict(num_heads=2), mlp=dict(mlp_dim=16)),
    "window": dict(embed_dim=16, num_layers=2, attention=dict(num_heads=2, window=4), mlp=dict(mlp_dim=16)),
    "min_gru": dict(embed_dim=16, num_layers=2, pattern=("min_gru",), min_gru=dict(hidden_dim=16)),
}
PROMPTS = [[1, 2, 3], [4], [2, 2, 0, 1, 3, 4, 4]]


@functools.cache
def model(name):
    built = build_model({**MODELS[name], "dtype": "float32", "vocab_multiple": 8, "embed_std": 0.5}, VOCAB)
    params = init_params(built, jax.random.key(1))
    params = jax.tree.map(lambda a: a * 3 if a.ndim > 1 else a, params)  # far from uniform
    return built, make_apply(built), params


@functools.cache
def every_continuation(name, prompt, steps):
    """{tokens: log-probability} of all VOCAB^steps continuations, by one forward pass over each."""
    _, apply, params = model(name)
    rows = np.array([[*prompt, *more] for more in itertools.product(range(VOCAB), repeat=steps)], np.int32)

    def score(rows):
        out = apply(params, rows)
        return jax.nn.log_softmax(logits_of(out.hidden, out.head))
    logp = np.asarray(jax.jit(score)(rows), np.float64)
    at = np.arange(len(prompt) - 1, len(prompt) + steps - 1)
    each = np.take_along_axis(logp[:, at], rows[:, at + 1, None], axis=-1)[..., 0]
    return {tuple(row[len(prompt):]): value for row, value in zip(rows.tolist(), each, strict=True)}


def search(name, **options):
    built, apply, params = model(name)
    return beam_search(apply, params, built.initial_state, PROMPTS, **options)


@pytest.mark.parametrize("name", ["attention", pytest.param("window", marks=pytest.mark.slow),
                                  pytest.param("min_gru", marks=pytest.mark.slow)])
def test_a_search_that_drops_nothing_ranks_all_continuations(name):
    """As many beams as there are continuations: the order and the sums are those of enumeration."""
    found = search(name, beams=VOCAB**3, max_new_tokens=3)
    for prompt, row in zip(PROMPTS, found, strict=True):
        want = sorted(((each.sum(), tokens) for tokens, each in every_continuation(name, tuple(prompt), 3).items()),
                      reverse=True)
        assert len(row) == VOCAB**3
        np.testing.assert_allclose([h.logp for h in row], [logp for logp, _ in want], rtol=1e-5, atol=1e-4)
        assert tuple(row[0].tokens) == want[0][1] and {tuple(h.tokens) for h in row} == {t for _, t in want}


@pytest.mark.slow
def test_the_search_keeps_the_best_sums_of_each_step():
    """Against the algorithm in Python, with 4 beams of 4 tokens; long enough that it is not the enumeration."""
    found = search("attention", beams=4, max_new_tokens=4)
    for prompt, row in zip(PROMPTS, found, strict=True):
        logp = every_continuation("attention", tuple(prompt), 4)
        prefix = {tokens[:n]: each[:n].sum() for tokens, each in logp.items() for n in range(1, 5)}
        beams = [()]
        for _ in range(4):
            beams = sorted(((*beam, token) for beam in beams for token in range(VOCAB)), key=lambda b: -prefix[b])[:4]
        assert [tuple(h.tokens) for h in row] == beams
        np.testing.assert_allclose([h.logp for h in row], [prefix[beam] for beam in beams], atol=1e-4)


@pytest.mark.slow
def test_one_beam_is_greedy_decoding_and_more_beams_are_never_less_probable():
    built, apply, params = model("attention")
    greedy = generate(apply, params, built.initial_state, PROMPTS, max_new_tokens=8, options=GREEDY)
    one, many = search("attention", beams=1, max_new_tokens=8), search("attention", beams=8, max_new_tokens=8)
    for row, alone, best in zip(greedy.rows, one, many, strict=True):
        np.testing.assert_array_equal(row.tokens, alone[0].tokens)
        assert best[0].logp >= alone[0].logp - 1e-4 and len(best) == 8


@pytest.mark.slow
def test_a_stop_token_ends_a_hypothesis_which_keeps_its_place():
    found = search("attention", beams=VOCAB**3, max_new_tokens=3, stop_tokens=[2])
    for prompt, row in zip(PROMPTS, found, strict=True):
        want = {}
        for tokens, each in every_continuation("attention", tuple(prompt), 3).items():
            n = tokens.index(2) + 1 if 2 in tokens else 3
            want[tokens[:n]] = each[:n].sum()
        assert {tuple(h.tokens) for h in row} == set(want)
        np.testing.assert_allclose([h.logp for h in row], sorted(want.values(), reverse=True), atol=1e-4)
        assert all(h.ended == (h.tokens[-1] == 2) for h in row)
    ranked = search("attention", beams=VOCAB**3, max_new_tokens=3, stop_tokens=[2], length_penalty=1.0)[0]
    assert [h.score for h in ranked] == sorted((h.logp / len(h.tokens) for h in ranked), reverse=True)


@pytest.mark.slow
def test_chunks_of_the_prompt_do_not_matter():
    whole, cut = search("attention", beams=3, max_new_tokens=4), search("attention", beams=3, max_new_tokens=4,
                                                                         prefill_chunk_size=2)
    for a, b in zip(whole, cut, strict=True):
        assert [h.tokens.tolist() for h in a] == [h.tokens.tolist() for h in b]


def test_the_axis_of_rows_is_found_in_stacked_and_single_leaves():
    state = lambda n, capacity: (jnp.zeros((2, n, capacity)), jnp.zeros((n, 3)), jnp.zeros(4))
    assert row_axes(state, 3, 16) == (1, 0, None)


@pytest.mark.parametrize("options, message", [(dict(beams=0, max_new_tokens=3), "beams=0"),
                                              (dict(beams=2, max_new_tokens=0), "max_new_tokens=0"),
                                              (dict(beams=2, max_new_tokens=3, length_penalty=-1), "length_penalty=-1"),
                                              (dict(beams=2, max_new_tokens=30, capacity=20), "room for 20")])
def test_what_cannot_be_searched_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search("attention", **options)


@pytest.mark.slow
def test_nan_logits_stop_the_search():
    built, apply, params = model("attention")
    with pytest.raises(FloatingPointError, match="prompt 0"):
        beam_search(apply, jax.tree.map(lambda a: a * jnp.nan, params), built.initial_state, PROMPTS, beams=2,
                    max_new_tokens=2)
