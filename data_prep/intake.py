"""Reporting and checking the input of `prepare` before any work.

In: a `Survey`. Out: lines on standard error about the files of each language and the files that are left out, and errors: a
`--text-field` that the records do not have, or with `--strict-input` any file that is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from data_prep.command_line import is_verbose
from data_prep.discovery import Survey, summary
from data_prep.durable_files import replace_file
from data_prep.journal import Journal
from data_prep.names import shown
from data_prep.shards import DataError
from data_prep.sources import Source, WrongTextField
from data_prep.walk import KNOWN_REASONS

NAMES_PER_REASON, NAMES_PER_LANGUAGE, MOST_LINES = 20, 3, 10
NOT_TAKEN_NAME = "not_taken.tsv"


def announce(survey: Survey, chosen: dict[str, list[Source]]) -> None:
    """Print one line for each language, or one for many languages, and one for each reason to leave files out."""
    sizes = {language: sum(source.stamp()["bytes"] for source in sources) for language, sources in chosen.items()}
    if len(chosen) > MOST_LINES and not is_verbose():
        of_each = ", ".join(f"{language} {size:,}" for language, size in sizes.items())
        num_files, total = sum(map(len, chosen.values())), sum(sizes.values())
        print(f"input: {len(chosen)} languages, {total:,} bytes in {num_files} files: {of_each}", file=sys.stderr)
    else:
        for language, sources in chosen.items():
            names = [shown(source.name) for source in sources[:NAMES_PER_LANGUAGE]]
            more = [f"{len(sources) - len(names)} more"] if len(sources) > len(names) else []
            about = f"{sizes[language]:,} bytes in {len(sources)} files: {', '.join(names + more)}"
            print(f"input: {language}: {about}", file=sys.stderr)
    for line in summary(survey.not_taken, NAMES_PER_REASON):
        print(f"warning: left out: {line}", file=sys.stderr)
    for pattern in survey.unmatched:
        print(f"warning: the language map's {pattern!r} matches no file of the input", file=sys.stderr)
    for name, commit in survey.commits.items():
        print(f"input: data set {name} at commit {commit}", file=sys.stderr)
    for note in survey.notes:
        print(f"note: {note}", file=sys.stderr)


def check_left_out(survey: Survey) -> None:
    """With `--strict-input`: raise `DataError` if a file is left out for a reason that the user may not know."""
    left = [one for one in survey.not_taken if not one.reason.startswith(KNOWN_REASONS)]
    if left:
        raise DataError(
            f"--strict-input: {len(left)} files below the input are left out: {'; '.join(summary(left, NAMES_PER_REASON))}."
            " Nothing was prepared. Move it away, rename it, leave it out with --language-map FILE (lines of: PATTERN -), or do "
            "without --strict-input."
        )


def check_field(output: Path, chosen: dict[str, list[Source]], redo: Collection[str] = ()) -> None:
    """Raise `WrongTextField` if the first file of records of a language has no field --text-field.

    This runs before the output is begun, so that a wrong option is not recorded there. Finished languages are not checked,
    except those in `redo`, whose journals may be corrupt and are not read.
    """
    for language, sources in chosen.items():
        first = next((source for source in sources if source.holds_records), None)
        if first is None or (language not in redo and Journal.read(output / language).complete):
            continue
        try:
            next(first.chunks(), None)
        except WrongTextField:
            raise
        except DataError:
            continue  # the language's own job reports what is wrong with it


def write_list(output: Path, survey: Survey) -> None:
    """Write `not_taken.tsv`: every file that was left out, with the reason. No such file if there are none."""
    path = output / NOT_TAKEN_NAME
    if survey.not_taken:
        lines = (f"{one.reason}\t{shown(one.path)}\n" for one in survey.not_taken)
        replace_file(path, "".join(lines))
        print(f"left out: complete list in {shown(path)}", file=sys.stderr)
    else:
        path.unlink(missing_ok=True)


def same_texts(output: Path, languages: list[str]) -> list[str]:
    """Warnings about sources of the finished languages that hold the same text under different names."""
    first: dict[tuple[int, str], str] = {}
    found = []
    for language in languages:
        for record in Journal.read(output / language).finished_sources:
            if not record["text_bytes"]:
                continue
            name = f"{shown(record['name'])} ({language})"
            other = first.setdefault((record["text_bytes"], record["text_xxh3_128"]), name)
            if other != name:
                found.append(f"{other} and {name} hold the same text, and both are in the shards")
    return found
