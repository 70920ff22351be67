"""The programs that are planned, traced over abstract arrays: the train step as `lm train` jits it, and one token of
every row as `lm generate` draws it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.recipe import objective_of, recipe_of
from lm.core.batch import Batch, MaskedBatch, ReferencedBatch, TaughtBatch
from lm.core.fields import build
from lm.core.goldfish import masked
from lm.core.goldfish_sharded import dropped_over_shards
from lm.core.sharding import batch_sharding, shardings, spec
from lm.generate.decode import APART_BYTES
from lm.generate.loop import Loop, Plan, decode_steps
from lm.generate.sampling import SamplingOptions
from lm.layers.stack import StackState
from lm.losses.preference import PREFERENCE
from lm.models.build import abstract_params, build_model, make_apply
from lm.optim.options import OptimizerOptions
from lm.tasks.goldfish import goldfish_of
from lm.train.options import TrainOptions
from lm.train.step import make_train_step


class Program(NamedTuple):
    """traced: a `jax.stages.Traced`. held: bytes a device of what outlives a call, by kind."""

    traced: Any
    held: dict[str, int]


def train_step(asked: Mapping[str, Any], mesh: Mesh) -> Program:
    """The train step of the config in `asked`, see `launch.planning.compile_step`."""
    model = build_model(asked["model"], asked["vocab_size"])
    train, loss = build(TrainOptions, asked["train"], "config.train"), asked["loss"]
    recipe = recipe_of(model, train, optimizer_of(asked), loss)
    step = jax.jit(
        make_train_step(make_apply(model), objective_of(model, train, loss), recipe.optimizer,
                        microbatches=train.microbatches, skip_nonfinite=train.on_nonfinite == "skip",
                        spike_sigma=train.spike_sigma, per_microbatch=train.per_microbatch, mask=mask_of(asked, train)),
        donate_argnums=0, out_shardings=(recipe.shardings(mesh), None))
    state = recipe.abstract(mesh)
    held = {"params": bytes_of(state.params) + bytes_of(state.ema), "optimizer": bytes_of(state.opt_state),
            "other": bytes_of(state.carry)}
    return Program(step.trace(state, batch_of(asked, train, mesh)), held)


def decode_step(asked: Mapping[str, Any], mesh: Mesh) -> Program:
    """One token for each of `rows` rows with room for `capacity` tokens; rows are split over data and fsdp."""
    model, (rows, capacity) = build_model(asked["model"], asked["vocab_size"]), asked["decode"]
    boxed = abstract_params(model)
    params = placed(nn.meta.unbox(boxed), shardings(boxed, mesh))
    state = abstract_state(model, rows, capacity, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    a_row = lambda dtype: array((rows,), dtype)
    loop = Loop(a_row(np.int32), a_row(np.int32), a_row(bool), a_row(bool), None)
    key = jax.eval_shape(lambda: jax.random.key(0))
    plan = Plan(a_row(np.int32), a_row(np.int32), array((0,), np.int32), array(key.shape, key.dtype))
    traced = decode_steps.trace(make_apply(model), params, state, loop, a_row(bool), plan, options=SamplingOptions(),
                                steps=1)
    return Program(traced, {"params": bytes_of(params), "optimizer": 0, "other": bytes_of(state)})


def optimizer_of(asked: Mapping[str, Any]) -> OptimizerOptions:
    """Its options; JSON has made lists of tuples."""
    return build(OptimizerOptions, dict(asked["optimizer"], rules=tuple(asked["optimizer"]["rules"])),
                 "config.optimizer")


def mask_of(asked: Mapping[str, Any], train: TrainOptions) -> Any:
    """What the step does to the weights of a batch, as `lm train` has it; None for nothing."""
    goldfish = goldfish_of(asked["loss"], asked["special"], train.seq_len)
    if goldfish is None or goldfish.where != "device":
        return None
    rows = jnp.uint32(train.batch_size)
    return lambda batch, step: masked(goldfish, batch, step.astype(jnp.uint32) * rows, dropped_over_shards)


def batch_of(asked: Mapping[str, Any], train: TrainOptions, mesh: Mesh) -> Any:
    """An abstract batch of the kind that the data would give."""
    shape = (train.batch_size, train.seq_len)

    def array(dtype, *more):
        whole = (*shape, *more)
        return jax.ShapeDtypeStruct(whole, dtype, sharding=batch_sharding(mesh, shape))

    fields = [array(dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)]
    goldfish = goldfish_of(asked["loss"], asked["special"], train.seq_len)
    if asked["teacher_k"]:
        return TaughtBatch(*fields, array(np.int32, asked["teacher_k"]), array(np.float32, asked["teacher_k"] + 1))
    if goldfish is not None and goldfish.where != "device":
        return MaskedBatch(*fields, array(np.float32))
    if any(name in PREFERENCE for name in asked["loss"]) and asked["loss"].get("reference") == "cached":
        return ReferencedBatch(*fields, array(np.float32))
    return Batch(*fields)


def abstract_state(model: Any, rows: int, capacity: int, mesh: Mesh) -> Any:
    """The decode state as `lm generate` holds it, its rows split like those of a batch."""
    shapes, more = (jax.eval_shape(lambda n=n: model.initial_state(n, capacity=capacity)) for n in (rows, rows + 1))
    if sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) >= APART_BYTES:
        shapes, more = apart(shapes), apart(more)

    def one(leaf, other):
        names = ["batch" if a != b else None for a, b in zip(leaf.shape, other.shape, strict=True)]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                    sharding=NamedSharding(mesh, spec(names, leaf.shape, mesh)))

    return jax.tree.map(one, shapes, more)


def apart(state: Any) -> Any:
    """What `lm.core.tree.apart` makes of a state, of shapes alone."""
    def one(node):
        leaves = jax.tree.leaves(getattr(node, "pattern", ()))
        if not isinstance(node, StackState) or isinstance(node.pattern, list) or not leaves:
            return node
        part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), node.pattern)
        return node._replace(pattern=[part] * leaves[0].shape[0])

    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, StackState))


def placed(shapes: Any, places: Any) -> Any:
    """Abstract arrays with shardings."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, places)


def bytes_of(tree: Any) -> int:
    """Bytes that a device holds of abstract arrays with shardings."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))
