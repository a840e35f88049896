"""Turn text into token shards, check the shards, and describe them. Each verb has its own --help.

python -m data_prep prepare --input cc100/ --tokenizer sentencepiece.bpe.model --output shards/
python -m data_prep verify shards/
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data_prep.blocks import BLOCK_BYTES
from data_prep.clean import CleanOptions
from data_prep.command_line import (
    EXIT_INTERRUPTED,
    EXIT_USER,
    VERBOSE_HELP,
    CommandLine,
    add_version,
    code_without_traceback,
    end_lines,
    module_command,
    print_bytes_as_they_come,
)
from data_prep.outputs import output_path
from data_prep.shards import RUN_NAME, DataError, ShardSet
from data_prep.sources import ReadOptions
from data_prep.tokenizer_ids import ENGINES, UNITS
from data_prep.where import Where

RANGES: dict[str, tuple[float, float]] = {
    "workers": (1, 4096),
    "shard_tokens": (1, 2**40),
    "block_bytes": (1, 2**30),
    "dedup_memory_mb": (1, 2**62),
    "min_document_chars": (0, 2**62),
    "max_document_chars": (0, 2**62),
    "alpha": (0, 1),
    "max_broken_lines": (0, 1),
    "seq_len": (3, 2**20),
    "samples": (1, 2**62),
    "min_count": (1, 2**62),
}

PROGRAM = "python -m data_prep"
VERBS = {
    "prepare": "turn text into shards; run it again to resume",
    "merge": "write the manifest of languages that were prepared one by one",
    "verify": "check every byte and name each corrupt file and offset",
    "stats": "print sizes, sampling shares and epochs for each language",
    "trim-vocab": "write a smaller vocabulary for some languages, and its id map",
}
STOPPED = "Stopped. Finished shards are kept; the same command continues after them."
STOPPED_REDO = (
    "Stopped. The same command deletes the shards of --redo again; without --redo it continues after the finished ones."
)
TIME_TO_STOP_S = 5.0


@contextlib.contextmanager
def interruptible(stopped: str) -> Iterator[None]:
    """Let Ctrl-C end the command within `TIME_TO_STOP_S`, even if a thread waits for a file that does not arrive."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C is ignored in the background, or another program handles it
        return

    def end() -> None:
        print(stopped, file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)

    timers: list[threading.Timer] = []

    def on_interrupt(number: int, frame: Any) -> None:
        if not timers:
            timers.append(threading.Timer(TIME_TO_STOP_S, end))
            timers[0].daemon = True
            timers[0].start()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if timers and threading.active_count() <= 2:  # no thread is left to wait for
            timers[0].cancel()


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run one verb. Returns the exit code: 0 success, 2 a problem that the user can fix, 130 interrupted."""
    print_bytes_as_they_come()
    parsed = build_parser(program).parse_args(arguments)
    stopped = STOPPED_REDO if getattr(parsed, "redo", None) else STOPPED
    try:
        with interruptible(stopped):
            code = parsed.run(parsed)
            sys.stdout.flush()  # here, where a closed pipe gives no traceback
            return code
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        return code_without_traceback(error)


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = CommandLine(prog=program, description=__doc__, epilog=VERBOSE_HELP)
    add_version(parser)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    parsers = {verb: verbs.add_parser(verb, help=text) for verb, text in VERBS.items()}
    add_prepare(parsers["prepare"])
    add_merge(parsers["merge"])
    parsers["verify"].add_argument("shards", type=Path)
    parsers["verify"].set_defaults(run=run_verify)
    add_stats(parsers["stats"])
    add_trim_vocab(parsers["trim-vocab"])
    return parser


def add_prepare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, directories, or data sets: hf:NAME[@REVISION][:CONFIG[:SPLIT]], where NAME is one of the hub or a "
        "directory in the hub's layout (docs/your_own_text.md). Files of these kinds are read: .txt, .jsonl, .ndjson (plain or .xz .gz .zst .bz2), packed .json (JSON lines), .parquet",
    )
    verb.add_argument(
        "--tokenizer", type=Path, required=True, help="SentencePiece .model, tokenizer.json, or a directory with one"
    )
    verb.add_argument("--output", type=output_path, required=True, help="directory of the shards")
    verb.add_argument(
        "--language",
        metavar="xx",
        help="prepare only this language; also the language of a given file whose name states none",
    )
    add_reading(verb)
    verb.add_argument(
        "--bad-records", choices=["skip", "fail"], default="skip",
        help="records without text (null, empty, not text, or without the field): count and skip them (default), or fail",
    )  # fmt: skip
    verb.add_argument(
        "--strict-input", action="store_true", help="fail before any work if a file below --input is left out"
    )
    verb.add_argument(
        "--redo",
        nargs="+",
        default=[],
        metavar="xx",
        help="delete the shards of these languages and prepare them again",
    )
    verb.add_argument("--add", action="store_true", help="add new languages to an output that was begun without them")
    verb.add_argument("--shard-tokens", type=int, help="size of a shard (default: 2**28 tokens, 1 GiB)")
    verb.add_argument(
        "--block-bytes", type=int, help="size of a unit of work; a shard ends at the end of one (default: 2**20)"
    )
    verb.add_argument("--unit", choices=UNITS, default="line", help="what a SentencePiece model encodes at a time (default: line); word "
                      "takes 0.6 of the time, and about one line in 3000 has other ids of an equal score")  # fmt: skip
    verb.add_argument("--engine", choices=ENGINES, default="auto", help="what encodes for a tokenizer.json: auto is kitoken where "
                      "it gives the ids of tokenizers, else tokenizers (default: auto)")  # fmt: skip
    add_cleaning(verb.add_argument_group("cleaning (by default the text is not changed; every change is counted)"))
    verb.set_defaults(run=run_prepare, block_bytes=BLOCK_BYTES, **asdict(CleanOptions()))
    verb.set_defaults(max_broken_lines=ReadOptions.max_broken_lines)


def add_reading(verb: argparse.ArgumentParser) -> None:
    """Options of the verbs that read text."""
    verb.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenising processes (default: all cores)")
    verb.add_argument(
        "--language-map", type=Path, metavar="FILE",
        help="file with lines of: PATTERN LANGUAGE, where the pattern matches files or configs of data sets ('-' leaves out)",
    )  # fmt: skip
    verb.add_argument("--text-field", default="text", help="field of JSON lines and Parquet (default: text)")
    verb.add_argument(
        "--where", action="append", default=[], metavar="CONDITION",
        help="keep only records whose columns meet it, such as 'language_score >= 0.8 and url != \"\"'; may be repeated",
    )  # fmt: skip


def add_cleaning(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--broken-text",
        choices=["replace", "skip", "fail"],
        help="what to do with lines that are not UTF-8 (default: replace)",
    )
    group.add_argument(
        "--max-broken-lines", type=float, metavar="SHARE",
        help="largest share of a file's lines that may be invalid UTF-8; a file with more is rejected (default: 0.05)",
    )  # fmt: skip
    group.add_argument("--control-characters", choices=["keep", "remove"], help="default: keep")
    group.add_argument("--script-check", action="store_true", help="drop lines in another script than the language's")
    group.add_argument("--min-document-chars", type=int, metavar="N", help="drop shorter documents")
    group.add_argument("--max-document-chars", type=int, metavar="N", help="drop longer documents")
    group.add_argument("--dedup", choices=["none", "documents", "lines"], help="drop exact repetitions (default: none)")
    group.add_argument(
        "--dedup-memory-mb", type=int, metavar="MB", help="memory for --dedup, per language (default: 256)"
    )


def add_merge(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("shards", type=Path)
    verb.add_argument(
        "--from",
        dest="others",
        nargs="+",
        type=Path,
        default=[],
        help="copy the finished languages of these directories",
    )
    verb.add_argument("--partial", action="store_true", help="leave out languages that are not finished")
    verb.set_defaults(run=run_merge)


def add_stats(verb: argparse.ArgumentParser) -> None:
    verb.description = (
        "Shares and epochs follow from tokens and alpha only. A recipe's sampling_unit, language_weights, languages and\n"
        "max_epochs, and its held-out rows, are not considered."
    )
    verb.add_argument("shards", type=Path)
    verb.add_argument("--alpha", type=float, default=0.3)
    verb.add_argument("--seq-len", type=int, default=512)
    verb.add_argument(
        "--samples", type=int, help="rows that a planned run reads (steps x global batch), to compute epochs"
    )
    verb.add_argument("--plot", type=Path, metavar="PNG", help="write a plot of shares and epochs")
    verb.set_defaults(run=run_stats)


def add_trim_vocab(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--tokenizer", type=Path, required=True, help="SentencePiece .model, tokenizer.json, or a directory with one"
    )
    counted = verb.add_mutually_exclusive_group(required=True)
    counted.add_argument("--shards", type=Path, help="count pieces in these shards, made with this tokenizer")
    counted.add_argument("--input", nargs="+", metavar="PATH", help="count pieces in text, given as for `prepare`")
    verb.add_argument(
        "--languages", metavar="xx,yy", help="keep pieces that these languages use (default: all languages)"
    )
    verb.add_argument(
        "--min-count", type=int, default=1, metavar="N", help="keep pieces that occur at least N times (default: 1)"
    )
    verb.add_argument("--coverage", type=float, default=1.0, metavar="SHARE", help="keep the most frequent pieces of each language "
                      "that make up this share of its tokens (default: 1, every piece that occurs)")  # fmt: skip
    verb.add_argument("--output", type=output_path, required=True, help="directory of the vocabulary")
    add_reading(verb)
    verb.set_defaults(run=run_trim_vocab)


def check_option_ranges(parsed: argparse.Namespace) -> None:
    """Raise `DataError` for a number outside of `RANGES`: a typing error, which would end in a traceback or a full disk."""
    for name, (least, most) in RANGES.items():
        value = getattr(parsed, name, None)
        if value is not None and not least <= value <= most:
            option, bound = name.replace("_", "-"), f"at least {least}" if value < least else f"at most {most}"
            raise DataError(f"--{option} {str(value)[:24]}: the value must be {bound}.")


def run_prepare(parsed: argparse.Namespace) -> int:
    from data_prep.discovery import LanguageRules
    from data_prep.prepare import DEFAULT_SHARD_TOKENS, PrepareConfig, prepare

    check_option_ranges(parsed)
    if parsed.max_document_chars and parsed.max_document_chars < parsed.min_document_chars:
        raise DataError(
            f"--max-document-chars {parsed.max_document_chars} is below --min-document-chars {parsed.min_document_chars}: "
            "no document would be kept."
        )
    config = PrepareConfig(
        inputs=parsed.input,
        tokenizer=parsed.tokenizer,
        output=parsed.output,
        num_workers=parsed.workers,
        rules=LanguageRules.read(parsed.language_map, parsed.language),
        reading=ReadOptions(parsed.text_field, parsed.bad_records, parsed.max_broken_lines, Where.parse(parsed.where)),
        clean=CleanOptions(**{option.name: getattr(parsed, option.name) for option in fields(CleanOptions)}),
        shard_tokens=parsed.shard_tokens or DEFAULT_SHARD_TOKENS,
        block_bytes=parsed.block_bytes,
        redo=parsed.redo,
        may_add=parsed.add,
        strict_input=parsed.strict_input,
        unit=parsed.unit,
        engine=parsed.engine,
    )
    if missing := prepare(config):
        still = f"{parsed.language or 'this input'} is finished; still to be prepared: {', '.join(missing)}, then: merge {parsed.output}"
        print(end_lines(parsed.output, about=still))
    else:
        print_shards(parsed.output)
    return 0


def print_shards(output: Path, left_out: Sequence[str] = ()) -> None:
    """The last lines of a command that has written a manifest."""
    about = f"shards of {len(ShardSet(output, check_sizes=False).languages)} languages"
    about += f", without {', '.join(left_out)}" if left_out else ""
    print(end_lines(output, about=about, then=module_command("data_prep", "verify", output)))


def run_merge(parsed: argparse.Namespace) -> int:
    from data_prep.manifest import import_languages, unfinished, write_manifest

    for other in parsed.others:
        added, not_finished = import_languages(parsed.shards, other), ", ".join(unfinished(other))
        print(
            f"{other}: added {', '.join(added) or 'nothing'}"
            + (f"; not finished there: {not_finished}" if not_finished else "")
        )
    if parsed.others and not (parsed.shards / RUN_NAME).is_file():
        raise DataError(
            f"Nothing was merged: no language is finished in {', '.join(map(str, parsed.others))}. Finish one with the command "
            "that prepared it."
        )
    left_out = unfinished(parsed.shards)
    write_manifest(parsed.shards, allow_partial=parsed.partial)
    print_shards(parsed.shards, left_out)
    return 0


def run_verify(parsed: argparse.Namespace) -> int:
    from data_prep.quality import qualities, quality_table
    from data_prep.verify import verify

    problems = verify(parsed.shards, show_progress=True)
    for problem in (*problems, *problems.unreadable):
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        names = ShardSet(parsed.shards, check_sizes=False).languages
        corrupt = [name for name in names if any(f"{parsed.shards / name}/" in problem for problem in problems)]
        redo = " ".join(["--redo", *(corrupt or ["LANGUAGE"])])
        print(f"Copy valid files in their place, or run the command that prepared them with {redo}", file=sys.stderr)
    elif not problems.unreadable:
        print(quality_table(qualities(ShardSet(parsed.shards))))
        print(f"{parsed.shards}: all {len(ShardSet(parsed.shards).all_shards())} shards are valid")
    return 2 if problems or problems.unreadable else 0


def run_stats(parsed: argparse.Namespace) -> int:
    from data_prep.stats import collect, draw, table

    check_option_ranges(parsed)
    rows = collect(ShardSet(parsed.shards), parsed.alpha, parsed.seq_len, parsed.samples)
    print(table(rows, parsed.alpha))
    if parsed.plot:
        draw(rows, parsed.alpha, parsed.plot)
        print(end_lines(parsed.plot))
    return 0


def run_trim_vocab(parsed: argparse.Namespace) -> int:
    from data_prep.discovery import LanguageRules, survey
    from data_prep.id_check import check_tokenizer
    from data_prep.intake import announce
    from data_prep.token_counts import token_counts_of_shards, token_counts_of_text
    from data_prep.vocabulary import TrimOptions, open_pieces, trim_vocabulary, trimming_table

    languages = [language for language in (parsed.languages or "").split(",") if language]
    options = TrimOptions(languages, parsed.min_count, parsed.coverage)  # rejects wrong options before counting
    check_option_ranges(parsed)
    if parsed.shards and (parsed.where or parsed.language_map):
        raise DataError(
            "--where and --language-map choose text of --input; of --shards everything is counted. Leave them out."
        )
    pieces, tokenizer = open_pieces(parsed.tokenizer)
    check_tokenizer(parsed.tokenizer, tokenizer)
    if parsed.shards:
        shards = ShardSet(parsed.shards)
        if shards.tokenizer_sha256 != tokenizer.sha256:
            raise DataError(
                f"{parsed.shards} was not made with the tokenizer {tokenizer.path}, so its ids have other meanings. "
                "Give the tokenizer that it was made with, or count in text with --input."
            )
        counts = token_counts_of_shards(shards)
    else:
        rules = LanguageRules.read(parsed.language_map, None)
        surveyed = survey(parsed.input, rules, ReadOptions(parsed.text_field, where=Where.parse(parsed.where)))
        announce(surveyed, surveyed.sources)
        counts = token_counts_of_text(surveyed.sources, tokenizer, parsed.workers)
    options = TrimOptions(languages or sorted(counts.counts), options.min_count, options.coverage)
    print(trimming_table(trim_vocabulary(pieces, tokenizer, counts, options, parsed.output)))
    print(end_lines(parsed.output, about=f"to prepare shards with it: prepare ... --tokenizer {parsed.output}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
