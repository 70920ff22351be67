"""Mistakes in the optimizer group are found before anything is built, and name what is near."""

import pytest

from lm.core.fields import build
from lm.optim.options import OptimizerOptions


def check(**given):
    return build(OptimizerOptions, given, "config.optimizer")


def test_defaults_are_valid():
    check()


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant", "inverse_sqrt"])
def test_every_optimizer_goes_with_every_schedule(name, schedule):
    check(name=name, schedule=schedule)


@pytest.mark.parametrize("given, says", [
    (dict(name="adanw"), "did you mean 'adamw'"),
    (dict(name="muom"), "did you mean 'muon'"),
    (dict(schedule="cosin"), "did you mean 'cosine'"),
    (dict(schedule="wds"), "did you mean 'wsd'"),
    (dict(state_dtype="bf16"), "did you mean 'bfloat16'"),
    (dict(muon_newton_schulz="fast"), "Known: standard, gram"),
    (dict(learning_rat=1.0), "did you mean 'learning_rate'"),
    (dict(learning_rate=0.0), "must be above 0"),
    (dict(warmup_steps=-1), "at least 0"),
    (dict(b2=1.0), "below 1"),
    (dict(final_fraction=1.5), "from 0 to 1"),
    (dict(stochastic_rounding=True), "set config.optimizer.state_dtype='bfloat16'"),
    (dict(momentum=0.9), "set config.optimizer.b1"),
    (dict(name="lion", nesterov=True), "no effect on lion"),
])
def test_mistakes_are_explained(given, says):
    with pytest.raises(ValueError, match=says):
        check(**given)


@pytest.mark.parametrize("rule, says", [
    (dict(match="x", lr_multipler=0.1), "did you mean 'lr_multiplier'"),
    (dict(match="x"), "at least one of lr_multiplier"),
    (dict(freeze=True), "needs 'match'"),
    (dict(match="x", freeze="yes"), r"rules\[0\].freeze must be bool"),
    (dict(match="x", weight_decay=-0.1), "at least 0"),
    (dict(match="x", optimizer="adam"), "did you mean 'adamw'"),
    (dict(match="(", freeze=True), "no regular expression"),
])
def test_mistakes_in_rules_are_explained(rule, says):
    with pytest.raises(ValueError, match=says):
        check(rules=(rule,))
