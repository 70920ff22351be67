"""`lm train`: from a config and a workdir to a run of the loop."""

import argparse
import dataclasses
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm train`."""
    parser.add_argument("--profile", metavar="START:END", help="trace these steps into <workdir>/profile (for xprof)")
    parser.add_argument("--init-from", metavar="WORKDIR",
                        help="start from the parameters of that run, as far as they fit (config.train.init_from)")
    parser.add_argument("--allow-config-change", action="store_true",
                        help="go on in a workdir that was made by a different config")


def main(args: argparse.Namespace) -> int:
    """Trains; returns the exit code."""
    from launch.cli import is_for_user
    from lm.train.exit_codes import STORAGE
    from lm.train.storage import refusal
    try:
        return run(args)
    except Exception as error:
        told = None if is_for_user(error) else refusal(error)
        if told is None or args.debug:
            raise
        print(f"lm train: {args.workdir} takes no more: {told}\nThe newest checkpoint there is complete. Make room, or "
              f"see that it can be written again; then the same command goes on.", file=sys.stderr, flush=True)
        return STORAGE


def run(args: argparse.Namespace) -> int:
    """Trains; what goes wrong is raised."""
    from launch import config as configs
    from launch.config_workdir import check_place, check_workdir, check_writable
    if args.init_from is not None:
        args.overrides = [*args.overrides, ("train.init_from", args.init_from)]
    if args.workdir is None:
        raise ValueError("lm train needs --workdir DIR, where checkpoints and logs go (local or gs://)")
    check_place(args.workdir)
    config = configs.from_args(args)
    check_writable(args.workdir)

    from launch.distributed import initialize
    initialize()
    import jax

    from launch.environment import write_environment
    configs.check(config, jax.device_count())
    first = jax.process_index() == 0
    check_workdir(args.workdir, config, allow_change=args.allow_config_change, write=False)
    prepared = prepare(config)  # before anything is written: a config that cannot run leaves no trace

    def begun() -> None:
        attach(prepared, args.workdir)
        if first:
            check_workdir(args.workdir, config, allow_change=args.allow_config_change)
            write_environment(args.workdir, args.config)
            write_parameters(args.workdir, prepared)
            print(prepared.headline, flush=True)

    from launch.preference import attach, with_reference
    from lm.train.loop import Schedule, train
    evaluation = configs.options(config, "eval")
    with jax.set_mesh(prepared.mesh):
        return train(prepared.experiment(args.workdir), args.workdir, prepared.mesh, options=prepared.options,
                     checkpoint=configs.options(config, "checkpoint"), log=configs.options(config, "log"),
                     schedule=Schedule(evaluation.every, evaluation.final), profile=args.profile,
                     start=lambda state: with_reference(prepared, prepared.start(state, args.workdir), args.workdir),
                     begun=begun)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is built but not started: model, data and recipe of one resolved config on one mesh."""

    config: Any
    options: Any  # TrainOptions
    mesh: Any
    model: Any
    recipe: Any
    corpora: Any
    train_set: Any
    headline: str
    goldfish: Any = None  # lm.core.goldfish.Goldfish, where the train step makes the mask
    began: dict = dataclasses.field(default_factory=dict)  # "base": see `lm.train.base`, once the run has begun

    def experiment(self, workdir: str, apply: Any = None) -> Any:
        """The `lm.train.loop.Experiment` of this run. apply: the model's, where runs are to share compiled programs."""
        from launch import adapters
        from launch import config as configs
        from launch.evaluation import Evaluation
        from launch.preference import reporting, telling
        from launch.recipe import objective_of
        from lm.data.loader import iterate
        from lm.models.build import make_apply
        from lm.train.loop import Experiment
        data = configs.options(self.config, "data")
        apply = make_apply(self.model) if apply is None else apply
        evaluation = Evaluation(self, workdir, apply)
        bytes_per_token = self.train_set.bytes_per_target if self.train_set.num_bytes else None

        def batches(start, index, count):
            return iterate(self.train_set, start, process_index=index, process_count=count,
                           num_threads=data.num_threads, prefetch=data.prefetch, num_workers=data.num_workers)

        return Experiment(
            apply=apply, recipe=self.recipe,
            objective=objective_of(self.model, self.options, self.config.loss.to_dict()),
            batches=batches, batch_at=reporting(self.train_set), evaluate=evaluation,
            data={"fingerprint": self.train_set.fingerprint},
            flops_per_token=self.model.flops_per_token(self.options.seq_len),
            # Frozen kernels need no gradient of their own: forward, and backward through the inputs.
            passes=self.model.passes(self.options.seq_len, 1.0 if adapters.used(self.options) else 2.0),
            bytes_per_token=bytes_per_token,
            baselines=evaluation.baselines, mask=self.mask(), base=lambda: self.began.get("base"),
            unscored=telling(self.train_set, self.options.on_nonfinite))

    def mask(self) -> Any:
        """What the train step does to the weights of a batch, None for nothing."""
        if self.goldfish is None:
            return None
        import jax.numpy as jnp

        from lm.core.goldfish import masked
        from lm.core.goldfish_sharded import dropped_over_shards
        rows = jnp.uint32(self.options.batch_size)
        return lambda batch, step: masked(self.goldfish, batch, step.astype(jnp.uint32) * rows, dropped_over_shards)

    def start(self, state: Any, workdir: str) -> Any:
        """A fresh state with another run's parameters, where the config asks for them."""
        if self.options.init_from is None:
            return state
        from launch.start import from_run
        state, self.began["base"] = from_run(self.options, state, workdir)
        return state


def prepare(config: Any, corpora: Any = None, devices: Any = None) -> Prepared:
    """Builds everything that a run needs; raises ValueError for what cannot run, before anything is compiled. corpora:
    of another run with the same data. devices: of its mesh; all where not given."""
    from launch import config as configs
    from launch.distill import check_teacher
    from launch.preference import check_rows
    from launch.recipe import recipe_of
    from lm.core.sharding import check_batch, make_mesh
    from lm.core.tree import num_params
    from lm.core.undivided import undivided
    from lm.data.corpora import load_corpora
    from lm.data.loader import build_dataset
    from lm.data.tokenizer import special_ids
    from lm.models.build import build_model, check_mesh
    from lm.tasks.goldfish import goldfish_of

    options, mesh_options = configs.options(config, "train"), configs.options(config, "mesh")
    mesh = make_mesh(mesh_options.sizes, dcn=mesh_options.dcn, devices=devices)
    check_batch(options.batch_size, options.seq_len, mesh, options.microbatches)
    data = configs.options(config, "data")
    check_carry(options, data, config)
    corpora = load_corpora(data) if corpora is None else corpora
    if options.init_from is not None:
        from launch.start import compare_tokenizers
        compare_tokenizers(options.init_from, corpora.tokenizer)
    goldfish = goldfish_of(config.loss.to_dict(), special_ids(corpora.tokenizer), options.seq_len)
    if goldfish is not None:
        goldfish.check_vocab(corpora.tokenizer.vocab_size)
    on_device = goldfish is not None and goldfish.where == "device"
    train_set = build_dataset(data, split="train", seed=options.seed, batch_size=options.batch_size,
                              seq_len=options.seq_len, corpora=corpora, goldfish=None if on_device else goldfish)
    check_teacher(config.loss, train_set)
    check_rows(config, train_set)
    model = build_model(config.model.to_dict(), corpora.tokenizer.vocab_size)
    check_mesh(model, mesh.shape)
    recipe = recipe_of(model, options, configs.options(config, "optimizer"), config.loss.to_dict())
    shape = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
    data = f"{train_set.num_tokens:,} training tokens" if train_set.num_tokens else f"new rows of {train_set.name}"
    headline = (f"{num_params(recipe.boxed):,} parameters, {data}, batches of "
                f"{options.batch_size} x {options.seq_len} (packing {train_set.packing_efficiency:.1%}), "
                f"{mesh.size} x {mesh.devices.flat[0].device_kind}{' (' + shape + ')' if shape else ''}")
    headline = "\n".join([headline, *map(str, undivided(recipe.boxed, mesh.shape))])
    return Prepared(config, options, mesh, model, recipe, corpora, train_set, headline, goldfish if on_device else None)


def check_carry(options: Any, data: Any, config: Any) -> None:
    """Raises ValueError where a state would be carried into other text, or rows go on and nothing is carried."""
    from lm.data.lanes import LANES
    if options.carry_state != (data.packing == LANES):
        raise ValueError(f"config.train.carry_state={options.carry_state} and config.data.packing={data.packing!r} do "
                         f"not fit: a state is carried along lanes, and only there; set train.carry_state=True and "
                         f"data.packing='lanes', or neither")
    if options.carry_state and config.model.random_positions is not None:
        raise ValueError("config.train.carry_state lets rows go on at the positions of the step before, and "
                         "model.random_positions moves them at each; use one of them")
    if options.carry_state and config.model.max_positions is not None:
        raise ValueError("config.train.carry_state lets documents go on beyond any number of positions; leave out "
                         "model.max_positions")


def write_parameters(workdir: str, prepared: Prepared) -> None:
    """<workdir>/parameters.txt: one line a parameter, with what the optimizer does to it."""
    from etils import epath

    from launch.config_workdir import write_text
    from lm.core.tree import num_params
    rows = prepared.recipe.optimizer.rows
    columns = [field for field in rows[0]._fields] if hasattr(rows[0], "_fields") else \
        [field.name for field in dataclasses.fields(rows[0])]
    table = [columns, *([str(getattr(row, name)) for name in columns] for row in rows)]
    widths = [max(len(line[n]) for line in table) for n in range(len(columns))]
    total = num_params(prepared.recipe.boxed)
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in table)
    write_text(epath.Path(workdir) / "parameters.txt", f"{text}\n\n{total:,} parameters\n")
