"""The budget of the claim peer_isoflop is what the models themselves say."""

import pytest

from experiments.claims import peer_isoflop as claim
from lm.models.build import build_model


@pytest.mark.parametrize("width", claim.FLOPS)
def test_every_arm_costs_the_flops_that_its_steps_are_counted_by(width):
    found = {arm: build_model(claim.model(arm, width), 256).flops_per_token(claim.LENGTH) for arm in claim.arms(width)}
    assert set(found.values()) == {claim.FLOPS[width]}
    assert claim.get_config().train.seq_len == claim.LENGTH
