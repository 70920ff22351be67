"""Cells that train more than once: each stage goes on from the one before, and is evaluated where it was asked for."""

import json

import pytest

from launch import config as configs
from launch.claim_cell import CONFIG_FILE
from launch.claim_stages import train_stages
from lm.claims.definition import _cell


def facts(part):
    return dict(source="facts", task=dict(num_keys=4, num_classes=4, part=(part, 2)))


@pytest.mark.slow
def test_a_grown_stage_starts_where_the_first_ended_and_is_not_run_twice(tmp_path):
    config = configs.resolve(dict(
        model=dict(embed_dim=16, num_layers=1, dtype="float32", vocab_multiple=4, pattern=("peer",),
                   peer=dict(num_experts=16, num_heads=2, top_k=2)),
        data=facts(0), optimizer=dict(warmup_steps=1), train=dict(steps=4, batch_size=8, seq_len=2),
        eval=dict(batches=2, baseline=False), log=dict(tensorboard=False)))
    (tmp_path / CONFIG_FILE).write_text(configs.to_json(config))
    stages = [{"set": {"data": facts(1), "train.steps": 6, "checkpoint.every": 3, "checkpoint.keep": 9,
                       "model.peer.active_keys": None}, "grow": {"experts": 25, "freeze": "rest"},
               "evaluate": {"first": {"data": facts(0)}, "closed": {"data": facts(0), "model.peer.active_keys": 4}}}]
    stages = json.loads(json.dumps(stages))  # as a cell's process reads them
    code, values = train_stages(tmp_path, stages)
    before = json.loads((tmp_path / "run" / "final_result.json").read_text())
    assert code == 0 and values["step"] == 6
    assert values["first/loss@0"] == pytest.approx(before["eval/validation/loss"])
    assert values["closed/loss@6"] == values["closed/loss"] == pytest.approx(values["first/loss@0"])
    assert values["first/loss@3"] != values["first/loss@6"] == values["first/loss"]
    second = configs.load(str(tmp_path / "run_2"))
    assert second.model.peer.num_experts == 25 and second.data.task["part"] == (1, 2)
    stamp = (tmp_path / "grown_2" / "config.json").stat().st_mtime_ns
    assert train_stages(tmp_path, stages)[1]["first/loss@6"] == values["first/loss@6"]
    assert (tmp_path / "grown_2" / "config.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("entry, message", [
    (dict(then=[dict(sett={})]), "did you mean 'set'"),
    (dict(then=[{}], measure="scan_error"), "then= is for cells that train"),
    (dict(then={}), "then must be list")])
def test_stages_that_are_none_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        _cell(dict(arm="a", seed=0, **entry), "entry")
