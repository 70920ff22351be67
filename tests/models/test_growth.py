"""More experts: numbers and rows of the old ones stay, what cannot grow is refused with what would do."""

import re

import jax
import numpy as np
import pytest

from lm.models.build import resolve_model
from lm.models.growth import check_number, entry_to_grow, freezing, grow
from lm.optim.options import OptimizerOptions
from lm.optim.rules import table

RNG = np.random.default_rng(0)
MODEL = resolve_model(dict(embed_dim=8, num_layers=5, prefix=("mlp/peer",), pattern=("peer/peer", "attention/pkm"),
                           peer=dict(num_experts=9, num_heads=2, top_k=2), pkm=dict(num_values=9, num_heads=1, top_k=2),
                           attention=dict(num_heads=1)))


def layer(*lead):
    draw = lambda *shape: RNG.normal(size=(*lead, *shape)).astype(np.float32)
    return {"experts": draw(9, 2, 8), "router": {"keys": draw(2, 3, 1), "query": {"kernel": draw(8, 4)}}}


def variables():
    stats = lambda *lead: {"usage": {"idle": RNG.random((*lead, 9)).astype(np.float32)}}
    return {"params": {"stack": {"prefix_0": {"peer": layer(), "mlp": {"up": {"kernel": np.ones((8, 8))}}},
                                 "pattern_0": {"peer_0": layer(2), "peer_1": layer(2)},
                                 "pattern_1": {"pkm": {"values": np.ones((2, 9, 8)),
                                                       "router": {"keys": np.ones((2, 2, 3, 1))}}}}},
            "stats": {"stack": {"prefix_0": {"peer": stats()}, "pattern_0": {"peer_0": stats(2)}}}}


@pytest.mark.parametrize("keys", ["near", "fresh"])
def test_old_rows_stay_and_new_ones_are_silent(keys):
    old = variables()
    new = grow(old, MODEL, "peer", 25, keys=keys, seed=3)
    for block, name, lead in (("prefix_0", "peer", ()), ("pattern_0", "peer_0", (2,)), ("pattern_0", "peer_1", (2,))):
        before, after = (tree["params"]["stack"][block][name] for tree in (old, new))
        assert after["experts"].shape == (*lead, 25, 2, 8) and after["experts"].dtype == np.float32
        np.testing.assert_array_equal(after["experts"][..., :9, :, :], before["experts"])
        assert not after["experts"][..., 9:, 1, :].any() and 0.2 < after["experts"][..., 9:, 0, :].std() < 0.5
        np.testing.assert_array_equal(after["router"]["keys"][..., :3, :], before["router"]["keys"])
        assert after["router"]["keys"].shape == (*lead, 2, 5, 1)
        assert after["router"]["query"]["kernel"] is before["router"]["query"]["kernel"]
    idle = new["stats"]["stack"]["pattern_0"]["peer_0"]["usage"]["idle"]
    assert idle.shape == (2, 25) and not idle[:, 9:].any()
    for path in (("prefix_0", "mlp"), ("pattern_1", "pkm")):
        before, after = (jax.tree.leaves(tree["params"]["stack"][path[0]][path[1]]) for tree in (old, new))
        assert all(a is b for a, b in zip(after, before, strict=True))


def test_rows_numbered_by_the_grid_are_put_into_shells():
    old = variables()
    new = grow(old, {**MODEL, "peer": {**MODEL["peer"], "numbering": "grid"}}, "peer", 16, keys="near", seed=0)
    shells = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2)]
    for get in (lambda tree: tree["params"]["stack"]["pattern_0"]["peer_1"]["experts"][1, :, 0, 0],
                lambda tree: tree["stats"]["stack"]["prefix_0"]["peer"]["usage"]["idle"]):
        np.testing.assert_array_equal(get(new)[:9], [get(old)[3 * i + j] for i, j in shells])


@pytest.mark.parametrize("new, shards, message", [
    (1000, 1, "is not a square n * n, as product keys need; nearest: 1024 = 32^2"),
    (900, 1, "is no more than the 961 = 31^2 experts that there are; experts are added, and none is taken away; "
             "nearest: 1024 = 32^2"),
    (961, 1, "nearest: 1024 = 32^2"), (-4, 4, "nearest: 1024 = 32^2"),
    (1089, 8, "is not divided by the mesh axis expert=8, over which experts are split; nearest: 1024 = 32^2"),
    (1296, 32, "expert=32, over which experts are split; nearest: 1024 = 32^2"),
    (1024, 3, "nearest: 1089 = 33^2")])
def test_a_number_that_cannot_be_is_refused_with_the_nearest(new, shards, message):
    check_number(961, 1024, 8)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_number(961, new, shards)


def test_only_peer_grows():
    assert entry_to_grow(MODEL, None) == entry_to_grow(MODEL, "peer") == "peer"
    with pytest.raises(ValueError, match="no layer 'pkm' of kind 'peer'; it has peer"):
        entry_to_grow(MODEL, "pkm")
    with pytest.raises(ValueError, match=re.escape("no layer of kind 'peer', the one that can grow; its layers: "
                                                   "attention (kind attention), mlp (kind mlp)")):
        entry_to_grow(resolve_model(dict(num_layers=1, embed_dim=64)), None)
    two = resolve_model(dict(embed_dim=8, num_layers=2, pattern=("peer", "other"), peer=dict(num_experts=9, top_k=2),
                             other=dict(kind="peer", num_experts=9, top_k=2)))
    assert entry_to_grow(two, "other") == "other"
    with pytest.raises(ValueError, match="--layer: peer, other"):
        entry_to_grow(two, None)


@pytest.mark.parametrize("what", ["none", "experts", "router", "rest"])
def test_rules_freeze_what_was_asked(what):
    grown = grow(variables(), MODEL, "peer", 16, keys="near", seed=0)
    rows = {row.name: row for row in table(OptimizerOptions(rules=tuple(freezing(MODEL, "peer", what))), grown)
            if not row.name.startswith("stats/")}
    for name, row in rows.items():
        leaf, mine = name.rsplit("/", 1)[1], re.search(r"/peer(_\d)?/", name)
        assert row.held == ({"experts": (9, -3), "keys": (3, -2)}.get(leaf) if mine and what != "none" else None)
        frozen = {"router": bool(mine) and leaf == "kernel", "rest": not mine or leaf == "kernel"}
        assert row.frozen == frozen.get(what, False), name
