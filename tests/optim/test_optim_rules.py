"""Every parameter gets exactly one row, from the first rule that says each thing."""

import jax
import jax.numpy as jnp
import pytest

from lm.optim.options import OptimizerOptions
from lm.optim.rules import format_table, table


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


VARIABLES = {
    "params": {
        "embed": {"embedding": shape(32, 8)},
        "stack": {
            "prefix_0": {"norm0": {"scale": shape(8)}, "mlp": {"up": {"kernel": shape(8, 16), "bias": shape(16)}}},
            "pattern_0": {"norm0": {"scale": shape(3, 8)},
                          "attention": {"query": {"kernel": shape(3, 8, 8), "bias": shape(3, 8)}},
                          "moe": {"up": {"kernel": shape(3, 4, 8, 16)}},
                          "mix": shape(3, 5, 8)},
        },
        "head": {"kernel": shape(32, 8)},
    },
    "lora": {"stack": {"pattern_0": {"attention": {"query": {"a": shape(3, 8, 2), "b": shape(3, 2, 8)}}}}},
}


def rows(**given):
    return {row.name: row for row in table(OptimizerOptions(**given), VARIABLES)}


def test_defaults_decay_matrices_only_whether_stacked_or_not():
    decays = {name: row.weight_decay for name, row in rows(weight_decay=0.5).items()}
    assert decays == {
        "embed/embedding": 0.0,
        "head/kernel": 0.5,
        "stack/prefix_0/norm0/scale": 0.0,
        "stack/prefix_0/mlp/up/kernel": 0.5,
        "stack/prefix_0/mlp/up/bias": 0.0,
        "stack/pattern_0/norm0/scale": 0.0,
        "stack/pattern_0/attention/query/kernel": 0.5,
        "stack/pattern_0/attention/query/bias": 0.0,
        "stack/pattern_0/moe/up/kernel": 0.5,
        "stack/pattern_0/mix": 0.0,
        "lora/stack/pattern_0/attention/query/a": 0.5,
        "lora/stack/pattern_0/attention/query/b": 0.5,
    }


def test_embeddings_decay_when_asked():
    assert rows(weight_decay=0.5, decay_embeddings=True)["embed/embedding"].weight_decay == 0.5


def test_muon_takes_hidden_matrices_only():
    muon = {name for name, row in rows(name="muon").items() if row.optimizer == "muon"}
    assert muon == {"stack/prefix_0/mlp/up/kernel", "stack/pattern_0/attention/query/kernel"}
    assert {row.optimizer for name, row in rows(name="muon").items() if name not in muon} == {"adamw"}
    assert {row.optimizer for row in rows(name="lion").values()} == {"lion"}


def test_first_rule_that_says_a_thing_decides_it():
    got = rows(weight_decay=0.5, rules=(
        {"match": "query/kernel$", "lr_multiplier": 0.1},
        {"match": "attention", "lr_multiplier": 0.2, "weight_decay": 0.3},
    ))
    kernel, bias = (got[f"stack/pattern_0/attention/query/{leaf}"] for leaf in ("kernel", "bias"))
    assert (kernel.lr_multiplier, kernel.weight_decay) == (0.1, 0.3)
    assert (bias.lr_multiplier, bias.weight_decay) == (0.2, 0.3)
    up = got["stack/prefix_0/mlp/up/kernel"]
    assert (up.lr_multiplier, up.weight_decay, up.frozen) == (1.0, 0.5, False)


def test_a_multiplier_alone_does_not_make_biases_decay():
    assert rows(rules=({"match": "attention", "lr_multiplier": 2.0},))[
        "stack/pattern_0/attention/query/bias"].weight_decay == 0.0


def test_adam_learning_rate_is_a_multiplier_of_what_adam_trains_beside_muon():
    got = rows(name="muon", learning_rate=0.02, adam_learning_rate=0.004)
    assert got["head/kernel"].lr_multiplier == pytest.approx(0.2)
    assert got["stack/prefix_0/mlp/up/kernel"].lr_multiplier == 1.0
    assert rows(name="adamw", learning_rate=0.02, adam_learning_rate=0.004)["head/kernel"].lr_multiplier == 1.0


def test_a_rule_that_matches_nothing_names_the_nearest_parameters():
    with pytest.raises(ValueError, match=r"rules\[1\] matches no parameter.*query/kernel"):
        rows(rules=({"match": "head", "freeze": True}, {"match": "atention/query/kernal$", "freeze": True}))


def test_muon_on_a_vector_is_refused_and_on_a_stack_of_matrices_is_not():
    with pytest.raises(ValueError, match=r"norm0/scale.*no matrix"):
        rows(rules=({"match": "norm0/scale", "optimizer": "muon"},))
    assert rows(rules=({"match": "moe", "optimizer": "muon"},))["stack/pattern_0/moe/up/kernel"].optimizer == "muon"


def test_freezing_everything_is_refused():
    with pytest.raises(ValueError, match="nothing is left to train"):
        rows(rules=({"match": "", "freeze": True},))


def test_only_adapters_are_trained_by_one_rule():
    got = rows(rules=({"match": "^(?!lora/)", "freeze": True},))
    assert {name for name, row in got.items() if not row.frozen} == {name for name in got if name.startswith("lora/")}


def test_text_has_a_line_a_parameter_and_the_totals():
    text = format_table(table(OptimizerOptions(rules=({"match": "embed", "freeze": True},)), VARIABLES))
    lines = text.splitlines()
    assert len(lines) == 1 + 12 + 1
    assert next(line for line in lines if line.startswith("embed/embedding")).split() == [
        "embed/embedding", "32x8", "256", "frozen", "-", "-"]
    total = sum(row.size for row in rows().values())
    assert lines[-1] == f"{total:,} parameters, {total - 256:,} trainable"
