"""Mosaic GPU kernels, for Hopper and Blackwell (compute capability 9.x and 10.x): a warpgroup is one token.

M tokens, P = heads * k experts a token, N experts, D width. One kernel gathers rows by their ids into registers and
keeps of each its product with x (or dy); between the kernels XLA applies the activation to these [M, P] numbers, any
function of JAX; the other kernel gathers rows and sums them up by weights. [M, P, D] is held nowhere. Several
warpgroups on a multiprocessor hide each other's gathers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.arguments import vary_alike
from pallas_kernels.peer_experts.merging import merging_tokens

Array = jax.Array
THREADS = 128
ROWS = 2048         # numbers of the rows that are asked for before the first of them is used: 16 registers a thread
MOST_WIDTH = 4096
DOWN, UP = range(2)


def unsupported(dtypes: dict[str, str], kinds: int, width: int, platform: str) -> str | None:
    """Why these kernels cannot serve, or None."""
    for name, dtype in dtypes.items():
        reason = gpu.no_mosaic(dtype, platform)
        if reason:
            return f"{name}: {reason}" if "takes" in reason else reason
    if kinds != 2:
        return "it takes tables [N, 2, D], without GLU"
    if width % THREADS or width > MOST_WIDTH:
        return f"D={width} is not a multiple of {THREADS} up to {MOST_WIDTH}, the threads that share a row"
    return None


def forward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array) -> Array:
    """y [B, T, D] in x's dtype. ids [B, T, P] outside of the table have gates of 0."""
    inner, = _products("forward", [DOWN])(ids, gates, table, x)
    y, = _sums("forward", UP)(ids, gates.astype(jnp.float32) * activation(inner), table, x)
    return y


def backward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array,
             dy: Array) -> tuple[Array, Array, Array]:
    """(dx, dgates, factors) as in `chunked.backward`: README.md derives it."""
    inner, slope = _products("backward", [DOWN, UP])(ids, gates, table, x, jnp.asarray(dy))
    hidden, pull = jax.vjp(activation, inner)
    weights = gates.astype(jnp.float32)
    down, = pull(weights * slope)
    dx, = _sums("backward", DOWN)(ids, down, table, x)
    return dx, (hidden * slope).astype(gates.dtype), jnp.stack([down, weights * hidden], axis=-1)


def _products(direction: str, kinds: Sequence[int]) -> Callable:
    """Of (ids, anything of their shape, table, x, ...): of the kinds of rows, each with its own of x, [B, T, P]."""
    def body(token: "_Token", ids, table, *refs):
        given, made = refs[:len(kinds)], refs[len(kinds):]
        given = [token.row(x, token.index) for x in given]

        def product(p, rows, _):
            for out, row, x in zip(made, rows, given, strict=True):
                out[token.index, p] = jnp.sum(row * x)
            return 0

        token.over_experts(ids, kinds, table, product, 0)

    def call(ids, shaped, table, *given):
        made = [gpu.like(_flat(ids), dtype=jnp.float32)] * len(kinds)
        out = _call(f"peer_experts_{direction}_products", body, made, ids, table, given)
        return [x.reshape(ids.shape) for x in out]

    return merging_tokens(call)


def _sums(direction: str, kind: int) -> Callable:
    """Of (ids, weights, table, x): the sum of the rows of a kind by their weights, as x is."""
    def body(token: "_Token", ids, table, weights, out):
        add = lambda p, rows, total: total + rows[0] * weights[token.index, p]
        token.write(out, token.over_experts(ids, [kind], table, add, token.zero()))

    def call(ids, weights, table, x):
        y, = _call(f"peer_experts_{direction}_sums", body, [gpu.like(_flat(x))], ids, table, [weights])
        return [y.reshape(x.shape)]

    return merging_tokens(call)


def _call(name: str, body: Callable, made: Sequence, ids: Array, table: Array, given: Sequence[Array]) -> list[Array]:
    from jax.experimental.pallas import mosaic_gpu as plgpu
    ids, given = _flat(jnp.minimum(ids, table.shape[0] - 1)), [_flat(x) for x in given]
    width, chosen = table.shape[-1], ids.shape[-1]
    vector = max(n for n in (1, 2, 4) if width % (n * THREADS) == 0 and n * table.dtype.itemsize <= 8)

    def kernel(*refs):
        body(_Token(plgpu, jax.lax.axis_index("token"), width, vector, chosen), *refs)

    kernel.__name__ = name
    out = plgpu.kernel(
        kernel, out_type=made, grid=(ids.shape[0],), grid_names=("token",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True,
                                             lowering_semantics=plgpu.LoweringSemantics.Lane), **gpu.interpret_mosaic(),
    )(ids, table, *given)
    return list(vary_alike(ids, table, *given, *out)[2 + len(given):])      # `plgpu.kernel` forgets the axes


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


class _Token(NamedTuple):
    """The token of a warpgroup; a thread has `vector` neighbours of every 128 * vector numbers of a row."""
    plgpu: Any
    index: Array
    width: int
    vector: int
    chosen: int

    @property
    def layout(self):
        return self.plgpu.Layout.WG_STRIDED((self.width,), self.vector)

    def row(self, ref, *at) -> Array:
        """Row [D] of global memory in float32."""
        return self.plgpu.layout_cast(ref[(*at, slice(None))], self.layout).astype(jnp.float32)

    def write(self, ref, value: Array) -> None:
        ref[self.index, :] = value.astype(ref.dtype)

    def zero(self) -> Array:
        return self.plgpu.layout_cast(jnp.zeros((self.width,), jnp.float32), self.layout)

    def over_experts(self, ids, kinds: Sequence[int], table, use: Callable, carry):
        """carry = use(p, [row of each kind], carry) over the token's experts p; some rows are asked for at once."""
        together = max(n for n in (1, 2, 4, 8) if self.chosen % n == 0
                       and (n == 1 or n * len(kinds) * self.width <= ROWS))

        def some(i, carry):
            experts = [i * together + j for j in range(together)]
            rows = [[self.row(table, ids[self.index, p], kind) for kind in kinds] for p in experts]
            for p, of in zip(experts, rows, strict=True):
                carry = use(p, of, carry)
            return carry

        return jax.lax.fori_loop(0, self.chosen // together, some, carry)
