"""Texts that a model writes: what a run shows at an evaluation."""

from collections.abc import Callable, Sequence

import numpy as np

from lm.core.types import Apply, Params, State
from lm.data.tokenizer import Tokenizer
from lm.eval.options import EvalOptions
from lm.generate.decode import generate


def encode_prompt(tokenizer: Tokenizer, text: str, *, add_bos: bool = False) -> np.ndarray:
    """Token ids of a prompt as the start of a document: with bos in front where the training data has it.

    An empty prompt is bos alone. Raises ValueError for an empty prompt where the tokenizer has no bos.
    """
    ids = np.asarray(tokenizer.encode(text), np.int32)
    if tokenizer.bos_id is not None and (add_bos or not ids.size):
        ids = np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])
    if not ids.size:
        raise ValueError("the prompt is empty and the tokenizer has no bos token to begin with; give at least one "
                         "character")
    return ids


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text: eos, where there is one."""
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def sample_texts(apply: Apply, params: Params, initial_state: Callable[..., State], tokenizer: Tokenizer,
                 options: EvalOptions, *, add_bos: bool = False,
                 prompts: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(prompt, continuation) of each of `options.samples`, or of `prompts`; the same at every call with the same
    parameters. Raises ValueError for an empty prompt without bos."""
    prompts = options.samples if prompts is None else prompts
    if not prompts:
        return []
    ids = [encode_prompt(tokenizer, prompt, add_bos=add_bos) for prompt in prompts]
    out = generate(apply, params, initial_state, ids, max_new_tokens=options.sample_tokens, options=options.sampling,
                   seed=options.sample_seed, stop_tokens=stop_tokens(tokenizer), decode=tokenizer.decode)
    return [(prompt, row.text) for prompt, row in zip(prompts, out.rows, strict=True)]
