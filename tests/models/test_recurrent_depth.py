"""The model of recurrent depth against its formula written out, one iteration after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.head import logits_of
from lm.core.recurrences import with_recurrences
from lm.models.build import build_model, init_params, make_apply, resolve_model
from lm.models.depth_draws import draw_iterations, random_state
from lm.models.recurrent_depth import ITERATIONS, STATE, STEPS

D, HEADS, VOCAB, STD = 16, 2, 10, (2 / 5) ** 0.5
BASE = dict(embed_dim=D, num_layers=4, prefix=("attention/mlp",), pattern=("attention/mlp", "attention/mlp"),
            attention=dict(num_heads=HEADS, rope_theta=None), mlp=dict(mlp_dim=24, activation="swiglu"),
            dtype="float32", vocab_multiple=8, embed_std=0.2, scan=False)
DEPTH = dict(coda=("attention/mlp",), mean=4.0, backprop=3)
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, VOCAB)


def model_and_params(depth=None, **changes):
    model = build_model({**BASE, **changes, "recurrent_depth": {**DEPTH, **(depth or {})}}, VOCAB)
    params = init_params(model, jax.random.key(0))
    # Scales that differ from 1, so that a norm in the wrong place shows.
    noise = lambda leaf: leaf * (1 + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape))
    return model, jax.tree.map(noise, params)


def norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def block(p, x):
    """n2(x + attention(n1 x)), then n4(x + mlp(n3 x))."""
    B, T, _ = x.shape
    a, m, K = p["attention"], p["mlp"], D // HEADS
    h = norm(x, p["norm0"]["scale"])
    q, k, v = (jnp.reshape(h @ a[n]["kernel"], (B, T, HEADS, K)) for n in ("query", "key", "value"))
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), jnp.einsum("bthk,bshk->bhts", q, k) / K**0.5, -jnp.inf)
    y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, -1), v).reshape(B, T, D) @ a["out"]["kernel"]
    x = norm(x + y, p["norm0_after"]["scale"])
    h = norm(x, p["norm1"]["scale"])
    y = (jax.nn.silu(h @ m["gate"]["kernel"]) * (h @ m["up"]["kernel"])) @ m["down"]["kernel"]
    return norm(x + y, p["norm1_after"]["scale"])


@functools.partial(jax.jit, static_argnums=(3, 4))
def written_out(params, tokens, s, r, silent=0):
    """Logits after r iterations from s, the first `silent` of them without gradient, and all states."""
    p = params["params"]
    core = [jax.tree.map(lambda leaf: leaf[0], p["stack"][f"pattern_{n}"]) for n in range(2)]
    e = block(p["prelude"]["prefix_0"], D**0.5 * p["embed"]["embedding"][tokens])
    states = []
    for i in range(r):
        s = jnp.concatenate([s, e], -1) @ p["adapter"]["kernel"]
        for layer in core:
            s = block(layer, s)
        s = jax.lax.stop_gradient(s) if i + 1 == silent else s
        states.append(s)
    last = p["final_norm"]["scale"]
    h = norm(block(p["coda"]["prefix_0"], norm(s, last)), last)
    return (h @ p["embed"]["embedding"].T)[..., :VOCAB], states


def first_state(key=None):
    """In training of each row and step, else of the position alone."""
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    drawn = jax.random.key(0) if key is None else jax.random.fold_in(key, STATE)
    return random_state(drawn, positions, D, STD, jnp.float32, by_row=key is not None)


def logits(out):
    return logits_of(out.hidden, out.head)[..., :VOCAB]


MODEL, PARAMS = model_and_params()
APPLY = jax.jit(make_apply(MODEL))


@pytest.mark.parametrize("r", [3, *(pytest.param(r, marks=pytest.mark.slow) for r in (1, 7))])
def test_logits_are_those_of_the_formula(r):
    want, _ = written_out(PARAMS, TOKENS, first_state(), r)
    np.testing.assert_allclose(logits(APPLY(with_recurrences(PARAMS, r), TOKENS)), want, atol=2e-5)


@pytest.mark.slow
def test_one_program_serves_every_number_of_iterations():
    apply = jax.jit(make_apply(MODEL))
    found = [apply(with_recurrences(PARAMS, r), TOKENS).hidden for r in (1, 2, 9)]
    assert apply._cache_size() == 1 and not np.allclose(found[0], found[1])
    # Without the collection it is the config's number, here the mean of training.
    np.testing.assert_allclose(make_apply(MODEL)(PARAMS, TOKENS).hidden,
                               apply(with_recurrences(PARAMS, 4), TOKENS).hidden, atol=1e-5)


def score(logits):
    return jnp.sum(jnp.sin(logits) * jnp.arange(VOCAB))


@jax.jit
def training_gradient(params, key):
    out = make_apply(MODEL)(params, TOKENS, key=key)
    return jax.grad(lambda p: score(logits(make_apply(MODEL)(p, TOKENS, key=key))))(params), out.aux["tally"]["depth"]


@pytest.mark.slow
def test_gradient_goes_back_through_the_last_iterations_alone_in_one_program():
    """Numbers of iterations below and above the three that have a gradient."""
    seen = {}
    for seed in range(40):
        key = jax.random.key(seed)
        r = int(draw_iterations(jax.random.fold_in(key, ITERATIONS), 4.0, 0.5))
        if r in (2, 5) and r not in seen:
            seen[r] = key
    assert set(seen) == {2, 5}
    for r, key in seen.items():
        found, tally = training_gradient(PARAMS, key)
        assert float(tally["recurrences"].total) == r
        s = first_state(key)
        want, whole = (jax.grad(lambda p, s=s, r=r, n=n: score(written_out(p, TOKENS, s, r, n)[0]))(PARAMS)
                       for n in (max(r - 3, 0), 0))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()) + 1e-5)
        assert (max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(whole),
                                                                strict=True)) > 1e-2) == (r > 3)
        states = written_out(PARAMS, TOKENS, s, r)[1]
        change = float(jnp.linalg.norm(states[-1] - states[-2]) / jnp.linalg.norm(states[-1]))
        assert float(tally["change"].total) == pytest.approx(change, rel=1e-4)
        unit = np.reshape(states[-1] / jnp.linalg.norm(states[-1], axis=-1, keepdims=True), (-1, D))
        pairs = unit @ unit.T
        cosine = (pairs.sum() - len(unit)) / (len(unit) * (len(unit) - 1))
        assert float(tally["cosine"].total) == pytest.approx(float(cosine), abs=1e-4)
    assert training_gradient._cache_size() == 1


@pytest.mark.slow
def test_states_of_the_core_have_unit_size_under_unit_scales():
    """After the last norm of a sandwich, whatever the iteration."""
    model = build_model({**BASE, "recurrent_depth": DEPTH}, VOCAB)
    params = init_params(model, jax.random.key(0))
    for s in written_out(params, TOKENS, first_state(), 5)[1]:
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(s * s, -1)), 1, atol=1e-3)
    state = jax.jit(make_apply(model))(params, TOKENS).state.stack.latent
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(state * state, -1)), 1, atol=1e-3)


def kl(p, q):
    p, q = (np.asarray(jax.nn.log_softmax(a), np.float64) for a in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.slow
def test_a_token_stops_where_its_prediction_stops_to_move():
    """A row of one token, of which nothing but its own states decides. The first comparison is with the uniform
    distribution."""
    tokens, most = TOKENS[:, :1], 9
    s = first_state()[:, :1]
    said = [jnp.zeros((2, 1, VOCAB)), *(written_out(PARAMS, tokens, s, r)[0] for r in range(1, most + 1))]
    moved = np.stack([kl(said[r - 1], said[r])[:, 0] for r in range(1, most + 1)])  # [iteration, row]
    for threshold in (3e-2, 1e-3, 1e-5):
        out = APPLY(with_recurrences(PARAMS, most, threshold), tokens)
        settled = moved < threshold
        want = np.where(settled.any(0), settled.argmax(0) + 1, most)
        np.testing.assert_array_equal(out.aux[STEPS][0, :, 0], want)
        rows = jnp.stack([said[n][b] for b, n in enumerate(want)])
        np.testing.assert_allclose(logits(out), rows, atol=2e-5)


def test_threshold_zero_is_all_iterations_and_infinity_is_one():
    for threshold, r in ((0.0, 7), (np.inf, 1)):
        out = APPLY(with_recurrences(PARAMS, 7, threshold), TOKENS)
        np.testing.assert_array_equal(out.aux[STEPS], np.full((1, *TOKENS.shape), r))
        np.testing.assert_allclose(out.hidden, APPLY(with_recurrences(PARAMS, r), TOKENS).hidden, atol=1e-6)


def test_tokens_do_not_see_later_ones():
    changed = TOKENS.at[:, 4:].set((TOKENS[:, 4:] + 1) % VOCAB)
    for params in (with_recurrences(PARAMS, 5), with_recurrences(PARAMS, 5, 1e-2)):
        a, b = (APPLY(params, tokens).hidden for tokens in (TOKENS, changed))
        np.testing.assert_allclose(a[:, :4], b[:, :4], atol=1e-6)
        assert not np.allclose(a[:, 4:], b[:, 4:], atol=1e-3)


@pytest.mark.parametrize("given, words", [
    (dict(recurrences=0), "recurrences=0 must be at least 1"), (dict(backprop=0), "backprop=0"),
    (dict(mean=1e6), "mean=1000000.0 and sigma=0.5: .* at most 10000"), (dict(sigma=3.0), "sigma=3.0: .* lower one of"),
    (dict(cache=0), "cache=0"), (dict(exit_kl=-1e-3), "exit_kl=-0.001"), (dict(exit_kl=float("nan")), "exit_kl=nan"),
    (dict(mean=-1.0), "mean=-1.0"), (dict(means=4.0), "did you mean 'mean'"), (dict(coda=("atention",)), "attention")],
    ids=str)
def test_options_that_cannot_be_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        resolve_model({**BASE, "recurrent_depth": {**DEPTH, **given}})


def test_numbers_given_beside_the_parameters_are_checked():
    with pytest.raises(ValueError, match="recurrences=0 must be at least 1"):
        with_recurrences(PARAMS, 0)
    for count, words in ((2.5, "whole number"), (float("nan"), "at least 1"), (2**31, "below 2\\^31")):
        with pytest.raises(ValueError, match=words):
            with_recurrences(PARAMS, count)
    with pytest.raises(ValueError, match="exit_kl=-1"):
        with_recurrences(PARAMS, 4, -1.0)


def test_layers_that_do_not_add_up_are_named():
    with pytest.raises(ValueError, match=r"num_layers=5 must be 2 \(prefix and coda\) plus a multiple of 2"):
        resolve_model({**BASE, "num_layers": 5, "recurrent_depth": DEPTH})
