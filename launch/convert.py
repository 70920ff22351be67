"""`lm convert`: published weights into a workdir, and a run out to a folder of Hugging Face or a file of BlinkDL's."""

import argparse
import pathlib

_EXAMPLES = """
examples:
  lm convert RWKV-4-Pile-169M.pth --workdir runs/pile --tokenizer 20B_tokenizer.json
  lm convert SmolLM2-135M/ --workdir runs/smol          # a folder with config.json, or a .gguf file
  lm generate --workdir runs/smol --prompt "The capital of France is" --temperature 0
  lm train --config runs/smol --init-from runs/smol --workdir runs/tuned --config.data.path=TEXTS ...
  lm convert --to hf --workdir runs/tuned --out tuned/  # what transformers loads; --merge adds adapters up
"""
TARGETS = ("hf", "blinkdl", "peft", "run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm convert`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("source", nargs="?", metavar="SOURCE",
                        help="folder of a Hugging Face model (Llama or RWKV-4), or a file: BlinkDL's .pth, "
                             "safetensors, GGUF, rwkv.cpp's .bin; goes into a new --workdir")
    parser.add_argument("--tokenizer", metavar="WHAT",
                        help="'bytes', or a file: tokenizer.json, *.model (sentencepiece), *.tiktoken, "
                             "rwkv_vocab_*.txt (default: what lies in SOURCE)")
    parser.add_argument("--to", choices=TARGETS,
                        help="the other way: write the run of --workdir to --out, as transformers loads it (hf), as a "
                             "safetensors file with BlinkDL's names (blinkdl), its adapters as PEFT loads them (peft), "
                             "or, with --merge, as a run without adapters (run)")
    parser.add_argument("--merge", action="store_true", help="with --to: add the run's adapters to its weights")
    parser.add_argument("--out", metavar="PATH", help="new folder, or file (blinkdl)")
    parser.add_argument("--step", type=int, help="with --to: checkpoint to use (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="with --to: use the averaged parameters")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                        help="with --to: of the tensors (default: that of the weights which the run was converted "
                             "from, else float32)")


def main(args: argparse.Namespace) -> int:
    """Converts one way or the other. What cannot be done is found before anything is written."""
    if args.workdir is None or args.config is not None:
        raise ValueError("lm convert needs --workdir: a new folder for SOURCE, or with --to the run to write out; it "
                         "takes no --config")
    if args.to is None:
        if args.source is None:
            raise ValueError("lm convert needs SOURCE, a folder or file of weights, or --to hf|blinkdl with --out")
        if given := [flag for flag in ("out", "step", "dtype") if getattr(args, flag) is not None] + \
                [flag for flag in ("ema", "merge") if getattr(args, flag)]:
            raise ValueError(f"--{given[0]} belongs to --to; SOURCE becomes a float32 checkpoint in --workdir")
        from launch.convert_in import write_workdir
        print(write_workdir(pathlib.Path(args.source).expanduser(), args.workdir, args.tokenizer, args.overrides))
        return 0
    if args.source is not None or args.tokenizer is not None or args.out is None:
        raise ValueError("lm convert --to takes --workdir RUN and --out PATH, and neither SOURCE nor --tokenizer")
    if (args.to == "run" and not args.merge) or (args.to == "peft" and args.merge):
        raise ValueError("--to run writes a run with its adapters added: give --merge; --to peft writes them alone: "
                         "leave it out")
    from launch.convert_out import write_out
    print(write_out(args))
    return 0
