"""What every kernel operation must hold. A row in `rows_kernels.py` buys all of these.

The chain of trust: a numpy loop written from the formula checks the reference in float64; the reference, differentiated
by JAX and checked against finite differences, checks every other implementation, values and all gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from rows_kernels import ROWS

from pallas_kernels.testing import interpreted_tpu

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
sized = pytest.mark.parametrize("row,size", [pytest.param(row, size, id=f"{row.name}-{'x'.join(map(str, size))}")
                                             for row in ROWS for size in row.sizes])
# The reference is XLA's own derivative of a loop that the numpy loop has checked: what it must hold besides can wait.
implementations = pytest.mark.parametrize(
    "implementation", ["chunked", pytest.param("reference", marks=pytest.mark.slow)])

# Largest error, as a fraction of the largest value of the float64 answer to the same (rounded) inputs. bfloat16
# outputs are rounded once (2^-9) and gradients use the rounded ones that the forward saved.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2}


def kernel_cases():
    for row in ROWS:
        slow = [(size, dtype) for size in row.slow_kernel_sizes for dtype in ("float32", "bfloat16")]
        for kernel in row.kernels:
            for size, dtype in dict.fromkeys((*row.kernel_cases, *slow)):
                marks = () if (size, dtype) in row.kernel_cases else pytest.mark.slow
                yield pytest.param(row, kernel, size, dtype, marks=marks,
                                   id=f"{row.name}-{kernel}-{'x'.join(map(str, size))}-{dtype}")


def inputs(row, size, dtype="float64", seed=0):
    """Arrays of one case; `narrow` ones in `dtype`, other floats in float32 at least."""
    wide = "float64" if dtype == "float64" else "float32"
    return {name: jnp.asarray(x, (dtype if name in row.narrow else wide) if x.dtype == np.float64 else x.dtype)
            for name, x in row.make(np.random.default_rng(seed), *size).items()}


def outputs(row, given, implementation):
    out = row.op(**given, implementation=implementation)
    return out if isinstance(out, tuple) else (out,)


def with_gradients(row, given, implementation, seed=1):
    """(outputs, gradients by input name) for cotangents drawn at random, of every output at once."""
    floats = {name: x for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    out, pull = jax.vjp(lambda floats: outputs(row, given | floats, implementation), floats)
    rng = np.random.default_rng(seed)
    return out, pull(tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in out))[0]


def compute(row, given, implementation):
    """The same, compiled, as numpy."""
    return jax.tree.map(np.asarray, jax.jit(lambda given: with_gradients(row, given, implementation))(given))


def exact(row, given):
    """Outputs and gradients of the float64 reference at the same, already rounded, inputs and cotangents."""
    out = jax.eval_shape(lambda: outputs(row, given, "reference"))
    rng = np.random.default_rng(1)
    cotangents = [np.asarray(jnp.asarray(rng.normal(size=x.shape), x.dtype), np.float64) for x in out]
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) if jnp.issubdtype(x.dtype, jnp.floating) else x
                for name, x in given.items()}
        floats = {name: x for name, x in wide.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        out, pull = jax.vjp(lambda floats: outputs(row, wide | floats, "reference"), floats)
        return jax.tree.map(np.asarray, (out, pull(tuple(map(jnp.asarray, cotangents)))[0]))


def assert_close(got, want, tolerance):
    for path, x in jax.tree.leaves_with_path(got):
        y = dict(jax.tree.leaves_with_path(want))[path]
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, jax.tree_util.keystr(path)
        error = np.abs(x - y).max() / max(np.abs(y).max(), 1.0)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.3g} > {tolerance:.3g}"


@sized
def test_reference_equals_numpy_loop(row, size):
    given = row.make(np.random.default_rng(0), *size)
    want = row.oracle(**given)
    with jax.enable_x64(True):
        assert_close(outputs(row, given, "reference"), want if isinstance(want, tuple) else (want,), 1e-12)


@rows
def test_gradients_of_reference_equal_finite_differences(row):
    with jax.enable_x64(True):
        given = inputs(row, row.sizes[0])
        floats = {name: x for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        check_grads(lambda floats: outputs(row, given | floats, "reference"), (floats,), order=1, modes=("rev",),
                    rtol=1e-6, atol=1e-6)


@sized
def test_chunked_equals_reference(row, size):
    with jax.enable_x64(True):
        given = inputs(row, size)
        assert_close(compute(row, given, "chunked"), compute(row, given, "reference"), TOLERANCE["float64"])


@pytest.mark.slow
@rows
def test_second_derivatives_of_chunked(row):
    """An inner gradient step differentiated by an outer one, as in test-time training."""
    with jax.enable_x64(True):
        given = inputs(row, row.sizes[0])
        floats = {name: x for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}

        def outer(implementation):
            inner = jax.grad(lambda f: sum((x ** 2).sum() for x in outputs(row, given | f, implementation)))
            return jax.jit(jax.grad(lambda f: sum((g ** 2).sum() for g in jax.tree.leaves(inner(f)))))(floats)

        assert_close(outer("chunked"), outer("reference"), 1e-10)


@rows
@implementations
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_narrow_inputs(row, implementation, dtype):
    """Outputs and gradients have the dtypes of what they belong to, and the accumulation is not narrow."""
    given = inputs(row, row.sizes[0], dtype)
    out, gradients = compute(row, given, implementation)
    assert {name: g.dtype for name, g in gradients.items()} == {name: given[name].dtype for name in gradients}
    assert out[0].dtype == dtype
    if row.scan:
        assert out[-1].dtype == jnp.float32
    seen = exact(row, given)
    assert_close((out, gradients), seen, TOLERANCE[dtype])
    if row.scan:
        assert_close(out[-1:], seen[0][-1:], TOLERANCE["float32"])


@rows
@implementations
def test_pieces_equal_the_whole(row, implementation):
    """Prefill in pieces, then one step at a time: the state handed on is all that the past is."""
    if row.scan is None:
        pytest.skip("no recurrence")
    with jax.enable_x64(True):
        given = inputs(row, row.sizes[0])
        run = jax.jit(lambda given: outputs(row, given, implementation))
        whole = run(given)
        length = given[row.scan.time[0]].shape[1]
        state, pieces = given[row.scan.state], []
        for start, stop in [(0, 5), *((t, t + 1) for t in range(5, length))]:
            part = {name: given[name][:, start:stop] for name in row.scan.time}
            *_, state = out = run(given | part | {row.scan.state: state})
            pieces.append(out[0])
        assert_close((jnp.concatenate(pieces, axis=1), state), (whole[0], whole[-1]), 1e-12)


@rows
@implementations
def test_reset_starts_a_document(row, implementation):
    """Nothing before a reset reaches what is after it, in values or gradients: whatever its size."""
    if row.scan is None or row.scan.reset is None:
        pytest.skip("no reset")
    given = inputs(row, row.sizes[0], "float32")
    given[row.scan.reset] = jnp.zeros_like(given[row.scan.reset]).at[:, 6].set(True)
    part = {name: given[name][:, 6:] for name in row.scan.time}
    alone = {**given, **part, row.scan.state: jnp.zeros_like(given[row.scan.state])}
    want = outputs(row, alone, implementation)
    first = outputs(row, given, implementation)[0][:, 6:]
    assert_close(first, want[0], 1e-6)
    poisoned = {**given, row.scan.state: jnp.full_like(given[row.scan.state], 1e30)}
    np.testing.assert_array_equal(outputs(row, poisoned, implementation)[0][:, 6:], first)


@pytest.mark.slow
@rows
@implementations
def test_vmap_equals_loop(row, implementation):
    several = [inputs(row, row.sizes[0], "float32", seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    got = jax.jit(jax.vmap(lambda given: with_gradients(row, given, implementation)))(stacked)
    want = jax.tree.map(lambda *x: np.stack(x), *[compute(row, given, implementation) for given in several])
    assert_close(got, want, TOLERANCE["float32"])


@pytest.mark.parametrize("row,kernel,size,dtype", list(kernel_cases()))
def test_kernel_equals_reference(row, kernel, size, dtype):
    """In the TPU interpreter, with NaN in memory that nothing wrote, and with no race."""
    given = inputs(row, size, dtype)
    with interpreted_tpu():
        got = compute(row, given, kernel)
    want = exact(row, given)
    assert_close(got, want, TOLERANCE[dtype])
    if row.scan:
        assert got[0][-1].dtype == np.float32
        # Of a state that is a matrix, products round their operands to bfloat16 as the inputs were: 2^-9 each.
        narrow = 2 ** -7 if want[0][-1].ndim == 4 else 2e-5
        assert_close(got[0][-1:], want[0][-1:], TOLERANCE["float32"] if dtype == "float32" else narrow)


@pytest.mark.slow
@pytest.mark.parametrize("row,kernel", [pytest.param(row, kernel, id=f"{row.name}-{kernel}")
                                        for row in ROWS for kernel in row.kernels])
def test_kernel_under_vmap(row, kernel):
    several = [inputs(row, row.slow_kernel_sizes[0], "float32", seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    with interpreted_tpu():
        got = jax.block_until_ready(jax.jit(jax.vmap(lambda given: with_gradients(row, given, kernel)))(stacked))
    want = jax.tree.map(lambda *x: np.stack(x), *[compute(row, given, "reference") for given in several])
    assert_close(got, want, TOLERANCE["float32"])
