"""Muon: momentum, orthogonalized by Newton-Schulz iterations (Jordan et al. 2024, github.com/KellerJordan/Muon).

The same update as `optax.contrib.scale_by_muon` followed by `scale_by_shape`, on parameters of shape [..., in, out]:
every matrix is orthogonalized by itself, whatever axes stand before it. Matrices of one shape, from all layers and
parameters, go through one batched iteration. Shapes below: N matrices, m rows, n columns, m <= n.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.core.sharding import current_mesh

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan et al.: singular values end up near 0.7 to 1.2


def newton_schulz(x: jax.Array, steps: int = 5, eps: float = 1e-8) -> jax.Array:
    """U V^T of each matrix of x = U S V^T [N, m, n], up to singular values between about 0.7 and 1.2.

    x <- a x + (b A + c A A) x with A = x x^T, from x over its Frobenius norm. Costs steps * (4 m^2 n + 2 m^3).
    """
    a, b, c = COEFFICIENTS
    x = _normalized(x, eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def gram_newton_schulz(x: jax.Array, steps: int = 5, eps: float = 1e-8) -> jax.Array:
    """`newton_schulz` with the iteration carried by the m x m Gram matrix: x = P x_0, where P is a polynomial of A_0.

    Costs 4 m^2 n + (8 steps - 6) m^3: less where n is at least 2 m. Rounding errors of A grow with the iterations, so
    the products are float32 on every device; relative to the standard form the result moves by up to about 1e-3.
    """
    a, b, c = COEFFICIENTS
    x = _normalized(x, eps)
    multiply = lambda left, right: jnp.matmul(left, right, precision="highest")
    gram, eye, total = multiply(x, x.mT), jnp.eye(x.shape[-2], dtype=x.dtype), None
    for step in range(steps):
        factor = a * eye + b * gram + c * multiply(gram, gram)
        total = factor if total is None else multiply(factor, total)
        if step < steps - 1:
            gram = multiply(multiply(factor, gram), factor)
    return multiply(total, x)


def _normalized(x: jax.Array, eps: float) -> jax.Array:
    return x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)


def orthogonalize(tree: Any, steps: int = 5, form: str = "standard") -> Any:
    """Every leaf [..., in, out] with each of its matrices orthogonalized; `form` is "standard" or "gram"."""
    leaves, structure = jax.tree.flatten(tree)
    tall = [x.shape[-2] > x.shape[-1] for x in leaves]
    wide = [x.mT if turn else x for x, turn in zip(leaves, tall, strict=True)]
    # One batch a shape keeps all cores and GPU multiprocessors busy. Across a mesh, kernels of one shape are split
    # along different axes, and joining them would move them between devices.
    groups: dict[Any, list[int]] = {}
    for index, x in enumerate(wide):
        groups.setdefault((x.shape[-2:], x.dtype) if current_mesh() is None else index, []).append(index)
    done: list[Any] = [None] * len(leaves)
    for members in groups.values():
        m, n = wide[members[0]].shape[-2:]
        batches = [wide[i].reshape(-1, m, n) for i in members]
        iterate = gram_newton_schulz if form == "gram" and n >= 2 * m else newton_schulz
        out = iterate(jnp.concatenate(batches) if len(batches) > 1 else batches[0], steps)
        ends = itertools.accumulate(len(batch) for batch in batches)
        for i, end in zip(members, ends, strict=True):
            x = out[end - wide[i].size // (m * n):end].reshape(wide[i].shape)
            done[i] = x.mT if tall[i] else x
    return jax.tree.unflatten(structure, done)


class MuonState(NamedTuple):
    """count: updates so far. mu: moving average of the gradients, with the shapes of the parameters."""

    count: jax.Array
    mu: Any


def scale_by_muon(beta: float = 0.95, *, nesterov: bool = True, steps: int = 5, consistent_rms: float | None = None,
                  form: str = "standard") -> optax.GradientTransformation:
    """Muon's direction for parameters [..., in, out]; multiply by the negative learning rate.

    consistent_rms: r makes the root mean square of an update about r whatever its shape (Liu et al. 2025,
    arXiv:2502.16982; 0.2 is AdamW's), so that AdamW's learning rates and decays carry over; None scales by
    sqrt(max(1, out / in)) instead.
    """

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def scaled(x):
        fan_in, fan_out = x.shape[-2:]
        if consistent_rms is None:
            return math.sqrt(max(1.0, fan_out / fan_in)) * x
        return math.sqrt(max(fan_in, fan_out)) * consistent_rms * x

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        direction = optax.tree.bias_correction(mu, beta, optax.safe_increment(count) if nesterov else count)
        if nesterov:
            direction = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, direction,
                                     optax.tree.bias_correction(updates, beta, count))
        return jax.tree.map(scaled, orthogonalize(direction, steps, form)), MuonState(count, mu)

    return optax.GradientTransformation(init, update)
