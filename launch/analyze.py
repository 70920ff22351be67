"""`lm analyze decay|trace|experts`: pictures and numbers of what a trained model does inside."""

import argparse
import json
from typing import Any

from lm.core.fields import did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm analyze`."""
    parser.add_argument("what", metavar="decay|trace|experts", help="decay: how fast the channels of each layer "
                        "forget; trace: which layer and token bring an answer back after the subject was corrupted; "
                        "experts: how evenly experts are used, and the tokens that choose one most")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="the averaged parameters")
    parser.add_argument("--out", metavar="DIR", help="where the files go (default: <workdir>/analysis)")
    group = parser.add_argument_group("trace")
    group.add_argument("--prompt", metavar="TEXT", help="a text that ends where the answer begins")
    group.add_argument("--subject", metavar="TEXT", help="the part of the prompt that is corrupted")
    group.add_argument("--answer", metavar="TEXT", help="what the model says after the prompt, with its space in front")
    group.add_argument("--noise", type=float, default=3.0, metavar="X",
                       help="of the corruption, in standard deviations of the embeddings (default: 3)")
    group.add_argument("--draws", type=int, default=4, metavar="N", help="of the noise, averaged (default: 4)")
    group.add_argument("--seed", type=int, default=0, help="of the noise")
    from launch import analyze_experts
    analyze_experts.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Opens the run, computes, writes a figure and a JSON file, and prints where they are."""
    if args.what not in WHAT:
        raise ValueError(f"`lm analyze` has no {args.what!r}{did_you_mean(args.what, WHAT)}; it has {', '.join(WHAT)}")
    if args.workdir is None or args.config is not None:
        raise ValueError("lm analyze needs --workdir RUN, the folder of a run or of converted weights")
    if args.what == "trace":
        missing = [f"--{name}" for name in ("prompt", "subject", "answer") if not getattr(args, name)]
        if missing:
            raise ValueError(f"lm analyze trace needs {', '.join(missing)}: for example --prompt 'The Eiffel Tower is "
                             f"in' --subject 'Eiffel Tower' --answer ' Paris'")
    from etils import epath

    from launch.config_workdir import write_text
    from launch.restore import open_run
    unrolled = (*args.overrides, ("model.scan", False)) if args.what == "experts" else args.overrides
    run = open_run(args.workdir, args.step, overrides=unrolled, ema=args.ema)
    picture, numbers, lines = WHAT[args.what](run, args)
    folder = epath.Path(args.out or epath.Path(args.workdir) / "analysis")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.what}.png").write_bytes(picture)
    write_text(folder / f"{args.what}.json", json.dumps({"step": run.step, **numbers}, indent=1) + "\n")
    print("\n".join([*lines, f"{folder / args.what}.png and .json"]))
    return 0


def decay(run: Any, args: argparse.Namespace) -> tuple[bytes, dict[str, Any], list[str]]:
    """(figure, numbers, lines to print) of the decays of every recurrent layer."""
    import numpy as np

    from lm.analysis.decay import decay_curves
    from lm.analysis.figures import draw_decay
    curves = decay_curves(run.params, run.config.model.to_dict())
    lines = ["layer  kind    half of the channels keep at least   share above 0.99"]
    lines += [f"{curve.depth:5}  {curve.kind:6}  {np.median(curve.factors):34.4f}   {np.mean(curve.factors > 0.99):.3f}"
              for curve in curves]
    numbers = {"curves": [{"layer": c.depth, "kind": c.kind, "factors": c.factors.tolist()} for c in curves]}
    return draw_decay(curves, f"time decay, step {run.step}"), numbers, lines


def trace(run: Any, args: argparse.Namespace) -> tuple[bytes, dict[str, Any], list[str]]:
    """(figure, numbers, lines to print) of one causal trace."""
    import jax
    import numpy as np

    from lm.analysis.figures import draw_trace
    from lm.analysis.trace import trace as compute
    from lm.eval.samples import encode_prompt
    prompt = encode_prompt(run.tokenizer, args.prompt, add_bos=run.config.data.add_bos)
    subject = tokens_of(run.tokenizer, prompt, args.prompt, args.subject)
    answer = run.tokenizer.encode(args.answer)
    with jax.set_mesh(run.mesh):
        found = compute(run.model, run.params, prompt.tolist(), subject, [int(i) for i in answer], noise=args.noise,
                        draws=args.draws, seed=args.seed)
    tokens = [run.tokenizer.decode([int(i)]) for i in prompt]
    layer, token = np.unravel_index(found.restored.argmax(), found.restored.shape)
    lines = [f"log p(answer): clean {found.clean:.3f}, corrupted {found.corrupted:.3f}, best restored "
             f"{found.restored.max():.3f} at layer {layer}, token {token} {tokens[token]!r}"]
    numbers = {"prompt": args.prompt, "subject": args.subject, "answer": args.answer, "tokens": tokens,
               "subject_tokens": list(subject), "clean": found.clean, "corrupted": found.corrupted,
               "restored": found.restored.tolist()}
    return draw_trace(found, tokens, subject, f"{args.prompt}[{args.answer}]"), numbers, lines


def tokens_of(tokenizer: Any, ids: Any, text: str, part: str) -> tuple[int, int]:
    """First and one after the last token that holds a character of `part`, where it first stands in the prompt.

    Raises ValueError where the prompt does not hold it.
    """
    begin = text.find(part)
    if begin < 0:
        raise ValueError(f"--subject {part!r} is no part of --prompt {text!r}; write it as it stands there")
    # Where each token ends, counted back from the end of the text: a bos in front decodes to something or nothing.
    whole = tokenizer.decode([int(i) for i in ids])
    rest = [len(whole) - len(tokenizer.decode([int(i) for i in ids[:n + 1]])) for n in range(len(ids))]
    ends = [len(text) - r for r in rest]
    inside = [n for n, end in enumerate(ends)
              if end > begin and (ends[n - 1] if n else end - 1) < begin + len(part)]
    if not inside:
        raise ValueError(f"--subject {part!r} lies in no token of the prompt as this tokenizer writes it ({whole!r}); "
                         f"name a longer part")
    return inside[0], inside[-1] + 1


def experts(run: Any, args: argparse.Namespace) -> tuple[bytes, dict[str, Any], list[str]]:
    """(figure, numbers, lines to print) of the layers that retrieve experts by product keys."""
    from launch.analyze_experts import experts as compute
    return compute(run, args)


WHAT = {"decay": decay, "trace": trace, "experts": experts}
