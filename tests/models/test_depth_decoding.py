"""Decoding with recurrent depth: one token at a time against the whole, states that are shared, warm starts, rows that
iterate at their own pace."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.recurrences import FINISHED, NOT_PARALLEL, STEPS, with_recurrences
from lm.generate.decode import generate
from lm.generate.loop import empty_state
from lm.generate.sampling import GREEDY, SamplingOptions
from lm.models.build import build_model, init_params, make_apply

VOCAB = 10
BASE = dict(embed_dim=16, num_layers=3, prefix=("attention/mlp",), pattern=("attention/mlp",),
            attention=dict(num_heads=2), rwkv6=dict(head_dim=8), mlp=dict(mlp_dim=24), dtype="float32",
            vocab_multiple=8, embed_std=0.2)
DEPTH = dict(coda=("attention/mlp",), mean=4.0)
TOKENS = jax.random.randint(jax.random.key(1), (3, 9), 0, VOCAB)


@functools.cache
def made(sliced=False, pattern=("attention/mlp",), entries=(), **depth):
    model = build_model({**BASE, "pattern": pattern, **dict(entries), "recurrent_depth": {**DEPTH, **depth}}, VOCAB)
    model = model.clone(sliced=sliced)
    params = init_params(model, jax.random.key(0))
    apply = make_apply(model)
    return model, params, apply, jax.jit(apply)


def in_pieces(given, params, cuts, tokens=TOKENS):
    """Hidden states, iterations where tokens stop, and the state after the last piece."""
    model, _, _, apply = given
    state, hidden, steps = empty_state(model.initial_state, len(tokens), 16), [], []
    for start, stop in itertools.pairwise(cuts):
        out = apply(params, tokens[:, start:stop], state)
        state = out.state
        hidden.append(out.hidden)
        steps.append(out.aux[STEPS][0] if STEPS in out.aux else None)
    return jnp.concatenate(hidden, 1), None if steps[0] is None else jnp.concatenate(steps, 1), state


ONE_BY_ONE = (0, 4, *range(5, 10))


@pytest.mark.parametrize("pattern", [("attention/mlp",), pytest.param(("rwkv6/mlp",), marks=pytest.mark.slow)], ids=str)
def test_one_token_at_a_time_equals_the_whole(pattern):
    """The noise of a token is a function of its position, and each iteration has a state of its own."""
    given = made(pattern=pattern)
    whole = given[3](given[1], TOKENS)
    assert NOT_PARALLEL in whole.aux  # the whole keeps no states to go on from
    hidden, _, state = in_pieces(given, given[1], ONE_BY_ONE)
    np.testing.assert_allclose(hidden, whole.hidden, atol=3e-5)
    assert NOT_PARALLEL not in given[3](given[1], TOKENS[:, :1], state).aux
    np.testing.assert_allclose(state.stack.latent, whole.state.stack.latent, atol=3e-5)


@pytest.mark.slow
def test_as_many_shared_states_as_iterations_are_no_sharing():
    alone = in_pieces(made(), made()[1], ONE_BY_ONE)[0]
    for cache, same in ((4, True), (9, True), (2, False)):
        given = made(cache=cache)
        assert given[0].initial_state(1, capacity=4).stack.core[0][0].keys.shape[0] == min(cache, 4)
        found = in_pieces(given, given[1], ONE_BY_ONE)[0]
        np.testing.assert_allclose(found[:, :4], alone[:, :4], atol=1e-6)  # the first piece looks at no state
        assert np.allclose(found, alone, atol=1e-5) == same


@pytest.mark.slow
def test_a_shared_state_is_that_of_the_last_iteration_that_wrote_it():
    """Four iterations and two states: number 0 is left by iteration 2, number 1 by iteration 3."""
    full, short = (in_pieces(made(cache=m), made()[1], (0, 9))[2].stack.core for m in (4, 2))
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(short), strict=True):
        np.testing.assert_array_equal(a[2:], b)


def test_states_that_no_iteration_reached_become_that_of_the_last():
    given = made()
    core = in_pieces(given, with_recurrences(given[1], 2), (0, 9))[2].stack.core
    for leaf in jax.tree.leaves(core):
        np.testing.assert_array_equal(leaf[2:], leaf[1:2].repeat(2, 0))


@pytest.mark.slow
def test_threshold_zero_decodes_as_all_iterations_do_with_one_state():
    given, one = made(exit_kl=0.0), made(cache=1)
    hidden, steps, _ = in_pieces(given, given[1], ONE_BY_ONE)
    np.testing.assert_array_equal(steps, 4)
    np.testing.assert_allclose(hidden, in_pieces(one, one[1], ONE_BY_ONE)[0], atol=1e-6)


@pytest.mark.slow
def test_rows_that_stop_do_not_depend_on_those_that_go_on():
    """Iterations and predictions of a row are what they are alone, also for the tokens after."""
    given = made(exit_kl=3e-4, recurrences=12)
    hidden, steps, _ = in_pieces(given, given[1], ONE_BY_ONE)
    assert len(np.unique(steps)) > 2
    for row in range(3):
        alone, own, _ = in_pieces(given, given[1], ONE_BY_ONE, TOKENS[row:row + 1])
        np.testing.assert_array_equal(own[0], steps[row])
        np.testing.assert_allclose(alone[0], hidden[row], atol=2e-6)


@pytest.mark.slow
def test_no_token_stops_before_every_state_is_written():
    given = made(exit_kl=1e9, cache=3, recurrences=8)
    steps = in_pieces(given, given[1], ONE_BY_ONE)[1]
    np.testing.assert_array_equal(steps, 3)


@pytest.mark.slow
def test_a_warm_start_begins_from_the_last_state():
    """Two tokens by one iteration each: warm, the second goes on from the first's state, and is one the whole cannot
    give."""
    warm, cold = made(warm_start=True, recurrences=1), made(recurrences=1)
    a, b = (in_pieces(g, g[1], ONE_BY_ONE)[0] for g in (warm, cold))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert not np.allclose(a[:, 4:], b[:, 4:], atol=1e-3)
    assert NOT_PARALLEL in warm[3](warm[1], TOKENS[:, :1], warm[0].initial_state(3, capacity=4)).aux
    # What the state remembers of the last token is what decides.
    _, _, state = in_pieces(warm, warm[1], (0, 4))
    _, params, _, run = warm
    other = state._replace(stack=state.stack._replace(latent=state.stack.latent * 0))
    assert not np.allclose(run(params, TOKENS[:, 4:5], state).hidden, run(params, TOKENS[:, 4:5], other).hidden)


def rows_of(given, tokens=24, **kwargs):
    model, params, apply, _ = given
    made_ = generate(apply, params, model.initial_state, [[1, 2, 3], [4], [5, 6, 7, 8, 9]], max_new_tokens=tokens,
                     steps_per_sync=10, prefill_chunk_size=16, stop_tokens=(0,), **kwargs)
    return [row.tokens.tolist() for row in made_.rows]


@pytest.mark.slow
@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(temperature=1.0)], ids=["greedy", "drawn"])
def test_rows_at_their_own_pace_write_what_they_write_in_step(options):
    depth = dict(exit_kl=1e-3, recurrences=8, cache=1)
    assert rows_of(made(sliced=True, **depth), options=options, continuous=True) == rows_of(
        made(**depth), options=options)


@pytest.mark.slow
def test_rows_at_their_own_pace_wait_for_no_other():
    """Calls of the core: the iterations of the row with the most, not the sum over tokens of the most of any row."""
    depth = dict(exit_kl=3e-3, recurrences=12)
    lock, free = made(**depth), made(sliced=True, **depth)
    steps = np.asarray(in_pieces(lock, lock[1], range(9))[1])
    model, params, _, run = free
    state = empty_state(model.initial_state, 3, 16)
    at, busy, calls, taken = np.zeros(3, int), np.zeros(3, bool), 0, np.zeros((3, 8), int)
    while (at < 8).any():
        begins = ~busy & (at < 8)
        token = np.asarray(TOKENS)[np.arange(3), np.minimum(at, 7)]
        out = run(params, token[:, None], state, weights=begins[:, None], reset=jnp.zeros((3, 1), bool))
        busy |= begins
        taken[busy, at[busy]] += 1
        finished = np.asarray(out.aux[FINISHED][0])
        state, calls, at, busy = out.state, calls + 1, at + finished, busy & ~finished
    np.testing.assert_array_equal(taken, steps)
    assert calls == steps.sum(1).max() < steps.max(0).sum()
