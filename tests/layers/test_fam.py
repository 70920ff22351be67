"""TransformerFAM: against its paper's loop over blocks, and the properties that the paper states or implies.

Shapes: B batch, T time, D embed_dim.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fam_by_blocks import hidden as by_blocks

from lm.core.sharding import make_mesh
from lm.layers import feedback
from lm.models.build import abstract_params, build_model, check_mesh, init_params, make_apply
from lm.models.decoder import moved

B, T, D, HEADS, VOCAB = 2, 24, 16, 2, 24
SLOW = pytest.mark.slow


def config(layers=2, kind="fam", scan=True, **fields):
    own = dict(slots=2, **fields) if kind == "fam" and "slots" not in fields else fields
    return dict(embed_dim=D, num_layers=layers, pattern=("fam/mlp",), dtype="float32", scan=scan, vocab_multiple=1,
                tie_embeddings=False, embed_std=1.0, mlp=dict(mlp_dim=24),
                fam=dict(kind=kind, num_heads=HEADS, **{"block": 4, "memory": 1, **own}))


@functools.cache
def built(layers=2, kind="fam", scan=True, **fields):
    """(model, variables) with every parameter moved off its initial value."""
    model = build_model(config(layers, kind, scan, **fields), VOCAB)
    params = init_params(model, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return model, jax.tree.unflatten(tree, [a + 0.1 * jax.random.normal(k, a.shape)
                                            for a, k in zip(leaves, keys, strict=True)])


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (B, T))




def run(model, params, tokens=TOKENS, **given):
    return jax.jit(lambda params, tokens: make_apply(model)(params, tokens, **given).hidden)(params, tokens)


def documents(*starts):
    return jnp.zeros((B, T), bool).at[:, jnp.array([0, *starts])].set(True)


def oracle(params, tokens, starts=(), **given):
    """`by_blocks` on each document, and the final norm."""
    float64 = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    stacked = float64["stack"]["pattern_0"]
    layers = [jax.tree.map(lambda a, n=n: a[n], stacked) for n in range(len(stacked["norm0"]["scale"]))]
    x = float64["embed"]["embedding"][tokens]
    cuts = [0, *starts, len(tokens)]
    out = np.concatenate([by_blocks(layers, float64["memory"]["embedding"], x[a:b], heads=HEADS, **given)[0]
                          for a, b in itertools.pairwise(cuts)])
    return out / np.sqrt(np.mean(out * out, -1, keepdims=True) + 1e-6) * float64["final_norm"]["scale"]


@pytest.mark.parametrize("block, memory, slots, slot_position, starts", [
    (4, 1, 2, "last", (9, 11)),
    *(pytest.param(*case, marks=SLOW) for case in (
        (4, 1, 2, "last", ()),
        (4, 1, 2, "zero", (9,)), (5, 0, 3, "last", ()), (3, 2, 5, "last", (7,)), (1, 1, 1, "last", (5,)),
        (24, 1, 2, "last", ()), (30, 1, 2, "last", (6,))))])
def test_equals_the_loop_of_the_paper(block, memory, slots, slot_position, starts):
    model, params = built(3 if not starts else 2, block=block, memory=memory, slots=slots, slot_position=slot_position)
    got = run(model, params, reset=documents(*starts))
    for row in range(B):
        want = oracle(params, TOKENS[row], starts, block=block, memory=memory, slot_position=slot_position)
        np.testing.assert_allclose(got[row], want, rtol=2e-4, atol=2e-4)


def as_bswa(params):
    return {"params": {name: tree for name, tree in params["params"].items() if name != "memory"}}


@SLOW
def test_without_slots_it_is_block_sliding_window_attention():
    model, params = built(slots=0)
    assert "memory" not in params["params"]
    np.testing.assert_array_equal(run(model, params), run(built(kind="bswa")[0], params))


def test_tokens_that_do_not_see_the_memory_are_those_of_block_sliding_window_attention(monkeypatch):
    model, params = built()
    want = run(built(kind="bswa")[0], as_bswa(params))
    assert np.abs(run(model, params) - want).max() > 1e-2
    columns = feedback.columns
    monkeypatch.setattr(feedback, "columns", lambda *a: (lambda c: c._replace(seen=c.seen & False))(columns(*a)))
    np.testing.assert_allclose(run(model, params), want, rtol=1e-5, atol=1e-5)


def memories(monkeypatch, model, params, tokens):
    """[layer][chunk] the memory after each chunk, as the recurrence makes it."""
    found, over = [], feedback.over_chunks
    monkeypatch.setattr(feedback, "over_chunks", lambda *a: (lambda out: found.append(out[1].slots) or out)(over(*a)))

    def one(params, tokens):
        found.clear()
        out = make_apply(model)(params, tokens).hidden
        return out, list(found)

    return jax.jit(one)(params, tokens)


@pytest.mark.parametrize("at", [2, pytest.param(13, marks=SLOW)])
def test_what_comes_changes_neither_outputs_nor_memories_before(monkeypatch, at):
    """Also inside the first block, whose memory flows up through the layers before the block has ended."""
    model, params = built(scan=False)
    other = TOKENS.copy()
    other[:, at] = (other[:, at] + 1) % VOCAB
    (y, before), (y_other, after) = (memories(monkeypatch, model, params, t) for t in (TOKENS, other))
    np.testing.assert_array_equal(y[:, :at], y_other[:, :at])
    assert len(before) == 2
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:at // 4], b[:at // 4])
        assert np.abs(a - b)[at // 4:].max() > 1e-4


def test_gradients_reach_the_first_block_from_any_other():
    """Where block sliding-window attention of one layer and no memory segments would see its own block alone."""
    model, params = built(layers=1, memory=0)

    @jax.jit
    def size(params):
        def at(table, t):  # each position has a row of the table of its own
            given = {"params": {**params["params"], "embed": {"embedding": table}}}
            return jnp.sum(make_apply(model)(given, jnp.arange(T)[None]).hidden[0, t])
        table = params["params"]["embed"]["embedding"]
        return jax.vmap(lambda t: jnp.abs(jax.grad(at)(table, t))[:4].max())(jnp.arange(3, T, 4))

    assert (np.asarray(size(params)) > 0).all()


@pytest.mark.parametrize("pieces", [(9, 1, 14), *(pytest.param(p, marks=SLOW) for p in (
    (1,) * T, (4,) * 6, (3, 10, 11), (8, 16)))])
@pytest.mark.parametrize("starts", [(6,), pytest.param((5, 6, 17), marks=SLOW)])
def test_pieces_equal_the_whole_with_a_constant_state(pieces, starts):
    model, params = built()
    reset, apply = documents(*starts), jax.jit(make_apply(model))
    state, outs, start = model.initial_state(B, capacity=1 << 20), [], 0
    sizes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert state.stack.pattern[0].keys.shape[:3] == (2, B, 8)
    for size in pieces:
        at = slice(start, start + size)
        out = apply(params, jnp.asarray(TOKENS)[:, at], state, reset=reset[:, at])
        outs, state, start = [*outs, out.hidden], out.state, start + size
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == sizes
    np.testing.assert_allclose(jnp.concatenate(outs, 1), run(model, params, reset=reset), rtol=1e-4, atol=1e-4)


@SLOW
@pytest.mark.parametrize("position, moves", [("last", False), ("zero", True)])
def test_an_offset_of_all_positions(position, moves):
    """Over the last positions of its block the memory stands where any attention is relative; at 0 it does not."""
    model, params = built(slot_position=position)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    plain, moved_on = (run(model, params, positions=positions + offset) for offset in (0, 500))
    difference = np.abs(plain - moved_on).max()
    assert difference > 1e-2 if moves else difference < 2e-3


def test_the_scale_of_the_learned_start_does_not_matter(monkeypatch):
    """It is normed where it is read, and the first update adds to zero."""
    model, params = built()
    start = params["params"]["memory"]["embedding"]
    scaled = {"params": {**params["params"], "memory": {"embedding": 7 * start}}}
    want = run(model, params)
    np.testing.assert_allclose(run(model, scaled), want, rtol=1e-4, atol=1e-4)
    other = {"params": {**params["params"], "memory": {"embedding": start[::-1] + 1}}}
    assert np.abs(run(model, other) - want).max() > 1e-3

    update = feedback.update  # with the start as the residual it would matter
    def added(memory, flow, chunk, *rest):
        new = chunk.document != memory.document
        slots = jnp.where(new[:, None, None], flow.slots, memory.slots)
        known = feedback.chosen(new, flow, memory)._replace(slots=slots)
        return feedback.chosen(chunk.here, update(known, flow, chunk, *rest), memory)
    monkeypatch.setattr(feedback, "update", added)
    assert np.abs(run(model, scaled) - run(model, params)).max() > 1e-3


def test_the_memory_adds_no_weights_but_the_learned_start():
    names = lambda model: {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(abstract_params(model))}
    more = names(built()[0]) - names(built(kind="bswa")[0])
    assert len(more) == 1 and "memory" in more.pop()


@pytest.mark.parametrize("fields", [dict(memory=0, slots=0), *(pytest.param(fields, marks=SLOW) for fields in (
    dict(memory=0), dict(slots=0)))])
def test_no_memory_and_no_slots_are_defined_for_any_length(fields):
    """A row that is no multiple of the block is the beginning of one that is."""
    model, params = built(**fields)
    whole = run(model, params)
    for length in (1, 22):
        np.testing.assert_allclose(run(model, params, TOKENS[:, :length]), whole[:, :length], rtol=1e-5, atol=1e-5)


@SLOW
@pytest.mark.parametrize("cut", ["document", "row"])
def test_no_document_sees_another_however_blocks_are_cut(cut):
    model, params = built(cut=cut)
    other = TOKENS.copy()
    other[:, :9] = (other[:, :9] + 1) % VOCAB
    a, b = (run(model, params, tokens, reset=documents(9)) for tokens in (TOKENS, other))
    np.testing.assert_array_equal(a[:, 9:], b[:, 9:])
    assert np.abs(a - b)[:, 0].max() > 1e-3


@SLOW
def test_cut_by_the_row_equals_cut_by_the_document_where_it_begins_with_the_row():
    np.testing.assert_allclose(run(built(cut="row")[0], built()[1]), run(*built()), rtol=1e-5, atol=1e-5)


def loss_of(model, **given):
    return lambda params: jnp.sum(make_apply(model)(params, TOKENS, **given).hidden ** 3)


@SLOW
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scanned_layers_and_remat_give_the_same_gradients(dtype):
    want = jax.jit(jax.value_and_grad(loss_of(built(scan=False)[0])))(built()[1])
    model = build_model({**config(), "remat": "full", "dtype": dtype}, VOCAB)
    got = jax.jit(jax.value_and_grad(loss_of(model)))(built()[1])
    if dtype == "float32":
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), got, want)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(got))


@SLOW
def test_eight_devices_compute_the_same_values_and_gradients():
    model, params = built(layers=2)
    tokens = np.concatenate([TOKENS, TOKENS[::-1]])
    def outcome(params):
        return jax.value_and_grad(lambda p: jnp.mean(make_apply(model)(p, tokens).hidden ** 3))(params)
    want = jax.jit(outcome)(params)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        got = jax.jit(outcome)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_a_mesh_that_splits_the_sequence_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="its memory of a block needs that of the block before"):
        check_mesh(built()[0], {"context": 2})
    check_mesh(built(kind="bswa")[0], {"context": 2})
    check_mesh(built(slots=0)[0], {"context": 2})


@pytest.mark.parametrize("pattern, message", [
    (("fam",), "one channel mixer, such as 'fam/mlp'; got 'fam'"), (("fam/mlp/mlp",), "got 'fam/mlp/mlp'"),
    (("mlp/fam",), "got 'mlp/fam'"), (("fam/channel_mix",), "passes through 'channel_mix'"),
    (("fam/bswa",), "that layer mixes positions")])
def test_blocks_that_cannot_be_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        build_model({**config(), "pattern": pattern}, VOCAB)


def test_fam_layers_of_two_sizes_are_refused():
    model = build_model({**config(layers=2), "pattern": ("fam/mlp", "wide/mlp"), "wide": dict(
        kind="fam", num_heads=HEADS, block=8, slots=2)}, VOCAB)
    with pytest.raises(ValueError, match="must agree in block and slots; got block=4, slots=2, block=8, slots=2"):
        init_params(model, jax.random.key(0))


def test_random_positions_move_half_of_the_rows_in_training_alone():
    positions = jnp.broadcast_to(jnp.arange(5), (400, 5))
    np.testing.assert_array_equal(moved(positions, 1000, None), positions)
    offset = np.asarray(moved(positions, 1000, jax.random.key(3)) - positions)
    assert (offset == offset[:, :1]).all() and offset.min() >= 0 and 900 < offset.max() < 1000
    assert 0.4 < (offset[:, 0] == 0).mean() < 0.6
