"""Dense, Embed and the output head: the three places where a matrix meets the activations.

Shape legend: B batch, T time, D embed_dim, V vocabulary (padded), r adapter rank.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.low_rank import column_scale
from lm.core.sharding import constrain, current_mesh
from lm.core.types import Array, Head


def fan_in(scale: float = 1.0) -> Callable:
    """Normal initializer with standard deviation scale / sqrt(fan in), cut at two deviations; scale 0 gives zeros."""
    if scale == 0.0:
        return nn.initializers.zeros
    return nn.initializers.variance_scaling(scale * scale, "fan_in", "truncated_normal")


def matmul(x: Array, kernel: Array, precision: jax.lax.Precision | None = None) -> Array:
    """x @ kernel over the last axis of x [..., D].

    On one device the leading axes are made one first: the gradient of the kernel is then a plain matrix product, which
    XLA's CPU backend runs up to 2.7 times as fast as one that contracts two axes. Over several devices merging axes
    that are split differently would move data.
    """
    if x.ndim <= 2 or current_mesh() is not None:
        return jnp.matmul(x, kernel, precision=precision)
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=precision)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Module):
    """y = x @ kernel + bias over the last axis, in the dtype of x.

    Where the `lora` collection holds (a, b) beside the kernel, y gains x @ a @ b (Hu et al. 2021, eq. 3), and where it
    holds a magnitude, each output then has its column's length (DoRA): adapters are data, present or absent, never a
    flag.
    """

    features: int
    axes: tuple[str | None, str | None] = ("embed", "mlp")
    use_bias: bool = False
    init_scale: float = 1.0
    kernel_init: Callable | None = None  # in place of `fan_in(init_scale)`
    precision: jax.lax.Precision | None = None  # of the product with the kernel; None is JAX's default

    @nn.compact
    def weights(self, in_features: int) -> tuple[Array, Array | None]:
        """kernel [in_features, features], bias [features] or None."""
        init = self.kernel_init or fan_in(self.init_scale)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), (in_features, self.features))
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]),
                                  (self.features,))

    def __call__(self, x: Array) -> Array:
        kernel, bias = self.weights(x.shape[-1])
        y = matmul(x, kernel.astype(x.dtype), self.precision)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y = y + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
            if self.has_variable("lora", "magnitude"):
                scale = column_scale(kernel, a, b, self.get_variable("lora", "magnitude"))
                y = y * scale.astype(x.dtype)
        y = y if bias is None else y + bias.astype(x.dtype)
        return self.pinned(y)

    def pinned(self, y: Array) -> Array:
        """y [B, T, features] split over the mesh as its logical axes say, where the kernel names the last one.

        Left to choose a layout of its own for a product whose kernel is split along both axes, XLA's partitioner gives
        wrong numbers (jax 0.10.2 and 0.12.0 with rows, `fsdp` and `tensor` split, CPU).
        """
        if y.ndim != 3:
            return y
        return constrain(y, "batch", "length", "activation_embed" if self.axes[1] == "embed" else self.axes[1])


def project(x: Array, *layers: Dense) -> list[Array]:
    """[layer(x) for layer in layers], as one product where one device holds everything and adapters are absent.

    The product of the joined kernels is wide enough for both of two CPU cores where those of its parts are not.
    """
    if current_mesh() is not None or any(layer.has_variable("lora", "a") for layer in layers):
        return [layer(x) for layer in layers]
    kernels, biases = zip(*(layer.weights(x.shape[-1]) for layer in layers), strict=True)
    y = matmul(x, jnp.concatenate(kernels, 1).astype(x.dtype))
    if any(bias is not None for bias in biases):
        whole = [jnp.zeros(layer.features) if b is None else b for layer, b in zip(layers, biases, strict=True)]
        y = y + jnp.concatenate(whole).astype(x.dtype)
    return jnp.split(y, [sum(layer.features for layer in layers[:i]) for i in range(1, len(layers))], -1)


@jax.custom_vjp
def lookup(table: Array, tokens: Array) -> Array:
    """Rows of `table` [V, D] at `tokens` [...]; ids outside the table are clipped to it.

    Its gradient accumulates in float32 whatever the dtype.
    """
    return table.at[tokens].get(mode="clip")


def _lookup_fwd(table, tokens):
    return lookup(table, tokens), (jnp.zeros((0, *table.shape[1:]), table.dtype), table.shape[0], tokens)


# Up to this many rows the gradient is one product with the one-hot matrix; a scatter-add has to serialise equal ids.
ONE_HOT_ROWS = 1024


def _lookup_bwd(saved, g):
    like, rows, tokens = saved
    flat, ids = g.reshape(-1, g.shape[-1]), tokens.reshape(-1)
    wide = jnp.promote_types(like.dtype, jnp.float32)
    if rows <= ONE_HOT_ROWS:
        hot = jax.nn.one_hot(ids, rows, dtype=flat.dtype, axis=0)
        table = jnp.matmul(hot, flat, preferred_element_type=wide)
    else:
        table = jnp.zeros((rows, flat.shape[-1]), wide).at[ids].add(flat.astype(wide))
    return table.astype(like.dtype), None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


class Embed(nn.Module):
    """Token ids [B, T] to vectors [B, T, D] in `dtype`; the table itself is float32 and may serve as the head."""

    rows: int
    features: int
    init_std: float = 0.02
    axes: tuple[str | None, str | None] = ("vocab", "embed")

    @nn.compact
    def __call__(self, tokens: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Returns (vectors, table [rows, features])."""
        table = self.param("embedding", nn.with_logical_partitioning(nn.initializers.normal(self.init_std), self.axes),
                           (self.rows, self.features))
        # Rows are gathered whole: a lookup in a table that fsdp splits by columns would be replicated by the compiler.
        return lookup(constrain(table, self.axes[0], "activation_embed"), tokens).astype(dtype), table


class OutputHead(nn.Module):
    """Names the head's own parameters where it is not tied to the embedding; see `with_adapter` for `lora`."""

    rows: int
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, embed_dim: int) -> Array:
        init = nn.initializers.normal(self.init_scale * embed_dim**-0.5)
        return self.param("kernel", nn.with_logical_partitioning(init, ("vocab", "embed")), (self.rows, embed_dim))


def with_adapter(hidden: Array, head: Head, a: Array, b: Array, magnitude: Array | None = None) -> tuple[Array, Head]:
    """A head with a low-rank adapter, as a wider head: x @ (W + a b) = [x, x a] @ [W; b], exact and never [D, V].

    hidden: [B, T, D]; head.kernel: [V, D]; a: [D, r]; b: [r, V]; magnitude: [V], the length of each token's row.
    """
    wider = jnp.concatenate([hidden, hidden @ a.astype(hidden.dtype)], axis=-1)
    kernel = jnp.concatenate([head.kernel, b.T.astype(head.kernel.dtype)], axis=-1)
    if magnitude is not None:
        kernel = kernel * column_scale(head.kernel.T, a, b, magnitude)[:, None].astype(kernel.dtype)
    return wider, head._replace(kernel=kernel)
