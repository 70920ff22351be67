"""What every experiment file must hold. Files are found by globbing: a new one is under contract by being there."""

import ast
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import config as configs
from launch.train import prepare
from lm.core.batch import batch_spec
from lm.core.sharding import batch_sharding
from lm.core.tree import num_params
from lm.models.build import entry_names, make_apply
from lm.tasks.build import build_objective
from lm.train.exit_codes import DONE
from lm.train.loop import Schedule, train
from lm.train.step import make_train_step

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "experiments"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "base"))
files = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])

# Eight devices that split rows, parameters and heads.
ON_EIGHT = [*((f"mesh.{axis}", n) for axis, n in dict(data=2, fsdp=2, tensor=2, context=1, expert=1).items()),
            ("mesh.dcn", None)]
# Sizes of a shrunken model, wherever a layer has such a field and sets it.
SMALL = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 32, "window": 8, "max_positions": 64,
         "num_experts": 16, "num_values": 16, "top_k": 2}
SHORT = [("train.steps", 2), ("train.seq_len", 32), ("optimizer.warmup_steps", 1), ("optimizer.decay_steps", None),
         ("eval.every", 100), ("eval.final", False), ("eval.sets", {}), ("log.every", 1), ("log.tensorboard", False)]
# Stands in for data that lie in files, which a checkout does not have.
TEXTS = {"source": "memory", "texts": tuple("abcdefgh"[: 2 + n % 7] * (9 + n) for n in range(40)), "tokenizer": "bytes"}


def load(path: pathlib.Path, overrides=()):
    """The resolved config, with texts in the place of files."""
    config = configs.load(str(path), overrides)
    data = configs.options(config, "data")
    named = [*data.parts().values(), *data.validation_part().values()]
    if any(source.path for source in named) or isinstance(data.tokenizer, Mapping):
        return configs.load(str(path), [*overrides, ("data", TEXTS)])
    return config


def shrunken(path: pathlib.Path):
    """The experiment with a small width, every kind of block once, and two short steps."""
    config = load(path)
    model = config.model.to_dict()
    blocks = (*model["prefix"], *model["pattern"], *(model.get("recurrent_depth") or {"coda": ()})["coda"])
    small = [("model.embed_dim", 16), ("model.num_layers", len(blocks)),
             ("train.batch_size", 8 * config.train.microbatches)]
    if model["max_positions"] is not None:
        small.append(("model.max_positions", SMALL["max_positions"]))
    for name in entry_names(blocks):
        small += [(f"model.{name}.{field}", SMALL[field]) for field, value in model[name].items()
                  if field in SMALL and value is not None]
    return load(path, [*small, *SHORT, *ON_EIGHT])


def two_steps(config, workdir) -> list[dict[str, float]]:
    """Rows of metrics of a real run of two steps on eight devices: data, mesh, step, logs and a checkpoint."""
    prepared = prepare(config)
    with jax.set_mesh(prepared.mesh):
        code = train(prepared.experiment(str(workdir)), workdir, prepared.mesh, options=prepared.options,
                     checkpoint=configs.options(config, "checkpoint"), log=configs.options(config, "log"),
                     schedule=Schedule(None, False))
    assert code == DONE and (workdir / "checkpoints" / "2").is_dir()
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_there_are_experiments():
    assert "quickstart" in [path.stem for path in FILES]


@files
def test_docstring_says_claim_command_and_expectation(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    for title in ("Claim", "Command", "Expected"):
        assert any(line.startswith(f"{title}: ") for line in text.splitlines()), f"{path.name} has no line '{title}: '"
    command = next(line for line in text.splitlines() if line.startswith("Command: "))
    assert f"--config experiments/{path.name}" in command


@files
def test_full_size_step_lowers_on_eight_devices(path):
    """Shapes of all parameters at full size, and one train step traced and partitioned over them; nothing is
    allocated."""
    config = load(path, ON_EIGHT)
    rows, pieces = 4, config.train.microbatches
    if config.train.batch_size % (rows * pieces):
        config = load(path, [*ON_EIGHT, ("train.batch_size", rows * pieces)])
    prepared = prepare(config)
    mesh, options = prepared.mesh, prepared.options
    state = prepared.recipe.abstract(mesh)
    assert num_params(state.params) > 0
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    shape = (options.batch_size, options.seq_len)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=batch_sharding(mesh, shape)),
                         batch_spec(*shape))
    step = make_train_step(make_apply(prepared.model), build_objective(config.loss.to_dict()),
                           prepared.recipe.optimizer, microbatches=pieces, per_microbatch=options.per_microbatch)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(prepared.recipe.shardings(mesh), None)).lower(
            state, batch)
    after, metrics = lowered.out_info
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert metrics["train/loss"].shape == ()


@files
def test_two_real_steps_of_the_shrunken_form(path, tmp_path):
    rows = two_steps(shrunken(path), tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["train/loss"]) and row["train/bad_step"] == -1 for row in rows)
    assert rows[0]["train/grad_norm"] > 0
