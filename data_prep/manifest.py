"""The settings of an output directory (`prepare.json`), and its contents when it is finished (`manifest.json`).

In: tokenizer, options and journals. Out: the two files. Everything that determines the bytes of the shards is recorded before
the first shard and compared at every later run, so that one output holds text of one tokenizer and one set of options.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from data_prep.blocks import MAX_DOCUMENT_BYTES
from data_prep.clean import CleanOptions
from data_prep.command_line import module_command
from data_prep.durable_files import leftovers, replace_file, sync
from data_prep.journal import JOURNAL_NAME, Journal
from data_prep.json_files import read_json_object
from data_prep.merging import copy_language, finished_languages
from data_prep.names import how_to_redo
from data_prep.ownership import own_when_free
from data_prep.shard_layout import FORMAT_NAME, FORMAT_VERSION
from data_prep.shards import LANGUAGE_PATTERN, MANIFEST_NAME, RUN_NAME, DataError, manifest_digest
from data_prep.sources import ReadOptions
from data_prep.tokenizer import Tokenizer

LOCK_NAME = "prepare.lock.tmp"
DATA_SETS = "data_sets"  # in prepare.json and the manifest: for each data set of the hub its commits
DEFAULT_UNIT = "line"  # of outputs whose options name none


def describe(
    tokenizer: Tokenizer, clean: CleanOptions, shard_tokens: int, block_bytes: int, reading: ReadOptions
) -> dict[str, Any]:
    """Everything except the text that determines the bytes of the shards."""
    options = {
        "shard_tokens": shard_tokens,
        "block_bytes": block_bytes,
        "max_document_bytes": MAX_DOCUMENT_BYTES,
        "text_field": reading.text_field,
        **({"where": str(reading.where)} if reading.where.conditions else {}),
        **tokenizer.library,
        **asdict(clean),
        **({"unit": tokenizer.unit} if tokenizer.unit != DEFAULT_UNIT else {}),
    }
    return {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "pieces": tokenizer.num_pieces,
            **tokenizer.library,
            **tokenizer.special_ids,
        },
        "options": options,
        "options_xxh3_128": xxhash.xxh3_128_hexdigest(json.dumps(options, sort_keys=True).encode()),
    }


@contextmanager
def changing(output: Path) -> Iterator[None]:
    """Lock the set of languages of an output: the tasks of a Slurm array start together."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with own_when_free(output / LOCK_NAME, str(output)):
            for name in (RUN_NAME, MANIFEST_NAME):  # of killed processes: both files are written under this lock only
                for leftover in leftovers(output / name, ".tmp"):
                    leftover.unlink(missing_ok=True)
            yield
    except OSError as error:
        raise DataError(f"Cannot write to {output}: {error.strerror}. Give --output a writable directory.") from error


def begin_output(output: Path, about: dict[str, Any], languages: list[str], may_add: bool) -> None:
    """Create the output, or check that it was begun with the same settings (`about`, from `describe`) and languages."""
    if _new_languages(output, about, languages, may_add) != [] or _new_data_sets(
        output, about
    ):  # else nothing is written, and no lock is necessary
        with changing(output):
            _begin(output, about, languages, may_add)


def _begin(output: Path, about: dict[str, Any], languages: list[str], may_add: bool) -> None:
    new = _new_languages(output, about, languages, may_add)
    if new is None:
        if not (output / RUN_NAME).is_file() and {path.name for path in output.iterdir()} - {LOCK_NAME}:
            raise DataError(
                f"{output} is not empty and not an output of prepare. Give --output a new or empty directory."
            )
        write_run(output, about, languages)
    elif new or _new_data_sets(output, about):
        (output / MANIFEST_NAME).unlink(missing_ok=True)
        begun = read_run(output)
        write_run(output, with_data_sets(begun, about), sorted({*new, *begun["languages"]}))


def commits_of(output: Path) -> dict[str, str]:
    """The commit with which an output was begun, for each data set of the hub; none if it has not been begun."""
    begun = read_run(output) if (output / RUN_NAME).is_file() else {}
    return {name: commits[0] for name, commits in begun.get(DATA_SETS, {}).items()}


def with_data_sets(run: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The settings `run` with the commits of `other` after its own: only `merge` can give a data set a second one."""
    ours, theirs = run.get(DATA_SETS, {}), other.get(DATA_SETS, {})
    both = {
        name: list(dict.fromkeys([*ours.get(name, []), *theirs.get(name, [])])) for name in sorted({*ours, *theirs})
    }
    return {**run, DATA_SETS: both} if both else run


def _new_data_sets(output: Path, about: dict[str, Any]) -> list[str]:
    """Data sets that the output was begun without. Raises `DataError` if it was begun with another commit of one."""
    begun, given = commits_of(output), about.get(DATA_SETS, {})
    for name, (commit, *_) in given.items():
        if begun.get(name, commit) != commit:
            raise DataError(
                f"{output} was begun with commit {begun[name]} of {name}, and this run found {commit}. Nothing was changed. "
                "Run the same command again: it continues with the commit of the output."
            )
    return [name for name in given if name not in begun]


def _holds_nothing_of(output: Path, about: dict[str, Any]) -> bool:
    """Whether the output was begun with other options and holds no shard of them, and no run is making one."""
    begun = read_run(output)
    if begun["options"] == about["options"]:
        return False
    try:
        journals = [Journal.read(output / language) for language in begun["languages"] if (output / language).is_dir()]
        if any(journal.entries for journal in journals):
            return False
        for journal in journals:
            with journal.locked():
                pass
    except DataError:
        return False
    return True


def _new_languages(output: Path, about: dict[str, Any], languages: list[str], may_add: bool) -> list[str] | None:
    """Languages that the output was begun without; None if it has not been begun, or holds nothing and is begun again.

    Raises `DataError` if the languages or the settings must not be mixed.
    """
    if not (output / RUN_NAME).is_file() or _holds_nothing_of(output, about):
        return None
    begun = read_run(output)
    check_same_options(output, begun, about)
    new = sorted(set(languages) - set(begun["languages"]))
    if new and not may_add:
        raise DataError(
            f"{output} was begun with {', '.join(begun['languages'])}; the input now also has {', '.join(new)}. Nothing "
            "was changed. Use --add to add them, or give --output a new directory and join the two with "
            f"`{module_command('data_prep', 'merge', output, '--from')} DIRECTORY`."
        )
    return new


def read_run(output: Path) -> dict[str, Any]:
    """The content of `prepare.json`. Raises `DataError` if the directory has none or it is not valid."""
    file = output / RUN_NAME
    try:
        run = read_json_object(file)
        if run["format"] != FORMAT_NAME or run["version"] != FORMAT_VERSION:
            raise DataError(
                f"{file} is of another format version ({str(run['version'])[:40]}). Give --output a new directory."
            )
        if not isinstance(run["languages"], list) or not all(
            isinstance(run[part], dict) for part in ("tokenizer", "options")
        ):
            raise TypeError("languages is not a list, or tokenizer or options is not an object")
        if not all(isinstance(commits, list) and commits for commits in dict(run.get(DATA_SETS, {})).values()):
            raise TypeError(f"{DATA_SETS} does not hold lists of commits")
        for language in run["languages"]:
            if not LANGUAGE_PATTERN.fullmatch(language):
                raise DataError(
                    f"{file} names a language {language[:80]!r}: not a plain name. Do not use this directory."
                )
        json.dumps(run, ensure_ascii=False).encode()  # a lone surrogate (\ud800) cannot be written to the manifest
        return run
    except FileNotFoundError as error:
        raise DataError(
            f"{output} is not an output of `{module_command('data_prep', 'prepare')}` ({RUN_NAME} is missing)."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read ({error}). Give --output a new directory.") from error


def write_run(output: Path, about: dict[str, Any], languages: list[str]) -> None:
    """Write `prepare.json`: the settings, and the languages that must be finished before there is a manifest."""
    replace_file(output / RUN_NAME, json.dumps({**about, "languages": languages}, indent=1) + "\n")


def check_same_options(output: Path, begun: dict[str, Any], about: dict[str, Any]) -> None:
    """Raise `DataError` if tokenizer or options of the two settings differ."""
    default = {"unit": DEFAULT_UNIT}
    for part in ("tokenizer", "options"):
        keys = sorted({*begun[part], *about[part]})
        differing = [
            f"{key} is {begun[part].get(key, default.get(key))!r} there and {about[part].get(key, default.get(key))!r} here"
            for key in keys
            if begun[part].get(key) != about[part].get(key)
        ]
        if differing:
            raise DataError(
                f"{output} was begun with another {part.removesuffix('s')}: {'; '.join(differing)}. Nothing was "
                "changed. Use the same, or give --output a new directory."
            )


def unfinished(output: Path) -> list[str]:
    """The languages of `prepare.json` that are not finished."""
    return [name for name in read_run(output)["languages"] if not Journal.read(output / name).complete]


def finish(output: Path) -> list[str]:
    """Write `manifest.json` if every language is finished. Returns the languages that are not."""
    missing = unfinished(output)
    if missing or _has_manifest(output, _manifest_text(output, [])):
        return missing
    with changing(output):
        missing = unfinished(output)  # another task may have added some
        if not missing:
            replace_file(output / MANIFEST_NAME, _manifest_text(output, []))
    return missing


def write_manifest(output: Path, allow_partial: bool = False) -> None:
    """Write `manifest.json` from the journals. Unfinished languages are left out with `allow_partial`; else they raise."""
    with changing(output):
        missing = unfinished(output)
        if not read_run(output)["languages"]:
            raise DataError(
                f"{output} holds no language. Nothing was written. Merge directories with finished languages."
            )
        if missing and (not allow_partial or len(missing) == len(read_run(output)["languages"])):
            raise DataError(
                f"{output}: not finished are {', '.join(missing)}. Run prepare for them, then "
                f"`{module_command('data_prep', 'merge', output)}` (with --partial to leave them out)."
            )
        text = _manifest_text(output, missing)
        if not _has_manifest(output, text):
            replace_file(output / MANIFEST_NAME, text)


def _manifest_text(output: Path, left_out: list[str]) -> str:
    run = read_run(output)
    run["languages"] = [language for language in run["languages"] if language not in left_out]
    return json.dumps(make_manifest(output, run), indent=1, ensure_ascii=False) + "\n"


def _has_manifest(output: Path, text: str) -> bool:
    path = output / MANIFEST_NAME
    return path.is_file() and path.read_bytes() == text.encode()


def make_manifest(output: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The manifest of `run["languages"]`, made from `prepare.json` and the journals."""
    journals = {language: Journal.read(output / language) for language in run["languages"]}
    for language, journal in journals.items():
        if not journal.complete:
            raise DataError(f"{journal.path} is missing or does not reach the end of {language}. Run prepare for it.")
    entries = {language: _checked_entry(language, journal) for language, journal in journals.items()}
    manifest = {**run, "languages": entries}
    return {**manifest, "manifest_xxh3_128": manifest_digest(manifest)}


def _checked_entry(language: str, journal: Journal) -> dict[str, Any]:
    try:
        return _manifest_entry(journal)
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{journal.path} was edited or made by another program ({type(error).__name__}: {error}). "
            f"To {how_to_redo(language)}"
        ) from error


def _manifest_entry(journal: Journal) -> dict[str, Any]:
    assert journal.last is not None
    return {
        "tokens": sum(shard["tokens"] for shard in journal.shards),
        "documents": sum(shard["documents"] for shard in journal.shards),
        "text_bytes": journal.last.counts["text_bytes"],
        "counts": {name: count for name, count in sorted(journal.last.counts.items()) if count},
        "sources": [
            {key: value for key, value in source.items() if key != "mtime_ns"} for source in journal.finished_sources
        ],
        "shards": _shards_with_ranges(journal),
    }


def _shards_with_ranges(journal: Journal) -> list[dict[str, Any]]:
    """The shards, each with the start and the end of its text: source name and byte of the source's text."""
    names = [source["name"] for source in journal.finished_sources]
    shards, start = [], [names[0], 0]
    for entry in journal.entries:
        end = [names[entry.source], entry.text_end]
        if entry.shard is not None:
            shards.append({**entry.shard, "text_from": start, "text_to": end})
        start = end
    return shards


def import_languages(output: Path, other: Path) -> list[str]:
    """Copy the finished languages of the output `other`, as hard links where possible. Returns those that are new."""
    theirs = read_run(other)
    # raises before anything is written; without a finished language no output is begun
    if not finished_languages(other, theirs) and not (output / RUN_NAME).is_file():
        return []
    with changing(output):
        return _import_under_lock(output, other, theirs)


def _import_under_lock(output: Path, other: Path, theirs: dict[str, Any]) -> list[str]:
    if not (output / RUN_NAME).is_file():
        _begin(output, theirs, [], may_add=False)
    ours = read_run(output)
    check_same_options(output, ours, theirs)
    finished = finished_languages(other, theirs)
    arrived = [language for language in finished if (output / language).exists()]
    differing = [language for language in arrived if not _same_journal(output / language, other / language)]
    if differing:
        raise DataError(
            f"{', '.join(differing)} is in both {output} and {other}, and differs. Nothing was copied. To keep those of "
            f"{other}: rm -r {shlex.join(str(output / language) for language in differing)}"
        )
    # a language that has arrived is not named if a process was killed before it wrote `prepare.json`
    new = [language for language in finished if language not in arrived or language not in ours["languages"]]
    for language in new:
        if language in arrived:
            continue
        arriving = output / f"{language}.tmp"
        copy_language(other / language, arriving, Journal.read(other / language))
        arriving.rename(output / language)
    if not new:
        return []
    sync(output)
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    write_run(output, with_data_sets(ours, theirs), sorted({*ours["languages"], *finished}))
    return new


def _same_journal(one: Path, other: Path) -> bool:
    """Whether two languages have equal journals. Journals hold the hash of every shard, so their shards are equal too."""
    if not (one / JOURNAL_NAME).is_file():
        return False
    return (one / JOURNAL_NAME).read_bytes() == (other / JOURNAL_NAME).read_bytes()
