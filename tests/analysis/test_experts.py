"""Which tokens choose an expert: against the sums that the layers themselves report, and a loop over all choices."""

import collections

import jax
import numpy as np
from flax import linen as nn

from lm.analysis.experts import choices, layers_with_experts, use
from lm.core.batch import Batch
from lm.models.build import abstract_params, build_model, make_apply

MODEL = dict(embed_dim=16, num_layers=3, prefix=("peer",), pattern=("peer", "pkm"), dtype="float32", scan=False,
             peer=dict(num_experts=25, num_heads=2, top_k=3),
             pkm=dict(num_values=16, num_heads=2, top_k=2))


def batch(seed, rows=3, length=8):
    tokens = np.random.default_rng(seed).integers(0, 40, (rows, length)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[-1, 5:] = 0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Batch(tokens, tokens, (segments > 0).astype(np.float32), segments, positions)


def test_choices_add_up_to_what_layers_report_and_places_are_the_heaviest():
    model = build_model(MODEL, 40)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) ** 2,
                          nn.meta.unbox(abstract_params(model)))
    given = [batch(0), batch(1)]
    names = ["layer_0/peer", "layer_1/peer", "layer_2/pkm"]
    assert layers_with_experts(model) == dict(zip(names, (25, 25, 16), strict=True))

    apply, want = make_apply(model), collections.Counter()
    run = jax.jit(lambda params, b: apply(params, b.tokens, reset=b.reset, positions=b.positions,
                                          weights=b.present).aux["tally"]["stack"])
    weights = {name: collections.defaultdict(float) for name in names}
    for n, b in enumerate(given):
        tally = run(params, b)
        want.update(dict(zip(names, (np.asarray(scores) for scores in (
            tally["prefix_0"]["peer"]["usage"].scores, tally["pattern_0"]["peer"]["usage"].scores[0],
            tally["pattern_1"]["pkm"]["usage"].scores[0])), strict=True)))
        for layer, ids, gates in choices(model, params, b):
            assert (ids[-1, 5:] == -1).all() and ids.shape[:2] == (3, 8)
            for (row, t, h, k), expert in np.ndenumerate(ids):
                if expert >= 0:
                    weights[layer][int(expert), 3 * n + row, t] += gates[row, t, h, k]

    asked = {"layer_0/peer": range(25), "layer_2/pkm": (0,)}
    found = use(model, params, given, asked, 4)
    assert set(found) == set(asked)
    for name, one in found.items():
        np.testing.assert_allclose(one.scores, want[name], rtol=1e-5)
        assert one.usage == np.mean(want[name] > 0)
        z = want[name][want[name] > 0] / want[name].sum()
        np.testing.assert_allclose(one.unevenness, np.log(len(want[name])) + (z * np.log(z)).sum(), rtol=1e-4)
        for expert in range(len(one.scores)):
            assert one.tokens[expert] == sum(e == expert for e, _, _ in weights[name])
        for expert in asked[name]:
            best = sorted(((w, row, t) for (e, row, t), w in weights[name].items() if e == expert), reverse=True)[:4]
            np.testing.assert_allclose([place.weight for place in one.places[expert]], [w for w, *_ in best], rtol=1e-5)
            for place in one.places[expert]:
                np.testing.assert_allclose(weights[name][expert, place.row, place.position], place.weight, rtol=1e-5)
                np.testing.assert_array_equal(place.tokens, given[place.row // 3].tokens[place.row % 3])
    assert any(one.places[e] for one in found.values() for e in one.places)
