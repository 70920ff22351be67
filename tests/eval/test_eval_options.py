"""The `eval` group: every mistake is named before a run starts."""

import pytest

from lm.core.fields import build
from lm.eval.options import EvalOptions


def test_defaults_are_valid_and_sampling_takes_the_fields():
    options = build(EvalOptions, {"temperature": 0.5, "top_k": 4, "min_p": 0.1}, "config.eval")
    assert (options.sampling.temperature, options.sampling.top_k, options.sampling.min_p) == (0.5, 4, 0.1)


@pytest.mark.parametrize(("given", "message"), [
    ({"evry": 3}, "no field 'evry'; did you mean 'every'"),
    ({"every": 0}, r"config\.eval\.every=0 must be at least 1"),
    ({"batches": 0}, r"config\.eval\.batches=0"),
    ({"sample_tokens": 0}, r"config\.eval\.sample_tokens=0"),
    ({"sets": {"validation": "x.txt"}}, "config.eval.sets has the name 'validation'"),
    ({"sets": {"a/b": "x.txt"}}, "config.eval.sets has the name 'a/b'"),
    ({"top_p": 1.5}, r"config\.eval: top_p=1\.5 must be"),
    ({"samples": "text"}, r"config\.eval\.samples must be tuple\[str, \.\.\.\]"),
])
def test_mistakes_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        build(EvalOptions, given, "config.eval")
