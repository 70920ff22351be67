"""`lm grow`: more experts for the PEER layers of a trained run, as a new run that computes the same."""

import argparse
import json
import pathlib

_EXAMPLES = """
examples:
  lm grow --workdir runs/a --out runs/grown --experts 2304      # 32^2 experts become 48^2
  lm train --config runs/grown --init-from runs/grown --workdir runs/b \\
      --config.model.peer.active_keys=None --config.data.path=TEXTS ...

runs/grown computes what runs/a does until active_keys=None lets the new experts be chosen.
"""
FREEZE = ("experts", "router", "rest", "none")
GROWN_FILE = "grown.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm grow`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("--out", metavar="DIR", help="workdir of the grown run: a new folder")
    parser.add_argument("--experts", type=int, metavar="N", help="experts of a layer from now on, a square")
    parser.add_argument("--layer", metavar="NAME", help="entry of config.model, where several are of kind peer")
    parser.add_argument("--freeze", choices=FREEZE, default="experts",
                        help="what training the grown run leaves as it is: the old experts and sub-keys (default); "
                             "with router also queries and their statistics; with rest everything that is not new")
    parser.add_argument("--new-keys", choices=("near", "fresh"), default="near",
                        help="new sub-keys near old ones, so that they are chosen at once (default), or anywhere")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="the averaged parameters")
    parser.add_argument("--seed", type=int, default=0, help="of what is new")


def main(args: argparse.Namespace) -> int:
    """Grows; what cannot be done is found before anything is written."""
    missing = [flag for flag in ("workdir", "out", "experts") if getattr(args, flag) is None]
    if missing or args.config is not None:
        raise ValueError(f"lm grow needs --workdir RUN, --out NEW and --experts N, and takes no --config"
                         f"{'; missing: --' + ', --'.join(missing) if missing else ''}")
    if "://" in args.out:
        raise ValueError(f"--out {args.out}: lm grow writes local folders; copy it there afterwards")
    from launch.config_workdir import check_place
    check_place(args.out)
    print(write_workdir(args))
    return 0


def write_workdir(args: argparse.Namespace) -> str:
    """Writes the grown run and returns what was done, in words. Nothing is left behind where it fails."""
    import jax

    from launch import config as configs
    from launch.convert_in import staged
    from launch.restore import open_run
    from lm.models.build import build_model
    from lm.models.growth import check_number, entry_to_grow, freezing, grow
    from lm.train.checkpoint import open_checkpoints
    from lm.train.init_from import on_host

    config = configs.load(args.workdir, args.overrides)
    model = config.model.to_dict()
    entry = entry_to_grow(model, args.layer)
    old = model[entry]["num_experts"]
    check_number(old, args.experts, max(1, configs.options(config, "mesh").sizes.get("expert", 1)))
    with staged(pathlib.Path(args.out).absolute()) as stage:
        run = open_run(args.workdir, args.step, overrides=args.overrides, ema=args.ema)
        variables = grow(jax.tree.map(on_host, run.params), model, entry, args.experts, keys=args.new_keys,
                         seed=args.seed)
        made = freezing(model, entry, args.freeze)
        every = {rule["match"] for what in FREEZE for rule in freezing(model, entry, what)}  # of a growth before
        kept = [rule for rule in config.optimizer.to_dict()["rules"] if rule["match"] not in every]
        fields = {**model[entry], "num_experts": args.experts, "numbering": "shell",
                  "active_keys": model[entry]["active_keys"] or round(old**0.5)}
        if args.freeze in ("router", "rest"):
            fields["momentum"] = 1.0  # of the queries' running statistics
        grown = config.to_dict()
        grown["model"][entry], grown["optimizer"]["rules"] = fields, (*made, *kept)
        grown["train"]["init_from"] = None
        grown = configs.resolve(grown)
        build_model(grown.model.to_dict(), run.tokenizer.vocab_size)
        with open_checkpoints(stage, configs.options(grown, "checkpoint")) as checkpoints:
            checkpoints.save(0, {"params": variables}, {})
        info = {"from": str(args.workdir), "step": run.step, "layer": entry, "experts": [old, args.experts],
                "frozen": args.freeze, "new_keys": args.new_keys, "seed": args.seed}
        (stage / GROWN_FILE).write_text(json.dumps(info, indent=2) + "\n")
        (stage / configs.CONFIG_FILE).write_text(configs.to_json(grown))
    return (f"{entry}: {old:,} experts become {args.experts:,} -> {args.out}. The new ones wait until a run is trained "
            f"with --config {args.out} --init-from {args.out} --config.model.{entry}.active_keys=None")
