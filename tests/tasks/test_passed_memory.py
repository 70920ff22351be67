"""Random state passing: rows begin after the memory of the step before, and it stands in the carry of the run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.models.build import build_model, init_params, make_apply
from lm.tasks.build import build_objective
from lm.tasks.passed_memory import first_carry

B, T, VOCAB, BLOCK, SLOTS = 2, 12, 11, 4, 2
MODEL = dict(embed_dim=16, num_layers=2, pattern=("fam/mlp",), dtype="float32", vocab_multiple=1, embed_std=1.0,
             fam=dict(num_heads=2, block=BLOCK, memory=0, slots=SLOTS))


@functools.cache
def setup(scan=True):
    model = build_model({**MODEL, "scan": scan}, VOCAB)
    return model, init_params(model, jax.random.key(0))


def batch(seed, length=T):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (B, length)).astype(np.int32)
    ones = np.ones((B, length), np.int32)
    return Batch(tokens, np.roll(tokens, -1, 1), ones.astype(np.float32), ones,
                 np.broadcast_to(np.arange(length, dtype=np.int32), (B, length)))


def objective(probability=1.0, **given):
    return build_objective({"next_token": 1.0}, pass_memory=probability, initial_state=setup(**given)[0].initial_state)


def step(made, carry, given, key=3, **which):
    model, params = setup(**which)
    call = jax.jit(lambda params, carry, batch: made(make_apply(model), params, carry, batch, jax.random.key(key)))
    means, after, metrics = call(params, carry, given)
    return float(means["next_token"].value), after, metrics


def test_the_first_step_begins_from_nothing_and_the_next_after_its_first_row():
    made, (model, params) = objective(), setup()
    plain = build_objective({"next_token": 1.0})
    carry = first_carry(model.initial_state)()
    assert all(memory.dtype == jnp.float32 and memory.shape == (2, SLOTS, 16) for memory, _ in carry)
    loss, carry, metrics = step(made, carry, batch(0))
    assert loss == pytest.approx(step(plain, (), batch(0))[0], rel=1e-6) and float(metrics["passed"].value) == 0
    first = jax.jit(make_apply(model))(params, batch(0).tokens).state.stack.pattern[0]
    np.testing.assert_allclose(carry[0][0], first.memory[:, 0], rtol=1e-5, atol=1e-6)

    second, after, metrics = step(made, carry, batch(1))
    assert float(metrics["passed"].value) == 1 and abs(second - step(plain, (), batch(1))[0]) > 1e-5
    # The rows of the second step are those of texts that go on after the first row of the first, without its tokens.
    joined = np.concatenate([np.broadcast_to(batch(0).tokens[:1], (B, T)), batch(1).tokens], axis=1)
    whole = jax.jit(make_apply(model))(params, joined).state.stack.pattern[0]
    np.testing.assert_allclose(after[0][0], whole.memory[:, 0], rtol=1e-4, atol=1e-4)


def test_rows_begin_from_nothing_as_often_as_the_probability_leaves():
    model, made = setup()[0], objective(0.8)
    carry = step(made, first_carry(model.initial_state)(), batch(0))[1]
    call = jax.jit(lambda key: made(make_apply(model), setup()[1], carry, batch(1), key)[2]["passed"].value)
    uses = [float(call(jax.random.key(n))) for n in range(100)]
    assert set(uses) == {0.0, 1.0} and 0.7 < np.mean(uses) < 0.9


def test_a_step_without_a_whole_block_keeps_the_memory_of_before():
    model, made = setup()[0], objective(0.5)
    carry = step(made, first_carry(model.initial_state)(), batch(0))[1]
    kept = step(made, carry, batch(1, length=3), key=4)[1]
    for (a, there), (b, _) in zip(kept, carry, strict=True):
        np.testing.assert_array_equal(a, b)
        assert bool(jnp.all(there))


def test_a_memory_from_another_text_stands_just_before_the_first_token_wherever_that_is():
    model, params = setup()
    made = objective()
    carry = step(made, first_carry(model.initial_state)(), batch(0))[1]
    state = model.initial_state(B)
    begun = state._replace(stack=state.stack._replace(pattern=(state.stack.pattern[0].begun(*carry[0]),)))
    positions = jnp.asarray(batch(1).positions)
    reset = positions == 0
    apply = jax.jit(make_apply(model))
    one, two = (apply(params, batch(1).tokens, begun, reset=reset, positions=positions + offset).hidden
                for offset in (0, 100))
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3)


def test_a_model_without_a_memory_is_refused():
    model = build_model({**MODEL, "fam": {**MODEL["fam"], "slots": 0}}, VOCAB)
    with pytest.raises(ValueError, match="passes on the feedback memory of `fam` layers, and this model has none"):
        first_carry(model.initial_state)
