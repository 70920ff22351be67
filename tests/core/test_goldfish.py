"""Goldfish masks against the published numbers, a Python loop of the published algorithm, and what a mask must hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.core.batch import Batch
from lm.core.goldfish import Goldfish, dropped, masked
from lm.core.goldfish_hash import lanes_of_salt, window_bits
from lm.core.goldfish_sharded import dropped_over_shards
from lm.core.goldfish_umd import TABLE_SIZE, product_keys, table
from lm.core.sharding import make_mesh

on_device = jax.jit(dropped, static_argnames="options")
over_shards = jax.jit(dropped_over_shards, static_argnames="options")
KINDS = [Goldfish(k=3, h=5), Goldfish(k=4, h=13), Goldfish(k=2, h=1), Goldfish(k=4, h=2, exempt=(3, 9)),
         Goldfish(k=5, h=50), Goldfish(k=3, h=5, salt=7), Goldfish(mask="static", k=3, offset=2),
         Goldfish(mask="random", k=3), Goldfish(k=4, h=13, compat="umd"), Goldfish(k=3, h=4, compat="umd"),
         Goldfish(mask="static", k=4, compat="umd")]
kinds = pytest.mark.parametrize("options", KINDS, ids=[f"{n}-{o.mask}-k{o.k}-h{o.h}" for n, o in enumerate(KINDS)])


def row_of(targets, start=0):
    """One document that begins with token `start`; targets [n]."""
    targets = np.asarray(targets, np.int32)[None]
    tokens = np.concatenate([np.full((1, 1), start, np.int32), targets[:, :-1]], axis=1)
    ones = np.ones(targets.shape, np.int32)
    return Batch(tokens, targets, np.ones(targets.shape, np.float32), ones,
                 np.arange(targets.shape[1], dtype=np.int32)[None])


def packed(seed=0, rows=4, length=64, vocab=50):
    """Rows of two documents and padding; the target of a document's last token is none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    targets = np.concatenate([tokens[:, 1:], np.zeros((rows, 1), np.int32)], axis=1)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for b in range(rows):
        cut, end = rng.integers(10, 30), rng.integers(45, length)
        segments[b, :cut], segments[b, cut:end] = 1, 2
        for begin, stop in ((0, cut), (cut, end), (end, length)):
            positions[b, begin:stop] = np.arange(stop - begin)
    last = np.concatenate([segments[:, 1:] != segments[:, :-1], np.ones((rows, 1), bool)], axis=1)
    weights = ((segments > 0) & ~last).astype(np.float32)
    return Batch(tokens, np.where(weights > 0, targets, 0).astype(np.int32), weights, segments, positions)


def published(targets, k, h):
    """`apply_goldfish`, hash-table: indices of dropped targets, with Python's integers for int64 arithmetic."""
    drawn, out = table(), []
    for j in range(h - 1, len(targets)):
        product = 1
        for y in targets[j - h + 1:j + 1]:
            product = (product * int(y) + 2**63) % 2**64 - 2**63
        if drawn[product % TABLE_SIZE] / 2**24 < 1 / k:
            out.append(j)
    return out


@pytest.mark.parametrize("h, k, want", [(13, 4, [18, 21]), (13, 3, [16, 18, 21]), (4, 4, [7, 12, 13, 19, 25, 28])])
def test_published_golden_vectors(h, k, want):
    found = dropped(Goldfish(k=k, h=h, compat="umd"), row_of(np.arange(1, 33)))
    assert np.flatnonzero(found[0]).tolist() == want


@pytest.mark.parametrize("value", [0, 7])
def test_published_mask_of_a_constant_text(value):
    """The weakness of the product hash that is kept: all windows of a constant text are one."""
    assert dropped(Goldfish(k=4, h=13, compat="umd"), row_of(np.full(40, value))).sum() == 28


def test_published_table_is_that_of_torch():
    np.testing.assert_allclose(table()[:4] * 2.0**-24, [.23368388, .44126403, .7411477, .9092719], atol=5e-9)
    shares = [(table() * k < 2**24).mean() for k in (4, 3, 50)]
    np.testing.assert_allclose(shares, [.24953, .33231, .01990], atol=5e-6)


def test_published_table_equals_torch_itself():
    torch = pytest.importorskip("torch", reason="needs torch")
    drawn = torch.rand(TABLE_SIZE, generator=torch.Generator().manual_seed(2971215073))
    np.testing.assert_array_equal((drawn.double() * 2**24).long().numpy(), table())


@pytest.mark.parametrize("h, k", [(13, 4), (13, 3), (50, 50), (4, 8), (1, 3), (2, 2)])
@pytest.mark.parametrize("vocab", [10, 50_000, 2**31 - 1])
def test_published_hash_equals_a_loop_with_wrapping_integers(h, k, vocab):
    targets = np.random.default_rng(h).integers(0, vocab, 200)
    found = dropped(Goldfish(k=k, h=h, compat="umd"), row_of(targets))
    assert np.flatnonzero(found[0]).tolist() == published(targets, k, h)


def test_keys_of_products_that_wrap():
    ids = np.array([[2**31 - 1, 2**31 - 3, 2**31 - 1, 12345, 2**31 - 5, 0, 3]], np.int32)
    keys = product_keys(ids[:, :-1], ids[:, 1:], 3)
    for t in range(1, 6):
        product = int(ids[0, t - 1]) * int(ids[0, t]) * int(ids[0, t + 1])
        assert keys[0, t] == ((product + 2**63) % 2**64 - 2**63) % TABLE_SIZE


def version_1(window, salt=0):
    """The default hash of one window, written down again with Python's integers."""
    whole, word = 2**64 - 1, 2**32 - 1

    def mixed(x):
        x = (x ^ x >> 16) * 0x85EBCA6B & word
        x = (x ^ x >> 13) * 0xC2B2AE35 & word
        return x ^ x >> 16

    z = (salt * 256 + 1) * 0x9E3779B97F4A7C15 & whole
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & whole
    z = (z ^ z >> 27) * 0x94D049BB133111EB & whole
    high, low = divmod(z ^ z >> 31, 2**32)
    first = second = 0
    for one in map(int, window):
        first = (first * 0x2C1B3C6D + mixed(one ^ high)) & word
        second = (second * 0x85EBCA6B + mixed((one * 0x9E3779B9 + low) & word)) & word
    return mixed(first ^ mixed((second + len(window)) & word))


@pytest.mark.parametrize("h", [1, 2, 3, 7, 13, 50])
@pytest.mark.parametrize("salt", [0, 2**32 - 1])
def test_default_hash_equals_a_loop_over_the_window(h, salt):
    targets = np.random.default_rng(h).integers(0, 2**31, 70)
    batch = row_of(targets, start=77)
    text = [77, *targets]
    bits = window_bits(batch.tokens, batch.targets, h, lanes_of_salt(salt))[0]
    want = [version_1(text[t + 2 - h:t + 2], salt) for t in range(max(h - 2, 0), 70)]
    assert bits[max(h - 2, 0):].tolist() == want
    found = dropped(Goldfish(k=3, h=h, salt=salt), batch)[0]
    assert found.tolist() == [False] * max(h - 2, 0) + [b < 2**32 // 3 for b in want]


def test_default_hash_never_changes():
    """What version 1 gives for these windows, for good: another result drops other targets of the same texts."""
    batch = row_of(np.arange(1, 33))
    assert np.flatnonzero(dropped(Goldfish(k=4, h=13), batch)[0]).tolist() == GOLDEN_H13
    assert np.flatnonzero(dropped(Goldfish(k=3, h=4, salt=5), batch)[0]).tolist() == GOLDEN_H4
    bits = window_bits(batch.tokens, batch.targets, 3, lanes_of_salt(0))
    assert bits[0, [2, 3, 31]].tolist() == GOLDEN_BITS


GOLDEN_H13, GOLDEN_H4 = [12, 15, 22, 25, 31], [7, 15, 17, 18, 19, 21, 23, 24, 25, 26, 30]
GOLDEN_BITS = [122225401, 1015016941, 3435396083]


@kinds
def test_device_and_data_pipeline_agree_to_the_bit(options):
    batch = packed()
    ours = dropped(options, batch, 123)
    theirs = on_device(options, jax.tree.map(jnp.asarray, batch), jnp.uint32(123))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == bool and theirs.dtype == bool


@kinds
@pytest.mark.parametrize("seq", [2, 4])
def test_a_sequence_over_devices_has_the_same_mask(options, seq):
    """Windows reach over the shards of time: the tokens before a shard come from its neighbour."""
    batch = packed()
    mesh = make_mesh({"data": 2, "context": seq}, devices=jax.devices()[:2 * seq])
    sharding = NamedSharding(mesh, PartitionSpec("data", "context"))
    with jax.set_mesh(mesh):
        compiled = over_shards.lower(options, jax.device_put(batch, sharding), jnp.uint32(5)).compile()
        found = compiled(jax.device_put(batch, sharding), jnp.uint32(5))
    np.testing.assert_array_equal(found, dropped(options, batch, 5))
    assert "all-gather" not in compiled.as_text(), "rows were put together on every device"


@pytest.mark.parametrize("options", [Goldfish(k=3, h=5), Goldfish(k=4, h=13), Goldfish(mask="random", k=10),
                                     Goldfish(mask="static", k=7), Goldfish(k=4, h=1)], ids=str)
def test_share_of_dropped_targets_is_one_in_k(options):
    """Within three standard deviations, over ids that are uniform (h=1: over many ids)."""
    rng = np.random.default_rng(1)
    rows = np.concatenate([dropped(options, row_of(rng.integers(0, 10**6, 20_000)), n)[0, options.h:]
                           for n in range(4)])
    assert abs(rows.mean() - 1 / options.k) < 3 * np.sqrt((1 - 1 / options.k) / options.k / rows.size)


def test_few_ids_zeros_and_even_ids_do_not_break_the_default_hash():
    """What breaks the published one: windows with id 0, ids that share factors, small vocabularies."""
    for vocab, scale in ((3, 1), (16, 2), (256, 64)):
        targets = np.random.default_rng(2).integers(0, vocab, 40_000) * scale
        assert abs(dropped(Goldfish(k=4, h=13), row_of(targets))[0].mean() - 0.25) < 0.02


def test_default_hash_sees_the_order_and_every_token_of_the_window():
    rng = np.random.default_rng(3)
    options, differs = Goldfish(k=2, h=5), {"order": 0, **{n: 0 for n in range(6)}}
    for _ in range(200):
        window = rng.choice(1000, 6, replace=False)
        whole = dropped(options, row_of(window))[0, 5]
        differs["order"] += whole != dropped(options, row_of(window[[0, 2, 1, 3, 4, 5]]))[0, 5]
        for n in range(6):
            other = np.where(np.arange(6) == n, 1001, window)
            differs[n] += whole != dropped(options, row_of(other))[0, 5]
    assert differs[0] == 0, "a token before the window changed the mask"
    assert all(60 < count < 140 for n, count in differs.items() if n != 0), differs


def test_the_same_text_loses_the_same_targets_wherever_it_stands():
    """In another row, behind a prefix, in another document of the row, at another repetition."""
    options, text = Goldfish(k=3, h=6), np.random.default_rng(4).integers(0, 100, 40)
    want = dropped(options, row_of(text))[0]
    behind = dropped(options, row_of(np.concatenate([[5, 6, 7], text])), 99)[0]
    np.testing.assert_array_equal(behind[3 + 5:], want[5:])
    batch = packed()
    tokens = batch.tokens.copy()
    tokens[2, :30], tokens[3, 20:50] = text[:30], text[:30]
    one = np.ones_like(tokens)
    two = np.where((np.arange(64) >= 20)[None] & (np.arange(4) == 3)[:, None], 2, one)
    targets = np.concatenate([tokens[:, 1:], one[:, :1]], axis=1)
    found = dropped(options, Batch(tokens, targets, batch.weights, two, batch.positions))
    np.testing.assert_array_equal(found[2, :28], found[3, 20:48])
    assert found[2, 4:28].any() and not found[3, 20:24].any(), "a window reached into the document before"


def test_targets_without_h_tokens_of_their_document_are_kept():
    batch = packed(rows=40)
    for h in (2, 5, 13):
        found = dropped(Goldfish(k=2, h=h), batch)
        counted = (batch.weights > 0)
        assert not (found & counted & (batch.positions < h - 2)).any()
        assert (found & counted & (batch.positions == h - 2)).any()


def test_undefined_targets_do_not_change_the_mask_of_others():
    """Where the weight is 0, as in a masked prompt, the target may be any number."""
    batch = packed()
    counted = batch.weights * (np.random.default_rng(0).random(batch.weights.shape) < 0.5)
    other = batch._replace(targets=np.where(counted > 0, batch.targets, -1).astype(np.int32), weights=counted)
    for options in KINDS:
        np.testing.assert_array_equal(dropped(options, batch)[counted > 0], dropped(options, other)[counted > 0])


def test_static_drops_every_kth_of_a_document_and_umd_of_a_row():
    batch = packed()
    found = dropped(Goldfish(mask="static", k=3, offset=1), batch)
    np.testing.assert_array_equal(found, batch.positions % 3 == 1)
    found = dropped(Goldfish(mask="static", k=3, offset=1, compat="umd"), batch)
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(64) % 3 == 1, found.shape))


def test_random_is_new_for_each_row_of_the_run_and_the_same_for_a_row():
    batch = packed()
    whole = dropped(Goldfish(mask="random", k=3), batch, 10)
    part = dropped(Goldfish(mask="random", k=3), Batch(*(field[2:] for field in batch)), 12)
    np.testing.assert_array_equal(whole[2:], part)
    assert (whole != dropped(Goldfish(mask="random", k=3), batch, 14)).mean() > 0.3


def test_special_ids_are_never_dropped():
    options = Goldfish(k=2, h=3).with_exempt([3, 9])
    batch = packed(vocab=12)
    special = np.isin(batch.targets, [3, 9])
    assert dropped(Goldfish(k=2, h=3), batch)[special].any() and not dropped(options, batch)[special].any()
    np.testing.assert_array_equal(dropped(options, batch)[~special], dropped(Goldfish(k=2, h=3), batch)[~special])
    assert Goldfish(compat="umd").with_exempt([3]).exempt is None
    assert Goldfish(exempt=()).with_exempt([3]).exempt == ()


def test_masked_batch_keeps_inputs_and_splits_the_weights():
    batch = packed()
    batch = batch._replace(weights=batch.weights * 0.5)
    out = masked(Goldfish(k=2, h=3), batch)
    np.testing.assert_array_equal(out.weights + out.dropped, batch.weights)
    assert (out.weights * out.dropped == 0).all() and out.dropped.any() and out.weights.any()
    for name in ("tokens", "targets", "segment_ids", "positions"):
        assert getattr(out, name) is getattr(batch, name)


def test_large_k_drops_nothing():
    assert not dropped(Goldfish(k=2**31 - 1, h=3), packed(rows=50)).any()


@pytest.mark.parametrize("fields, message", [
    (dict(k=1), "leave goldfish out"), (dict(h=0), "h=0 must be from 1"), (dict(offset=2), "0 where mask"),
    (dict(mask="static", offset=4), "k - 1 = 3"), (dict(salt=-1), "salt=-1"), (dict(salt=2**32), "2\\^32 - 1"),
    (dict(compat="umd", mask="random"), "published mask"), (dict(compat="umd", salt=3), "no salt"),
    (dict(compat="umd", exempt=(0,)), "exempts no id"), (dict(exempt=(5, -1)), "exempt holds -1")])
def test_values_that_make_no_mask_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Goldfish(**fields).check()


def test_exempt_ids_are_ids_of_the_tokenizer():
    Goldfish(exempt=(0, 63)).check_vocab(64)
    Goldfish().check_vocab(64)
    with pytest.raises(ValueError, match="exempt holds 64, and the tokenizer's ids are 0 to 63"):
        Goldfish(exempt=(0, 64)).check_vocab(64)


def test_rows_too_short_for_any_window_are_refused():
    Goldfish(h=13).check_length(12)
    with pytest.raises(ValueError, match=r"h=14 needs train\.seq_len of at least 13"):
        Goldfish(h=14).check_length(12)
    dataclasses.replace(Goldfish(mask="static"), h=500).check_length(12)
