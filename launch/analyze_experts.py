"""`lm analyze experts`: how evenly a run uses its experts, and the tokens that choose one of them most."""

import argparse
from collections.abc import Mapping
from typing import Any

MOST_USED = 3  # experts of a layer that are shown where none is named
CONTEXT = 24  # tokens before the one that chose, and half as many after it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm analyze experts`."""
    group = parser.add_argument_group("experts")
    group.add_argument("--expert", type=int, action="append", metavar="ID",
                       help=f"list the tokens that choose this expert most; repeat it for several (default: the "
                            f"{MOST_USED} most used of each layer)")
    group.add_argument("--layer", metavar="NAME", help="of this layer alone, such as layer_3/peer (default: all)")
    group.add_argument("--tokens", type=int, default=8, metavar="N", help="tokens listed an expert (default: 8)")
    group.add_argument("--batches", type=int, default=20, metavar="N",
                       help="batches of the validation split that are looked at (default: 20)")


def experts(run: Any, args: argparse.Namespace) -> tuple[bytes, dict[str, Any], list[str]]:
    """(figure, numbers, lines to print). Raises ValueError where the run has no such layer or expert."""
    import jax
    import numpy as np

    from lm.analysis.experts import layers_with_experts, use
    from lm.analysis.figures import draw_experts
    for name in ("tokens", "batches"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1; got {getattr(args, name)}")
    rows = chosen_layers(layers_with_experts(run.model), args)
    data = batches(run)
    with jax.set_mesh(run.mesh):
        asked = dict.fromkeys(rows, args.expert)
        if args.expert is None:
            found = use(run.model, run.params, data(args.batches), dict.fromkeys(rows, ()), args.tokens)
            asked = {name: np.argsort(-one.scores, kind="stable")[:MOST_USED].tolist() for name, one in found.items()}
        found = use(run.model, run.params, data(args.batches), asked, args.tokens)
    numbers, lines = {}, []
    for name, one in found.items():
        listed = {expert: [written(run.tokenizer, place) for place in places] for expert, places in one.places.items()}
        numbers[name] = {"experts": rows[name], "usage": one.usage, "unevenness": one.unevenness,
                         "weight": one.scores.tolist(), "tokens": one.tokens.tolist(), "chosen_by": listed}
        lines.append(f"{name}: {one.usage:.1%} of {rows[name]:,} experts used, unevenness {one.unevenness:.3f}")
        for expert, places in listed.items():
            lines.append(f"  expert {expert}: chosen by {one.tokens[expert]:,} tokens, "
                         f"{one.scores[expert] / max(one.scores.sum(), 1e-30):.3%} of the weight")
            lines += [f"    {place['weight']:.3f}  {place['before']!r} >{place['token']!r}< {place['after']!r}"
                      for place in places]
    picture = draw_experts({name: one.scores for name, one in found.items()}, f"experts, step {run.step}")
    return picture, {"layers": numbers}, lines


def chosen_layers(layers: Mapping[str, int], args: argparse.Namespace) -> dict[str, int]:
    """The layers that are looked at, each with its number of experts."""
    from lm.core.fields import did_you_mean
    if not layers:
        raise ValueError("the run has no layer of kind peer or pkm, whose experts could be listed")
    if args.layer is not None and args.layer not in layers:
        raise ValueError(f"--layer {args.layer!r} is no layer with experts{did_you_mean(args.layer, layers)}; it may "
                         f"be {', '.join(layers)}")
    out = dict(layers) if args.layer is None else {args.layer: layers[args.layer]}
    wrong = [expert for expert in args.expert or () if not 0 <= expert < min(out.values())]
    if wrong:
        raise ValueError(f"--expert {wrong[0]}: the experts of {', '.join(out)} are 0 to {min(out.values()) - 1}")
    return out


def batches(run: Any) -> Any:
    """limit -> batches of the run's validation split, or of its training data where nothing is held out."""
    from launch import config as configs
    from lm.data.corpora import load_corpora
    from lm.data.loader import build_dataset
    data = configs.options(run.config, "data")
    corpora = load_corpora(data, run.tokenizer)
    split = "validation" if corpora.validation else "train"
    made = build_dataset(data, split=split, corpora=corpora, batch_size=run.config.train.batch_size,
                         seq_len=run.config.train.seq_len)
    return made.eval_batches if split == "validation" else lambda limit: (made.batch(step) for step in range(limit))


def written(tokenizer: Any, place: Any) -> dict[str, Any]:
    """A token with what stands around it in its row."""
    text = lambda ids: tokenizer.decode([int(i) for i in ids])
    at = place.position
    return {"weight": place.weight, "row": place.row, "position": at,
            "before": text(place.tokens[max(0, at - CONTEXT):at]), "token": text(place.tokens[at:at + 1]),
            "after": text(place.tokens[at + 1:at + 1 + CONTEXT // 2])}
