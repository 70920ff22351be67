"""Every implementation of the attention operation against a numpy loop, and what a user of it relies on."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.sharding import make_mesh
from lm.layers.attention_op import cudnn, dispatch, dot_product_attention, halving, reach, reference, splash
from lm.layers.attention_op.blocked import attend_with_logsumexp
from lm.layers.attention_op.ring import merge
from lm.layers.attention_op.visibility import Visibility


def oracle(q, k, v, sees, scale):
    """Attention one query at a time in float64; `sees(b, i, j)` says which keys count."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        keys = [j for j in range(k.shape[1]) if sees(b, i, j)]
        if keys:
            scores = scale * (k[b, keys, h // group].astype(float) @ q[b, i, h])
            weights = np.exp(scores - scores.max())
            out[b, i, h] = weights @ v[b, keys, h // group] / weights.sum()
    return out


def arrays(batch=2, tokens=300, heads=4, groups=2, dim=8, keys=None, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, tokens, heads, dim), *[(batch, keys or tokens, groups, dim)] * 2]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def documents(batch, tokens, seed=0):
    """Numbers in no order, some negative: what is seen must not depend on rows being packed in order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-1, 3, (batch, tokens)), jnp.int32)


def gradients(implementation, q, k, v, **kwargs):
    def loss(q, k, v):
        out = dot_product_attention(q, k, v, implementation=implementation, **kwargs)
        return (jnp.sin(out.astype(jnp.float32)) * jnp.arange(out.shape[1])[:, None, None] / out.shape[1]).mean()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)


@pytest.mark.oracle
@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("tokens, heads, groups", [(1, 2, 2), (150, 4, 2), (129, 3, 1)])
@pytest.mark.parametrize("window", [None, 1, 60])
@pytest.mark.parametrize("with_documents", [False, True])
def test_aligned_attention_equals_a_loop(implementation, tokens, heads, groups, window, with_documents):
    q, k, v = arrays(2, tokens, heads, groups)
    docs = documents(2, tokens) if with_documents else None

    def sees(b, i, j):
        same = docs is None or (docs[b, i] == docs[b, j] and docs[b, j] >= 0)
        return same and j <= i and (window is None or i - j < window)

    docs = None if docs is None else np.asarray(docs)
    out = dot_product_attention(q, k, v, q_documents=docs, k_documents=docs, window=window, scale=0.7, aligned=True,
                                implementation=implementation)
    np.testing.assert_allclose(out, oracle(*map(np.asarray, (q, k, v)), sees, 0.7), atol=2e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("tokens", [7, 1])
@pytest.mark.parametrize("window", [None, 5])
def test_a_cache_in_any_slot_order_equals_a_loop(implementation, tokens, window):
    q, k, v = arrays(2, tokens, 4, 2, keys=33)
    rng = np.random.default_rng(1)
    k_positions = np.stack([rng.permutation(33) for _ in range(2)]).astype(np.int32)
    q_positions = np.array([np.arange(20, 20 + tokens), np.arange(9, 9 + tokens)], np.int32)
    k_documents, q_documents = np.asarray(documents(2, 33)), np.asarray(documents(2, 7, seed=2))[:, :tokens]

    def sees(b, i, j):
        distance = q_positions[b, i] - k_positions[b, j]
        same = k_documents[b, j] == q_documents[b, i] and k_documents[b, j] >= 0
        return same and distance >= 0 and (window is None or distance < window)

    out = dot_product_attention(q, k, v, q_positions=q_positions, k_positions=k_positions, q_documents=q_documents,
                                k_documents=k_documents, window=window, aligned=False, implementation=implementation)
    np.testing.assert_allclose(out, oracle(*map(np.asarray, (q, k, v)), sees, 8 ** -0.5), atol=2e-6)


@pytest.mark.parametrize("tokens, groups, window, with_documents", [
    (300, 2, None, False), (513, 4, None, True), (300, 1, 70, True), (1, 2, None, False), (140, 2, 200, False)])
def test_blocked_gradients_equal_those_of_the_formula(tokens, groups, window, with_documents):
    q, k, v = arrays(2, tokens, 4, groups)
    docs = documents(2, tokens) if with_documents else None
    kwargs = dict(q_documents=docs, k_documents=docs, window=window, aligned=True)
    for one, two in zip(jax.tree.leaves(gradients("reference", q, k, v, **kwargs)),
                        jax.tree.leaves(gradients("blocked", q, k, v, **kwargs)), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6 * max(1.0, float(abs(one).max())))


def packed(rows, tokens):
    """Document numbers [B, T] of rows whose documents are so long, and padding behind them (-1 for keys)."""
    queries, keys = np.zeros((len(rows), tokens), np.int32), np.full((len(rows), tokens), -1, np.int32)
    for row, lengths in enumerate(rows):
        for number, at in enumerate(np.cumsum([0, *lengths])):
            queries[row, at:] = number
        keys[row, :sum(lengths)] = queries[row, :sum(lengths)]
    return queries, keys


LAYOUTS = {"one": [[512]], "halves": [[256, 256]], "crossing": [[250, 262]], "short": [[60] * 8], "pair": [[130, 140]],
           "rows differ": [[256, 256], [40, 470]], "uneven": [[100, 300, 50]], "padding": [[5]]}


@pytest.mark.parametrize("tokens", [512, 500])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_corners_hold_all_that_documents_see_and_no_more(layout, tokens):
    """Against a loop over pairs of positions, for T on and off the blocks."""
    queries, keys = packed([[min(n, tokens) for n in row] for row in LAYOUTS[layout]], tokens)
    widths, block = (64, 128, 256), 64
    filled = (np.pad(x, ((0, 0), (0, 512 - tokens))) for x in (queries, keys))
    found = np.asarray(reach.corners(*filled, widths, block, tokens))
    for row, (q, k) in enumerate(zip(queries, keys, strict=True)):
        for level, width in enumerate(widths):
            need = 0
            for middle in range(width, 512, 2 * width):
                late, early = q[middle:middle + width], k[middle - width:middle]
                i, j = np.nonzero((late[:, None] == early) & (early >= 0))
                need = max([need, *(i + 1), *(width - j)])
            sizes = reach.sizes(width, block)
            assert sizes[found[row, level]] == min(size for size in sizes if size >= need), (row, width, need)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_equal_the_formula(layout, monkeypatch):
    """Values and gradients where corners of several sizes are computed, forced small blocks."""
    monkeypatch.setattr(halving, "BLOCK", 32)
    tokens = 500 if layout == "uneven" else 512
    queries, keys = packed(LAYOUTS[layout], tokens)
    q, k, v = arrays(len(queries), tokens, 2, 1)
    kwargs = dict(q_documents=jnp.asarray(queries), k_documents=jnp.asarray(keys), aligned=True)
    for one, two in zip(jax.tree.leaves(gradients("reference", q, k, v, **kwargs)),
                        jax.tree.leaves(gradients("blocked", q, k, v, **kwargs)), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6 * max(1.0, float(abs(one).max())))


@pytest.mark.parametrize("rows, form", [
    ([[512]], 256), ([[250, 262]], 256), ([[256, 256]], 0), ([[130, 140]], 128), ([[150, 200, 162]], 128),
    ([[200, 120, 192]], 64), ([[256, 256], [200, 120, 192]], 64), ([[256, 256], [512]], 256), ([[60] * 8], "each"),
    ([[256, 256], [60] * 8], "each"), ([[5]], "each")])
def test_few_documents_a_row_cut_the_largest_level_alone(rows, form):
    """The form that is run: the largest level alone is cut, as far as all rows allow, unless a smaller one can be."""
    queries, keys = packed(rows, 512)
    corners = reach.corners(queries, keys, (64, 128, 256), 64, 512)

    def function(largest, documents, _):
        assert (documents[2] is None) == (largest is not None)
        return jnp.asarray(-1 if largest is None else largest)

    chosen = int(halving._whole_or_corners(function, 64, (queries, keys, corners), queries))
    assert chosen == (-1 if form == "each" else form)


def test_documents_in_no_order_lose_nothing():
    """Numbers that do not ascend take more than they need: the corner then has every pair that sees each other."""
    docs = np.asarray(documents(20, 256, seed=5))
    found = np.asarray(reach.corners(docs, docs, (64, 128), 64, 256))
    assert (found == 0).all() and [reach.sizes(width, 64)[0] for width in (64, 128)] == [64, 128]


@pytest.mark.parametrize("window", [None, 150])
def test_float64_gradients_agree_to_the_last_digits(window):
    with jax.enable_x64(True):
        q, k, v = arrays(1, 200, 2, 1, dtype=np.float64)
        one, two = (gradients(name, q, k, v, window=window, aligned=True)[1] for name in ("reference", "blocked"))
        assert two[0].dtype == jnp.float64
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-16), one, two)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_query_without_keys_gives_zero_and_takes_no_gradient(implementation, window):
    q, k, v = arrays(1, 140, 2, 2)
    docs = jnp.zeros((1, 140), jnp.int32).at[:, :131].set(-1)
    kwargs = dict(q_documents=docs, k_documents=docs, window=window, aligned=True)
    out = dot_product_attention(q, k, v, implementation=implementation, **kwargs)
    assert not out[:, :131].any() and out[:, 131:].all()
    for gradient in gradients(implementation, q, k, v, **kwargs)[1]:
        assert not gradient[:, :131].any() and jnp.isfinite(gradient).all() and gradient[:, 132:].any()


@pytest.mark.parametrize("window", [None, 150])
def test_extreme_scores_stay_finite_and_right(window):
    q, k, v = arrays(1, 200, 2, 2)
    q, k = 30 * q, 30 * k
    one, two = (gradients(name, q, k, v, window=window, aligned=True) for name in ("reference", "blocked"))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(two))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-3)


@pytest.mark.parametrize("window", [None, 100])
def test_bfloat16_keeps_its_dtype_and_sums_in_float32(window):
    q, k, v = arrays(1, 200, 4, 2, dtype=jnp.bfloat16)
    out = dot_product_attention(q, k, v, window=window, aligned=True, implementation="blocked")
    exact = dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)), window=window, aligned=True,
                                  implementation="reference")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)
    assert all(g.dtype == jnp.bfloat16 for g in gradients("blocked", q, k, v, window=window, aligned=True)[1])


@pytest.mark.parametrize("window", [None, 90])
def test_works_under_vmap_remat_scan_and_a_second_derivative(window):
    q, k, v = arrays(3, 140, 2, 1)

    def loss(implementation, q):
        attend = jax.checkpoint(lambda q: dot_product_attention(q, k[:1], v[:1], window=window, aligned=True,
                                                                implementation=implementation))
        return jax.lax.scan(lambda x, _: (attend(x), None), q[None], length=2)[0].mean()

    def inner_step(implementation, q):
        return loss(implementation, q - 0.1 * jax.grad(lambda q: loss(implementation, q) * 100)(q))

    one, two = (jax.jit(jax.vmap(jax.grad(lambda q, n=name: inner_step(n, q))))(q) for name in ("reference", "blocked"))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_offset_attention_over_two_halves_merges_to_the_whole():
    q, k, v = arrays(1, 256, 2, 2)
    late = Visibility(True, 128)
    one = attend_with_logsumexp(q[:, 128:], k[:, :128], v[:, :128], late, scale=0.5)
    two = attend_with_logsumexp(q[:, 128:], k[:, 128:], v[:, 128:], Visibility(True), scale=0.5)
    whole = dot_product_attention(q, k, v, scale=0.5, aligned=True, implementation="reference")
    np.testing.assert_allclose(merge(one, two)[0], whole[:, 128:], atol=1e-6)


@pytest.mark.parametrize("sizes", [dict(data=2, context=4), dict(data=2, context=2, tensor=2), dict(data=4, tensor=2)])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("with_documents", [False, True])
def test_sharded_attention_equals_unsharded(sizes, window, with_documents):
    q, k, v = arrays(4, 64, 4, 2)
    docs = documents(4, 64) if with_documents else None
    kwargs = dict(q_documents=docs, k_documents=docs, window=window, aligned=True)
    one = gradients("reference", q, k, v, **kwargs)
    with jax.set_mesh(make_mesh(sizes)):
        two = gradients(None, q, k, v, **kwargs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, two)


def test_the_ring_holds_no_whole_score_matrix():
    q, k, v = arrays(1, 512, 2, 2)
    with jax.set_mesh(make_mesh(dict(data=2, context=4))):
        text = jax.jit(lambda *a: dot_product_attention(*a, aligned=True)).lower(q, k, v).as_text()
    assert "collective_permute" in text and "512x512" not in text


@pytest.mark.parametrize("window", [None, 200])
def test_blocked_holds_fewer_bytes_than_one_score_matrix(window):
    q, k, v = arrays(4, 1024, 4, 4)
    step = jax.jit(jax.grad(lambda *a: dot_product_attention(*a, window=window, aligned=True).sum(), (0, 1, 2)))
    temporary = step.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 4 * 1024 * 1024 * 4 / 2


@pytest.mark.parametrize("window, with_documents", [(None, False), (70, True)])
def test_the_interpreted_tpu_kernel_equals_the_formula(window, with_documents):
    q, k, v = arrays(1, 256, 4, 2, dim=64)
    docs = documents(1, 256) if with_documents else None
    see = Visibility(True, 0, window, None, None, docs, docs)

    def step(attend, **kwargs):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sin(attend(*a, see, scale=0.1, **kwargs)).mean(), (0, 1, 2)))(
            q, k, v)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(a).max())),
                 step(reference.attend), step(splash.attend, interpret=True))


def test_device_kernels_say_why_they_do_not_serve(monkeypatch):
    q, k, v = arrays(1, 200)
    for kernel in ("splash", "cudnn"):
        with pytest.raises(ValueError, match="this is cpu"):
            dot_product_attention(q, k, v, aligned=True, implementation=kernel)
    monkeypatch.setattr(splash, "platform", lambda: "tpu")
    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
    see = Visibility(True)
    assert "multiple of 128" in splash.unsupported(see, q, k)
    assert "not float32" in cudnn.unsupported(see, q, k)
    q, k, v = arrays(1, 256, dtype=jnp.bfloat16)
    assert splash.unsupported(see, q, k) is None and cudnn.unsupported(see, q, k) is None
    assert "a cache" in splash.unsupported(Visibility(False), q, k)


def test_the_choice_is_logged_once_with_the_reasons(caplog):
    dispatch._announce.cache_clear()
    q, k, v = arrays(1, 8)
    with caplog.at_level(logging.INFO, "lm.layers.attention_op"):
        for _ in range(2):
            dot_product_attention(q, k, v, aligned=True)
    assert len(caplog.messages) == 1
    assert "'blocked' on cpu" in caplog.text and "not 'ring'" in caplog.text


def test_a_tuple_is_tried_in_turn_and_a_name_is_that_or_an_error():
    q, k, v = arrays(1, 8)
    assert dispatch.choose(q, k, Visibility(True), ("ring", "reference")) == "reference"
    with pytest.raises(ValueError, match="context is 1"):
        dot_product_attention(q, k, v, aligned=True, implementation="ring")
    with pytest.raises(ValueError, match="did you mean 'blocked'"):
        dot_product_attention(q, k, v, aligned=True, implementation="bloked")


@pytest.mark.parametrize("change, message", [
    (dict(k=(1, 9, 2, 8), v=(1, 9, 2, 8)), "as many keys as queries"),
    (dict(q=(1, 8, 3, 8)), "multiple of key-value heads"),
    (dict(v=(1, 8, 2, 4)), "k and v"),
    (dict(q=(2, 8, 4, 8)), "agree in batch"),
    (dict(aligned=False), "q_positions"),
    (dict(q_documents=np.zeros((1, 8), np.int32)), "give both"),
    (dict(window=0), "at least 1")])
def test_arguments_that_do_not_fit_are_refused(change, message):
    given = dict(q=(1, 8, 4, 8), k=(1, 8, 2, 8), v=(1, 8, 2, 8), aligned=True) | change
    q, k, v = (jnp.zeros(given.pop(name)) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        dot_product_attention(q, k, v, **given)
