"""Compile the train step of a run for a machine that is not here, and say in JSON what a device would hold.

    python -m launch.planning.compile_step FILE.json

A process of its own, with the environment of `launch.kernels.process`. FILE holds what `lm plan` has resolved: target,
mesh, vocab_size, and the groups model, loss, optimizer and train of the config.
"""

import contextlib
import json
import logging
import sys
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import topologies

from launch.planning.targets import Machine, find_machine
from lm.core.batch import Batch
from lm.core.sharding import batch_sharding, make_mesh
from lm.models.build import abstract_params, build_model, make_apply, not_additive
from lm.models.tables import tables_of
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective
from lm.train.state import Recipe
from lm.train.step import make_train_step
from pallas_kernels import gpu
from pallas_kernels.aot.compilation import short_reason


def devices_of(machine: Machine) -> list[Any]:
    """Devices to compile for."""
    kind = machine.kind
    if kind.gpu is None:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=machine.topology).devices)
    return list(topologies.get_topology_desc(platform="cuda", topology_name=kind.gpu.product,
                                             target_config=kind.gpu.description(), topology=machine.topology).devices)


def compile_step(asked: dict[str, Any]) -> dict[str, Any]:
    """Bytes a device: of `params`, `optimizer` and `other` state, `temporaries` and `generated` code; `seconds` that it
    took. Compilers raise theirs."""
    machine, train = find_machine(asked["target"]), asked["train"]
    began = time.perf_counter()
    mesh = make_mesh(asked["mesh"], devices=devices_of(machine))
    model = build_model(asked["model"], asked["vocab_size"])
    boxed = abstract_params(model)
    options = dict(asked["optimizer"], rules=tuple(asked["optimizer"]["rules"]))
    optimizer = build_optimizer(OptimizerOptions(**options), nn.meta.unbox(boxed), train["steps"], tables_of(model))
    recipe = Recipe(lambda key: nn.meta.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))), boxed, optimizer)
    shape = (train["batch_size"], train["seq_len"])
    place = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape))
    batch = Batch(*map(place, (np.int32, np.int32, np.float32, np.int32, np.int32)))
    step = make_train_step(make_apply(model), build_objective(asked["loss"], not_additive=not_additive(model)),
                           optimizer, microbatches=train["microbatches"], per_microbatch=train["per_microbatch"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        if machine.kind.gpu is not None:
            stack.enter_context(gpu.stated_gpu(machine.kind.gpu.capability))
        state = recipe.abstract(mesh)
        traced = jax.jit(step, donate_argnums=0, out_shardings=(recipe.shardings(mesh), None)).trace(state, batch)
        lowered = traced.lower(lowering_platforms=("cuda",)) if machine.kind.gpu is not None else traced.lower()
        memory = lowered.compile().memory_analysis()
    held = {"params": bytes_of(state.params), "optimizer": bytes_of(state.opt_state)}
    return dict(status="ok", **held, other=memory.argument_size_in_bytes - sum(held.values()),
                temporaries=memory.temp_size_in_bytes, generated=memory.generated_code_size_in_bytes,
                not_in_place=memory.output_size_in_bytes - memory.alias_size_in_bytes,
                seconds=time.perf_counter() - began)


def bytes_of(tree: Any) -> int:
    """Bytes that a device holds of abstract arrays with shardings."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def main(arguments: list[str]) -> int:
    """Prints the result as the last line of the standard output."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with open(arguments[0]) as file:
        asked = json.load(file)
    try:
        result = compile_step(asked)
    except Exception as error:  # whatever a compiler raises is the answer that was asked for
        traceback.print_exc()
        result = dict(status="refused", reason=short_reason(error))
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
