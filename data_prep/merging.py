"""Taking a finished language out of another output directory: its journal, the shards that this names, and nothing else.

Another directory may come from anywhere, so nothing is read through a link, and only regular files are opened: a FIFO would
hang, a device or a link would copy what is not the directory's own.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import stat
from pathlib import Path
from typing import Any

from data_prep.journal import JOURNAL_NAME, Journal
from data_prep.shard_layout import HEADER_BYTES, Identity
from data_prep.shards import MANIFEST_NAME, DataError, Shard, identity_of, read_manifest

NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


def finished_languages(other: Path, run: dict[str, Any]) -> list[str]:
    """Languages of another directory that can be taken. A `DataError` where it holds links or more than it should, where
    its manifest is damaged, or where a finished language has lost a shard."""
    if os.path.lexists(other / MANIFEST_NAME):
        _check_same_kind([other / MANIFEST_NAME])
        read_manifest(other)
    finished = []
    for language in run["languages"]:
        directory = other / language
        if not os.path.lexists(directory):
            continue
        if not stat.S_ISDIR(directory.lstat().st_mode):
            raise _refusal(directory, "is a link or no directory")
        if os.path.lexists(directory / JOURNAL_NAME):
            files = [path for path in sorted(directory.iterdir()) if path.suffix == ".tok"]
            _check_same_kind([directory / JOURNAL_NAME, *files])
        journal = Journal.read(directory)
        if journal.complete:
            check_language(other, language, journal, identity_of({**run, "languages": {}}))
            finished.append(language)
        elif _says_complete(journal.path):
            raise DataError(
                f"{directory} was finished once, and has lost a shard or a part of one since. Nothing was copied. Copy the "
                f"directory again from where it was prepared, or make it again with --redo {language}."
            )
    return finished


def _says_complete(journal: Path) -> bool:
    """What the last line says, whether or not the shards are there."""
    lines = journal.read_bytes().splitlines() if journal.is_file() else []
    try:
        return bool(lines) and json.loads(lines[-1].partition(b" ")[2])["complete"] is True
    except (ValueError, KeyError, TypeError):
        return False


def check_language(root: Path, language: str, journal: Journal, identity: Identity) -> None:
    """Name, size and header of every shard are the language's own; their bytes are `verify`'s."""
    for number, record in enumerate(journal.shards):
        name = str(record["file"])
        if name != f"{language}/{number:05d}.tok":
            raise DataError(
                f"{journal.path} names a shard {name!r}; expected {language}/{number:05d}.tok. Do not use it."
            )
        shard = Shard(root, language, number, record, identity)
        if problem := shard.size_problem():
            raise DataError(problem)
        with open(shard.path, "rb") as file:
            if file.read(HEADER_BYTES) != shard.expected_header():
                raise DataError(
                    f"The header of shard {shard.path} is not the one its journal describes: the file is damaged or was "
                    "swapped. Nothing was copied. Copy the directory again from where it was prepared."
                )


def copy_language(source: Path, target: Path, journal: Journal) -> None:
    """Shards are hard-linked where that is possible; the journal, which may be written to again, never is."""
    if target.is_symlink():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for record in journal.shards:
        name = Path(record["file"]).name
        if not _is_linked(source / name, target / name):
            _copy(source / name, target / name)
    _copy(source / JOURNAL_NAME, target / JOURNAL_NAME)


def _check_same_kind(paths: list[Path]) -> None:
    for path in paths:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _refusal(path, "is a link or no regular file")


def _refusal(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} {what}: merge copies what is in the directory itself, and nothing through a link. Nothing was copied. Put the "
        f'file itself in its place, for example: cp --remove-destination "$(readlink -f {shlex.quote(str(path))})" '
        f"{shlex.quote(str(path))}"
    )


def _is_linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_HARD_LINK:
            raise
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file, open(target, "xb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
