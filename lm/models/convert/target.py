"""A model of ours under the names of others, where their code computes the same."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lm.layers import LAYERS
from lm.models.build import entry_names, resolve_model
from lm.models.convert import blinkdl, hf_rwkv, llama
from lm.models.convert.names import Layout, to_names

FAMILIES = {("attention/mlp",): llama, ("rwkv4/channel_mix",): hf_rwkv}
# Fields that do not change what a trained model computes, beyond rounding.
FREE = {"dtype", "scan", "remat", "vocab_multiple", "embed_std", "dropout", "output_scale", "implementation"}
# Sizes that a config may leave open: the layer's method that says what they then are.
SIZES = {"attention": {"num_heads": "heads", "num_kv_heads": "kv_heads", "head_dim": "dim"},
         "mlp": {"mlp_dim": "hidden_dim"}, "channel_mix": {"mlp_dim": "hidden_dim"},
         "rwkv4": {"attention_dim": "width"}}

Cast = Callable[[np.ndarray], np.ndarray]


def explicit(given: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The `model` group with the sizes that it leaves open, and only the layers that it uses."""
    model = resolve_model(given)
    used = entry_names(tuple(model["prefix"]) + tuple(model["pattern"]))
    out = {name: value for name, value in model.items() if not isinstance(value, Mapping) or name in used}
    for name in used:
        entry = dict(out[name])
        kind = entry["kind"]
        layer = LAYERS[kind](**{k: v for k, v in entry.items() if k != "kind"})
        for field, method in SIZES.get(kind, {}).items():
            entry[field] = getattr(layer, method)(model["embed_dim"])
        if kind == "rwkv7":
            entry |= {f"{k}_rank": v for k, v in layer.ranks(model["embed_dim"]).items()}
        if kind == "rwkv6":
            entry |= dict(zip(("mix_rank", "decay_rank"), layer.ranks(model["embed_dim"]), strict=True))
        out[name] = entry
    return out | {"vocab_size": vocab_size, "norm_eps": eps_of(out)}


def eps_of(model: Mapping[str, Any]) -> float:
    """The number that `norm_eps` leaves open."""
    return (1e-6 if model["norm"] == "rms" else 1e-5) if model["norm_eps"] is None else model["norm_eps"]


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Fields, as `model.a.b=value`, of which theirs are not the same."""
    out = []
    for name, value in ours.items():
        if isinstance(value, Mapping):
            other = theirs.get(name, {})
            out += [f"model.{name}.{field}={v!r}" for field, v in value.items()
                    if field not in FREE and other.get(field) != v
                    # The layer whose values others take has no rank of its own.
                    and not (field == "value_rank" and not value.get("value_residual", True))]
        elif name not in FREE and theirs.get(name) != value:
            out.append(f"model.{name}={value!r}")
    return out


def layout_of_hugging_face(given: Mapping[str, Any], vocab_size: int, max_len: int) -> tuple[dict[str, Any], Layout]:
    """(config.json, layout) of a model whose code transformers has: Llama or RWKV-4.

    Raises ValueError, naming the fields, where that code would compute something else.
    """
    model = explicit(given, vocab_size)
    family = FAMILIES.get(tuple(model["pattern"]))
    if family is None or model["prefix"]:
        raise ValueError(f"transformers has no code for model.prefix={tuple(model['prefix'])!r} and "
                         f"model.pattern={tuple(model['pattern'])!r}; it has for "
                         f"{' and '.join(map(repr, FAMILIES))} without a prefix (and --to blinkdl knows every RWKV)")
    kinds = [f"model.{name}.kind={model[name]['kind']!r}" for name in entry_names(tuple(model["pattern"]))
             if model[name]["kind"] != name]
    hf = {} if kinds else family.hf_config(model, max_len)
    check(kinds or differences(model, explicit(family.model_config(hf), vocab_size)), family.ARCHITECTURE)
    return hf, family.layout_of(hf)


def to_hugging_face(given: Mapping[str, Any], params: Mapping[str, Any], vocab_size: int, max_len: int,
                    cast: Cast) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, tensors) of a model whose code transformers has; see `layout_of_hugging_face`."""
    hf, layout = layout_of_hugging_face(given, vocab_size, max_len)
    return hf, to_names(layout, params, vocab_size, cast)


def to_blinkdl(given: Mapping[str, Any], params: Mapping[str, Any], vocab_size: int,
               cast: Cast) -> dict[str, np.ndarray]:
    """BlinkDL's tensors of an RWKV model. Raises ValueError, naming the fields, where his code would compute something
    else."""
    model = explicit(given, vocab_size)
    versions = {f"rwkv{n}/channel_mix": n for n in blinkdl.NAMES}
    pattern = tuple(model["pattern"]) or ("rwkv7/channel_mix",)
    version = versions.get(pattern[0]) if len(pattern) == 1 else None
    if version is None or tuple(model["prefix"]) != (("rwkv7_first/channel_mix",) if version == 7 else ()):
        raise ValueError(f"BlinkDL has no names for model.prefix={tuple(model['prefix'])!r} and model.pattern="
                         f"{tuple(model['pattern'])!r}; there are {', '.join(map(repr, versions))}, the last after "
                         f"prefix ('rwkv7_first/channel_mix',)")
    if model["tie_embeddings"] or not model["embed_norm"]:
        check([f"model.{n}={model[n]!r}" for n in ("tie_embeddings", "embed_norm")], blinkdl.NAMES[version])
    head_dim = model.get(f"rwkv{version}", {}).get("head_dim", 64)
    names = to_names(blinkdl.layout(version, model["num_layers"], head_dim), params, vocab_size, cast)
    tensors = blinkdl.join_mixes(names)
    check(differences(model, explicit(blinkdl.model_config(tensors), vocab_size)), blinkdl.NAMES[version])
    return tensors


def check(wrong: list[str], what: str) -> None:
    """Raises ValueError where there are fields that their code has another value of."""
    if wrong:
        raise ValueError(f"{what} as others compute it is not this model: {', '.join(wrong)}")
