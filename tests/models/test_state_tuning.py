"""Learned initial states: what they compute, what they cost where there are none, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.head import logits_of
from lm.core.tree import named_leaves
from lm.models.build import build_model, init_params, make_apply
from lm.models.state_tuning import init_states

B, T, VOCAB, D = 2, 12, 40, 16
BASE = dict(embed_dim=D, num_layers=3, dtype="float32", vocab_multiple=8, norm="layer", embed_norm=True,
            mlp=dict(mlp_dim=32), channel_mix=dict(mlp_dim=32))
HEADS = dict(head_dim=8)
KINDS = {
    "rwkv4": dict(pattern=("rwkv4/channel_mix",)),
    "rwkv5": dict(pattern=("rwkv5/mlp",), rwkv5=HEADS),
    "rwkv6": dict(pattern=("rwkv6/mlp",), rwkv6=HEADS),
    "rwkv7": dict(prefix=("first/mlp",), pattern=("rwkv7/mlp",), rwkv7=HEADS,
                  first=dict(kind="rwkv7", value_residual=False, **HEADS)),
    "min_gru": dict(pattern=("min_gru/mlp",), min_gru=dict(conv_width=3)),
    "min_lstm": dict(prefix=("attention/mlp",), pattern=("min_lstm/mlp",), attention=dict(num_heads=2)),
}
kinds = pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=() if kind in ("rwkv4", "min_gru") else pytest.mark.slow) for kind in KINDS])
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)


@functools.cache
def setup(kind, scan=True):
    """(model, jitted apply, variables with parameters and states moved off their first values)."""
    model = build_model({**BASE, **KINDS[kind], "scan": scan}, VOCAB)
    variables = {**init_params(model, jax.random.key(0)), "state": init_states(model)}
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return model, jax.jit(make_apply(model)), jax.tree.unflatten(treedef, moved)


def logits(apply, variables, tokens=TOKENS, state=None, **kwargs):
    out = apply(variables, tokens, state, **kwargs)
    return logits_of(out.hidden, out.head)[..., :VOCAB], out.state


def put_in(model, variables):
    """The model's initial state with the learned arrays put into their places by hand."""
    state, learned = model.initial_state(B), variables["state"]["stack"]
    for group, blocks in (("prefix", model.stack.prefix), ("pattern", model.stack.pattern)):
        for n, block in enumerate(blocks):
            for at, name in enumerate(block.names):
                given = learned.get(f"{group}_{n}", {}).get(name)
                if given is None:
                    continue
                states = getattr(state.stack, group)
                rows = {field: jnp.stack([array] * B, axis=1 if group == "pattern" else 0)
                        for field, array in given.items()}
                block_state = (*states[n][:at], states[n][at]._replace(**rows), *states[n][at + 1:])
                states = (*states[:n], block_state, *states[n + 1:])
                state = state._replace(stack=state.stack._replace(**{group: states}))
    return state


@kinds
def test_equals_the_same_state_given_by_hand(kind):
    model, apply, variables = setup(kind)
    got, after = logits(apply, variables)
    want, state = logits(apply, {"params": variables["params"]}, state=put_in(model, variables))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(after.stack), jax.tree.leaves(state.stack), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    without, _ = logits(apply, {"params": variables["params"]})
    assert float(jnp.abs(got - without)[:, 0].max()) > 1e-3


@kinds
def test_decoding_equals_the_whole_pass(kind):
    model, apply, variables = setup(kind)
    whole, _ = logits(apply, variables)
    state, steps = model.initial_state(B, capacity=T), []
    for t in range(T):  # no reset: a state that has seen no token is enough
        step, state = logits(apply, variables, TOKENS[:, t:t + 1], state)
        steps.append(step)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, rtol=1e-4, atol=1e-5)


@kinds
def test_a_reset_begins_again_from_the_learned_state(kind):
    _, apply, variables = setup(kind)
    whole, used = logits(apply, variables)
    fresh = jnp.zeros((B, T), bool).at[1, 0].set(True)
    again, _ = logits(apply, variables, state=used, reset=fresh)
    np.testing.assert_allclose(again[1], whole[1], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(again[0] - whole[0]).max()) > 1e-3


@pytest.mark.parametrize("kind", [pytest.param("rwkv7", marks=pytest.mark.slow), "min_gru"])
def test_scanned_and_unrolled_agree(kind):
    (_, a, variables), (_, b, _) = setup(kind), setup(kind, scan=False)
    np.testing.assert_allclose(logits(a, variables)[0], logits(b, variables)[0], rtol=1e-5, atol=1e-5)


def test_a_document_inside_a_row_gives_nan_there_and_a_padding_tail_does_not():
    _, apply, variables = setup("min_gru")
    whole, _ = logits(apply, variables)
    reset = jnp.zeros((B, T), bool).at[:, 0].set(True).at[:, 8].set(True)
    weights = jnp.ones((B, T), bool).at[1, 8:].set(False)
    got, after = logits(apply, variables, reset=reset, weights=weights)
    assert bool(jnp.isnan(got[0]).all())
    np.testing.assert_allclose(got[1, :8], whole[1, :8], rtol=1e-5, atol=1e-5)
    first, _ = logits(apply, variables, TOKENS, after)  # the padding's reset: row 1 begins a document now
    np.testing.assert_allclose(first[1], whole[1], rtol=1e-5, atol=1e-5)


def test_before_training_nothing_changes():
    model, apply, variables = setup("min_gru")
    untrained = {"params": variables["params"], "state": init_states(model)}
    np.testing.assert_allclose(logits(apply, untrained)[0], logits(apply, {"params": variables["params"]})[0],
                               rtol=1e-5, atol=1e-5)


def test_every_learned_array_has_a_gradient():
    """Also RWKV-4's, whose empty average has no weight of its own, before anything is trained."""
    for kind in ("rwkv4", "min_gru"):
        model, apply, variables = setup(kind)
        def loss(state, apply=apply, params=variables["params"]):
            return jnp.mean(jnp.square(logits(apply, {"params": params, "state": state})[0]))
        grads = named_leaves(jax.jit(jax.grad(loss))(init_states(model)))
        assert grads and all(float(jnp.abs(g).max()) > 0 for g in grads.values())


def test_names_and_shapes():
    model = build_model({**BASE, **KINDS["rwkv7"]}, VOCAB)
    assert {name: leaf.shape for name, leaf in named_leaves({"state": init_states(model)}).items()} == {
        "state/stack/prefix_0/first/wkv": (2, 8, 8), "state/stack/pattern_0/rwkv7/wkv": (2, 2, 8, 8)}


def test_a_model_without_recurrent_layers_is_refused():
    with pytest.raises(ValueError, match=r"this model has none; use train\.lora_rank"):
        init_states(build_model(dict(embed_dim=D, num_layers=1, attention=dict(num_heads=2)), VOCAB))
