"""From the `model` group of a config to a Module, and from a Module to a pure function of its variables.

The group holds the model's own fields and, beside them, one entry a layer, named in `pattern`:

    model = dict(embed_dim=256, num_layers=8, pattern=("attention/mlp",), attention=dict(num_heads=4), mlp=dict())

`pattern` names blocks; a block is layers joined by slashes. An entry gives the fields of the class that its `kind`
(default: its own name) has in `lm.layers.LAYERS`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from lm.core.fields import build, did_you_mean, field_types, fill, option
from lm.core.sharding import shardings
from lm.core.transfer import Transfer
from lm.core.types import Apply, Key, Params
from lm.layers import LAYERS
from lm.layers.block import Block
from lm.layers.bswa import heads_of
from lm.layers.fam import FAM
from lm.layers.fam_block import FAMBlock
from lm.layers.norm import LayerNorm, RMSNorm
from lm.layers.stack import Stack
from lm.models.decoder import DecoderLM
from lm.models.depth_options import ENTRY, RecurrentDepthOptions
from lm.models.recurrent_depth import RecurrentDepthLM

NORMS = {
    "rms": RMSNorm,
    "layer": LayerNorm,
    "layer_no_bias": functools.partial(LayerNorm, use_bias=False),
}


MOST_POSITIONS = 2**30
NONE_IS = {"embed_std": "", "norm_eps": ", or None for the norm's own"}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The fields of `model` that are not layer entries."""

    embed_dim: int = option(256, "width of the residual stream")
    num_layers: int = option(4, "number of blocks, prefix included")
    prefix: tuple[str, ...] = option((), "blocks before the pattern, e.g. ('attention/mlp',)")
    pattern: tuple[str, ...] = option(("attention/mlp",), "blocks repeated until num_layers; layers joined by '/'")
    vocab_size: int | None = option(None, "number of token ids; None takes the tokenizer's")
    vocab_multiple: int = option(128, "tables are padded to a multiple of this, the same on every mesh")
    tie_embeddings: bool = option(True, "use the embedding as output head")
    max_positions: int | None = option(None, "rows of a learned table of absolute positions; None for none")
    embed_std: float = option(0.02, "standard deviation of the embeddings at initialisation")
    embed_norm: bool = option(False, "norm of the embedded input too (RWKV's ln0)")
    softcap: float | None = option(None, "logits become softcap * tanh(logits / softcap)")
    dropout: float = option(0.0, "dropout of the embedded input; layers have their own")
    norm: Literal["rms", "layer", "layer_no_bias"] = option("rms", "norm before each layer and before the head")
    norm_eps: float | None = option(None, "added to the variance in these norms; None is 1e-6 for rms, else 1e-5")
    random_positions: int | None = option(None, "in training, half of the rows start at a random position below this, "
                                                "for rotary positions; None starts all at 0")
    base_width: int | None = option(None, "width at which learning rates were found, for optimizer.parametrization="
                                          "'mup': logits and an untied head are scaled; None for none")
    base_depth: int | None = option(None, "the same of num_layers: residual branches are multiplied by (base_depth / "
                                          "num_layers)^depth_exponent")
    depth_exponent: float = option(1.0, "with base_depth: 1 is CompleteP, 0.5 depth-muP")
    scan: bool = option(True, "scan over repeats (compiles fast) or unroll them; the checkpoint is the same")
    remat: Literal["none", "full", "dots", "minimal"] = option("none", "what the backward pass computes again")
    dtype: Literal["bfloat16", "float32", "float16", "float64"] = option("bfloat16", "dtype of activations")


def entry_names(blocks: tuple[str, ...]) -> list[str]:
    """The layer entries that these blocks name, in order, each once."""
    return list(dict.fromkeys(name for block in blocks for name in block.split("/")))


def resolve_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """The complete `model` group: defaults filled, every entry that `prefix` and `pattern` use present and filled.

    An entry that the pattern does not use is kept and checked like the others, so that a sweep may vary the pattern.

    Raises ValueError, naming the field, for unknown names, wrong types, and layers that do not fit the width.
    """
    own = field_types(ModelOptions)
    given = dict(given)
    looped = given.pop(ENTRY, None)
    depth = None if looped is None else build(RecurrentDepthOptions, looped, f"config.model.{ENTRY}")
    entries = {name: dict(value) for name, value in given.items() if isinstance(value, Mapping) and name not in own}
    for name in set(given) - set(entries) - set(own):
        if name in LAYERS:
            raise ValueError(f"config.model.{name} must be a group of fields of that layer; got {given[name]!r}")
    options = fill(ModelOptions, {k: v for k, v in given.items() if k not in entries}, "config.model")
    made = ModelOptions(**options)
    for name in ("embed_dim", "num_layers", "vocab_multiple"):
        if options[name] < 1:
            raise ValueError(f"config.model.{name}={options[name]} must be at least 1")
    for name in ("base_width", "base_depth"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"config.model.{name}={options[name]} must be at least 1, or None for none")
    if not 0.5 <= made.depth_exponent <= 1:
        raise ValueError(f"config.model.depth_exponent={made.depth_exponent} must be from 0.5 (depth-muP) to 1 "
                         f"(CompleteP)")
    if made.vocab_size is not None and made.vocab_size < 2:
        raise ValueError(f"config.model.vocab_size={made.vocab_size} must be at least 2, or None for the tokenizer's")
    for name in ("embed_std", "softcap", "max_positions", "norm_eps", "random_positions"):
        if options[name] is not None and not options[name] > 0:
            raise ValueError(f"config.model.{name}={options[name]} must be above 0"
                             f"{NONE_IS.get(name, ', or None for none')}")
    if made.random_positions is not None and made.random_positions > MOST_POSITIONS:
        raise ValueError(f"config.model.random_positions={made.random_positions} must be at most {MOST_POSITIONS}: "
                         f"positions are 32-bit numbers, and a row goes on from there")
    check_dropout(options, "config.model")
    coda = () if depth is None else depth.coda
    repeats_of(made, coda)
    if depth is not None and not made.pattern:
        raise ValueError(f"config.model.pattern is the core that config.model.{ENTRY} loops, and it is empty; name at "
                         f"least one block, such as 'attention/mlp'")
    used = entry_names(made.prefix + made.pattern + coda)
    out = dict(options) if depth is None else {**options, ENTRY: dataclasses.asdict(depth)}
    for name in dict.fromkeys((*used, *entries)):
        given_entry = entries.get(name, {})
        kind = given_entry.get("kind", name)
        if kind not in LAYERS:
            what = "config.model.pattern names" if name in used else "config.model has an entry"
            raise ValueError(f"{what} {name!r}, and there is no layer of kind {kind!r}"
                             f"{did_you_mean(kind, LAYERS)}; layers: {', '.join(sorted(LAYERS))}")
        fields = {k: v for k, v in given_entry.items() if k != "kind"}
        filled = fill(LAYERS[kind], fields, f"config.model.{name}")
        try:
            LAYERS[kind](**filled).check(made.embed_dim)
        except ValueError as error:
            raise ValueError(f"config.model: {error}") from None
        check_dropout(filled, f"config.model.{name}")
        out[name] = {"kind": kind, **filled}
    return out


def check_dropout(options: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a `dropout` that is no share: such a run trains without complaint, and learns nothing."""
    if not 0 <= options.get("dropout", 0.0) < 1:
        raise ValueError(f"{where}.dropout={options['dropout']} must be at least 0 and below 1")


def repeats_of(options: ModelOptions, coda: tuple[str, ...] = ()) -> int:
    """How often the pattern stands; raises ValueError where num_layers is not prefix + pattern * repeats + coda."""
    once = len(options.prefix) + len(coda)
    rest = options.num_layers - once
    if not options.pattern and rest == 0:
        return 0
    if not options.pattern:
        raise ValueError(f"config.model.pattern is empty and config.model.prefix makes {len(options.prefix)} of "
                         f"num_layers={options.num_layers}; name at least one block, such as 'attention/mlp'")
    if rest < 0 or rest % len(options.pattern):
        raise ValueError(
            f"config.model.num_layers={options.num_layers} must be {once} (prefix{' and coda' if coda else ''}) plus a "
            f"multiple of {len(options.pattern)} (pattern); nearest: "
            f"{once + max(1, round(rest / max(1, len(options.pattern)))) * len(options.pattern)}")
    return rest // len(options.pattern)


def build_model(config: Mapping[str, Any], vocab_size: int) -> DecoderLM:
    """The Module that the `model` group describes (resolved or not). `vocab_size` is the tokenizer's, and serves where
    the group leaves its own open; raises ValueError where the group's is smaller than the tokenizer's."""
    resolved = resolve_model(config)
    options = ModelOptions(**{k: v for k, v in resolved.items() if k in field_types(ModelOptions)})
    if options.vocab_size is not None and options.vocab_size < vocab_size:
        raise ValueError(f"config.model.vocab_size={options.vocab_size} is smaller than the tokenizer's {vocab_size}; "
                         f"set it to None or at least that")
    if options.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("config.model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment; without it JAX would "
                         "compute in float32")
    norm = functools.partial(NORMS[options.norm], **({} if options.norm_eps is None else {"eps": options.norm_eps}))
    depth = RecurrentDepthOptions(**resolved[ENTRY]) if ENTRY in resolved else None
    coda = () if depth is None else depth.coda
    repeats = repeats_of(options, coda)
    # Blocks that a token goes through, a looped core's as often as it is on average.
    blocks = options.num_layers + (0 if depth is None else repeats * len(options.pattern) * max(0.0, depth.mean - 1))
    layers = {}
    for name in entry_names(options.prefix + options.pattern + coda):
        entry = dict(resolved[name])
        cls = LAYERS[entry.pop("kind")]
        # Branches add up in the residual stream: each starts at 1 / sqrt(number of branches) (GPT-2, section 2.3).
        if "output_scale" in entry and entry["output_scale"] is None:
            entry["output_scale"] = (2 * (options.base_depth or blocks)) ** -0.5
        layers[name] = cls(**entry)
    sandwich = depth is not None and depth.sandwich
    transfer = transfer_of(options, layers, looped=depth is not None)
    branch = 1.0 if transfer is None else transfer.branch
    prefix, pattern, coda = (tuple(build_block(spec, layers, norm(), sandwich, branch) for spec in specs)
                             for specs in (options.prefix, options.pattern, coda))
    common = dict(
        vocab_size=options.vocab_size or vocab_size, embed_dim=options.embed_dim, final_norm=norm(),
        vocab_multiple=options.vocab_multiple, tie_embeddings=options.tie_embeddings,
        max_positions=options.max_positions, embed_std=options.embed_std, softcap=options.softcap,
        dropout=options.dropout, dtype=options.dtype, embed_norm=norm() if options.embed_norm else None,
        random_positions=options.random_positions, transfer=transfer)
    stack = lambda prefix, pattern, repeats: Stack(prefix, pattern, repeats, options.scan, options.remat)
    if depth is None:
        return DecoderLM(stack=stack(prefix, pattern, repeats), **common)
    return RecurrentDepthLM(stack=stack((), pattern, repeats), prelude=stack(prefix, (), 0), coda=stack(coda, (), 0),
                            depth=depth, **common)


def transfer_of(options: ModelOptions, layers: Mapping[str, nn.Module], looped: bool) -> Transfer | None:
    """The base size of muP, None for none. Raises ValueError for models that it says nothing about."""
    if options.base_width is None and options.base_depth is None:
        return None
    if looped:
        raise ValueError("config.model.base_width and base_depth say nothing about a core that is looped; leave them "
                         "None, or leave out config.model.recurrent_depth")
    fams = [name for name, layer in layers.items() if isinstance(layer, FAM)]
    if options.base_depth is not None and fams:
        raise ValueError(f"config.model.base_depth scales residual branches, and the block of {fams[0]} adds up its "
                         f"own; leave it None")
    for name, layer in layers.items():
        field = next((field for field in ("key_dim", "head_dim") if hasattr(layer, field)), None)
        if options.base_width is None or field is None:
            continue
        here, there = (dot_dim(layer, width) for width in (options.embed_dim, options.base_width))
        if here != there:
            raise ValueError(f"config.model.base_width={options.base_width} needs queries and keys of one size at "
                             f"every width, so that scores keep theirs, and {name} has {field} {here} here and {there} "
                             f"there; set config.model.{name}.{field}" + (
                                 " and leave num_heads None" if field == "head_dim" else ""))
    return Transfer(options.embed_dim, options.base_width, options.num_layers, options.base_depth,
                    options.depth_exponent)


def dot_dim(layer: nn.Module, embed_dim: int) -> int:
    """How long the vectors are whose products a layer takes."""
    if hasattr(layer, "dim"):
        return layer.dim(embed_dim)
    return heads_of(layer, embed_dim)[2] if hasattr(layer, "num_kv_heads") else layer.head_dim


def build_block(spec: str, layers: Mapping[str, nn.Module], norm: nn.Module, sandwich: bool = False,
                branch: float = 1.0) -> Block:
    """The block "a/b" of these layers; a layer that stands twice in it gets two sets of parameters."""
    parts = spec.split("/")
    names = tuple(part if parts.count(part) == 1 else f"{part}_{parts[:n].count(part)}" for n, part in enumerate(parts))
    if any(isinstance(layers[part], FAM) for part in parts):
        return fam_block(spec, tuple(layers[part] for part in parts), names, norm, sandwich)
    return Block(tuple(layers[part] for part in parts), names, norm, sandwich, branch)


def fam_block(spec: str, layers: tuple[nn.Module, ...], names: tuple[str, ...], norm: nn.Module,
              sandwich: bool) -> FAMBlock:
    """The block of a `FAM` and the channel mixer that its memory passes through; raises ValueError for others."""
    if len(layers) != 2 or not isinstance(layers[0], FAM) or isinstance(layers[1], FAM):
        raise ValueError(f"config.model: a block of kind fam is that layer and one channel mixer, such as 'fam/mlp'; "
                         f"got {spec!r}; other layers go into blocks of their own")
    if jax.tree.leaves(layers[1].initial_state(1, 64, jnp.float32)):
        raise ValueError(f"config.model: the memory of fam passes through {names[1]!r} of {spec!r} as tokens do, slot "
                         f"by slot, and that layer mixes positions; use mlp, moe, peer or pkm")
    return FAMBlock(layers, names, norm, sandwich)


def layers_of(model: DecoderLM) -> list[nn.Module]:
    """The templates of the layers of all its blocks, in order of depth, those of a pattern once."""
    return [layer for _, block, _, _ in model.blocks() for layer in block.layers]


def not_additive(model: DecoderLM) -> tuple[str, ...]:
    """What in its layers makes a batch more than the sum of its microbatches."""
    return tuple(dict.fromkeys(what for layer in layers_of(model) for what in getattr(layer, "not_additive", ())))


def check_mesh(model: DecoderLM, mesh: Mapping[str, int]) -> None:
    """Raises ValueError where a layer cannot be split over a mesh of these sizes, with what could be."""
    for layer in layers_of(model):
        if hasattr(layer, "check_mesh"):
            layer.check_mesh(mesh)


def make_apply(model: nn.Module) -> Apply:
    """The model as a pure function of {"params": ...}, with {"lora": ...} and {"state": ...} where those are used."""
    def apply(params, tokens, state=None, *, reset=None, positions=None, weights=None, key=None):
        return model.apply(params, tokens, state, reset=reset, positions=positions, weights=weights, key=key)
    return apply


def abstract_params(model: nn.Module) -> Params:
    """Shapes of the variables, boxed with their logical axes; nothing is allocated."""
    return jax.eval_shape(lambda: initial_variables(model, jax.random.key(0)))


def init_params(model: nn.Module, key: Key, mesh: Mesh | None = None) -> Params:
    """Fresh variables {"params": ...}, created where they belong on the mesh."""
    def init(key):
        return nn.meta.unbox(initial_variables(model, key))
    out = None if mesh is None else shardings(abstract_params(model), mesh)
    return jax.jit(init, out_shardings=out)(key)


def initial_variables(model: nn.Module, key: Key) -> Params:
    """Variables as one token makes them, which implementations that the config names need not serve, nor the machine
    that only counts them."""
    return _unnamed(model).init(key, jnp.zeros((1, 1), jnp.int32))


def _unnamed(part: Any) -> Any:
    """A module with `implementation` of None in it and in all that it holds."""
    if type(part) is tuple:
        return tuple(map(_unnamed, part))
    if not isinstance(part, nn.Module):
        return part
    own = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
    held = {name: _unnamed(value) for name, value in own.items() if isinstance(value, (tuple, nn.Module))
            and name != "parent"}
    return part.clone(**held, **({"implementation": None} if "implementation" in own else {}))
