"""Prompts into the state: checked, padded to few distinct shapes, and run in chunks.

Shape legend: B batch, T tokens of a chunk, V padded vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.head import logits_of
from lm.core.types import Apply, Array, Params, State

SMALLEST_BUCKET = 16  # shorter chunks are padded to this: they cost little, and each new shape is a compilation
CAPACITY_MULTIPLE = 128


def check_prompts(prompts: Sequence[Sequence[int]], bos: int | None) -> list[np.ndarray]:
    """The prompts as int32 arrays; an empty one becomes `[bos]`. Raises ValueError, naming the prompt."""
    if not len(prompts):
        raise ValueError("there is no prompt; give at least one")
    out = []
    for n, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.size == 0:
            if bos is None:
                raise ValueError(f"prompt {n} is empty and there is no bos token to begin with; give it at least one "
                                 f"token, or a bos")
            ids = np.array([bos])
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
            raise ValueError(f"prompt {n} must be a list of token ids, integers from 0; got {ids.dtype} of shape "
                             f"{ids.shape}" + (f" with {ids.min()}" if ids.dtype.kind in "if" else ""))
        out.append(ids.astype(np.int32))
    return out


def room(lengths: Sequence[int], max_new_tokens: int, capacity: int | None) -> int:
    """Tokens that the state of each row must hold: `capacity`, or what is needed rounded up to a few distinct values.

    Raises ValueError where the longest prompt and the new tokens do not fit in `capacity`.
    """
    need = max(lengths) + max_new_tokens
    if capacity is None:
        return -(-need // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
    if need > capacity:
        raise ValueError(f"prompt {int(np.argmax(lengths))} has {max(lengths)} tokens, which with max_new_tokens="
                         f"{max_new_tokens} makes {need}; there is room for {capacity}. Shorten the prompt by "
                         f"{need - capacity}, or ask for at most {max(0, capacity - max(lengths))} new tokens")
    return capacity


def bucket(length: int, largest: int) -> int:
    """The smallest power of two, from SMALLEST_BUCKET, that holds `length`, at most `largest`."""
    return min(largest, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()))


def chunks(prompts: Sequence[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, present) [B, T] of right-padded prompts, T at a time: `size`, and a bucket for what is left."""
    longest = max(len(p) for p in prompts)
    for start in range(0, longest, size):
        length = bucket(min(size, longest - start), size)
        tokens, present = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
        for row, prompt in enumerate(prompts):
            part = prompt[start:start + length]
            tokens[row, :len(part)], present[row, :len(part)] = part, True
        yield tokens, present


@functools.partial(jax.jit, static_argnames=("apply",), donate_argnames=("state",))
def prefill_chunk(apply: Apply, params: Params, state: State, tokens: Array, present: Array,
                  reset: Array) -> tuple[State, Array]:
    """(state after the chunk, logits [B, V] after each row's last token in it; undefined for rows without one)."""
    out = apply(params, tokens, state, reset=reset, weights=present)
    last = jnp.maximum(jnp.sum(present, axis=1) - 1, 0)
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    return out.state, logits_of(hidden, out.head)
