"""The data sets among the inputs: which configs are read, the language of each, and the commit that an output keeps.

In: specifications `hf:NAME[@REVISION][:CONFIG[:SPLIT]]` and language rules. Out: sources by language, configs that are left out,
and commits by name of data set. The commit is looked up once, at the first run into an output; `prepare.json` keeps it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.child import in_child
from data_prep.hub import PREFIX, Listing, Specification, check_config, list_files
from data_prep.hub_files import sources_of
from data_prep.languages import language_of_code
from data_prep.names import map_pattern, quoted, shown
from data_prep.shards import DataError
from data_prep.sources import ReadOptions, Source
from data_prep.walk import LEFT_OUT, NO_TEXT, NotTaken, is_about_text

IGNORED = "-"
OTHER_KIND = "of another kind than most files of the data set"
MOST_NAMES = 8


class DataSetRules:
    """The language of each config: by the language map, by its name or that of the split (`de`, `deu_Latn`), or by `--language`."""

    def __init__(self, mapping: list[tuple[str, str]], matched: set[str], language: str | None) -> None:
        self._mapping, self._matched, self.language = mapping, matched, language

    def mapped(self, given: Specification, config: str) -> str | None:
        """The language that the map gives to a config: a pattern matches CONFIG, NAME or NAME:CONFIG."""
        for pattern, language in self._mapping:
            names = (config, given.name, f"{given.name}:{config}")
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                self._matched.add(pattern)
                return language
        return None

    def language_of(self, given: Specification, config: str) -> str:
        """Raises `DataError` if nothing names the language."""
        named = language_of_code(config) or language_of_code(given.split or "")
        language = self.mapped(given, config) or named or self.language
        if language is None:
            raise DataError(
                f"{given.given}: cannot tell the language of config {config!r}. Say it with --language xx, or with "
                f"--language-map FILE (a line: {map_pattern(f'{given.name}:{config}')} xx)."
            )
        return language

    def chosen(self, given: Specification, configs: list[str], default: str | None) -> dict[str, str]:
        """The configs to read and their languages, of all configs of a data set; `-` for those that the map leaves out."""
        if given.config is not None:
            check_config(given, given.config, configs)
            return {given.config: self.language_of(given, given.config)}
        mapped = {config: self.mapped(given, config) or IGNORED for config in configs}
        if any(language != IGNORED for language in mapped.values()):
            return mapped
        if default is None:
            raise DataError(
                f"{given.given}: the data set has {len(configs)} configs: {', '.join(configs[:MOST_NAMES])}"
                f"{', ...' if len(configs) > MOST_NAMES else ''}. Name one ({quoted(f'{PREFIX}{given.name}:{configs[0]}')}), or several with "
                "--language-map FILE (lines of: CONFIG LANGUAGE)."
            )
        return {default: self.language_of(given, default)}


@dataclass
class DataSets:
    """The data sets of one command."""

    sources: dict[str, list[Source]] = field(default_factory=dict)  # by input
    languages: set[str] = field(default_factory=set)  # also those whose files are not looked up
    commits: dict[str, str] = field(default_factory=dict)  # by name of data set
    notes: list[str] = field(default_factory=list)
    not_taken: list[NotTaken] = field(default_factory=list)


def look_up(inputs: list[str], rules: DataSetRules, options: ReadOptions, pinned: Mapping[str, str]) -> DataSets:
    """The sources of all `hf:` inputs; with `--language`, only those of that language.

    Args:
        pinned: commits with which the output was begun, by name

    Raises:
        DataError: one is given twice, the hub does not answer, or the output was begun with another revision
    """
    found = DataSets(commits=dict(pinned))
    given = [Specification.parse(text) for text in inputs if text.startswith(PREFIX)]
    for number, one in enumerate(given):
        if one in given[:number]:
            raise DataError(f"{shown(one.given)} is given twice as input. Give it once.")
    if not given:
        return DataSets()

    def list_all() -> list[dict[str, Any]]:
        return [asdict(_list(one, rules, found.commits)) for one in given]

    # The library starts threads, and the process that forks the workers must have none.
    listings = [Listing.from_json(record) for record in in_child(list_all, "listing data sets")]
    for one, listing in zip(given, listings, strict=True):
        languages = rules.chosen(one, listing.configs, listing.default)
        _add(found, one, listing, languages)
        found.sources[one.given] = sources_of(one, listing, languages, options)
    found.commits = {
        one.name: listing.revision for one, listing in zip(given, listings, strict=True) if listing.revision
    }
    return found


def _list(given: Specification, rules: DataSetRules, commits: dict[str, str]) -> Listing:
    def choose(configs: list[str], default: str | None) -> list[str]:
        chosen = rules.chosen(given, configs, default)
        is_read = {rules.language} if rules.language else {*chosen.values()} - {IGNORED}
        return [config for config, language in chosen.items() if language in is_read]

    listing = list_files(given, commits.get(given.name), choose)
    commits.setdefault(given.name, listing.revision)
    return listing


def _add(found: DataSets, given: Specification, listing: Listing, languages: dict[str, str]) -> None:
    """Check the revision of one data set, and add what is not a source."""
    found.languages |= {*languages.values()} - {IGNORED}
    left_out = [config for config, language in languages.items() if language == IGNORED]
    found.not_taken += [NotTaken(f"{PREFIX}{given.name}:{config}", LEFT_OUT) for config in left_out]
    for path in [path for chosen in listing.chosen.values() for path in chosen.left_out]:
        found.not_taken.append(NotTaken(path, NO_TEXT if is_about_text(Path(path).name) else OTHER_KIND))
    if listing.newest == listing.revision:
        return
    if given.revision:
        raise DataError(
            f"{given.given}: revision {given.revision!r} is commit {listing.newest}, but this output was begun with commit "
            f"{listing.revision}, and one output holds one revision of a data set. Give that commit, or give --output a new "
            "directory."
        )
    note = (
        f"data set {given.name}: the newest revision is commit {listing.newest[:12]}; the output was begun with "
        f"{listing.revision[:12]} and continues with it. For newer text give --output a new directory"
    )
    found.notes += [note] if note not in found.notes else []
