"""`lm bench`: benchmarks that print ratios measured in one run. They are never tests."""

import argparse

WHAT = {"train": "launch.bench.train", "rwkv4": "launch.bench.train", "min_gru": "launch.bench.train",
        "lengths": "launch.bench.lengths", "orpo": "launch.bench.orpo", "generate": "launch.bench.generate",
        "kernels": "launch.bench.kernels", "tables": "launch.bench.tables", "sweep": "launch.bench.sweep"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm bench`."""
    parser.add_argument("what", choices=sorted(WHAT), help="train: a train step against PyTorch's GPT-2; rwkv4, "
                        "min_gru: the same against its RWKV-4 and minGRU-pytorch; lengths: RWKV-4 against our own "
                        "transformer as rows grow; orpo: a step of preference learning against TRL's trainer; "
                        "generate: a token after a long context; kernels: what CPUs run of the kernel operations, "
                        "against packages; tables: PEER as its table grows, updated by rows and densely; sweep: "
                        "several small models in one program against one after the other")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each side and shape (at least 10)")
    parser.add_argument("--seq-len", type=int, action="append", metavar="T", help="tokens of a row; may be repeated "
                        "(default: 256 and 1024; lengths: 256 to 8,192; generate: 1,024 to 65,536; sweep: 32)")
    parser.add_argument("--width", type=int, action="append", metavar="E", help="sweep: widths of the model; may be "
                        "repeated (default: 16, 64 and 256)")
    parser.add_argument("--vocab", type=int, default=8192, help="orpo: ids of the vocabulary (default: 8192)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/bench", help="where JSON and Markdown are written")


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark."""
    import importlib
    return importlib.import_module(WHAT[args.what]).run(args)
