"""Metrics of sets against sums in numpy over full logits; splits of the batch and meshes change nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.core.head import logits_of
from lm.core.sharding import batch_sharding, make_mesh, shardings
from lm.eval.base import by_set, evaluate
from lm.eval.perplexity import Perplexity, batch_totals, metrics_of
from lm.eval.sets import EvalSet
from lm.models.build import abstract_params, build_model, init_params, make_apply

VOCAB, BYTES = 40, np.random.default_rng(9).integers(0, 5, 40).astype(np.float64)
METRICS = {"loss", "perplexity", "bits_per_byte", "accuracy"}


@functools.cache
def decoder():
    model = build_model(dict(embed_dim=16, num_layers=1, pattern=("attention",), attention=dict(num_heads=2),
                             dtype="float32", vocab_multiple=64), VOCAB)
    params = jax.tree.map(lambda leaf: leaf * 5, init_params(model, jax.random.key(0)))
    return model, make_apply(model), params


def packed(rows=4, length=12, seed=0):
    """Two documents and some padding a row; the last token of a document, and padding, have no target."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        a, b = sorted(rng.choice(np.arange(2, length), 2, replace=False))
        row[:a], row[a:b] = 1, 2
    first = np.diff(segments, axis=1, prepend=0) != 0
    start = np.maximum.accumulate(np.where(first, np.arange(length), 0), axis=1)
    tokens = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    following = np.roll(segments, -1, axis=1)
    following[:, -1] = 0
    weights = ((segments > 0) & (segments == following)).astype(np.float32)
    targets = np.where(weights > 0, np.roll(tokens, -1, axis=1), 10**6).astype(np.int32)
    return Batch(tokens, targets, weights, segments, (np.arange(length) - start).astype(np.int32))


def oracle(batches):
    """Each document alone through the model, log-softmax and sums in numpy float64."""
    _, apply, params = decoder()
    forward = jax.jit(lambda ids: logits_of(*apply(params, ids)[:2])[0])
    nats = right = count = size = 0.0
    for batch in batches:
        for row in range(len(batch.tokens)):
            for document in (1, 2):
                ids = batch.tokens[row, batch.segment_ids[row] == document]
                alone = np.zeros((1, batch.tokens.shape[1]), np.int32)  # filled up, so that one shape is compiled
                alone[0, :len(ids)] = ids
                logits = np.asarray(forward(alone), np.float64)[:, :VOCAB]
                for position, target in enumerate(ids[1:]):
                    scores = logits[position]
                    nats += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
                    right += scores.argmax() == target
                    count, size = count + 1, size + BYTES[target]
    return {"loss": nats / count, "perplexity": math.exp(nats / count), "accuracy": right / count,
            "bits_per_byte": nats / math.log(2) / size}


def measured(batches, **options):
    _, apply, params = decoder()
    evaluator = Perplexity({"some": EvalSet(lambda: batches, BYTES)}, **options)
    return by_set(evaluate([evaluator], apply, params))["some"]


def test_metrics_are_the_sums_over_every_document_alone():
    batches = [packed(seed=n) for n in range(2)]
    got, expected = measured(batches), oracle(batches)
    assert set(got) == METRICS
    for name in METRICS:
        assert got[name] == pytest.approx(expected[name], rel=1e-5), name


def test_how_rows_are_divided_into_batches_changes_nothing():
    batches = [packed(seed=n) for n in range(3)]
    joined = Batch(*(np.concatenate(fields) for fields in zip(*batches, strict=True)))
    uneven = [Batch(*(field[:8] for field in joined)), Batch(*(field[8:] for field in joined))]
    got, whole, cut = measured(batches), measured([joined], chunk=5), measured(uneven)
    for name in METRICS:
        assert got[name] == pytest.approx(whole[name], rel=1e-6) == pytest.approx(cut[name], rel=1e-6), name


def test_rows_of_padding_count_nothing():
    batch = packed()
    more = Batch(*(np.concatenate([field, np.zeros_like(field)]) for field in batch))
    assert measured([more]) == pytest.approx(measured([batch]), rel=1e-6)


@pytest.mark.parametrize("placed", [False, True])
def test_rows_over_a_mesh_give_the_same(placed):
    model, apply, params = decoder()
    batches, mesh = [packed(seed=n) for n in range(2)], make_mesh(dict(data=2, fsdp=2), devices=jax.devices()[:4])
    alone = measured(batches)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings(abstract_params(model), mesh))
        place = (lambda batch: jax.device_put(batch, batch_sharding(mesh, batch.tokens.shape))) if placed else None
        got = evaluate([Perplexity({"some": EvalSet(lambda: batches, BYTES)}, place)], apply, split)
    assert by_set(got)["some"] == pytest.approx(alone, rel=1e-6)


def test_the_model_is_compiled_once_for_all_sets_and_calls():
    _, apply, params = decoder()
    traces = []

    def counted(*args, **context):
        traces.append(1)
        return apply(*args, **context)

    evaluator = Perplexity({name: EvalSet(lambda n=n: [packed(seed=n)] * 2, BYTES) for n, name in enumerate("ab")})
    first = dict(evaluator(counted, params))
    assert dict(evaluator(counted, params)) == first and len(traces) == 1
    assert list(first)[:4] == ["eval/a/loss", "eval/a/perplexity", "eval/a/bits_per_byte", "eval/a/accuracy"]


def test_fractional_weights_weigh_nats_and_bytes():
    _, apply, params = decoder()
    batch = packed()
    halved = batch._replace(weights=batch.weights * np.where(np.arange(12) % 2, 0.5, 1).astype(np.float32))
    totals = batch_totals(apply, params, halved, jnp.asarray(BYTES, jnp.float32), None)
    at = halved.weights > 0
    assert float(totals["bytes"].total) == pytest.approx(np.sum(BYTES[halved.targets[at]] * halved.weights[at]))
    assert float(totals["loss"].count) == halved.weights.sum() < batch.weights.sum()


def test_the_model_is_told_what_is_padding_and_where_documents_start():
    _, apply, params = decoder()
    given = {}

    def recording(params, tokens, **context):
        given.update(context)
        return apply(params, tokens, **context)

    batch = packed()
    with jax.disable_jit():
        list(Perplexity({"a": EvalSet(lambda: [batch])})(recording, params))
    np.testing.assert_array_equal(given["weights"], batch.segment_ids != 0)
    np.testing.assert_array_equal(given["reset"], batch.positions == 0)
    np.testing.assert_array_equal(given["positions"], batch.positions)


def test_without_bytes_of_tokens_there_are_no_bits_per_byte():
    _, apply, params = decoder()
    names = dict(Perplexity({"a": EvalSet(lambda: [packed()])})(apply, params))
    assert set(by_set(names)["a"]) == METRICS - {"bits_per_byte"}


def test_a_set_without_targets_is_an_error_that_names_it():
    _, apply, params = decoder()
    empty = packed()._replace(weights=np.zeros((4, 12), np.float32))
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="'none' has no target"):
            list(Perplexity({"none": EvalSet(lambda b=batches: b)})(apply, params))


def test_a_hopeless_loss_has_infinite_perplexity_and_nan_stays_nan():
    from lm.core.types import Mean
    right = Mean(0.0, 1.0)
    assert metrics_of({"loss": Mean(1e4, 1.0), "accuracy": right})["perplexity"] == math.inf
    assert math.isnan(metrics_of({"loss": Mean(math.nan, 1.0), "accuracy": right})["perplexity"])


def test_two_evaluators_of_one_name_are_refused():
    twice = lambda apply, params, key: iter([("eval/a/loss", 1.0)])
    with pytest.raises(ValueError, match="two evaluators give 'eval/a/loss'"):
        evaluate([twice, twice], None, None)
