"""Responses that a model writes to prompts of pairs, judged against others by a score, beside what length alone says.

A judge is a number for each (prompt, response), the larger the better: a function of their texts, or the mean
log-probability of the response under a model.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.batch import Batch
from lm.core.types import Apply, Params, State
from lm.eval.preference import interval, share_of
from lm.generate.decode import generate
from lm.generate.sampling import SamplingOptions
from lm.losses.cross_entropy import token_scores
from lm.losses.preference.responses import CHOSEN, KINDS

Written = Sequence[tuple[np.ndarray, np.ndarray]]  # (prompt, response) ids
Judge = Callable[[Written], np.ndarray]  # -> [n] scores


def chosen_of(batches: Iterable[Batch], limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, response) of the first `limit` chosen responses, as ids [tokens] int32."""
    out = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            ids = batch.segment_ids[row]
            for segment in np.unique(ids[(ids > 0) & ((ids - 1) % KINDS == CHOSEN)]):
                inside = np.flatnonzero(ids == segment)
                first = int(np.flatnonzero(batch.weights[row, inside])[0])
                out.append((np.asarray(batch.tokens[row, inside[:first + 1]], np.int32),
                            np.asarray(batch.targets[row, inside[first:]], np.int32)))
                if len(out) == limit:
                    return out
    return out


def end_tokens(written: Written, least: float = 0.5) -> tuple[int, ...]:
    """The id that ends at least that share of the responses: where generation stops. () where there is none."""
    (token, count), = collections.Counter(int(response[-1]) for _, response in written).most_common(1)
    return (token,) if count >= least * len(written) else ()


def respond(apply: Apply, params: Params, initial_state: Callable[..., State], prompts: Sequence[np.ndarray], *,
            stop: tuple[int, ...], max_new_tokens: int, options: SamplingOptions, seed: int = 0,
            batch_size: int = 16) -> list[np.ndarray]:
    """A response to each prompt, ids with the stop token where one was drawn."""
    out = []
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first:first + batch_size])
        rows = list(range(first, first + len(part)))
        made = generate(apply, params, initial_state, part, max_new_tokens=max_new_tokens, options=options, seed=seed,
                        rows=rows, stop_tokens=stop)
        out += [np.asarray(row.tokens, np.int32) for row in made.rows]
    return out


@dataclasses.dataclass(frozen=True)
class LogProbability:
    """A judge: the mean log-probability of each response after its prompt under a model."""

    apply: Apply
    params: Params
    batch_size: int = 16

    def __call__(self, written: Written) -> np.ndarray:
        length = max(len(prompt) + len(response) for prompt, response in written) - 1
        scores = []
        for first in range(0, len(written), self.batch_size):
            part = written[first:first + self.batch_size]
            found = jax.device_get(_mean_logp(self.apply, self.params, rows_of(part, self.batch_size, length)))
            scores.append(np.asarray(found)[:len(part)])
        return np.concatenate(scores).astype(np.float64)


def rows_of(written: Written, rows: int, length: int) -> Batch:
    """One prompt and response a row, weight on the response; missing rows are padding."""
    batch = Batch(*(np.zeros((rows, length), kind) for kind in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    for row, (prompt, response) in enumerate(written):
        ids = np.concatenate([prompt, response])
        n = len(ids) - 1
        batch.tokens[row, :n], batch.targets[row, :n], batch.segment_ids[row, :n] = ids[:-1], ids[1:], 1
        batch.weights[row, len(prompt) - 1:n], batch.positions[row, :n] = 1, np.arange(n)
        batch.positions[row, n:] = np.arange(length - n)
    return batch


@functools.partial(jax.jit, static_argnames=("apply",))
def _mean_logp(apply: Apply, params: Params, batch: Batch) -> jax.Array:
    out = apply(params, batch.tokens, reset=batch.reset, positions=batch.positions, weights=batch.present)
    logp = token_scores(out.hidden, out.head, batch.targets).logp
    return jnp.sum(jnp.where(batch.weights > 0, logp, 0), 1) / jnp.maximum(batch.weights.sum(1), 1)


def win_rate(prompts: Sequence[np.ndarray], ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray],
             judge: Judge) -> dict[str, float]:
    """win_rate: share of prompts whose response of ours has the larger score, ties half, with its interval of 95%;
    length_win_rate: the same with the length in tokens as score; win_rate_of_longer: how often the judge prefers the
    longer of the two, where they differ in length. length, other_length: means."""
    scores = [judge(list(zip(prompts, side, strict=True))) for side in (ours, theirs)]
    lengths = [np.array([len(response) for response in side], np.float64) for side in (ours, theirs)]
    wins, longer = share_of(scores[0] - scores[1]), share_of(lengths[0] - lengths[1])
    low, high = interval(float(wins.mean()), len(wins))
    apart = longer != 0.5
    agrees = np.where(longer > 0.5, wins, 1 - wins)[apart]
    return {"win_rate": float(wins.mean()), "win_rate_low": low, "win_rate_high": high,
            "length_win_rate": float(longer.mean()),
            "win_rate_of_longer": float(agrees.mean()) if apart.any() else 0.5,
            "length": float(lengths[0].mean()), "other_length": float(lengths[1].mean()), "prompts": float(len(wins))}
