"""A trained run opened again: config, model, parameters and tokenizer from its workdir."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from launch import adapters
from launch import config as configs
from launch.config_workdir import check_place
from lm.core.sharding import make_mesh, shardings
from lm.core.types import Apply, Params
from lm.data.corpora import load_tokenizer
from lm.data.tokenizer import Tokenizer
from lm.models.build import abstract_params, build_model, make_apply
from lm.models.decoder import DecoderLM
from lm.train.checkpoint import restore_params

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """config: resolved. apply: of `model`. params: variables on `mesh`, the mesh to set while they are used. step: of
    the checkpoint."""

    config: ConfigDict
    model: DecoderLM
    apply: Apply
    params: Params
    tokenizer: Tokenizer
    step: int
    mesh: Mesh


def open_run(workdir: str, step: int | None = None, *, overrides: Sequence[tuple[str, Any]] = (),
             ema: bool = False) -> Run:
    """The run of `workdir` at checkpoint `step`, by default the newest.

    overrides: (path, text) of config fields, e.g. ("model.dtype", "float32"). ema: the averaged parameters.
    The mesh is the config's where it fits this machine's devices, else every device holds all parameters.

    Raises FileNotFoundError or ValueError where there is no such run or checkpoint.
    """
    check_place(workdir)
    config = configs.load(workdir, overrides)
    tokenizer = load_tokenizer(configs.options(config, "data"))
    model = build_model(config.model.to_dict(), tokenizer.vocab_size)
    mesh = mesh_here(config)
    params, step = restore_params(workdir, abstract_variables(model, config, mesh), step, ema=ema)
    return Run(config, model, make_apply(model), params, tokenizer, step, mesh)


def mesh_here(config: ConfigDict) -> Mesh:
    """The config's mesh if it fits the devices, else one whose devices all hold the whole model."""
    given = configs.options(config, "mesh")
    try:
        return make_mesh(given.sizes, dcn=given.dcn)
    except ValueError as error:
        log.info("the run's mesh does not fit this machine (%s): every device holds all parameters", error)
        return make_mesh({"data": -1})


def abstract_variables(model: DecoderLM, config: ConfigDict, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the variables that a checkpoint of this config holds; nothing is allocated."""
    boxed = abstract_params(model)
    out = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                       nn.meta.unbox(boxed), shardings(boxed, mesh))
    whole = NamedSharding(mesh, PartitionSpec())
    made = jax.eval_shape(lambda: adapters.beside(configs.options(config, "train"), model, out["params"],
                                                  jax.random.key(0)))
    return {**out, **jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), made)}
