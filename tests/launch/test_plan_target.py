"""`lm plan --target`: which machines there are, what is refused, and train steps that compilers accept."""

import json
import sys

import pytest

from launch import config as configs
from launch.plan import main
from launch.planning.report import plan, report
from launch.planning.targets import find_machine


def tiny(**optimizer):
    """Blocks with 256 experts of which a step chooses few enough for rows, and the mesh of eight devices."""
    return configs.resolve(dict(
        model=dict(embed_dim=512, num_layers=2, prefix=("attention/peer",), pattern=("attention/mlp",), dtype="float32",
                   attention=dict(num_heads=4), mlp=dict(mlp_dim=64), vocab_size=300,
                   peer=dict(num_experts=4096, num_heads=1, top_k=2, query_norm="layer")),
        optimizer=optimizer, train=dict(batch_size=8, seq_len=16), mesh=dict(data=2, expert=4)))


@pytest.mark.parametrize(("name", "devices", "gib", "topology"), [
    ("v5e-256", 256, 16, "v5e:16x16"), ("v5e-8", 8, 16, "v5e:2x4"), ("v4-4", 8, 16, "v4:2x2x1"),
    ("7x-8", 16, 96, "tpu7x:2x2x2"), ("h100-8", 8, 80, "1x1x8"), ("h100-32", 32, 80, "1x4x8")])
def test_machines_are_found_by_name(name, devices, gib, topology):
    machine = find_machine(name)
    assert (machine.devices, machine.gib, machine.topology) == (devices, gib, topology)


@pytest.mark.parametrize(("name", "message"), [
    ("v5e", "must be KIND-CHIPS"), ("v5f-8", "did you mean 'v5"), ("v5e-200", "nearest: v5e-256"),
    ("h100-12", "nearest: h100-"), ("v4-x", "must be KIND-CHIPS")])
def test_other_names_are_refused_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        find_machine(name)


def test_a_python_without_a_target_is_refused():
    import argparse
    given = argparse.Namespace(config="experiments/quickstart.py", workdir=None, overrides=[], python="p", target=None,
                               devices=None)
    with pytest.raises(ValueError, match="no effect without --target"):
        main(given)


def test_a_report_says_whether_it_fits():
    gib = 2**30
    result = dict(status="ok", params=gib, optimizer=2 * gib, other=0, temporaries=12 * gib, not_in_place=0,
                  generated=0, seconds=3.0)
    text = report(find_machine("v5e-8"), {"data": 2, "expert": 4}, "jax", result)
    assert "15.000 GiB: fits" in text and "(data 2, expert 4)" in text
    assert "17.000 GiB: does not fit" in report(find_machine("v5e-8"), {}, "jax", {**result, "optimizer": 4 * gib})
    assert "refused: too large" in report(find_machine("v5e-8"), {}, "jax", dict(status="refused", reason="too large"))


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [None, "adamw"])
@pytest.mark.parametrize("machine", ["v5e-8", "h100-8"])
def test_train_steps_compile(request, machine, sparse):
    """With rows of the table gathered from devices, and densely; state in bytes that add up to the parameters'."""
    python = request.getfixturevalue("python_with_cuda" if machine.startswith("h100") else "python_with_libtpu")
    text = plan(tiny(sparse_tables=sparse), 300, machine, python)
    assert "fits, compiled" in text, text


@pytest.mark.slow
def test_a_batch_that_the_mesh_does_not_divide_is_refused(python_with_libtpu):
    config = configs.resolve(json.loads(configs.to_json(tiny())), [("train.batch_size", 7)])
    with pytest.raises(ValueError, match=r"divisible by data x fsdp x microbatches = 2 on v5e-8; nearest: 8"):
        plan(config, 300, "v5e-8", python_with_libtpu or sys.executable)
