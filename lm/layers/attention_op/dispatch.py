"""One attention operation, several implementations, and a loud choice between them.

Shape legend: B batch, T queries, S keys, H heads, G key-value heads, K head_dim.
"""

import difflib
import functools
import logging

import jax

from lm.core.sharding import platform
from lm.layers.attention_op import blocked, cudnn, reference, ring, splash
from lm.layers.attention_op.visibility import Visibility

Array = jax.Array
log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("ring", "splash", "cudnn", "blocked", "reference")  # in the order in which None tries them


def dot_product_attention(q: Array, k: Array, v: Array, *, q_positions: Array | None = None,
                          k_positions: Array | None = None, q_documents: Array | None = None,
                          k_documents: Array | None = None, window: int | None = None, scale: float | None = None,
                          aligned: bool, implementation: str | tuple[str, ...] | None = None) -> Array:
    """Causal grouped-query attention: softmax(scale q k^T) v over the keys that each query sees.

    q [B, T, H, K]; k, v [B, S, G, K], H a multiple of G -> [B, T, H, K] in q's dtype; scores and softmax in float32 or
    wider. `scale` defaults to K ** -0.5.

    Query i sees key j when both hold:
    - order. `aligned`: key j is token j of the same row (T == S), so j <= i, and i - j < window. Otherwise (a cache,
      slots in any order): k_positions[j] <= q_positions[i], [B, S] and [B, T], and their difference < window.
    - document: k_documents[j] == q_documents[i] where given, [B, S] and [B, T]; a key with a negative document is an
      empty slot that nothing sees.
    A query that sees no key gives 0 with zero gradient.

    `implementation`: None takes the best one that serves on this platform; a name is that one or an error; a tuple is
    tried in turn. What is chosen is logged once, with the reasons against those passed over.

    Raises ValueError for shapes that do not fit together, unknown names, and implementations that cannot serve.
    """
    see = Visibility(aligned, 0, window, None if aligned else q_positions, None if aligned else k_positions,
                     q_documents, k_documents)
    _check(q, k, v, see)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = choose(q, k, see, implementation)
    return _MODULES[name].attend(q, k, v, see, scale=scale)


_MODULES = {"ring": ring, "splash": splash, "cudnn": cudnn, "blocked": blocked, "reference": reference}


def choose(q: Array, k: Array, see: Visibility, implementation: str | tuple[str, ...] | None = None) -> str:
    """Name of the implementation that serves these arguments (arrays or their shapes), by the rules of the operation.

    Raises ValueError with every reason when none does.
    """
    names = (implementation,) if isinstance(implementation, str) else implementation or IMPLEMENTATIONS
    reasons = []
    for name in names:
        if name not in IMPLEMENTATIONS:
            near = difflib.get_close_matches(name, IMPLEMENTATIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"attention implementation {name!r} is unknown{hint}; "
                             f"implementations: {', '.join(IMPLEMENTATIONS)}")
        unsupported = getattr(_MODULES[name], "unsupported", None)
        reason = unsupported(see, q, k) if unsupported else None
        if reason is None:
            passed = f" ({'; '.join(reasons)})" if reasons else ""
            _announce(f"attention runs as {name!r} on {platform()}{passed}")
            return name
        reasons.append(f"not {name!r}: {reason}")
    raise ValueError(f"no attention implementation of {names} can serve q{q.shape} k{k.shape} {q.dtype} on "
                     f"{platform()}: {'; '.join(reasons)}; pass implementation=None to take the best one that does")


@functools.cache
def _announce(message: str) -> None:
    log.info(message)


def _check(q: Array, k: Array, v: Array, see: Visibility) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention takes q [B, T, H, K], k and v [B, S, G, K]; got {q.shape}, {k.shape}, {v.shape}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q and k must agree in batch and head_dim; got q{q.shape}, k{k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key-value heads; got {q.shape[2]} and {k.shape[2]}")
    if see.aligned and q.shape[1] != k.shape[1]:
        raise ValueError(f"aligned attention needs as many keys as queries; got {q.shape[1]} queries and {k.shape[1]} "
                         "keys; for a cache pass aligned=False with q_positions and k_positions")
    if not see.aligned and (see.q_positions is None or see.k_positions is None):
        raise ValueError("aligned=False needs q_positions [B, T] and k_positions [B, S], which give the order")
    if (see.q_documents is None) != (see.k_documents is None):
        raise ValueError("q_documents and k_documents go together; give both or neither")
    if see.window is not None and see.window < 1:
        raise ValueError(f"window counts the keys that a query sees, itself included: at least 1; got {see.window}")
