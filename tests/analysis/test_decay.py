"""Decay curves by the numbers of the published initial tables."""

import jax
import numpy as np
import pytest

from lm.analysis.decay import decay_curves
from lm.models.build import build_model, init_params, resolve_model


def curves(**model):
    config = dict(embed_dim=64, norm="layer", dtype="float32", **model)
    return decay_curves(init_params(build_model(config, 20), jax.random.key(0)), resolve_model(config))


def test_rwkv4_starts_with_the_published_decays():
    """exp(-exp(-5 + 8 (i / (C - 1))^(0.7 + 1.3 l / (L - 1)))): .99330 to 2e-9 in every layer, and between them more
    channels that keep the past the deeper the layer is."""
    found = curves(num_layers=3, prefix=("rwkv4/mlp",), pattern=("rwkv4/mlp",))
    assert [(c.depth, c.kind, len(c.factors)) for c in found] == [(n, "rwkv4", 64) for n in range(3)]
    for curve in found:
        assert curve.factors[-1] == pytest.approx(0.99330, abs=2e-5) and curve.factors[0] < 3e-9
        assert (np.diff(curve.factors) >= 0).all()
    middle = [c.factors[32] for c in found]
    ramp = 31 / 63
    assert middle == pytest.approx([np.exp(-np.exp(-5 + 8 * ramp ** (0.7 + 0.65 * n))) for n in range(3)], rel=1e-4)


def test_rwkv7_stays_in_its_range_under_any_name():
    found = curves(num_layers=2, prefix=("first/mlp",), pattern=("rwkv7/mlp",),
                   first=dict(kind="rwkv7", head_dim=32, value_residual=False), rwkv7=dict(head_dim=32))
    assert [(c.depth, c.kind) for c in found] == [(0, "rwkv7"), (1, "rwkv7")]
    assert all(0.5452 < c.factors[0] <= c.factors[-1] < 1 for c in found)


def test_a_model_without_decays_is_refused():
    with pytest.raises(ValueError, match="no layer of this model has decays; those that have: rwkv4"):
        curves(num_layers=1, pattern=("mlp",))
