"""`lm distill`: a trained run as a teacher; its most probable tokens at every target of prepared data go to disk."""

import argparse
import dataclasses
import pathlib
import time
from typing import Any

_EXAMPLES = """
examples:
  lm distill --workdir runs/teacher --data data/chats --out data/chats-taught --top-k 32
  lm train --config student.py --workdir runs/student     # data=dict(source="array_record", path="data/chats",
                                                          # teacher="data/chats-taught"), loss=dict(distill=1.0)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm distill`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("--data", metavar="FOLDER", help="prepared data with the teacher's tokenizer")
    parser.add_argument("--out", metavar="FOLDER", help="the new folder of predictions")
    parser.add_argument("--top-k", type=int, default=32, help="tokens kept at each target (default: 32)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits before they are normalised; "
                        "config.loss.distill.temperature must be the same (default: 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (default: 8)")
    parser.add_argument("--seq-len", type=int, help="tokens of a row (default: config.train.seq_len of the run)")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="use the averaged parameters")
    for name in ("bos", "eos"):
        parser.add_argument(f"--add-{name}", action="store_true", help=f"as data.add_{name} of the student's config")


def main(args: argparse.Namespace) -> int:
    """Writes the predictions and says how much of the teacher's probability they hold."""
    if args.workdir is None or args.config is not None or args.data is None or args.out is None:
        raise ValueError("lm distill needs --workdir TEACHER, --data PREPARED and --out FOLDER, and takes no --config")
    if args.top_k < 1 or args.batch_size < 1 or not args.temperature > 0:
        raise ValueError(f"--top-k and --batch-size must be at least 1 and --temperature above 0; got {args.top_k}, "
                         f"{args.batch_size} and {args.temperature}")
    from launch.convert_in import staged
    from launch.restore import open_run
    from lm.data.prepared import PreparedCorpus, manifest_tokenizer
    begin = time.monotonic()
    run = open_run(args.workdir, args.step, overrides=args.overrides, ema=args.ema)
    tokenizer = manifest_tokenizer(args.data)
    if plain(tokenizer).fingerprint != plain(run.tokenizer).fingerprint:
        raise ValueError(f"{args.data} was prepared with another tokenizer ({type(tokenizer).__name__}, "
                         f"{tokenizer.vocab_size:,} ids) than {args.workdir} has ({type(run.tokenizer).__name__}, "
                         f"{run.tokenizer.vocab_size:,} ids): a teacher's tokens would mean others to the student")
    corpus = PreparedCorpus(args.data, tokenizer, add_bos=args.add_bos, add_eos=args.add_eos)
    seq_len = args.seq_len or run.config.train.seq_len
    with staged(pathlib.Path(args.out).expanduser().absolute()) as stage:
        rest = predict(run, corpus, stage, args.top_k, args.temperature, args.batch_size, seq_len)
    count = int(corpus.num_targets.sum())
    k = min(args.top_k, run.model.vocab_size)
    print(f"step {run.step} of {args.workdir}: {count:,} targets of {args.data}, the {k} most probable tokens of each "
          f"hold {1 - rest:.2%} of the probability, {time.monotonic() - begin:.1f} s\n"
          f"use them with data=dict(source='array_record', path={args.data!r}, teacher={args.out!r}) and "
          f"loss=dict(distill=dict(weight=1.0, temperature={args.temperature}))")
    return 0


def plain(tokenizer: Any) -> Any:
    """The tokenizer without its choice of special ids: what decides whether ids mean the same."""
    given = {name: None for name in ("bos", "eos", "bos_id", "eos_id")
             if name in {field.name for field in dataclasses.fields(tokenizer)}}
    return dataclasses.replace(tokenizer, **given)


def predict(run: Any, corpus: Any, folder: pathlib.Path, k: int, temperature: float, batch_size: int,
            seq_len: int) -> float:
    """Writes the folder; returns the mean probability of the tokens that are left out."""
    import jax
    import numpy as np

    from lm.data import teacher
    from lm.data.corpora import Part
    from lm.data.loader import check_whole
    from lm.data.rows import Rows, empty_batch, fill_rows
    part = Part(corpus, np.flatnonzero(corpus.table.num_tokens > 0), 1.0)
    check_whole({"data": part}, seq_len)
    run.model.check_length(seq_len)
    k = min(k, run.model.vocab_size)
    ids, logp = teacher.create(folder, corpus, k, run.model.vocab_size)
    teacher.finish(folder, corpus, k, temperature, seq_len=seq_len, step=run.step)
    places = teacher.Teacher(str(folder), corpus)
    rows = Rows(part, seq_len=seq_len, packing="first_fit", window=None, shuffle=False, key=0, name="data")
    best = jax.jit(lambda params, batch: most_probable(run.apply, params, batch, k, temperature))
    total = 0.0
    with jax.set_mesh(run.mesh):
        for first in range(0, rows.num_rows, batch_size):
            batch = empty_batch(batch_size, seq_len)
            pieces = [rows.pieces(i) for i in range(first, min(first + batch_size, rows.num_rows))]
            fill_rows(batch, range(len(pieces)), pieces, corpus)
            found_ids, found_logp = jax.device_get(best(run.params, batch))
            for row, piece in enumerate(pieces):
                at = 0
                for document, start, length, _ in zip(*(field.tolist() for field in piece), strict=True):
                    inside = at + np.flatnonzero(batch.weights[row, at:at + length])
                    where = places.rows(document, start, len(inside))
                    ids[where], logp[where] = found_ids[row, inside], found_logp[row, inside]
                    at += length
            total += float((np.exp(found_logp[..., -1], dtype=np.float64) * (batch.weights > 0)).sum())
    ids.flush()
    logp.flush()
    return total / max(int(corpus.num_targets.sum()), 1)


def most_probable(apply: Any, params: Any, batch: Any, k: int, temperature: float) -> tuple[Any, Any]:
    """([B, T, k] ids, the most probable first; [B, T, k + 1] their log-probabilities and that of all others)."""
    import jax

    from lm.core.batch import Batch
    from lm.core.sharding import constrain
    from lm.losses.chunks import over_chunks
    from lm.losses.distillation import named_logp
    from lm.tasks.language_modeling import forward
    batch = Batch(*(constrain(field, "batch", "length") for field in batch))
    out = forward(apply, params, batch)

    def score(logits, _):
        ids = jax.lax.top_k(logits, k)[1]
        return ids, named_logp(logits, ids, temperature, out.head.vocab_size)

    return over_chunks(score, out.hidden, out.head, batch.targets)


def check_teacher(loss: Any, train_set: Any) -> None:
    """Raises ValueError where a config's loss and its data do not agree on the teacher."""
    teacher, given = getattr(train_set, "teacher", None), loss.get("distill")
    if (given is not None) != (teacher is not None):
        raise ValueError("config.loss.distill learns from predictions of a teacher, and config.data.teacher names "
                         "none; make them with `lm distill`" if teacher is None else
                         "config.data.teacher gives predictions that no loss uses; set config.loss.distill, or leave "
                         "them out")
    if teacher is not None and given["temperature"] != teacher.temperature:
        raise ValueError(f"config.loss.distill.temperature={given['temperature']} and the teacher's predictions are of "
                         f"temperature {teacher.temperature}; set the same, or run `lm distill --temperature` again")
