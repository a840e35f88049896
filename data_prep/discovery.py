"""The input files and the language of each: by a language map, by CC-100's names, or by `--language`.

In: paths, directories and names of datasets. Out: sources by language, and the files that are left out with the reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.data_sets import IGNORED, DataSetRules, look_up
from data_prep.hub import PREFIX
from data_prep.languages import CC100
from data_prep.names import map_pattern, shown
from data_prep.shards import LANGUAGE_PATTERN, DataError
from data_prep.sources import KNOWN_KINDS, ReadOptions, Source
from data_prep.unpack import packing_of_name
from data_prep.walk import LEFT_OUT, NotTaken, walk


@dataclass
class LanguageRules:
    """How the language of a file is found: by the mapping, else by the names of file and folder, else by `language`."""

    language: str | None = None
    mapping: list[tuple[str, str]] = field(default_factory=list)  # pattern of a file name, and its language or "-"
    matched: set[str] = field(default_factory=set, compare=False)  # patterns that matched a file

    @classmethod
    def read(cls, file: Path | None, language: str | None) -> LanguageRules:
        """The rules of a language map (`file`) and of `--language`.

        The map holds lines of `PATTERN LANGUAGE`. A pattern may use * and ?; the language `-` leaves files out.
        """
        if language is not None:
            _check_name(language, "--language")
        if file is None:
            return cls(language)
        mapping = []
        try:
            lines = file.read_text(
                encoding="utf-8-sig"
            ).splitlines()  # -sig: Notepad on Windows writes a byte order mark
        except OSError as error:
            raise DataError(f"Cannot read the mapping file {shown(file)}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"The mapping file {shown(file)} is not UTF-8 (byte {error.start}). Save it as UTF-8 "
                "(iconv -f UTF-16 -t UTF-8, if a Windows program wrote it)."
            ) from error
        for number, line in enumerate(lines, start=1):
            words = line.split("#")[0].split()
            if not words:
                continue
            if len(words) != 2:
                raise DataError(f"{file} line {number}: expected PATTERN LANGUAGE, found {line!r}.")
            if words[1] != IGNORED:
                _check_name(words[1], f"{file} line {number}")
            mapping.append((words[0], words[1]))
        return cls(language, mapping)

    def mapped(self, path: Path) -> str | None:
        """The language that the mapping gives to a file, "-" to leave it out, or None."""
        for pattern, language in self.mapping:
            if fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(str(path), pattern):
                self.matched.add(pattern)
                return language
        return None

    def unmatched(self) -> list[str]:
        """Patterns that matched no file."""
        return [pattern for pattern, _ in self.mapping if pattern not in self.matched]

    def names(self, path: Path) -> bool:
        """Whether the mapping has a pattern for a file."""
        return self.mapped(path) is not None

    def language_of(self, path: Path, given_by_name: bool) -> str:
        """The language of one file, or "-". `given_by_name`: the file was named on the command line, not found in a directory."""
        if (language := self.mapped(path)) is not None:
            return language
        for name in (path.name.split(".")[0], path.parent.name):
            if name in CC100:
                return name
        if given_by_name and self.language is not None:
            return self.language
        raise DataError(
            f"{shown(path)}: cannot tell its language, as neither it nor its folder is named like one of CC-100 (en.txt.xz, "
            "zh-Hans.txt.xz, sw/part-1.jsonl). Rename it, give it alone with --language xx, or map it with "
            "--language-map FILE (lines of: PATTERN LANGUAGE, or - to leave it out)."
        )


def _check_name(language: str, where: str) -> None:
    if not LANGUAGE_PATTERN.fullmatch(language):
        raise DataError(
            f"{where}: {language!r} is not a language name; use letters, digits, '-' and '_' (en, zh-Hans)."
        )


@dataclass
class Survey:
    """The input: sources by language, in an order that depends on their names only, and the files that are left out."""

    sources: dict[str, list[Source]]
    not_taken: list[NotTaken]
    unmatched: list[str] = field(default_factory=list)  # patterns of the language map that matched no file
    commits: dict[str, str] = field(default_factory=dict)  # of data sets of the hub, by name
    notes: list[str] = field(default_factory=list)  # about data sets


def survey(
    inputs: list[str], rules: LanguageRules, options: ReadOptions, pinned: Mapping[str, str] | None = None
) -> Survey:
    """Read all directories of the input once, and ask the hub for its files.

    Args:
        pinned: commits of data sets that must be used, by name

    Raises:
        DataError: a file is there twice, its language is unknown, or there is no text; the hub does not answer
    """
    by_config = DataSetRules(rules.mapping, rules.matched, rules.language)
    data_sets = look_up(inputs, by_config, options, pinned or {})
    found: dict[str, list[Source]] = {}
    files: dict[tuple[int, int], Path] = {}
    not_taken: list[NotTaken] = []
    for given in inputs:
        if given.startswith(PREFIX):
            for source in data_sets.sources[given]:
                found.setdefault(source.language, []).append(source)
            continue
        here, num_accepted = walk(given, rules.names, rules.language), 0
        for file in here.found:
            language = rules.language_of(file.path, file.by_name)
            if language == IGNORED:
                here.leave(file.path, LEFT_OUT)
                continue
            if (other := files.setdefault(file.identity, file.path)) is not file.path:
                raise DataError(_given_twice(file.path, other))
            num_accepted += 1
            found.setdefault(language, []).append(Source(language, file.path, file.name, options))
        not_taken += here.not_taken
        if not num_accepted and len(inputs) > 1 and Path(given).is_dir():
            raise DataError(f"No text in {shown(given)}. {_what_is_there(here.not_taken)}")
    found |= {language: [] for language in data_sets.languages if language not in found}
    selected = found if rules.language is None else found.get(rules.language)
    if not selected:
        of = f" of language {rules.language}" if rules.language else ""
        there = f"It holds: {', '.join(sorted(found))}." if found else _what_is_there(not_taken)
        raise DataError(f"No text{of} in {', '.join(map(shown, inputs))}. {there}")
    for language, sources in found.items():
        _check_duplicate_inputs(language, sources)
        if rules.language in (None, language):
            _check_records(sources, options)
    not_taken += data_sets.not_taken
    return Survey(dict(sorted(found.items())), not_taken, rules.unmatched(), data_sets.commits, data_sets.notes)


def _check_records(sources: list[Source], options: ReadOptions) -> None:
    """With `--where`: raise `DataError` if a source has no columns to compare."""
    for source in sources if options.where.conditions else []:
        if not source.holds_records:
            raise DataError(
                f"--where '{options.where}': {source.title} holds lines of text and no columns. Leave it out with "
                "--language-map FILE (a line: PATTERN -), or prepare it with another command."
            )


def _given_twice(path: Path, other: Path) -> str:
    if path == other:
        return f"{shown(path)} is given twice as input. Give it once."
    return (
        f"{shown(path)} is the same file as {shown(other)} (by a link, or as two inputs overlap), so its text would be read "
        "twice. Give it once, or leave one out with --language-map FILE (a line: PATTERN -)."
    )


def _what_is_there(not_taken: list[NotTaken]) -> str:
    looked_for = f"Looked for {KNOWN_KINDS}."
    return f"{looked_for} Left out: {'; '.join(summary(not_taken, 3))}." if not_taken else looked_for


def summary(not_taken: list[NotTaken], most_names: int) -> list[str]:
    """One line for each reason: the number of files, the reason, and the first names."""
    by_reason: dict[str, list[str]] = {}
    for one in not_taken:
        by_reason.setdefault(one.reason, []).append(shown(one.path))
    return [
        f"{len(paths)} {reason}: {', '.join(paths[:most_names])}" + (", ..." if len(paths) > most_names else "")
        for reason, paths in by_reason.items()
    ]


def _check_duplicate_inputs(language: str, sources: list[Source]) -> None:
    """Reject two files of one name, and a text that is both packed and unpacked in a directory, as `xz -dk` leaves it."""
    names: dict[str, Path] = {}
    unpacked_names: dict[str, Path] = {}
    for source in sources:
        if source.name in names:
            raise DataError(f"{language}: two input files are named {source.name}. Give them different names.")
        names[source.name] = source.path
        packing = packing_of_name(source.path.name)
        unpacked_name = source.title[: len(source.title) - len(packing)]
        if unpacked_name in unpacked_names:
            raise DataError(
                f"{language}: {source.title} and {shown(unpacked_names[unpacked_name])} are by their names the same "
                "text, packed and unpacked, which would be read twice. Remove one, or leave one out with --language-map "
                f"FILE (a line: {map_pattern(source.path.name)} -)."
            )
        unpacked_names[unpacked_name] = source.path
