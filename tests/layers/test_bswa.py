"""Block sliding-window attention: who sees whom, by a loop; where gradients flow; every implementation alike.

Shapes: B batch, T time, D embed_dim, H heads, K head_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.core.sharding import make_mesh
from lm.core.types import Context, context
from lm.layers.attention import Attention
from lm.layers.attention_op import splash
from lm.layers.block_sliding import bands, dispatch
from lm.layers.bswa import BSWA
from lm.models.build import build_model, init_params, make_apply

B, T, D, H, K = 2, 24, 16, 2, 8


@functools.cache
def inputs(seed=0, length=T):
    x = jax.random.normal(jax.random.key(seed), (B, length, D))
    layer = BSWA(num_heads=H)
    init = jax.jit(lambda: layer.init(jax.random.key(1), x, layer.initial_state(B, D, x.dtype), context(B, length)))
    return nn.meta.unbox(init()), x


def documents(*starts: int, length: int = T) -> Context:
    reset = jnp.zeros((B, length), bool).at[:, jnp.array([0, *starts])].set(True)
    index = jnp.arange(length)
    return context(B, length)._replace(
        reset=reset, positions=(index - jax.lax.cummax(jnp.where(reset, index, 0), axis=1)).astype(jnp.int32))


def run(layer, x, ctx, variables=None, capacity=0):
    state = layer.initial_state(len(x), D, x.dtype, capacity=capacity)
    return jax.jit(layer.apply)(inputs()[0] if variables is None else variables, x, state, ctx)[0]


def by_loop(x, ctx, block, memory, cut, same_reach):
    """One query at a time, in float64, from the definition."""
    kernels = jax.tree.map(lambda a: np.asarray(a, np.float64), inputs()[0]["params"])
    x, positions, reset = np.asarray(x, np.float64), np.asarray(ctx.positions), np.asarray(ctx.reset)
    out = np.zeros_like(x)

    def rotated(vector, position):
        half = K // 2
        z = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag])

    for b in range(len(x)):
        starts = [max(s for s in range(t + 1) if reset[b, s]) for t in range(x.shape[1])]
        for t in range(x.shape[1]):
            origin = starts[t] if cut == "document" else 0
            mine = (t - origin) // block
            seen = []
            for s in range(t + 1):
                near = t - s <= memory * block if same_reach else mine - (s - origin) // block <= memory
                if starts[s] == starts[t] and ((s - origin) // block == mine or near):
                    seen.append(s)
            heads = []
            for h in range(H):
                part = slice(h * K, (h + 1) * K)
                project = lambda name, s, part=part, b=b: x[b, s] @ kernels[name]["kernel"][:, part]
                q = rotated(project("query", t), positions[b, t])
                scores = np.array([q @ rotated(project("key", s), positions[b, s]) for s in seen]) / np.sqrt(K)
                weights = np.exp(scores - scores.max())
                heads.append(weights / weights.sum() @ np.array([project("value", s) for s in seen]))
            out[b, t] = np.concatenate(heads) @ kernels["out"]["kernel"]
    return out


SLOW = pytest.mark.slow


@pytest.mark.parametrize("block, memory, cut, same_reach", [
    (5, 2, "document", False), (4, 1, "row", True), *(pytest.param(c, m, cut, same, marks=SLOW) for c, m in (
        (4, 1), (5, 2), (7, 0)) for cut in ("document", "row") for same in (False, True))])
def test_equals_the_loop_of_the_definition(block, memory, cut, same_reach):
    x, ctx = inputs()[1], documents(9, 11)
    layer = BSWA(num_heads=H, block=block, memory=memory, cut=cut, same_reach=same_reach)
    want = by_loop(x, ctx, block, memory, cut, same_reach)
    np.testing.assert_allclose(run(layer, x, ctx), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("fields", [
    dict(block=4, memory=6), *(pytest.param(fields, marks=SLOW) for fields in (
        dict(block=24, memory=0), dict(block=100, memory=3), dict(block=5, memory=9, cut="row")))])
def test_a_window_over_everything_is_causal_attention(fields):
    x, ctx = inputs()[1], documents(9)
    np.testing.assert_allclose(run(BSWA(num_heads=H, **fields), x, ctx), run(Attention(num_heads=H), x, ctx),
                               rtol=1e-5, atol=1e-5)


@SLOW
def test_the_mask_of_transformer_xl_differs_inside_the_oldest_segment_alone():
    x, block, memory = inputs()[1], 4, 2
    def reach(layer):
        """[T, T] whether the output at t depends on the input at s."""
        f = lambda x: run(layer, x[None], context(1, T))[0].sum(-1)
        return np.abs(np.asarray(jax.jacrev(f)(x[0]))).max(-1) > 0
    whole, sliding = (reach(BSWA(num_heads=H, block=block, memory=memory, same_reach=same)) for same in (False, True))
    query, key = np.nonzero(whole != sliding)
    assert len(query) and set(query // block - key // block) == {memory}
    assert (whole | ~sliding).all()


def test_gradients_reach_as_far_as_layers_times_memory_and_no_further():
    block, memory, layers = 4, 1, 2
    model = build_model(dict(embed_dim=D, num_layers=layers, pattern=("bswa/mlp",), dtype="float32", vocab_multiple=1,
                             tie_embeddings=False, bswa=dict(num_heads=H, block=block, memory=memory)), T)
    params = init_params(model, jax.random.key(0))
    table = params["params"]["embed"]["embedding"]

    @jax.jit
    def gradient(rows):
        def last(rows):  # each position has a row of the table of its own
            given = {"params": {**params["params"], "embed": {"embedding": rows}}}
            return jnp.sum(make_apply(model)(given, jnp.arange(T)[None]).hidden[0, -1])
        return jax.grad(last)(rows)

    size = np.abs(np.asarray(gradient(table))).max(-1).reshape(-1, block).max(-1)
    assert (size[-1 - layers * memory:] > 0).all() and (size[:-1 - layers * memory] == 0).all()


@pytest.mark.parametrize("stop", [True, pytest.param(False, marks=SLOW)])
def test_stop_gradient_lets_none_into_earlier_blocks(stop):
    x, layer = inputs()[1], BSWA(num_heads=H, block=4, memory=2, stop_gradient=stop)
    plain = BSWA(num_heads=H, block=4, memory=2)
    np.testing.assert_allclose(run(layer, x, context(B, T)), run(plain, x, context(B, T)), rtol=1e-6, atol=1e-6)
    out = lambda x: jnp.sum(run(layer, x, context(B, T))[:, 14:16] ** 2)
    size = np.abs(np.asarray(jax.grad(out)(x))).max((0, 2))
    assert (size[12:16] > 0).all() and (size[16:] == 0).all() and (size[:4] == 0).all()
    assert (size[4:12] == 0).all() if stop else (size[4:12] > 0).all()


@SLOW
def test_an_offset_of_all_positions_changes_nothing():
    x, layer, ctx = inputs()[1], BSWA(num_heads=H, block=4, memory=1), context(B, T)
    moved = ctx._replace(positions=ctx.positions + 1000)
    np.testing.assert_allclose(run(layer, x, moved), run(layer, x, ctx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", ["document", pytest.param("row", marks=SLOW)])
@pytest.mark.parametrize("pieces", [(9, 1, 14), *(pytest.param(p, marks=SLOW) for p in (
    (24,), (4, 4, 4, 4, 4, 4), (3, 10, 11)))])
def test_the_state_is_constant_and_pieces_equal_the_whole(cut, pieces):
    x, ctx = inputs()[1], documents(6)
    layer = BSWA(num_heads=H, block=4, memory=1, cut=cut)
    state = layer.initial_state(B, D, x.dtype, capacity=1 << 20)
    assert state.keys.shape[1] == 8
    outs, start = [], 0
    for size in pieces:
        at = slice(start, start + size)
        inner = ctx._replace(reset=ctx.reset[:, at], positions=ctx.positions[:, at], weights=ctx.weights[:, at])
        y, state, _ = jax.jit(layer.apply)(inputs()[0], x[:, at], state, inner)
        outs, start = [*outs, y], start + size
    np.testing.assert_allclose(jnp.concatenate(outs, 1), run(layer, x, ctx), rtol=1e-5, atol=1e-5)


def test_padding_inside_a_row_of_several_chunks_is_refused_by_nan():
    x, ctx = inputs()[1], context(B, T)
    ctx = ctx._replace(weights=ctx.weights.at[0, 5].set(False))
    y = run(BSWA(num_heads=H, block=4, memory=1), x, ctx)
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_every_implementation_computes_the_same(monkeypatch):
    x, ctx = inputs()[1], documents(9)
    ctx = ctx._replace(weights=ctx.weights.at[0, 20:].set(False))
    real = (ctx.weights != 0)[..., None]
    layer = lambda **given: BSWA(num_heads=H, block=4, memory=1, **given)

    def both(layer):
        out = lambda x: jnp.sum(jnp.where(real, layer.apply(inputs()[0], x, layer.initial_state(B, D, x.dtype),
                                                            ctx)[0], 0) ** 2)
        return jax.jit(jax.value_and_grad(out))(x)

    want = both(layer(implementation="reference"))
    close = lambda got: jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
    close(both(layer(implementation="xla")))
    monkeypatch.setattr(bands, "SCORES", 1)  # a loop over chunks
    close(both(layer(implementation="xla")))
    # What cuDNN is given, computed without it.
    monkeypatch.setattr(dispatch, "_not_cudnn", lambda *_: None)
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention",
                        lambda *a, implementation, **k: plain(*a, implementation="xla", **k))
    close(both(layer(implementation="cudnn")))


def test_implementations_that_cannot_serve_say_why():
    x = inputs()[1]
    with pytest.raises(ValueError, match="not 'splash': it is a TPU kernel and this is cpu"):
        run(BSWA(num_heads=H, implementation="splash"), x, context(B, T))
    with pytest.raises(ValueError, match="no implementation 'spash'; did you mean 'splash'"):
        run(BSWA(num_heads=H, implementation="spash"), x, context(B, T))


@SLOW
@pytest.mark.parametrize("memory", [0, 1])
def test_splash_with_its_block_mask_equals_the_reference(memory):
    """The TPU kernel in interpret mode, with documents and padding, blocks cut by the row."""
    length, dim = 512, 64
    q, k, v = (jax.random.normal(jax.random.key(i), (1, length, 2, dim)) for i in range(3))
    index = jnp.arange(length)[None]
    document = (index >= 150).astype(jnp.int32)
    empty = jnp.where(index < 480, document, -1)
    own = index - index % 96
    queries = bands.Queries(q, index, document, own - memory * 96, own)
    keys = bands.Keys(k, v, index, empty)
    past = jax.tree.map(lambda x: x[:, :0], keys)

    def outcome(f):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.where(
            (index < 480)[..., None, None], f(q, k, v), 0) ** 2), argnums=(0, 1, 2)))(q, k, v)

    want = outcome(lambda q, k, v: dispatch.block_sliding_attention(
        queries._replace(queries=q), keys._replace(keys=k, values=v), past, block=96, behind=memory,
        implementation="reference"))
    got = outcome(lambda q, k, v: splash.attend_blocks(q, k, v, (document, empty), (96, memory), interpret=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), got, want)


@pytest.mark.parametrize("axes, block, memory, cut", [
    (dict(context=2, data=2, tensor=2), 5, 1, "row"), *(pytest.param(*case, marks=SLOW) for case in (
        (dict(context=4), 5, 2, "document"), (dict(context=4), 3, 1, "row"), (dict(context=8), 4, 3, "document")))])
def test_time_split_over_devices_fetches_what_it_looks_back_to(axes, block, memory, cut):
    x, ctx = inputs()[1], documents(9)
    layer = BSWA(num_heads=H, block=block, memory=memory, cut=cut)

    def outcome(variables, x):
        out = lambda variables, x: jnp.sum(
            layer.apply(variables, x, layer.initial_state(B, D, x.dtype), ctx)[0] ** 2)
        return jax.value_and_grad(out, argnums=(0, 1))(variables, x)

    want = jax.jit(outcome)(inputs()[0], x)
    size = int(np.prod(list(axes.values())))
    with jax.set_mesh(make_mesh(axes, devices=jax.devices()[:size])):
        got = jax.jit(outcome)(inputs()[0], x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_pieces_on_devices_that_split_time_see_the_ring():
    x, layer = inputs()[1][:1], BSWA(num_heads=H, block=4, memory=1)

    def pieces(variables, x):
        state, outs = layer.initial_state(1, D, x.dtype, capacity=64), []
        for start in (0, T // 2):
            y, state, _ = layer.apply(variables, x[:, start:start + T // 2], state, context(1, T // 2, start=start))
            outs.append(y)
        return jnp.concatenate(outs, axis=1)

    want = jax.jit(pieces)(inputs()[0], x)
    with jax.set_mesh(make_mesh(dict(context=2), devices=jax.devices()[:2])):
        got = jax.jit(pieces)(inputs()[0], x)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("memory", [0, 3])
def test_the_layer_gives_splash_its_rows_without_a_ring(memory, monkeypatch):
    taken = []
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    monkeypatch.setattr(dispatch.splash, "attend_blocks", lambda q, k, v, documents, mask: taken.append(mask) or q)
    layer, x = BSWA(num_heads=H, block=96, memory=memory, cut="row"), jnp.zeros((1, 512, D))
    jax.eval_shape(lambda x: layer.init_with_output(jax.random.key(0), x, layer.initial_state(1, D, x.dtype),
                                                    context(1, 512)), x)
    assert taken == [(96, memory)]


def test_a_memory_beyond_the_row_costs_no_more_than_the_row():
    x, ctx = inputs()[1], documents(9)
    layer = lambda memory: BSWA(num_heads=H, block=4, memory=memory)
    np.testing.assert_allclose(run(layer(10**6), x, ctx), run(layer(T // 4), x, ctx), rtol=1e-5, atol=1e-6)


def test_fields_that_do_not_fit_are_refused():
    for fields, message in ((dict(block=0), "bswa.block=0 must be at least 1"), (dict(memory=-1), "memory=-1"),
                            (dict(block=10**9, memory=3), "window of 4000000000 tokens"),
                            (dict(num_heads=3), "does not divide"), (dict(num_heads=4, num_kv_heads=3), "must divide")):
        with pytest.raises(ValueError, match=message):
            BSWA(**{"num_heads": 2, **fields}).check(D)
