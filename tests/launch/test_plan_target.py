"""`lm plan --target`: what is asked of a compiler, kept, reported and proposed, and steps that compilers accept."""

import argparse
import gzip
import json

import pytest

from launch import config as configs
from launch.plan import check, main, rows_of
from launch.planning import cache, planned, report
from launch.planning.ask import ask, full_mesh
from launch.planning.compiled import compiled
from launch.planning.machines import find_machine
from launch.planning.planned import Plan, Setting, make_plan, needed, unheard
from launch.planning.propose import format_flags, next_change, propose
from launch.planning.search import meshes, search
from lm.data.tokenizer import Bytes
from lm.models.build import build_model

GIB = 2**30
PROGRAM = """
HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[128,128]) -> bf16[128,128] {
  %x = bf16[128,128]{1,0} parameter(0)
  ROOT %y = bf16[128,128]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def tiny(**optimizer):
    """Blocks with 4,096 experts of which a step chooses few enough for rows, and the mesh of eight devices."""
    return configs.resolve(dict(
        model=dict(embed_dim=512, num_layers=2, prefix=("attention/peer",), pattern=("attention/mlp",), dtype="float32",
                   attention=dict(num_heads=4), mlp=dict(mlp_dim=64), vocab_size=300,
                   peer=dict(num_experts=4096, num_heads=1, top_k=2, query_norm="layer")),
        optimizer=optimizer, train=dict(batch_size=8, seq_len=16), mesh=dict(data=2, expert=4)))


def dense(**groups):
    """A small transformer."""
    return configs.resolve(dict(dict(model=dict(embed_dim=64, num_layers=2, attention=dict(num_heads=4), mlp=dict()),
                                     train=dict(batch_size=64, seq_len=128)), **groups))


def setting(machine="v5e-8", **changes):
    return Setting(find_machine(machine), "python", "jax 1, libtpu 2", 10.0, changes.pop("decode", None),
                   Bytes(), **changes)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that needs 12 GiB of temporaries for a microbatch of the whole batch without rematerialization, a
    third of it with, and the state divided by the devices of fsdp; and what it was asked."""
    asked_for = []

    def compile_(asked, python, name, limit, *, refresh=False):
        asked_for.append(asked)
        mesh = {**{axis: 1 for axis in ("fsdp", "tensor")}, **asked["mesh"]}
        split = (8 if mesh["fsdp"] == -1 else mesh["fsdp"]) * mesh["tensor"]
        temporaries = 12 * GIB // asked["train"]["microbatches"] // (3 if asked["model"]["remat"] == "full" else 1)
        held = dict(params=8 * GIB // split, optimizer=16 * GIB // split, other=0)
        total = sum(held.values()) + temporaries
        if total > 16 * GIB:
            return dict(status="too large", used=total, usable=16 * GIB, reason="Ran out of memory", **held)
        with gzip.open(tmp_path / "program.hlo.gz", "wt") as file:
            file.write(PROGRAM)
        return dict(status="ok", **held, batch=0, temporaries=temporaries, generated=0, not_in_place=0, cached=False,
                    seconds=dict(trace=1.0, lower=2.0, compile=3.0), program=str(tmp_path / "program.hlo.gz"))

    monkeypatch.setattr(planned, "compiled", compile_)
    return asked_for


def resolver(config):
    return lambda flags: configs.resolve(json.loads(configs.to_json(config)), [(p, str(v)) for p, v in flags.items()])


def test_flags_without_a_target_are_refused():
    given = argparse.Namespace(config="experiments/quickstart.py", workdir=None, overrides=[], python="p", target=None,
                               devices=None)
    with pytest.raises(ValueError, match="--python p has no effect without --target"):
        main(given)
    flags = dict.fromkeys(("python", "decode", "tries", "trials", "limit"))
    with pytest.raises(ValueError, match="--measure runs the step on this machine's CPU"):
        check(argparse.Namespace(**flags, search=False, measure=True, target="v5e-8"))
    with pytest.raises(ValueError, match="--trials 3 has no effect without --search"):
        check(argparse.Namespace(**{**flags, "trials": 3}, search=False, measure=False, target="v5e-8"))


def test_rows_to_decode_are_read():
    config = dense()
    assert (rows_of("8x4096", config), rows_of("", config)) == ((8, 4096), (64, 128))
    with pytest.raises(ValueError, match="ROWSxTOKENS"):
        rows_of("8", config)


def test_what_is_asked_is_checked_first():
    config = dense(mesh=dict(data=1, fsdp=-1))
    asked = ask(config, find_machine("v5e-16"), vocab_size=256)
    assert json.loads(json.dumps(asked))["train"]["batch_size"] == 64   # JSON takes it
    assert (asked["target"], asked["dcn"], asked["decode"]) == ("v5e-16", {}, None)
    assert full_mesh(config, find_machine("2xv5e-16")) == dict(data=2, fsdp=16, expert=1, context=1, tensor=1)
    with pytest.raises(ValueError, match=r"batch_size=64 must be divisible by .* = 256 on v5e-256; nearest: 256"):
        ask(config, find_machine("v5e-256"), vocab_size=256)
    with pytest.raises(ValueError, match=r"--decode 3 must be divisible by data x fsdp = 16 .*nearest: 16"):
        ask(config, find_machine("v5e-16"), vocab_size=256, decode=(3, 64))
    with pytest.raises(ValueError, match="write 4x in front"):
        ask(dense(mesh=dict(dcn=dict(data=4))), find_machine("2xv5e-16"), vocab_size=256)


def test_what_was_compiled_is_kept_until_something_changes(monkeypatch, tmp_path):
    from launch.kernels import process
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers = iter([dict(status="timeout", reason="not done"), dict(status="too large", used=1, usable=0),
                    dict(status="too large", used=2, usable=0), dict(status="too large", used=3, usable=0)])
    monkeypatch.setattr(process, "answer", lambda command, environ, limit: next(answers))
    asked = dict(target="v5e-8", train=dict(steps=1))
    assert compiled(asked, "python", "jax 1", 1.0)["status"] == "timeout"       # is asked again
    assert compiled(asked, "python", "jax 1", 1.0)["used"] == 1
    again = compiled(asked, "python", "jax 1", 1.0)
    assert (again["used"], again["cached"]) == (1, True)
    assert compiled(asked, "python", "jax 2", 1.0)["used"] == 2                 # another compiler
    assert compiled({**asked, "train": dict(steps=2)}, "python", "jax 1", 1.0)["used"] == 3
    monkeypatch.setattr(cache, "source_hash", lambda: "other sources")
    with pytest.raises(StopIteration):
        compiled(asked, "python", "jax 1", 1.0)


def test_a_report_says_what_fits_and_how_fast(compiler):
    config = dense(mesh=dict(data=1, fsdp=-1), model=dict(embed_dim=64, num_layers=2, remat="full",
                                                           attention=dict(num_heads=4), mlp=dict()))
    plan = make_plan(config, setting())
    text = report.describe(plan, setting())
    assert plan.fits and "7.000 GiB: fits, compiled in 3 s" in text and "fsdp 8" in text
    assert "8 x v5e (2x4), 8 cores, 8 devices" in text
    # 2 x 128^3 FLOPs at 197 TFLOP/s, and twice 32 KiB at 819 GB/s: the second takes longer.
    assert plan.seconds == pytest.approx(2 * 128 * 128 * 2 / 819e9)
    data = report.data(plan, setting())
    assert json.loads(json.dumps(data))["numbers"]["fits"] is True
    model = build_model(config.model.to_dict(), 256)
    assert needed(config, model, None)["flops"] == 3 * model.flops_per_token(128) * 64 * 128


def test_a_plan_that_does_not_fit_is_changed_until_it_does(compiler):
    """24 GiB of state are split first; then 3 + 12 GiB fit into 16."""
    config, told = dense(), []
    plan = make_plan(config, setting())
    assert not plan.fits and "does not fit: the compiler needs 36.00 GiB" in report.describe(plan, setting())
    found = propose(plan, setting(), resolver(config), 4, told.append)
    assert found.fits and found.flags == ("--config.mesh.data=1", "--config.mesh.fsdp=8")
    assert len(compiler) == 2 and "fits: 15.00 GiB" in told[-1]
    assert propose(plan, setting(), resolver(config), 0, told.append) is None


def test_changes_follow_what_the_memory_goes_to():
    machine = find_machine("v5e-8")

    def change(config, mesh, used, state):
        result = dict(status="too large", used=used * GIB, usable=16 * GIB, params=state * GIB, optimizer=0)
        return next_change(Plan(config, {**dict.fromkeys(("expert", "context"), 1), **mesh}, (), result, None), machine)

    data, fsdp = dict(data=8, fsdp=1, tensor=1), dict(data=1, fsdp=8, tensor=1)
    full = dict(model=dict(embed_dim=64, num_layers=2, remat="full", attention=dict(num_heads=4), mlp=dict()))
    assert change(dense(), data, 20, 10) == {"mesh.data": 1, "mesh.fsdp": 8}
    assert change(dense(), data, 20, 2) == {"model.remat": "full"}
    # 40 GiB besides the state must shrink to 12.4: four pieces; 64 rows over 8 devices have eight.
    assert change(dense(**full), fsdp, 42, 2) == {"train.microbatches": 4}
    one_row = dense(**full, train=dict(batch_size=8, seq_len=128))
    assert change(one_row, fsdp, 20, 2) == {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
    assert change(one_row, data, 20, 2) == {"mesh.data": 1, "mesh.fsdp": 8}
    alone = dense(**full, train=dict(batch_size=1, seq_len=128))
    assert change(alone, dict(data=1, fsdp=1, tensor=8), 20, 2) is None
    assert format_flags({"mesh.data": 1}) == "--config.mesh.data=1"


def test_a_search_ranks_what_fits_by_its_step(compiler):
    told = []
    plans = search(dense(), setting(), resolver(dense()), 4, told.append)
    assert len(plans) == len(compiler) == 4
    assert [plan.fits for plan in plans] == sorted((plan.fits for plan in plans), reverse=True)
    assert "--config.model.remat=none" in plans[0].flags and any("does not fit" in line for line in told)
    # All on fsdp fits at once; all on data with no policy, and all three are tried.
    assert [plan.flags[0].split("=")[1] for plan in plans if "--config.mesh.fsdp=8" in plan.flags] == ["none"]
    assert {plan.flags[0].split("=")[1] for plan in plans[1:]} == {"none", "minimal", "full"}
    found = meshes(dense(), find_machine("v5e-16"))
    assert {"mesh.data": 2, "mesh.fsdp": 8, "mesh.tensor": 1} in found
    assert all(f["mesh.data"] * f["mesh.fsdp"] * f["mesh.tensor"] == 16 for f in found)
    assert len({tuple(f.values()) for f in found}) == len(found)


def test_a_mesh_that_does_not_divide_the_width_is_named_and_changed(compiler):
    """A width of 40 over 16 devices: 8 of them divide it."""
    config = dense(model=dict(embed_dim=40, num_layers=2, attention=dict(num_heads=4), mlp=dict()),
                   mesh=dict(data=1, fsdp=-1))
    plan = make_plan(config, setting("v5e-16"))
    assert [(one.axis, one.dims, one.divisor) for one in plan.undivided] == [("fsdp", {"embed": 40}, 8)]
    assert "mesh.fsdp=16 does not divide embed=40: every device holds" in report.describe(plan, setting("v5e-16"))
    machine, short = find_machine("v5e-16"), dict(status="too large", used=20 * GIB, usable=16 * GIB, params=GIB,
                                                  optimizer=0)
    change = next_change(Plan(config, plan.mesh, (), short, None, plan.undivided), machine)
    assert change == {"mesh.data": 2, "mesh.fsdp": 8}
    assert not make_plan(resolver(config)(change), setting("v5e-16")).undivided
    assert meshes(config, machine)[0] == {"mesh.data": 2, "mesh.fsdp": 8, "mesh.tensor": 1}
    assert not make_plan(dense(mesh=dict(data=1, fsdp=-1)), setting("v5e-16")).undivided


def test_loops_that_draw_their_trips_are_taken_at_the_mean():
    from lm.models.depth_draws import iteration_pmf
    depth = dict(mean=4.0, recurrences=4, backprop=2)
    config = dense(model=dict(embed_dim=64, num_layers=1, attention=dict(num_heads=4), mlp=dict(),
                              recurrent_depth=depth))
    pmf = iteration_pmf(4.0, 0.5)
    mean = sum(p * max(0, n - 2) for n, p in enumerate(pmf, 1))
    assert unheard(build_model(config.model.to_dict(), 256)) == pytest.approx(mean)
    assert unheard(build_model(dense().model.to_dict(), 256)) == 1.0


def test_compilers_say_in_two_ways_that_memory_is_short():
    from launch.planning.compile_step import out_of_memory
    held = dict(params=GIB, optimizer=2 * GIB, other=0)
    whole = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.25G of 15.75G hbm. Exceeded"
    parts = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.00G) "
             "exceeds available HBM (15.75G).")
    found = out_of_memory(RuntimeError(whole), held)
    assert (found["status"], found["used"], found["usable"]) == ("too large", 18.25 * GIB, 15.75 * GIB)
    assert out_of_memory(RuntimeError(parts), held)["used"] == 43 * GIB
    assert out_of_memory(RuntimeError("out of luck"), held) is None


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [None, "adamw"])
@pytest.mark.parametrize("machine", ["v5e-8", "h100-8"])
def test_train_steps_compile(request, monkeypatch, tmp_path, machine, sparse):
    """With rows of the table gathered from devices, and densely; state in bytes that add up to the parameters'."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    python = request.getfixturevalue("python_with_cuda" if machine.startswith("h100") else "python_with_libtpu")
    asked = Setting(find_machine(machine), python, "compiler", 1800.0, None, Bytes())
    plan = make_plan(tiny(sparse_tables=sparse), asked)
    text = report.describe(plan, asked)
    assert plan.fits and "step at least" in text, text
    assert plan.result["optimizer"] >= 2 * plan.result["params"]
    assert any(one["kind"] == "all-reduce" for one in plan.numbers["collectives"])
    assert make_plan(tiny(sparse_tables=sparse), asked).result["cached"]


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["v4-8", "2xv5e-4", "7x-4", "v5e-1"])
def test_steps_of_all_kinds_of_slices_compile(python_with_libtpu, monkeypatch, tmp_path, machine):
    """A megacore, two slices with a network between, two devices a chip, and one chip; one token as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for decode in (None, (8, 128)):
        asked = Setting(find_machine(machine), python_with_libtpu, "compiler", 1800.0, decode, Bytes())
        plan = make_plan(dense(), asked)
        assert plan.fits, plan.result
        assert asked.machine.devices == 1 or decode or plan.numbers["collectives"]
        links = set(plan.numbers["link_seconds"])
        assert ("DCN" in links) == machine.startswith("2x"), links  # of a token too: every host reads all rows


@pytest.mark.slow
def test_what_a_compiler_finds_too_large_is_changed_until_it_fits(python_with_libtpu, monkeypatch, tmp_path):
    """Of one v5e chip; what is kept of eight wide blocks without rematerialization is more than it has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked, told = Setting(find_machine("v5e-1"), python_with_libtpu, "compiler", 1800.0, None, Bytes()), []
    config = dense(model=dict(embed_dim=1024, num_layers=8, attention=dict(num_heads=8), mlp=dict()),
                   train=dict(batch_size=64, seq_len=1024))
    plan = make_plan(config, asked)
    assert plan.result["status"] == "too large", plan.result
    found = propose(plan, asked, resolver(config), 4, told.append)
    assert found is not None and found.fits, told
    assert "--config.model.remat=full" in found.flags


@pytest.mark.slow
def test_planned_memory_is_about_what_a_step_takes(monkeypatch, tmp_path, capsys):
    """On the CPU, in a process of its own; the time is printed, a busy machine may take any."""
    import re

    from launch.cli import main as lm
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = ["--config.model.embed_dim=256", "--config.model.dtype=float32", "--config.train.batch_size=8",
             "--config.train.seq_len=256"]
    assert lm(["plan", "--config", "experiments/quickstart.py", *sizes, "--target", "cpu", "--measure"]) == 0
    said = capsys.readouterr().out
    assert 0.7 < float(re.search(r"([\d.]+) of the plan", said)[1]) < 1.5, said
    assert "of the bound" in said
