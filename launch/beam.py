"""`lm generate --beams N`: the most probable continuations that a beam search finds, in place of drawn ones."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

_DRAWING = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0, "stop": []}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the search."""
    parser.add_argument("--beams", type=int, metavar="N",
                        help="search for the most probable texts with N beams; prints the best --num-samples of them")
    parser.add_argument("--length-penalty", type=float, default=0.0, metavar="X",
                        help="with --beams: rank by log-probability / length^X; 1 is the mean a token (default: 0)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that a search does not have."""
    if args.beams is None:
        if args.length_penalty:
            raise ValueError("--length-penalty ranks the texts of a search; give --beams N too")
        return
    if args.beams < 1 or args.num_samples > args.beams:
        raise ValueError(f"--beams must be at least 1, and at least --num-samples={args.num_samples}; got {args.beams}")
    for name, default in _DRAWING.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is about drawing tokens, and --beams draws none; leave one "
                             f"of them out")
    for name, given in (("draft", args.draft is not None), ("continuous", args.continuous)):
        if given:
            raise ValueError(f"--{name} is about rows that each write one text, and --beams keeps its beams in step, a "
                             f"token a call; leave one of them out")


def check_width(name: str, beams: int, tokenizer: Any) -> None:
    """Raises ValueError for more beams than there are tokens: memory grows with them, and most begin as copies."""
    size = tokenizer.vocab_size
    if beams > size:
        raise ValueError(f"{name}={beams} is more than the {size} tokens of the vocabulary, with which a text can go "
                         f"on; give at most {size}")


def write(run: Any, prompts: Sequence[str], args: argparse.Namespace) -> int:
    """Searches for each prompt in turn and prints its best texts."""
    import jax

    from launch.generate import warn_if_long
    from lm.eval.samples import encode_prompt, stop_tokens
    from lm.generate.beam import beam_search
    check_width("--beams", args.beams, run.tokenizer)
    ids = [encode_prompt(run.tokenizer, prompt, add_bos=run.config.data.add_bos) for prompt in prompts]
    warn_if_long(max(map(len, ids)) + args.max_new_tokens, run)
    ends, started = stop_tokens(run.tokenizer), time.perf_counter()
    for n, (prompt, given) in enumerate(zip(prompts, ids, strict=True)):
        with jax.set_mesh(run.mesh):
            found, = beam_search(run.apply, run.params, run.model.initial_state, [given], beams=args.beams,
                                 max_new_tokens=args.max_new_tokens, stop_tokens=ends,
                                 length_penalty=args.length_penalty, capacity=run.model.max_positions)
        for place, one in enumerate(found[:args.num_samples]):
            text = run.tokenizer.decode(one.tokens[:-1] if one.ended else one.tokens)
            if args.json:
                print(json.dumps({"prompt": prompt, "sample": place, "text": text, "logp": one.logp,
                                  "finish_reason": "eos" if one.ended else "length", "tokens": one.tokens.tolist(),
                                  "beams": args.beams, "step": run.step}, ensure_ascii=False), flush=True)
            elif len(prompts) * args.num_samples > 1:
                print(f"==> prompt {n}, beam {place}, log-probability {one.logp:.2f} <==\n{prompt}{text}\n", flush=True)
            else:
                print(prompt + text, flush=True)
    print(f"{len(prompts)} searches with {args.beams} beams in {time.perf_counter() - started:.1f} s, compilation "
          f"included", file=sys.stderr)
    return 0
