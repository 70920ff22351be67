"""Mixtures of experts against loops over tokens and experts, and over devices against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.core.sharding import make_mesh, shardings
from lm.core.types import context
from lm.layers.experts import dispatch, grouped
from lm.layers.experts.shards import check_rows
from lm.layers.mlp import MLP
from lm.layers.moe import MoE

B, T, D = 4, 6, 16
TOKEN = MoE(num_experts=8, top_k=2, mlp_dim=12, activation="swiglu")
RAW = TOKEN.clone(renormalize=False, activation="relu2", chunk=5)
EXPERT = MoE(num_experts=8, top_k=2, mlp_dim=12, routing="expert", activation="relu2", chunk=12)


@functools.cache
def made(layer):
    """(variables off their initial values, x, context in training with two rows padded)."""
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    present = jnp.ones((B, T), bool).at[-1, 2:].set(False).at[1, 5:].set(False)
    ctx = context(B, T, key=jax.random.key(1))._replace(weights=present)
    variables = nn.meta.unbox(jax.jit(lambda: layer.init(jax.random.key(1), x, (), ctx))())
    return jax.tree.map(lambda a: a + 0.01, variables), x, ctx


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(layer, variables, x, ctx):
    """(y, accumulated weights of the experts, load balance, router z) with float64 loops."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x, present, E = np.asarray(x, np.float64), np.asarray(ctx.weights), layer.num_experts
    logits = x @ params["router"]["kernel"]
    p = softmax(logits)

    def expert(e, token):
        up = token @ params["experts_up"][e]
        if layer.activation == "swiglu":
            gate = token @ params["experts_gate"][e]
            h = gate / (1 + np.exp(-gate)) * up
        else:
            h = np.maximum(up, 0) ** 2
        return h @ params["experts_down"][e]

    chosen = []  # row, token, expert, weight
    for b in range(B):
        here = [t for t in range(T) if present[b, t]]
        if layer.routing == "expert" and ctx.key is not None:
            for e in range(E):
                best = sorted(here, key=lambda t: -p[b, t, e])[:-(-layer.top_k * len(here) // E)]
                chosen += [(b, t, e, p[b, t, e]) for t in best]
        for t in here if layer.routing == "token" or ctx.key is None else ():
            if layer.routing == "expert":
                cutoff = np.asarray(variables["stats"]["cutoff"]["mean"])
                chosen += [(b, t, e, p[b, t, e]) for e in range(E) if p[b, t, e] >= cutoff[e]]
                continue
            best = np.argsort(-p[b, t])[:layer.top_k]
            total = p[b, t, best].sum() if layer.renormalize else 1
            chosen += [(b, t, e, p[b, t, e] / total) for e in best]
    y, scores, counts = np.zeros_like(x), np.zeros(E), np.zeros(E)
    for b, t, e, g in chosen:
        y[b, t] += g * expert(e, x[b, t])
        scores[e] += g
        counts[e] += 1
    balance = E * (counts / counts.sum()) @ p[present].mean(0)
    return y, scores, balance, (np.log(np.exp(logits[present]).sum(-1)) ** 2).mean()


@pytest.mark.parametrize("layer, training", [
    pytest.param(TOKEN, True, id="token"), pytest.param(RAW, True, id="raw_chunked", marks=pytest.mark.slow),
    pytest.param(EXPERT, True, id="expert", marks=pytest.mark.slow),
    pytest.param(EXPERT, False, id="expert_by_cutoff", marks=pytest.mark.slow)])
def test_equals_a_loop_over_tokens(layer, training):
    variables, x, ctx = made(layer)
    ctx = ctx if training else ctx._replace(key=None)
    y, _, aux = jax.jit(layer.apply)(variables, x, (), ctx)
    want, scores, balance, z = by_hand(layer, variables, x, ctx)
    present = np.asarray(ctx.weights)
    np.testing.assert_allclose(np.asarray(y)[present], want[present], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux["tally"]["usage"].scores, scores, rtol=1e-5)
    np.testing.assert_allclose([aux["load_balance"], aux["router_z"]], [balance, z], rtol=1e-5)


@pytest.mark.slow
def test_expert_choice_takes_the_cutoff_of_training_along():
    variables, x, ctx = made(EXPERT)
    _, _, aux = jax.jit(EXPERT.apply)(variables, x, (), ctx)
    p = softmax(np.asarray(x, np.float64) @ np.asarray(variables["params"]["router"]["kernel"], np.float64))
    want = np.zeros(8)
    for b in range(B):
        n = int(ctx.weights[b].sum())
        want += np.sort(p[b, :n], axis=0)[::-1][-(-2 * n // 8) - 1] / B
    np.testing.assert_allclose(aux["tally"]["cutoff"].mean_and_var()[0], want, rtol=1e-5)


@pytest.mark.parametrize("form", ["blocked", "ragged_dot"])
def test_grouped_products_and_their_gradients(form, monkeypatch):
    monkeypatch.setattr(grouped, "BLOCK", 4)
    monkeypatch.setattr(grouped, "platform", lambda: "cpu" if form == "blocked" else "tpu")
    rng = np.random.default_rng(0)
    sizes, P = np.array([5, 0, 1, 9, 4], np.int32), 23  # the last 4 rows belong to no group
    x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((P, 3), (5, 3, 2), (P, 2)))
    dy[sizes.sum():] = 0
    y, pull = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, jnp.asarray(sizes)), *map(jnp.asarray, (x, w)))
    dx, dw = pull(jnp.asarray(dy))
    groups = np.repeat(np.arange(5), sizes)
    n = len(groups)
    want_dw = np.zeros_like(w)
    for row, e in enumerate(groups):
        want_dw[e] += np.outer(x[row], dy[row])
    np.testing.assert_allclose(y[:n], np.stack([x[r] @ w[e] for r, e in enumerate(groups)]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx[:n], np.stack([w[e] @ dy[r] for r, e in enumerate(groups)]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_no_expert_may_hold_anything(gated, monkeypatch):
    """What `grouped_matmul` leaves undefined, in results and gradients, is NaN here: it reaches nothing."""
    product = grouped.grouped_matmul
    in_group = lambda x, sizes: jnp.arange(len(x))[:, None] < sizes.sum()

    @jax.custom_vjp
    def undefined(x, w, sizes):
        return jnp.where(in_group(x, sizes), product(x, w, sizes), jnp.nan)

    def backward(saved, dy):
        x, w, sizes = saved
        dx, dw = jax.vjp(lambda x, w: product(x, w, sizes), x, w)[1](dy)
        kept = jnp.all(in_group(x, sizes) | (dy == 0))  # what is asked of callers
        return jnp.where(in_group(x, sizes), dx, jnp.nan), jnp.where(kept, dw, jnp.nan), None

    undefined.defvjp(lambda *args: (undefined(*args), args), backward)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    ids = jnp.asarray([[0, 1], [2, 0], [-1, -1], [-1, 2]])
    x, gates, up, gate, down = draw(4, 5), draw(4, 2), draw(3, 5, 6), draw(3, 5, 6) if gated else None, draw(3, 6, 5)

    def run(x, gates, up, gate, down):
        return jnp.sum(jnp.sin(dispatch.by_token(x, ids, gates, dispatch.Experts(up, gate, down, jax.nn.gelu))))

    found = []
    for form in (product, undefined):
        monkeypatch.setattr(dispatch, "grouped_matmul", form)
        found.append(jax.jit(lambda *args: jax.value_and_grad(run, range(5))(*args))(x, gates, up, gate, down))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.slow
@pytest.mark.parametrize("layer, sizes", [
    (TOKEN, {"data": 2, "expert": 4}),
    (RAW, {"expert": 2, "tensor": 2, "context": 2, "data": 1}),
    (TOKEN.clone(num_experts=16, top_k=3), {"data": 1, "expert": 8}),
    (EXPERT, {"fsdp": 2, "expert": 2, "tensor": 2, "data": 1}),
], ids=["token", "raw", "wide", "expert"])
def test_experts_split_over_devices_compute_the_same(layer, sizes):
    """Values, all gradients, losses and tallies, to 1e-6 of the largest; also where all pairs go to one device."""
    variables, x, ctx = made(layer)
    biased = {**variables, "params": {**variables["params"], "router": {
        "kernel": variables["params"]["router"]["kernel"].at[:, :2].add(3 * jnp.sign(x[0, 0])[:, None])}}}

    def run(variables, x):
        def loss(params, x):
            y, _, aux = layer.apply({**variables, "params": params}, x, (), ctx)
            return jnp.sum(jnp.sin(y) * ctx.weights[..., None]) + aux["load_balance"] + aux["router_z"], aux
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)

    run, mesh = jax.jit(run), make_mesh(sizes)
    boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, (), ctx))
    for given in (variables, biased):
        alone = run(given, x)
        with jax.set_mesh(mesh):
            placed = jax.device_put(given, shardings(boxed, mesh))
            assert placed["params"]["experts_up"].addressable_shards[0].data.shape[0] \
                == layer.num_experts // sizes["expert"]
            split = jax.jit(run)(placed, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=2e-6 * max(1, float(jnp.abs(b).max()))), split, alone)


@pytest.mark.slow
def test_one_expert_is_an_mlp():
    layer = MoE(num_experts=1, top_k=1, mlp_dim=24)
    variables, x, _ = made(layer)
    params = {"up": {"kernel": variables["params"]["experts_up"][0]},
              "down": {"kernel": variables["params"]["experts_down"][0]}}
    want = MLP(24).apply({"params": params}, x, (), context(B, T))[0]
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x, (), context(B, T))[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [TOKEN, EXPERT], ids=["token", "expert"])
def test_peak_temporaries_do_not_grow_with_the_batch(layer):
    def temporaries(rows, layer):
        x = jax.ShapeDtypeStruct((rows, 32, D), jnp.float32)
        ctx = context(rows, 32, key=jax.random.key(0))
        variables = jax.eval_shape(lambda: nn.meta.unbox(layer.init(jax.random.key(0), jnp.zeros(x.shape), (), ctx)))
        loss = lambda v, x: jnp.sum(jnp.sin(layer.apply(v, x, (), ctx)[0]))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables, x).compile()
        # Router numbers, E a token, and a few arrays like x are there in any case.
        return compiled.memory_analysis().temp_size_in_bytes - rows * 32 * 4 * (5 * D + 12 * layer.num_experts)

    layer = layer.clone(mlp_dim=256)
    small, large = (temporaries(128, layer.clone(chunk=chunk)) for chunk in (64, 10**9))
    assert small < large / 4
    assert small < 1.5 * temporaries(32, layer.clone(chunk=64)) + 200_000


@pytest.mark.parametrize("fields, message", [
    (dict(top_k=9), "from 1 to num_experts=8; nearest: 8"),
    (dict(top_k=1), "renormalize=False"),
    (dict(activation="swiglo"), "did you mean 'swiglu'"),
    (dict(num_experts=0), "at least 1"),
])
def test_bad_fields_are_refused_with_what_would_do(fields, message):
    with pytest.raises(ValueError, match="moe") as error:
        MoE(**fields).check(32)
    assert message in str(error.value)


def test_an_expert_axis_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="nearest that is: 12"):
        check_rows("moe.num_experts", 13, {"expert": 4}, square=False)
    MoE(num_experts=8).check_mesh({"expert": 4})


def test_the_router_multiplies_in_full_precision():
    """Under bfloat16 activations too; the experts' products keep the default."""
    variables, x, ctx = made(TOKEN)
    text = str(jax.make_jaxpr(lambda v, x: TOKEN.apply(v, x, (), ctx)[0])(variables, x.astype(jnp.bfloat16)))
    _, after = text.split(":f32[24,8] = dot_general[")
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in after.split("preferred_element_type")[0]
    assert text.count("(Precision.HIGHEST, Precision.HIGHEST)") == 1
