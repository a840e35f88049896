"""Which files are the input, and of which language each is: from CC-100's names, a mapping file, or `--language`."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.languages import CC100
from data_prep.names import shown
from data_prep.shards import LANGUAGE_PATTERN, DataError
from data_prep.sources import KNOWN_KINDS, MAX_BROKEN_LINES, HubSource, Source, kind_of
from data_prep.walk import LEFT_OUT, NotTaken, walk

IGNORED = "-"


@dataclass
class LanguageRules:
    """How a file's language is found: first the mapping, then file and folder names, then `language`."""

    language: str | None = None
    mapping: list[tuple[str, str]] = field(default_factory=list)  # pattern for the file name, language or "-"
    matched: set[str] = field(default_factory=set, compare=False)  # patterns that a file was found for

    @classmethod
    def read(cls, file: Path | None, language: str | None) -> LanguageRules:
        """`file` holds lines of `PATTERN LANGUAGE`; the pattern may use * and ?, `-` as language leaves files out."""
        if language is not None:
            _check_name(language, "--language")
        if file is None:
            return cls(language)
        mapping = []
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()  # -sig: Windows' Notepad writes a mark
        except OSError as error:
            raise DataError(f"Cannot read the mapping file {shown(file)}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"The mapping file {shown(file)} is not UTF-8 (byte {error.start}). Save it as UTF-8 "
                "(iconv -f UTF-16 -t UTF-8, where a Windows program wrote it)."
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
        """What the mapping says of a file: a language, "-", or nothing."""
        for pattern, language in self.mapping:
            if fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(str(path), pattern):
                self.matched.add(pattern)
                return language
        return None

    def unmatched(self) -> list[str]:
        """Patterns that no file was found for."""
        return [pattern for pattern, _ in self.mapping if pattern not in self.matched]

    def names(self, path: Path) -> bool:
        """Whether the mapping speaks of a file."""
        return self.mapped(path) is not None

    def language_of(self, path: Path, given_by_name: bool) -> str:
        """Of one file; `given_by_name`: it was named on the command line, not found in a directory."""
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
        raise DataError(f"{where}: {language!r} is no language name; use letters, digits, '-' and '_' (en, zh-Hans).")


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read; nothing of it is part of what the shards are."""

    text_field: str = "text"
    bad_records: str = "skip"
    max_broken_lines: float = MAX_BROKEN_LINES


@dataclass
class Survey:
    """All input: sources by language, in an order that depends on the names alone, and what is not taken."""

    sources: dict[str, list[Source]]
    not_taken: list[NotTaken]
    unmatched: list[str] = field(default_factory=list)  # patterns of the language map that no file was found for


def discover(inputs: list[str], rules: LanguageRules, text_field: str = "text") -> dict[str, list[Source]]:
    """All input by language."""
    return survey(inputs, rules, ReadOptions(text_field)).sources


def survey(inputs: list[str], rules: LanguageRules, options: ReadOptions) -> Survey:
    """Looks at everything below the inputs once. Raises `DataError` for what is there twice, and where nothing is taken."""
    found: dict[str, list[Source]] = {}
    files: dict[tuple[int, int], Path] = {}
    not_taken: list[NotTaken] = []
    how = (options.text_field, options.bad_records, options.max_broken_lines)
    for given in inputs:
        if given.startswith("hf:"):
            language = _language_of_dataset(given, rules)
            found.setdefault(language, []).append(HubSource(language, Path(given), given, *how))
            continue
        here, num_taken = walk(given, rules.names, rules.language), 0
        for file in here.found:
            language = rules.language_of(file.path, file.by_name)
            if language == IGNORED:
                here.leave(file.path, LEFT_OUT)
                continue
            if (other := files.setdefault(file.identity, file.path)) is not file.path:
                raise DataError(_twice(file.path, other))
            num_taken += 1
            found.setdefault(language, []).append(Source(language, file.path, file.name, *how))
        not_taken += here.not_taken
        if not num_taken and len(inputs) > 1 and Path(given).is_dir():
            raise DataError(f"No text in {shown(given)}. {_what_is_there(here.not_taken)}")
    wanted = found if rules.language is None else found.get(rules.language)
    if not wanted:
        of = f" of language {rules.language}" if rules.language else ""
        there = f"It holds: {', '.join(sorted(found))}." if found else _what_is_there(not_taken)
        raise DataError(f"No text{of} in {', '.join(map(shown, inputs))}. {there}")
    for language, sources in found.items():
        _check_duplicate_inputs(language, sources)
    return Survey(dict(sorted(found.items())), not_taken, rules.unmatched())


def _language_of_dataset(given: str, rules: LanguageRules) -> str:
    if rules.language is None:
        raise DataError(f"{given}: say which language it is with --language xx.")
    return rules.language


def _twice(path: Path, other: Path) -> str:
    if path == other:
        return f"{shown(path)} is given twice as input. Give it once."
    return (
        f"{shown(path)} is the same file as {shown(other)} (by a link, or as two inputs overlap), so its text would be taken "
        "twice. Give it once, or leave one out with --language-map FILE (a line: PATTERN -)."
    )


def _pattern(name: str) -> str:
    """What a line of the language map may hold: no spaces, and nothing that would mean something else in a pattern."""
    return "".join(char if char.isprintable() and char not in " #[]*" else "?" for char in name)


def _what_is_there(not_taken: list[NotTaken]) -> str:
    looked_for = f"Looked for {KNOWN_KINDS}."
    return f"{looked_for} What is there was not taken: {'; '.join(summary(not_taken, 3))}." if not_taken else looked_for


def summary(not_taken: list[NotTaken], most_names: int) -> list[str]:
    """A line per reason: how many, and the first names."""
    by_reason: dict[str, list[str]] = {}
    for one in not_taken:
        by_reason.setdefault(one.reason, []).append(shown(one.path))
    return [
        f"{len(paths)} {reason}: {', '.join(paths[:most_names])}" + (", ..." if len(paths) > most_names else "")
        for reason, paths in by_reason.items()
    ]


def _check_duplicate_inputs(language: str, sources: list[Source]) -> None:
    """Of one name, or packed in two ways in one directory, as `xz -dk` leaves them."""
    names: dict[str, Path] = {}
    unpacked_names: dict[str, Path] = {}
    for source in sources:
        if source.name in names:
            raise DataError(f"{language}: two input files are named {source.name}. Give them different names.")
        names[source.name] = source.path
        kind = None if isinstance(source, HubSource) else kind_of(source.path.name, by_name=True)
        packing = kind[1] if kind else ""
        unpacked_name = str(source.path)[: len(str(source.path)) - len(packing)]
        if unpacked_name in unpacked_names:
            raise DataError(
                f"{language}: {shown(source.path)} and {shown(unpacked_names[unpacked_name])} are by their names the same "
                "text, packed and unpacked, which would be taken twice. Remove one, or leave one out with --language-map "
                f"FILE (a line: {_pattern(source.path.name)} -)."
            )
        unpacked_names[unpacked_name] = source.path
