"""The command line: `python -m data_prep prepare | merge | verify | stats` (each with --help)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from data_prep.shards import DataError, ShardSet


def main(arguments: list[str] | None = None) -> int:
    parsed = build_parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Finished shards are kept; the same command goes on from there.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    add_prepare(verbs.add_parser("prepare", help="text to shards; run it again after any interruption"))
    for name, run, help_text in (
        ("merge", run_merge, "write the manifest of a directory whose languages were prepared one by one"),
        ("verify", run_verify, "check every byte"),
        ("stats", run_stats, "what is in it, per language"),
    ):
        verb = verbs.add_parser(name, help=help_text)
        verb.add_argument("shards", type=Path)
        verb.set_defaults(run=run)
    return parser


def add_prepare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--input", nargs="+", type=Path, required=True, help="files or directories; names give the language"
    )
    verb.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece .model, or a directory with one")
    verb.add_argument("--output", type=Path, required=True, help="directory of the shards")
    verb.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenising processes (default: all cores)")
    verb.add_argument("--language", help="prepare this language alone; also names files whose name says no language")
    verb.add_argument("--redo", nargs="+", default=[], metavar="LANGUAGE", help="throw these away and make them again")
    verb.set_defaults(run=run_prepare)


def run_prepare(parsed: argparse.Namespace) -> int:
    from data_prep.prepare import PrepareConfig, prepare

    if parsed.workers < 1:
        raise DataError(f"--workers {parsed.workers}: at least 1 is needed.")
    config = PrepareConfig(
        inputs=parsed.input,
        tokenizer=parsed.tokenizer,
        output=parsed.output,
        num_workers=parsed.workers,
        language=parsed.language,
        redo=parsed.redo,
    )
    print(f"shards ready: {prepare(config).parent}")
    return 0


def run_merge(parsed: argparse.Namespace) -> int:
    from data_prep.prepare import RUN_NAME, write_manifest

    if not (parsed.shards / RUN_NAME).is_file():
        raise DataError(f"{parsed.shards} is no output of `python -m data_prep prepare` ({RUN_NAME} is missing).")
    print(f"shards ready: {write_manifest(parsed.shards).parent}")
    return 0


def run_verify(parsed: argparse.Namespace) -> int:
    from data_prep.verify import verify

    problems = verify(parsed.shards)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{parsed.shards}: all {len(ShardSet(parsed.shards).all_shards())} shards are whole")
    return 2 if problems else 0


def run_stats(parsed: argparse.Namespace) -> int:
    from data_prep.stats import table

    print(table(ShardSet(parsed.shards)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
