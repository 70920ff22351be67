"""What every layer must hold. A row in `rows_layers.py` buys all of these.

Shapes: B batch, T time, D embed_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from rows_layers import EMBED_DIM, ROWS, SLOW

from lm.adapters.lora import init_lora
from lm.core.sharding import make_mesh, shardings, spec
from lm.core.types import Context, context
from lm.layers import LAYERS
from lm.layers.block import Block
from lm.layers.norm import RMSNorm
from lm.layers.stack import Stack

B, T, D = 3, 16, EMBED_DIM
layers = pytest.mark.parametrize("layer", [
    pytest.param(layer, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, layer in ROWS])


@functools.cache
def compiled(layer):
    """layer.apply, compiled once a layer and shape for all the tests of this process."""
    return jax.jit(layer.apply)


@functools.cache
def setup(layer, dtype=jnp.float32, seed=0):
    """(variables, input) with every parameter moved off zero, so that nothing hides behind a zero initialiser."""
    @jax.jit
    def draw():
        x = jax.random.normal(jax.random.key(seed), (B, T, D), dtype)
        boxed = layer.init(jax.random.key(seed + 1), x, layer.initial_state(B, D, dtype), context(B, T))
        leaves, treedef = jax.tree.flatten(nn.meta.unbox(boxed))
        keys = jax.random.split(jax.random.key(seed + 2), len(leaves))
        return jax.tree.unflatten(treedef, [a + 0.05 * jax.random.normal(k, a.shape, a.dtype)
                                            for a, k in zip(leaves, keys, strict=True)]), x

    return draw()


def part(ctx: Context, start: int, stop: int) -> Context:
    return ctx._replace(reset=ctx.reset[:, start:stop], positions=ctx.positions[:, start:stop],
                        weights=ctx.weights[:, start:stop])


def run_in_pieces(layer, variables, x, ctx, cuts):
    """Output and final state of the layer fed piece by piece, as prefill and decoding feed it."""
    state, outs = layer.initial_state(B, D, x.dtype, capacity=T), []
    for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
        y, state, _ = compiled(layer)(variables, x[:, start:stop], state, part(ctx, start, stop))
        outs.append(y)
    return jnp.concatenate(outs, axis=1), state


def documents(*starts: int) -> Context:
    """The context of rows in which documents start at 0 and at each of `starts`."""
    reset = jnp.zeros((B, T), bool).at[:, jnp.array([0, *starts])].set(True)
    index = jnp.arange(T)
    positions = index - jax.lax.cummax(jnp.where(reset, index, 0), axis=1)
    return context(B, T)._replace(reset=reset, positions=positions.astype(jnp.int32))


def test_every_layer_has_a_row():
    assert {type(getattr(layer, "layers", (layer,))[0]) for _, layer in ROWS} == set(LAYERS.values())


@layers
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shape_and_dtype(layer, dtype):
    variables, x = jax.eval_shape(lambda: setup.__wrapped__(layer, dtype))
    before = layer.initial_state(B, D, dtype)
    y, state, _ = jax.eval_shape(layer.apply, variables, x, before, context(B, T))
    assert y.shape == x.shape and y.dtype == dtype
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) \
        == jax.tree.map(lambda a: (a.shape, a.dtype), before)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(variables))


@layers
def test_causal(layer):
    variables, x = setup(layer)
    run = lambda x: compiled(layer)(variables, x, layer.initial_state(B, D, x.dtype), context(B, T))[0]
    before, after = run(x), run(x.at[:, 7:].add(1.0))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before - after)[:, 7:].max(axis=-1).min() > 1e-4


@layers
@pytest.mark.parametrize("cuts", [(1, 2, 7, 12), tuple(range(1, T))], ids=["uneven", "one_by_one"])
def test_step_by_step_equals_parallel(layer, cuts):
    variables, x = setup(layer)
    ctx = documents(6)
    whole, _, _ = compiled(layer)(variables, x, layer.initial_state(B, D, x.dtype), ctx)
    pieces, _ = run_in_pieces(layer, variables, x, ctx, cuts)
    np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=1e-5)


@layers
def test_packed_equals_separate(layer):
    variables, x = setup(layer)
    run = lambda x, ctx: compiled(layer)(variables, x, layer.initial_state(len(x), D, x.dtype), ctx)[0]
    packed = run(x, documents(6, 11))
    for start, stop in ((0, 6), (6, 11), (11, T)):
        # At full length, so that one compilation serves all: what follows a document does not reach it (test_causal).
        alone = run(jnp.roll(x, -start, axis=1), context(B, T))[:, :stop - start]
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-5, atol=1e-5)


@layers
def test_padding_changes_no_state(layer):
    """Rows of 5 and 9 real tokens, padded to 12, go on exactly like rows that were never padded."""
    variables, x = setup(layer)
    lengths, padded, more = np.array([5, 9, 12]), 12, 3
    weights = jnp.arange(padded)[None] < lengths[:, None]
    ctx = context(B, padded)._replace(weights=weights)
    noisy = jnp.where(weights[..., None], x[:, :padded], 1e3)
    _, state, _ = compiled(layer)(variables, noisy, layer.initial_state(B, D, x.dtype, capacity=32), ctx)
    tail = jax.random.normal(jax.random.key(9), (B, more, D))
    following = context(B, more)._replace(reset=jnp.zeros((B, more), bool),
                                          positions=jnp.asarray(lengths)[:, None] + jnp.arange(more))
    y, _, _ = compiled(layer)(variables, tail, state, following)
    alone = x
    for row, n in enumerate(lengths):
        alone = alone.at[row, n:n + more].set(tail[row])
    want, _, _ = compiled(layer)(variables, alone, layer.initial_state(B, D, x.dtype), context(B, T))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(y[row], want[row, n:n + more], rtol=1e-5, atol=1e-5)


@layers
def test_float32_state_under_bfloat16(layer):
    """Accumulators are float32 whatever the compute dtype; only copies of activations may be narrow."""
    state = layer.initial_state(B, D, jnp.bfloat16, capacity=8)
    named = state._asdict() if hasattr(state, "_asdict") else {}
    narrow = {name for name, leaf in named.items() if jnp.issubdtype(leaf.dtype, jnp.floating)
              and leaf.dtype != jnp.float32}
    assert narrow <= {"keys", "values", "shift"}


@layers
def test_finite_gradients(layer):
    variables, x = setup(layer)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(variables, x):
        return jnp.sum(jnp.square(layer.apply(variables, x, layer.initial_state(B, D, x.dtype), documents(6))[0]))

    for scale in (1e4, 0.0, 1.0):
        grads = gradients(variables, scale * x)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    # A bias before a softmax over keys cancels: its gradient is zero by construction.
    flat = {jax.tree_util.keystr(path): g for path, g in jax.tree_util.tree_leaves_with_path(grads[0])}
    assert all(float(jnp.abs(g).max()) > 0 for name, g in flat.items()
               if name.startswith("['params']") and "'key']['bias" not in name)


@layers
def test_vmap_over_adapters(layer):
    """One adapter a sequence: vmap over (adapter, row) equals a loop."""
    variables, x = setup(layer)
    loras = []
    for i in range(B):
        lora = init_lora(jax.random.key(i), variables, 2, match=r".*/kernel")
        loras.append(jax.tree.map(lambda a, i=i: a + 0.1 * jax.random.normal(jax.random.key(50 + i), a.shape), lora))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *loras)

    @jax.jit
    def one(lora, row):
        state = layer.initial_state(1, D, row.dtype)
        return layer.apply({**variables, "lora": lora}, row[None], state, context(1, T))[0][0]

    together = jax.vmap(one)(stacked, x)
    for i in range(B):
        np.testing.assert_allclose(together[i], one(loras[i], x[i]), rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(together - compiled(layer)(variables, x, layer.initial_state(B, D, x.dtype),
                                                context(B, T))[0]).max()) > 1e-4


@layers
def test_repeated_templates_get_distinct_weights(layer):
    stack = Stack(prefix=(), pattern=(Block((layer, layer), ("first", "second"), RMSNorm()),), repeats=2)
    x = jnp.zeros((1, 1, D))
    params = nn.meta.unbox(jax.jit(stack.init)(jax.random.key(0), x, stack.initial_state(1, D, x.dtype),
                                               context(1, 1)))
    block = params["params"]["pattern_0"]
    kernels = [leaf for leaf in jax.tree.leaves(block) if leaf.ndim == 3]
    drawn = [leaf for leaf in kernels if bool(leaf.max() > leaf.min())]  # others start at one value by design
    assert drawn and all(bool((leaf[0] != leaf[1]).any()) for leaf in drawn)
    pairs = zip(jax.tree.leaves(block["first"]), jax.tree.leaves(block["second"]), strict=True)
    assert all(bool((a != b).any()) for a, b in pairs if a.ndim == 3 and bool(a.max() > a.min()))


@layers
def test_every_parameter_names_its_axes(layer):
    x = jnp.zeros((1, 1, D))
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x, layer.initial_state(1, D, x.dtype), context(1, 1))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda a: isinstance(a, nn.LogicallyPartitioned))
    assert leaves and all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for leaf in leaves:
        spec(leaf.names, leaf.value.shape, mesh)
    # Every matrix is split by fsdp or tensor: a matrix that stays whole is a forgotten axis.
    assert all(any(spec(leaf.names, leaf.value.shape, mesh)) for leaf in leaves if leaf.value.ndim >= 2)


@layers
def test_same_on_eight_devices(layer):
    """Split over data, fsdp and tensor the layer computes what it computes alone."""
    variables, x = setup(layer)
    x = jnp.concatenate([x, x[:1]])
    ctx = context(4, T)

    def run(variables, x):
        return layer.apply(variables, x, layer.initial_state(4, D, x.dtype), ctx)[0]

    alone = jax.jit(run)(variables, x)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, layer.initial_state(4, D, x.dtype), ctx))
    with jax.set_mesh(mesh):
        split = jax.jit(run)(jax.device_put(variables, shardings(boxed, mesh)), x)
    np.testing.assert_allclose(split, alone, rtol=1e-5, atol=1e-5)


@layers
def test_flops_are_positive(layer):
    assert layer.flops_per_token(D, T) > 0
