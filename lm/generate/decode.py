"""Generation: prompts of any lengths in one batch, one token after another from the model's own state.

The model is a pure `apply` and an `initial_state`; whether the state is a key-value cache or a recurrence is not known
here. Everything on the device is two compiled functions: a chunk of prompt (`prefill`), and a loop of N tokens
(`loop`). Between loops the host looks for stop strings and gives out text.
"""

import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.tree import apart
from lm.core.types import Apply, Array, Params, State
from lm.generate.continuous import continuous_steps
from lm.generate.loop import Loop, Plan, decode_steps, empty_state, first_token
from lm.generate.prefill import check_prompts, chunks, prefill_chunk, room
from lm.generate.result import Generated, Timing
from lm.generate.sampling import SamplingOptions
from lm.generate.speculative import Speculation, speculative_steps
from lm.generate.stopping import Decode, Row

# Bytes of state from which layers that are stacked get arrays of their own for decoding. Stacked, every token copies
# all of it; apart, the loop over tokens is compiled with each layer in it, which takes longer than copying little.
APART_BYTES = 2**24


def generate(apply: Apply, params: Params, initial_state: Callable[..., State], prompts: Sequence[Sequence[int]], *,
             max_new_tokens: int, options: SamplingOptions | None = None, seed: int = 0,
             rows: Sequence[int] | None = None, stop_tokens: Collection[int] = (), stop_strings: Sequence[str] = (),
             decode: Decode | None = None, bos: int | None = None, capacity: int | None = None,
             prefill_chunk_size: int = 512, steps_per_sync: int = 32,
             on_text: Callable[[int, str], None] | None = None, speculation: Speculation | None = None,
             continuous: bool = False) -> Generated:
    """Continues each prompt by at most `max_new_tokens` tokens.

    apply, initial_state: the model (`lm.core.types.Apply`, and `initial_state(batch_size, capacity=N)`). Compiled code
      is kept for the same two objects: use them again, do not make them anew for each call.
    prompts: token ids, any lengths. An empty one needs `bos`.
    options: how tokens are drawn, default temperature 1. seed, rows: the tokens of a row are a function of its prompt,
      the seed and its number in `rows` (default 0, 1, ...), and of nothing else in the batch.
    stop_tokens: ids that end a row, such as eos. stop_strings: texts that end a row, exactly before them; they need
      `decode`, from ids to text.
    capacity: tokens that a row may have in all, e.g. the model's limit; None makes as much room as is needed.
    prefill_chunk_size: prompt tokens of a row in one call. steps_per_sync: tokens drawn between two looks of the host.
    on_text: called with (row, piece) as text becomes certain; the pieces of a row join to its text. It needs `decode`.
    speculation: a model of recurrent depth drafts with few iterations and verifies with all of them; the distribution
      of the text stays. continuous: the model is one whose rows iterate at their own pace (`sliced`).

    Raises ValueError before anything runs for prompts, options and lengths that cannot be; FloatingPointError where
    the logits become NaN.
    """
    options = SamplingOptions() if options is None else options
    options.check()
    if speculation is not None:
        speculation.check(options)
    if continuous and (speculation is not None or prefill_chunk_size < 2):
        raise ValueError("continuous decoding takes no speculation, and prefill_chunk_size of at least 2: a single "
                         "token is a step of decoding")
    prompts = check_prompts(prompts, bos)
    numbers = _check(len(prompts), max_new_tokens, rows, stop_strings, decode, on_text, prefill_chunk_size,
                     steps_per_sync)
    lengths = np.array([len(p) for p in prompts], np.int32)
    capacity = room(lengths, max_new_tokens, capacity)
    plan = Plan(numbers, lengths + np.int32(max_new_tokens), np.array(sorted(stop_tokens), np.int32),
                jax.random.key(seed))
    timing = Timing(prefill_tokens=int(lengths.sum()))
    run = functools.partial(_run, timing)
    host = [Row(prompt, decode, stop_tokens, stop_strings) for prompt in prompts]

    state = run(empty_state, (initial_state, len(prompts), capacity), ())
    timing.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    started, compiled, logits = time.perf_counter(), timing.compile_seconds, None
    for tokens, present in chunks(prompts, prefill_chunk_size):
        reset = np.zeros(tokens.shape, bool)
        reset[:, 0] = logits is None
        state, now = run(prefill_chunk, (apply,), (params, state, tokens, present, reset))
        logits = now if logits is None else jnp.where(present.any(axis=1)[:, None], now, logits)
    if timing.state_bytes >= APART_BYTES:
        state = apart(state)
    seen = None if options.repetition_penalty == 1 else _seen(prompts, logits.shape[-1])
    loop = run(first_token, (), (logits, lengths, seen, plan), options=options)
    drawn = on_host(loop.token)[:, None]
    timing.prefill_seconds = time.perf_counter() - started - (timing.compile_seconds - compiled)

    started, compiled = time.perf_counter(), timing.compile_seconds
    while True:
        _take(host, drawn, loop, on_text)
        halted = np.array([row.reason is not None for row in host])
        if np.all(halted | on_host(loop.done)):
            break
        now = (params, state, loop, halted, plan)
        if speculation is None:
            steps = continuous_steps if continuous else decode_steps
            state, loop, drawn = run(steps, (apply,), now, options=options, steps=steps_per_sync)
        else:
            state, loop, drawn, counts = run(speculative_steps, (apply,), now, options=options, steps=steps_per_sync,
                                             speculation=speculation)
            timing.drafted, timing.kept = (a + int(on_host(b)) for a, b in zip((timing.drafted, timing.kept), counts,
                                                                       strict=True))
    for n, row in enumerate(host):
        row.finish("length")
        _show(n, row, on_text)
    timing.decode_seconds = time.perf_counter() - started - (timing.compile_seconds - compiled)
    timing.decode_tokens = sum(len(row.tokens) - 1 for row in host)
    return Generated([row.result() for row in host], timing)


def _check(size: int, max_new_tokens: int, rows: Sequence[int] | None, stop_strings: Sequence[str],
           decode: Decode | None, on_text: Any, chunk: int, steps: int) -> np.ndarray:
    """The rows' numbers; raises ValueError for arguments that cannot be."""
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk_size", chunk), ("steps_per_sync", steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise ValueError(f"stop_strings must be a list of texts that are not empty; got {stop_strings!r}")
    if decode is None and (stop_strings or on_text):
        raise ValueError("stop_strings and on_text need `decode`, the function from token ids to text")
    numbers = np.arange(size, dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    if numbers.shape != (size,):
        raise ValueError(f"rows must give one number for each of the {size} prompts; got shape {numbers.shape}")
    return numbers


def _run(timing: Timing, fn: Any, static: tuple, args: tuple, **options: Any) -> Any:
    """`fn(*static, *args, **options)`, compiled first, so that compilation is timed apart; JAX keeps what it made."""
    started = time.perf_counter()
    compiled = fn.lower(*static, *args, **options).compile()
    timing.compile_seconds += time.perf_counter() - started
    return compiled(*args)


def _seen(prompts: Sequence[np.ndarray], vocab: int) -> np.ndarray:
    out = np.zeros((len(prompts), vocab), bool)
    for row, prompt in zip(out, prompts, strict=True):
        row[prompt] = True
    return out


def on_host(x: Any) -> np.ndarray:
    """The values of an array, also of one that is split over devices of several processes, all of which must ask."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        whole = jax.NamedSharding(x.sharding.mesh, jax.P())
        x = jax.jit(lambda x: x, out_shardings=whole)(x)
    return np.asarray(x)


def _take(host: Sequence[Row], drawn: Array, loop: Loop, on_text: Callable[[int, str], None] | None) -> None:
    """Gives the drawn tokens [B, S] to their rows, and the text that became certain to the caller."""
    if (broken := np.flatnonzero(on_host(loop.broken))).size:
        n = int(broken[0])
        raise FloatingPointError(f"the logits of row {n} became NaN after {len(host[n].tokens)} new tokens: the "
                                 f"parameters are not finite, or the compute dtype overflows")
    for n, (row, tokens) in enumerate(zip(host, on_host(drawn), strict=True)):
        for token in tokens[tokens >= 0]:
            row.add(int(token))
        _show(n, row, on_text)


def _show(n: int, row: Row, on_text: Callable[[int, str], None] | None) -> None:
    if on_text is not None and (piece := row.piece()):
        on_text(n, piece)
