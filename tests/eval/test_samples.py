"""Samples of a run: the prompt begins a document, eos ends it, and the text is the same at every evaluation."""

import jax
import jax.numpy as jnp
import pytest

from lm.core.types import Head, Output
from lm.data.tokenizer import Bytes
from lm.eval.options import EvalOptions
from lm.eval.samples import encode_prompt, sample_texts, stop_tokens

ABC = Bytes(bos_id=0, eos_id=1)


def alphabet(params, tokens, state=None, *, reset=None, positions=None, weights=None, key=None):
    """After a letter the next one, after "f" eos: the hidden state is a one-hot of the next token."""
    following = jnp.where(tokens == ord("f"), 1, tokens + 1)
    return Output(jax.nn.one_hot(following, 128) * 50, Head(jnp.eye(128), None, 128, None), state, {})


def nothing(batch_size, *, capacity):
    return ()


def test_samples_go_on_from_each_prompt_until_eos():
    options = EvalOptions(samples=("c", "xa"), sample_tokens=4)
    assert sample_texts(alphabet, {}, nothing, ABC, options) == [("c", "def"), ("xa", "bcde")]
    assert sample_texts(alphabet, {}, nothing, ABC, options, prompts=["b"]) == [("b", "cdef")]
    assert sample_texts(alphabet, {}, nothing, ABC, EvalOptions()) == []


def test_samples_repeat_by_seed():
    def texts(seed):
        options = EvalOptions(samples=("a",), sample_tokens=8, temperature=30.0, sample_seed=seed)
        return sample_texts(alphabet, {}, nothing, ABC, options)

    assert texts(0) == texts(0) != texts(1)


def test_a_prompt_begins_with_bos_where_the_data_does_or_where_it_is_empty():
    assert encode_prompt(ABC, "a", add_bos=True).tolist() == [0, 97]
    assert encode_prompt(ABC, "a").tolist() == [97]
    assert encode_prompt(ABC, "").tolist() == [0]
    with pytest.raises(ValueError, match="the prompt is empty and the tokenizer has no bos"):
        encode_prompt(Bytes(), "")


def test_eos_is_the_only_stop_token():
    assert (stop_tokens(ABC), stop_tokens(Bytes())) == ((1,), ())
