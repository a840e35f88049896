"""Which files are the input, and of which language each is: from CC-100's names, a mapping file, or `--language`."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.languages import CC100
from data_prep.manifest import RUN_NAME
from data_prep.shards import LANGUAGE_PATTERN, DataError
from data_prep.sources import SUFFIXES, HubSource, Source

IGNORED = "-"


@dataclass
class LanguageRules:
    """How a file's language is found: first the mapping, then file and folder names, then `language`."""

    language: str | None = None
    mapping: list[tuple[str, str]] = field(default_factory=list)  # pattern for the file name, language or "-"

    @classmethod
    def read(cls, file: Path | None, language: str | None) -> LanguageRules:
        """`file` holds lines of `PATTERN LANGUAGE`; the pattern may use * and ?, `-` as language leaves files out."""
        if language is not None:
            _check_name(language, "--language")
        if file is None:
            return cls(language)
        mapping = []
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"Cannot read the mapping file {file}: {error}.") from error
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

    def language_of(self, path: Path, given_by_name: bool) -> str:
        """Of one file; `given_by_name`: it was named on the command line, not found in a directory."""
        for pattern, language in self.mapping:
            if fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(str(path), pattern):
                return language
        for name in (path.name.split(".")[0], path.parent.name):
            if name in CC100:
                return name
        if given_by_name and self.language is not None:
            return self.language
        raise DataError(
            f"{path}: cannot tell its language, as neither it nor its folder is named like one of CC-100 (en.txt.xz, "
            "zh-Hans.txt.xz, sw/part-1.jsonl). Rename it, give it alone with --language xx, or map it with "
            "--language-map FILE (lines of: PATTERN LANGUAGE, or - to leave it out)."
        )


def _check_name(language: str, where: str) -> None:
    if not LANGUAGE_PATTERN.fullmatch(language):
        raise DataError(f"{where}: {language!r} is no language name; use letters, digits, '-' and '_' (en, zh-Hans).")


def discover(inputs: list[str], rules: LanguageRules, text_field: str = "text") -> dict[str, list[Source]]:
    """All input by language, in an order that depends on the names alone."""
    found: dict[str, list[Source]] = {}
    for given in inputs:
        if given.startswith("hf:"):
            if rules.language is None:
                raise DataError(f"{given}: say which language it is with --language xx.")
            found.setdefault(rules.language, []).append(HubSource(rules.language, Path(given), given, text_field))
            continue
        for path, name in _files(Path(given)):
            language = rules.language_of(path, given_by_name=path == Path(given))
            if language != IGNORED:
                found.setdefault(language, []).append(Source(language, path, name, text_field))
    wanted = found if rules.language is None else found.get(rules.language)
    if not wanted:
        of = f" of language {rules.language}" if rules.language else ""
        there = f" It holds: {', '.join(sorted(found))}." if found else f" Looked for *{', *'.join(SUFFIXES)}."
        raise DataError(f"No text{of} in {', '.join(inputs)}.{there}")
    for language, sources in found.items():
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"{language}: two input files are named {twice[0]}. Give them different names.")
    return dict(sorted(found.items()))


def _files(path: Path) -> list[tuple[Path, str]]:
    if path.is_dir():
        # Shards may lie below the texts they were made from, and their journals are JSON lines.
        outputs = [file.parent for file in path.rglob(RUN_NAME)]
        files = [
            file
            for file in path.rglob("*")
            if file.is_file() and file.name.endswith(SUFFIXES) and not any(map(file.is_relative_to, outputs))
        ]
        return sorted(((file, file.relative_to(path).as_posix()) for file in files), key=lambda pair: pair[1])
    if not path.exists():
        raise DataError(f"Input {path} does not exist.")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; known are *{', *'.join(SUFFIXES)}.")
    return [(path, path.name)]
