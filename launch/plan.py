"""`lm plan`: parameters in all and active, granularity and FLOPs a token of a config's model; nothing is allocated.

With --target the whole train step is compiled for a machine that is not here, and its memory is printed.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm plan`."""
    parser.add_argument("--devices", type=int, metavar="N", help="devices of the mesh, for the bytes that each holds")
    parser.add_argument("--target", metavar="KIND-CHIPS", help="compile the train step for these chips, such as "
                                                               "v5e-256 or h100-8, and print the bytes of each")
    parser.add_argument("--python", metavar="PATH", help="with --target: a python with libtpu or the CUDA plugin, "
                                                         "where this one has none")


def main(args: argparse.Namespace) -> int:
    """Prints a table with a row for each kind of layer."""
    from launch import config as configs
    from lm.data.corpora import load_tokenizer
    from lm.models.build import build_model, check_mesh
    from lm.models.plan import format_rows, parameter_bytes, rows
    config = configs.from_args(args)
    if args.python is not None and args.target is None:
        raise ValueError(f"--python {args.python} has no effect without --target KIND-CHIPS")
    vocab_size = load_tokenizer(configs.options(config, "data")).vocab_size
    model = build_model(config.model.to_dict(), vocab_size)
    print(format_rows(rows(model, config.train.seq_len)))
    if args.devices is not None:
        mesh = configs.mesh_shape(config, args.devices)
        check_mesh(model, mesh)
        size = parameter_bytes(model, mesh)
        shape = ", ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"
        print(f"parameters on a device ({shape}): {size / 2**30:.3f} GiB; with their gradient and two moments "
              f"{4 * size / 2**30:.3f} GiB")
    if args.target is not None:
        from launch.planning.report import plan
        print(plan(config, vocab_size, args.target, args.python))
    return 0
