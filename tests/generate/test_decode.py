"""Generation against a full forward pass for every token, for attention, a window, a recurrence and a mesh."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.head import logits_of
from lm.core.sharding import make_mesh, shardings
from lm.core.tree import apart
from lm.core.types import Head, Output
from lm.generate import decode
from lm.generate.decode import generate
from lm.generate.loop import Loop, Plan, decode_steps
from lm.generate.sampling import GREEDY, SamplingOptions
from lm.models.build import abstract_params, build_model, init_params, make_apply

VOCAB = 50
PROMPTS = [[5, 7, 2], list(range(1, 38)), [11], [3] * 16]
FEW = {"prefill_chunk_size": 16, "steps_per_sync": 5}


@functools.cache
def decoder():
    """Full and windowed attention and a table of positions, with weights large enough for texts that vary."""
    model = build_model(dict(embed_dim=16, num_layers=2, prefix=("attention",), pattern=("local",), dtype="float32",
                             vocab_multiple=64, max_positions=64, attention=dict(num_heads=2, num_kv_heads=1),
                             local=dict(kind="attention", num_heads=2, window=9)), VOCAB)
    params = jax.tree.map(lambda leaf: leaf * 6, init_params(model, jax.random.key(3)))
    return make_apply(model), params, model.initial_state


class Memory(NamedTuple):
    h: jax.Array


@functools.cache
def recurrent():
    """h_t = tanh(h_{t-1} W + E[token]); the state has one size whatever the capacity."""
    rng = np.random.default_rng(0)
    params = {name: jnp.array(rng.normal(size=shape) * 0.8, jnp.float32)
              for name, shape in (("W", (8, 8)), ("E", (VOCAB, 8)), ("O", (VOCAB, 8)))}

    def apply(params, tokens, state=None, *, reset=None, positions=None, weights=None, key=None):
        def step(h, inputs):
            token, first, present = inputs
            new = jnp.tanh(jnp.where(first[:, None], 0, h) @ params["W"] + params["E"][token])
            h = jnp.where(present[:, None], new, h)
            return h, h

        h = jnp.zeros((tokens.shape[0], 8)) if state is None else state.h
        reset = jnp.zeros(tokens.shape, bool) if reset is None else reset
        weights = jnp.ones(tokens.shape, bool) if weights is None else weights
        h, hidden = jax.lax.scan(step, h, (tokens.T, reset.T, weights.T))
        return Output(jnp.moveaxis(hidden, 0, 1), Head(params["O"], None, VOCAB, None), Memory(h), {})

    return apply, params, lambda batch_size, *, capacity: Memory(jnp.full((batch_size, 8), 0.0))


@functools.partial(jax.jit, static_argnums=0)
def forward(apply, params, tokens):
    out = apply(params, tokens)
    return jnp.argmax(logits_of(out.hidden, out.head), axis=-1)


def oracle(apply, params, prompts, count):
    """For each prompt the most probable token after the whole text so far, `count` times."""
    # Padded on the right, which a causal model does not see, so that one shape is compiled.
    tokens = np.zeros((len(prompts), 64), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[:len(prompt)] = prompt
    rows, ends = np.arange(len(prompts)), np.array([len(prompt) for prompt in prompts])
    for n in range(count):
        tokens[rows, ends + n] = np.asarray(forward(apply, params, tokens))[rows, ends + n - 1]
    return [row[end:end + count].tolist() for row, end in zip(tokens, ends, strict=True)]


@pytest.mark.parametrize("make", [decoder, recurrent])
def test_greedy_tokens_are_the_argmax_of_a_full_forward_pass_at_each_step(make):
    """Prompts of four lengths in one batch, the longest of which fills the capacity to the last token."""
    model = make()
    out = generate(*model, PROMPTS, max_new_tokens=13, options=GREEDY, capacity=50, **FEW)
    texts = [row.tokens.tolist() for row in out.rows]
    assert texts == oracle(*model[:2], PROMPTS, 13)
    assert len({tuple(text) for text in texts}) > 1 and max(len(set(text)) for text in texts) > 3
    assert [row.finish_reason for row in out.rows] == ["length"] * 4


def test_layers_with_arrays_of_their_own_write_the_same(monkeypatch):
    """Three repeats of a pattern of two, behind a prefix: texts of stacked states, and the argmax at each step."""
    model = build_model(dict(embed_dim=16, num_layers=7, prefix=("attention",), pattern=("local", "attention/rwkv4"),
                             dtype="float32", vocab_multiple=64, attention=dict(num_heads=2, num_kv_heads=1),
                             local=dict(kind="attention", num_heads=2, window=9), rwkv4=dict()), VOCAB)
    params = jax.tree.map(lambda leaf: leaf * 3, init_params(model, jax.random.key(3)))
    apply, asked = make_apply(model), []
    texts = {}
    for form, limit in (("stacked", 2**60), ("apart", 0)):
        monkeypatch.setattr(decode, "APART_BYTES", limit)
        monkeypatch.setattr(decode, "apart", lambda state, form=form: asked.append(form) or apart(state))
        out = generate(apply, params, model.initial_state, PROMPTS, max_new_tokens=7, options=GREEDY, capacity=50,
                       **FEW)
        texts[form] = [row.tokens.tolist() for row in out.rows]
    assert asked == ["apart"] and texts["apart"] == texts["stacked"] == oracle(apply, params, PROMPTS, 7)


@pytest.mark.parametrize(("make", "options"), [
    (decoder, SamplingOptions()), (recurrent, GREEDY), (recurrent, SamplingOptions(top_k=8, repetition_penalty=1.3))])
def test_a_row_is_the_same_alone_and_in_any_batch(make, options):
    def texts(order):
        out = generate(*make(), [PROMPTS[n] for n in order], max_new_tokens=9, options=options, seed=7, rows=order,
                       **FEW)
        return dict(zip(order, [row.tokens.tolist() for row in out.rows], strict=True))

    together = texts([0, 1, 2, 3])
    assert texts([2]) == {2: together[2]}
    if make is recurrent:
        assert texts([3, 1]) == {n: together[n] for n in (3, 1)}


def test_sampling_repeats_by_seed_and_differs_by_seed_and_row():
    def texts(seed):
        out = generate(*recurrent(), [[5, 7, 2]] * 3, max_new_tokens=16, seed=seed, **FEW)
        return [tuple(row.tokens.tolist()) for row in out.rows]

    assert texts(0) == texts(0)
    assert len({*texts(0), *texts(1)}) == 6


@pytest.mark.parametrize("sizes", [(32, 1)])
def test_texts_do_not_depend_on_the_sizes_of_chunks(sizes):
    def texts(chunk, steps):
        out = generate(*recurrent(), PROMPTS, max_new_tokens=9, seed=1, prefill_chunk_size=chunk, steps_per_sync=steps)
        return [row.tokens.tolist() for row in out.rows]

    assert texts(*sizes) == texts(16, 5)


def test_repetition_penalty_counts_prompt_and_new_tokens():
    prompts = [PROMPTS[0], PROMPTS[2]]
    options = SamplingOptions(temperature=0.0, repetition_penalty=1e9)
    out = generate(*recurrent(), prompts, max_new_tokens=12, options=options, **FEW)
    for prompt, row in zip(prompts, out.rows, strict=True):
        assert len(set(row.tokens.tolist())) == 12 and not set(prompt) & set(row.tokens.tolist())


def test_a_stop_token_ends_its_row_only():
    whole = generate(*recurrent(), PROMPTS, max_new_tokens=13, options=GREEDY, **FEW)
    free = [row.tokens.tolist() for row in whole.rows]
    stop = free[1][4]
    out = generate(*recurrent(), PROMPTS, max_new_tokens=13, options=GREEDY, stop_tokens=[stop], **FEW)
    for text, row in zip(free, out.rows, strict=True):
        cut = text[:text.index(stop) + 1] if stop in text else text
        assert (row.tokens.tolist(), row.finish_reason) == (cut, "eos" if stop in text else "length")
    assert "eos" in {row.finish_reason for row in out.rows} > {"eos"}


def letters(ids):
    return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_stop_string_cuts_the_text_before_it_and_the_pieces_join_to_the_text(steps):
    free = generate(*recurrent(), PROMPTS, max_new_tokens=13, options=GREEDY, decode=letters, **FEW).rows
    stop = free[1].text[5:8]
    pieces = [""] * 4
    out = generate(*recurrent(), PROMPTS, max_new_tokens=13, options=GREEDY, decode=letters, stop_strings=[stop],
                   steps_per_sync=steps, prefill_chunk_size=16,
                   on_text=lambda row, piece: pieces.__setitem__(row, pieces[row] + piece))
    for before, row in zip(free, out.rows, strict=True):
        at = before.text.find(stop)
        assert row.text == (before.text if at < 0 else before.text[:at])
        assert row.finish_reason == ("length" if at < 0 else "stop")
        assert row.tokens.tolist() == before.tokens.tolist()[:len(row.tokens) if at < 0 else at + 3]
    assert pieces == [row.text for row in out.rows]
    assert {row.finish_reason for row in out.rows} == {"stop", "length"}


def test_the_loop_ends_when_all_rows_are_done():
    apply, params, initial_state = recurrent()
    calls = []

    def counting(params, tokens, state=None, **context):
        jax.debug.callback(lambda: calls.append(tokens.shape), ordered=True)
        return apply(params, tokens, state, **context)

    stop = oracle(apply, params, [[5]], 3)[0][1]
    out = generate(counting, params, initial_state, [[5]], max_new_tokens=200, options=GREEDY, stop_tokens=[stop],
                   steps_per_sync=64)
    jax.effects_barrier()
    assert calls == [(1, 16), *[(1, 1)] * (len(out.rows[0].tokens) - 1)] and out.rows[0].finish_reason == "eos"


def test_the_state_of_a_row_that_is_done_stays():
    apply, params, _ = recurrent()
    state = Memory(jnp.arange(24.0).reshape(3, 8))
    before, no = np.asarray(state.h), np.zeros(3, bool)
    loop = Loop(jnp.array([1, 2, 3]), jnp.array([5, 5, 5]), jnp.array([False, True, False]), jnp.array(no), None)
    plan = Plan(np.arange(3), np.array([99, 99, 99]), np.zeros(0, np.int32), jax.random.key(0))
    halted = np.array([False, False, True])
    state, loop, tokens = decode_steps(apply, params, state, loop, halted, plan, options=GREEDY, steps=3)
    np.testing.assert_array_equal((np.asarray(state.h) == before).all(axis=1), [False, True, True])
    assert loop.position.tolist() == [8, 5, 5] and (np.asarray(tokens)[1:] == -1).all()


def test_prompts_of_many_lengths_compile_few_programs():
    model, traces = recurrent(), []

    def counted(*args, **context):
        traces.append(args[1].shape)
        return model[0](*args, **context)

    for length in (1, 2, 9, 16, 17, 30, 33, 63, 64, 90):
        generate(counted, *model[1:], [[1] * length], max_new_tokens=3, prefill_chunk_size=32, capacity=128)
    assert sorted(traces) == [(1, 1), (1, 16), (1, 32)]


def test_a_mesh_gives_the_same_texts():
    model = build_model(dict(embed_dim=16, num_layers=1, pattern=("attention",), attention=dict(num_heads=2),
                             dtype="float32", vocab_multiple=64), VOCAB)
    params = jax.tree.map(lambda leaf: leaf * 6, init_params(model, jax.random.key(3)))
    apply = make_apply(model)
    alone = generate(apply, params, model.initial_state, PROMPTS, max_new_tokens=9, options=GREEDY, **FEW)
    mesh = make_mesh(dict(data=2, tensor=2), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings(abstract_params(model), mesh))
        meshed = generate(apply, split, model.initial_state, PROMPTS, max_new_tokens=9, options=GREEDY, **FEW)
    assert [r.tokens.tolist() for r in meshed.rows] == [r.tokens.tolist() for r in alone.rows]


def test_timing_counts_tokens_state_and_compilation():
    apply, params, initial_state = decoder()

    def fresh(*args, **context):
        return apply(*args, **context)

    first, again = (generate(fresh, params, initial_state, PROMPTS, max_new_tokens=6, options=GREEDY, capacity=50,
                             **FEW).timing for _ in range(2))
    assert (first.prefill_tokens, first.decode_tokens) == (57, 20)
    # Of each row: two caches, of 50 slots with one head and of 9 with two; a slot is key, value, order and document.
    # Besides two counters a cache, and the position.
    assert first.state_bytes == 4 * 4 * (50 * (2 * 8 + 2) + 9 * (4 * 8 + 2) + 2 * 2 + 1)
    assert again.compile_seconds < 0.2 * first.compile_seconds
    assert min(again.prefill_rate, again.decode_rate) > 0
    both = first + again
    assert (both.decode_tokens, both.state_bytes) == (40, first.state_bytes)


def test_a_row_longer_than_the_capacity_is_refused_before_anything_runs():
    def never(*args, **context):
        raise AssertionError("ran")

    with pytest.raises(ValueError, match=r"prompt 1 has 37 tokens, .*max_new_tokens=20 makes 57; there is room for 50.*"
                                         r"Shorten the prompt by 7, or ask for at most 13"):
        generate(never, {}, never, PROMPTS, max_new_tokens=20, capacity=50)


def test_an_empty_prompt_needs_bos():
    with pytest.raises(ValueError, match="prompt 1 is empty and there is no bos"):
        generate(*recurrent(), [[1], []], max_new_tokens=2)
    given = generate(*recurrent(), [[1], [4]], max_new_tokens=5, options=GREEDY, **FEW)
    made = generate(*recurrent(), [[1], []], max_new_tokens=5, options=GREEDY, bos=4, **FEW)
    assert made.rows[1].tokens.tolist() == given.rows[1].tokens.tolist()


@pytest.mark.parametrize(("change", "message"), [
    (dict(prompts=[]), "there is no prompt"),
    (dict(prompts=[[1.5]]), "prompt 0 must be a list of token ids"),
    (dict(prompts=[[3, -1]]), "prompt 0 must be .* with -1"),
    (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
    (dict(stop_strings=["a", ""], decode=letters), "not empty"),
    (dict(stop_strings="stop", decode=letters), "list of texts"),
    (dict(stop_strings=["a"]), "need `decode`"),
    (dict(rows=[0, 1]), "one number for each of the 1 prompts"),
    (dict(options=SamplingOptions(top_k=0)), "top_k=0"),
])
def test_arguments_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        generate(*recurrent(), **{"prompts": [[1]], "max_new_tokens": 2, **change})


def test_nan_logits_stop_with_the_row():
    apply, params, initial_state = recurrent()
    params = {**params, "E": params["E"].at[9].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="row 1 became NaN after 0 new tokens"):
        generate(apply, params, initial_state, [[1], [9]], max_new_tokens=3, options=GREEDY)
