"""PEER against loops over tokens, heads and all N experts, written from the paper's equations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.core.sharding import make_mesh, shardings
from lm.core.types import context
from lm.layers.experts.numbering import numbered, to_shell
from lm.layers.experts.retrieved import overlap
from lm.layers.experts.shards import check_rows
from lm.layers.mlp import MLP
from lm.layers.peer import PEER

B, T, D = 4, 6, 16


@functools.cache
def made(layer, seed=0, shape=(B, T, D)):
    """(variables moved off their initial values, x, context in training with the last row padded after 2 tokens)."""
    x = jax.random.normal(jax.random.key(seed), shape)
    ctx = context(*shape[:2], key=jax.random.key(1))
    variables = nn.meta.unbox(jax.jit(lambda: layer.init(jax.random.key(seed + 1), x, (), ctx))())
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 2), len(leaves))
    variables = treedef.unflatten([a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
    present = jnp.ones(shape[:2], bool).at[-1, 2:].set(False)
    return variables, x, ctx._replace(weights=present)


def pairs(numbering, n):
    """The sub-keys (i, j) of experts 0, 1, ...; shell by shell, each the border of a square."""
    if numbering == "grid":
        return [(i, j) for i in range(n) for j in range(n)]
    return [pair for m in range(n) for pair in [(i, m) for i in range(m)] + [(m, j) for j in range(m + 1)]]


def by_hand(layer, variables, x, ctx):
    """(y, accumulated scores of every expert) with float64 loops; ids of a head are the k best of all N scores."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    router, table = params["router"], params["experts"]
    H, N, n = layer.num_heads, layer.num_experts, math.isqrt(layer.num_experts)
    x, present = np.asarray(x, np.float64), np.asarray(ctx.weights)
    Q = layer.dim(x.shape[-1])
    q = (x @ router["query"]["kernel"]).reshape(*x.shape[:2], H, Q)
    if layer.query_norm == "batch":
        if ctx.key is None:
            running = {k: np.asarray(v, np.float64) for k, v in variables["stats"]["router"]["queries"].items()}
            mean, var = running["mean"].reshape(H, Q), running["var"].reshape(H, Q)
        else:
            mean, var = q[present].mean(0), q[present].var(0)
        q = (q - mean) / np.sqrt(var + 1e-5) * router["scale"] + router["bias"]
    elif layer.query_norm == "layer":
        q = (q - q.mean(-1, keepdims=True)) / np.sqrt(q.var(-1, keepdims=True) + 1e-5)
        q = q * router["scale"] + router["bias"]
    elif layer.query_norm == "none":
        q = q + router["bias"]
    act = {"gelu": lambda a: np.asarray(jax.nn.gelu(jnp.asarray(a, jnp.float32)), np.float64),
           "geglu": lambda a: np.asarray(jax.nn.gelu(jnp.asarray(a, jnp.float32)), np.float64),
           "relu": lambda a: np.maximum(a, 0)}[layer.activation]
    y, usage = np.zeros_like(x), np.zeros(N)
    for b, t, h in np.ndindex(*x.shape[:2], H):
        if not present[b, t]:
            continue
        first, second = (router["keys"][half, h] if layer.per_head_keys else router["keys"][half] for half in (0, 1))
        one, two = q[b, t, h, :Q // 2], q[b, t, h, Q // 2:]
        if layer.query_norm == "l2":
            length = lambda v: np.sqrt((v * v).sum(-1, keepdims=True))
            one, two, first, second = (v / length(v) for v in (one, two, first, second))
            one, two = one * router["scale"][h, :Q // 2], two * router["scale"][h, Q // 2:]
        scores = np.array([one @ first[i] + two @ second[j] for i, j in pairs(layer.numbering, n)])
        best = np.argsort(-scores)[:layer.top_k]
        gates = np.exp(scores[best] - scores[best].max())
        gates = gates / gates.sum() if layer.gate == "softmax" else 1 / (1 + np.exp(-scores[best]))
        for g, i in zip(gates, best, strict=True):
            hidden = act(table[i, 0] @ x[b, t])
            if layer.activation == "geglu":
                hidden = hidden * (table[i, 2] @ x[b, t])
            y[b, t] += g * hidden * table[i, 1]
            usage[i] += g
    return y, usage


VARIANTS = {
    "batch": PEER(num_experts=25, num_heads=2, top_k=3, key_dim=6),
    "layer": PEER(num_experts=36, num_heads=3, top_k=2, query_norm="layer", gate="sigmoid", activation="relu"),
    "l2": PEER(num_experts=25, num_heads=2, top_k=4, query_norm="l2", per_head_keys=True),
    "none": PEER(num_experts=16, num_heads=2, top_k=4, query_norm="none", activation="geglu", chunk=5),
}


@pytest.mark.parametrize("name", [name if name == "batch" else pytest.param(name, marks=pytest.mark.slow)
                                  for name in VARIANTS])
def test_equals_a_loop_over_all_experts(name):
    layer = VARIANTS[name]
    variables, x, ctx = made(layer)
    for given in (ctx, ctx._replace(key=None)):
        y, _, aux = jax.jit(layer.apply)(variables, x, (), given)
        want, usage = by_hand(layer, variables, x, given)
        present = np.asarray(ctx.weights)
        np.testing.assert_allclose(np.asarray(y)[present], want[present], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(aux["tally"]["usage"].scores, usage, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_one_expert_a_head_is_a_dense_mlp_of_the_selected_rows():
    layer = PEER(num_experts=16, num_heads=3, top_k=1, query_norm="layer")
    variables, x, ctx = made(layer)
    run = lambda v, gate: jnp.sum(layer.clone(gate=gate).apply(v, x, (), ctx)[0] ** 2)
    soft, hard = (jax.jit(jax.grad(run), static_argnums=1)(variables, gate)["params"]["router"]
                  for gate in ("softmax", "sigmoid"))
    assert all(bool((g == 0).all()) for g in jax.tree.leaves(soft))
    assert all(bool((g != 0).any()) for g in jax.tree.leaves(hard))
    y = jax.jit(layer.apply)(variables, x, (), ctx)[0]
    want, usage = by_hand(layer, variables, x, ctx)
    np.testing.assert_allclose(y[0], want[0], rtol=1e-5, atol=1e-5)
    assert set(np.unique(usage)) <= set(range(int(usage.max()) + 1))  # gates are exactly 1


@pytest.mark.slow
def test_gradients_are_those_of_a_dense_gated_mlp():
    """k = n: values and all gradients are those of softmax over the k best of an ordinary dense layer's neurons."""
    layer = PEER(num_experts=4, num_heads=2, top_k=2, query_norm="none", key_dim=4, numbering="grid")
    variables, x, _ = made(layer)
    ctx = context(B, T, key=jax.random.key(0))

    def dense(params):
        q = (x @ params["router"]["query"]["kernel"]).reshape(B, T, 2, 4) + params["router"]["bias"]
        c1, c2 = params["router"]["keys"]
        scores = ((q[..., :2] @ c1.T)[..., :, None] + (q[..., 2:] @ c2.T)[..., None, :]).reshape(B, T, 2, 4)
        gates = jax.nn.softmax(jnp.where(scores >= jnp.sort(scores, -1)[..., 2:3], scores, -jnp.inf), -1)
        hidden = jax.nn.gelu(x @ params["experts"][:, 0].T)
        return jnp.sum(jnp.sin((gates.sum(2) * hidden) @ params["experts"][:, 1]))

    sparse = lambda params: jnp.sum(jnp.sin(layer.apply({**variables, "params": params}, x, (), ctx)[0]))
    value, grads = jax.jit(jax.value_and_grad(sparse))(variables["params"])
    want, want_grads = jax.jit(jax.value_and_grad(dense))(variables["params"])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want_grads)


@pytest.mark.slow
def test_heads_add_up():
    layer = PEER(num_experts=25, num_heads=3, top_k=3, query_norm="layer", key_dim=6)
    variables, x, ctx = made(layer)
    params, router = variables["params"], variables["params"]["router"]
    apply = jax.jit(layer.clone(num_heads=1).apply)
    kernel = router["query"]["kernel"].reshape(D, 3, 6)
    parts = [apply({**variables, "params": {**params, "router": {
        **router, "query": {"kernel": kernel[:, h]}, "scale": router["scale"][h:h + 1],
        "bias": router["bias"][h:h + 1]}}}, x, (), ctx)[0] for h in range(3)]
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x, (), ctx)[0], sum(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate, sizes", [
    ("softmax", (4096, 8, 16)), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("softmax", (1024, 2, 8)), ("softmax", (4096, 16, 4)), ("sigmoid", (4096, 8, 16)), ("sigmoid", (1024, 2, 8))))])
def test_starts_at_the_scale_of_an_mlp(sizes, gate):
    """At initialisation the output's standard deviation is within 2 times that of the MLP in the same slot."""
    N, H, k = sizes
    x = jax.random.normal(jax.random.key(0), (8, 64, 64))
    stds = []
    for layer in (MLP(), PEER(num_experts=N, num_heads=H, top_k=k, gate=gate)):
        run = jax.jit(lambda key, layer=layer: layer.apply(layer.init(key, x, (), context(8, 64)), x, (),
                                                           context(8, 64, key=key))[0])
        stds.append(float(jnp.std(run(jax.random.key(1)))))
    assert 0.5 < stds[1] / stds[0] < 2


def test_batch_norm_makes_unit_features_and_padding_does_not_enter():
    layer = VARIANTS["batch"]
    variables, x, ctx = made(layer)
    run = jax.jit(layer.apply)
    y, _, aux = run(variables, x, (), ctx)
    noisy = jnp.where(ctx.weights[..., None], x, 1e3)
    z, _, noisy_aux = run(variables, noisy, (), ctx)
    present = np.asarray(ctx.weights)
    np.testing.assert_array_equal(np.asarray(y)[present], np.asarray(z)[present])
    jax.tree.map(np.testing.assert_array_equal, aux, noisy_aux)
    mean, var = aux["tally"]["router"]["queries"].mean_and_var()
    q = (np.asarray(x) @ np.asarray(variables["params"]["router"]["query"]["kernel"]))[present]
    np.testing.assert_allclose(mean, q.mean(0), atol=1e-5)
    np.testing.assert_allclose(var, q.var(0), rtol=1e-4)


@pytest.mark.slow
def test_momentum_of_one_freezes_the_statistics():
    layer = VARIANTS["batch"].clone(momentum=1.0)
    variables, x, ctx = made(layer)
    run = jax.jit(layer.apply)
    training, _, aux = run(variables, x, (), ctx)
    np.testing.assert_array_equal(training, run(variables, x, (), ctx._replace(key=None))[0])
    assert "router" not in aux["tally"] and not layer.not_additive and VARIANTS["batch"].not_additive


@pytest.mark.parametrize("name, sizes", [
    ("batch", {"expert": 4, "data": 2}),
    pytest.param("batch", {"expert": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param("l2", {"data": 1, "expert": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
])
def test_experts_split_over_devices_compute_the_same(name, sizes):
    """Values, every gradient and every tally, to 1e-6 of the largest."""
    layer = VARIANTS[name].clone(num_experts=64, top_k=3)
    variables, x, ctx = made(layer)

    def run(variables, x):
        def loss(variables, x):
            y, _, aux = layer.apply(variables, x, (), ctx)
            return jnp.sum(jnp.sin(y) * ctx.weights[..., None]), (y * ctx.weights[..., None], aux)
        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
        return out, grads["params"] if isinstance(grads, dict) else (grads[0]["params"], grads[1])

    alone = jax.jit(run)(variables, x)
    mesh = make_mesh(sizes)
    boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, (), ctx))
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, shardings(boxed, mesh))
        assert placed["params"]["experts"].addressable_shards[0].data.shape[0] == 64 // sizes["expert"]
        split = jax.jit(run)(placed, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, float(jnp.abs(b).max()))),
                 split, alone)


def test_overlap_and_entropy_of_heads():
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(9, 4, replace=False) for _ in range(30)]).reshape(1, 10, 3, 4).astype(np.int32)
    want = [1 - len(set(token.reshape(-1))) / 12 for token in ids[0]]
    np.testing.assert_allclose(overlap(jnp.asarray(ids))[0], want, atol=1e-6)
    same = jnp.broadcast_to(jnp.arange(4), (1, 1, 3, 4))
    np.testing.assert_allclose(overlap(same), 2 / 3, rtol=1e-6)  # two of three heads add nothing
    layer = PEER(num_experts=16, num_heads=2, top_k=3, query_norm="none", key_dim=4)
    variables, x, ctx = made(layer)
    flat = jax.tree.map(jnp.zeros_like, variables)  # all scores are 0
    _, _, aux = jax.jit(layer.apply)(flat, x, (), ctx)
    np.testing.assert_allclose(aux["tally"]["entropy"].value, np.log(3), rtol=1e-5)
    np.testing.assert_allclose(aux["tally"]["overlap"].value, 0.5, rtol=1e-5)


@pytest.mark.slow
def test_only_chosen_rows_get_a_gradient():
    layer = VARIANTS["layer"]
    variables, x, ctx = made(layer)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(layer.apply(v, x, (), ctx)[0]))))(variables)
    _, usage = by_hand(layer, variables, x, ctx)
    touched = np.asarray(jnp.abs(grads["params"]["experts"]).max((1, 2)) > 0)
    assert not (touched & (usage == 0)).any() and touched.sum() <= int(np.sum(ctx.weights)) * 6


@pytest.mark.slow
def test_peak_temporaries_do_not_grow_with_the_batch():
    """Of a train step's layer, beyond its input, output and the table's gradient."""
    layer = PEER(num_experts=64, num_heads=4, top_k=4, query_norm="batch", chunk=64)

    def temporaries(rows, layer):
        x = jax.ShapeDtypeStruct((rows, 32, D), jnp.float32)
        ctx = context(rows, 32, key=jax.random.key(0))
        variables = jax.eval_shape(lambda: nn.meta.unbox(layer.init(jax.random.key(0), jnp.zeros(x.shape), (), ctx)))
        loss = lambda v, x: jnp.sum(jnp.sin(layer.apply(v, x, (), ctx)[0]))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes - 4 * rows * 32 * D * 4  # sin's input and cotangent, cut x

    assert temporaries(128, layer) < 1.3 * temporaries(32, layer) + 100_000
    assert temporaries(128, layer.clone(chunk=10**9)) > 3 * temporaries(128, layer)


@pytest.mark.parametrize("fields, message", [
    (dict(num_experts=1000), "nearest: 961 or 1024"),
    (dict(num_experts=64, top_k=9), "from 1 to 8"),
    (dict(num_experts=64, top_k=4, key_dim=7), "nearest: 8"),
    (dict(num_experts=64, top_k=1), "gate='sigmoid'"),
    (dict(activation="gelo"), "did you mean 'gelu'"),
    (dict(momentum=1.5), "from 0 to 1"),
    (dict(num_experts=64, top_k=4, active_keys=9), "from top_k=4 to 8, the root of num_experts=64; nearest: 8"),
    (dict(num_experts=64, top_k=4, active_keys=3), "nearest: 4"),
])
def test_bad_fields_are_refused_with_what_would_do(fields, message):
    with pytest.raises(ValueError, match="peer") as error:
        PEER(**fields).check(32)
    assert message in str(error.value)


@pytest.mark.parametrize("rows, shards, near", [(64, 8, None), (4225, 8, 4096), (81, 4, 64), (100, 3, 81)])
def test_an_expert_axis_that_does_not_divide_is_refused(rows, shards, near):
    if near is None:
        return check_rows("peer.num_experts", rows, {"expert": shards}, square=True)
    with pytest.raises(ValueError, match=f"nearest that is and is a square: {near}"):
        check_rows("peer.num_experts", rows, {"expert": shards}, square=True)


@pytest.mark.parametrize("n", [1, 5])
def test_shell_numbers_are_dense_and_do_not_change_with_n(n):
    more, grid = n + 3, np.arange(n * n)
    ids = [list(map(int, numbered(grid, n, stride, "shell"))) for stride in (n, more)]
    assert sorted(ids[0]) == list(grid) and ids[0] == ids[1] == [pairs("shell", n).index(pair) for pair in
                                                                 pairs("grid", n)]
    assert pairs("shell", more)[:n * n] == pairs("shell", n)
    assert [pairs("grid", more)[i] for i in numbered(grid, n, more, "grid")] == pairs("grid", n)


def test_sub_keys_that_wait_change_no_bit_and_numbering_is_a_permutation():
    small = VARIANTS["batch"]
    variables, x, ctx = made(small)
    run = lambda layer, variables: jax.jit(layer.apply)(variables, x, (), ctx)[0]
    y, params = run(small, variables), variables["params"]
    rng = np.random.default_rng(0)
    more = lambda a, axis: np.concatenate([a, rng.normal(size=(*a.shape[:axis], 64 - a.shape[axis] if axis == 0 else 3,
                                                               *a.shape[axis + 1:])).astype(np.float32)], axis)
    grown = {**params, "experts": more(params["experts"], 0),
             "router": {**params["router"], "keys": more(params["router"]["keys"], 1)}}
    waiting, opened = (run(small.clone(num_experts=64, active_keys=keys), {**variables, "params": grown})
                       for keys in (5, None))
    np.testing.assert_array_equal(y, waiting)
    assert np.abs(np.asarray(opened) - np.asarray(y)).max() > 1e-3
    grid = np.asarray(params["experts"])[[pairs("shell", 5).index(pair) for pair in pairs("grid", 5)]]
    np.testing.assert_array_equal(y, run(small.clone(numbering="grid"),
                                         {**variables, "params": {**params, "experts": grid}}))
    np.testing.assert_array_equal(to_shell(grid, 5, 0), params["experts"])
