"""`lm generate`: continues prompts with a trained model. The text goes to stdout as it is written, what it cost to
stderr."""

import argparse
import json
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from launch import beam, depth

log = logging.getLogger(__name__)

_EXAMPLES = """
examples:
  lm generate --workdir runs/quickstart --prompt "My fellow Americans, " --temperature 0.8
  echo "The state of" | lm generate --workdir runs/quickstart --num-samples 4 --stop '\\n' --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm generate`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="use the averaged parameters")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeat it for several prompts")
    parser.add_argument("--prompt-file", action="append", default=[], metavar="FILE",
                        help="a file that is one prompt, without its last line end; - is stdin, which is also read "
                             "where no prompt is given")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens of this probability")
    parser.add_argument("--min-p", type=float, metavar="P", help="draw from tokens at least P times the best's")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X",
                        help="above 1, tokens of the text so far become less probable (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help=r"text before which to stop; repeat it for several; \n and \t are understood")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N",
                        help="texts that are written at a time; they do not depend on it (default: 16)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line and text")
    beam.add_arguments(parser)
    depth.add_decoding_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Loads the run and writes. Mistakes in flags are found before anything is loaded."""
    if args.workdir is None or args.config is not None:
        raise ValueError("lm generate needs --workdir RUN, the folder of a run, and takes the config from there; "
                         "--config.GROUP.FIELD=VALUE changes a field of it")
    for name in ("max_new_tokens", "num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2^32 - 1; got {args.seed}")
    from lm.generate.sampling import SamplingOptions
    options = SamplingOptions(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    options.check()
    beam.check(args)
    prompts = read_prompts(args.prompt, args.prompt_file)
    from launch.restore import open_run
    run = depth.changed(open_run(args.workdir, args.step, overrides=args.overrides, ema=args.ema), args)
    return write(run, prompts, options, args) if args.beams is None else beam.write(run, prompts, args)


def read_prompts(texts: Sequence[str], files: Sequence[str]) -> list[str]:
    """All prompts: those given, then the files'; stdin where there is neither."""
    if not texts and not files:
        if sys.stdin.isatty():
            raise ValueError("there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe one in")
        files = ["-"]
    read = []
    for name in files:
        try:
            read.append(sys.stdin.read() if name == "-" else pathlib.Path(name).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {name} is not UTF-8: byte {error.object[error.start]:#04x} at offset "
                             f"{error.start}; convert it, for example with `iconv -t utf-8`") from None
    return [*texts, *(text.removesuffix("\n") for text in read)]


def write(run: Any, prompts: Sequence[str], options: Any, args: argparse.Namespace) -> int:
    """Continues every prompt `args.num_samples` times with an opened run and prints the texts."""
    import jax

    from lm.eval.samples import encode_prompt, stop_tokens
    from lm.generate.decode import generate
    from lm.generate.result import Timing
    jobs = [(n, sample) for n in range(len(prompts)) for sample in range(args.num_samples)]
    ids = [encode_prompt(run.tokenizer, prompt, add_bos=run.config.data.add_bos) for prompt in prompts]
    warn_if_long(max(map(len, ids)) + args.max_new_tokens, run)
    stops = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in args.stop]
    show = Printer(prompts, args, run.step)
    timing = Timing()
    with jax.set_mesh(run.mesh):
        for start in range(0, len(jobs), args.batch_size):
            batch = jobs[start:start + args.batch_size]
            made = generate(run.apply, run.params, run.model.initial_state, [ids[n] for n, _ in batch],
                            max_new_tokens=args.max_new_tokens, options=options, seed=args.seed,
                            rows=range(start, start + len(batch)), stop_tokens=stop_tokens(run.tokenizer),
                            stop_strings=stops, decode=run.tokenizer.decode, capacity=run.model.max_positions,
                            steps_per_sync=8 if show.streams else 32, speculation=depth.speculation(args),
                            continuous=args.continuous,
                            on_text=show.piece if show.streams else None)
            for (n, sample), row in zip(batch, made.rows, strict=True):
                show.finished(n, sample, row)
            timing += made.timing
    print(summary(timing), file=sys.stderr)
    return 0


class Printer:
    """Prints a single text as it is written, several one after another under a headline each, or JSON lines."""

    def __init__(self, prompts: Sequence[str], args: argparse.Namespace, step: int):
        self._prompts, self._json, self._seed, self._step = prompts, args.json, args.seed, step
        self._several = len(prompts) * args.num_samples > 1
        self.streams = not self._json and not self._several
        self._lead = prompts[0]
        self._terminal = sys.stdout.isatty()

    def piece(self, row: int, text: str) -> None:
        """The next piece of the only text, the prompt in front of the first."""
        self._print(self._lead + text, end="")
        self._lead = ""

    def finished(self, prompt: int, sample: int, row: Any) -> None:
        """A finished text."""
        if self._json:
            print(json.dumps({"prompt": self._prompts[prompt], "sample": sample, "text": row.text,
                              "finish_reason": row.finish_reason, "tokens": row.tokens.tolist(), "seed": self._seed,
                              "step": self._step}, ensure_ascii=False), flush=True)
        elif self._several:
            self._print(f"==> prompt {prompt}, sample {sample} ({row.finish_reason}) <==\n"
                        f"{self._prompts[prompt]}{row.text}\n")
        else:
            self._print(self._lead)

    def _print(self, text: str, end: str = "\n") -> None:
        """Control characters, which a model of bytes may write, are shown escaped on a terminal and not sent to it."""
        if self._terminal:
            text = "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)
        print(text, end=end, flush=True)


def warn_if_long(length: int, run: Any) -> None:
    """Says where the text may become longer than what the model was trained on."""
    if length > run.config.train.seq_len:
        log.warning("prompt and new tokens make up to %d tokens; the model was trained on %d at a time", length,
                    run.config.train.seq_len)


def summary(timing: Any) -> str:
    """What it cost, in one line."""
    return (f"decode {timing.decode_rate:,.0f} tokens/s ({timing.decode_tokens:,} tokens), prefill "
            f"{timing.prefill_rate:,.0f} tokens/s ({timing.prefill_tokens:,}), compilation "
            f"{timing.compile_seconds:.1f} s, state {timing.state_bytes:,} bytes"
            + (f", {timing.kept / timing.drafted:.1%} of {timing.drafted:,} drafted tokens kept"
               if timing.drafted else ""))
