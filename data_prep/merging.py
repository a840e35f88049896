"""Copying a finished language from another output directory: its journal and the shards that the journal names.

In: two directories. Out: the language in the second. The first may come from anywhere, so only regular files are opened and no
link is followed: a FIFO would hang, and a device or a link could lead outside the directory.
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
COPY_AGAIN = "Copy the directory again from the machine that prepared it"


def finished_languages(other: Path, run: dict[str, Any]) -> list[str]:
    """The finished languages of the output `other`.

    Args:
        other: the directory.
        run: the content of its `prepare.json`.

    Raises:
        DataError: it holds links or other unusual files, its manifest is corrupt, or a finished language lost a shard.
    """
    if os.path.lexists(other / MANIFEST_NAME):
        _check_regular_files([other / MANIFEST_NAME])
        read_manifest(other)
    finished = []
    for language in run["languages"]:
        directory = other / language
        if not os.path.lexists(directory):
            continue
        if not stat.S_ISDIR(directory.lstat().st_mode):
            raise _not_copied(directory, "is a link or not a directory")
        if os.path.lexists(directory / JOURNAL_NAME):
            files = [path for path in sorted(directory.iterdir()) if path.suffix == ".tok"]
            _check_regular_files([directory / JOURNAL_NAME, *files])
        journal = Journal.read(directory)
        if journal.complete:
            check_language(other, language, journal, identity_of({**run, "languages": {}}))
            finished.append(language)
        elif _says_complete(journal.path):
            raise DataError(
                f"{directory} was finished, and has lost a shard or a part of one since. Nothing was copied. {COPY_AGAIN}, or "
                f"prepare it again with --redo {language}."
            )
    return finished


def _says_complete(journal: Path) -> bool:
    """Whether the last line of the journal records the end of the language. The shards are not checked."""
    lines = journal.read_bytes().splitlines() if journal.is_file() else []
    try:
        return bool(lines) and json.loads(lines[-1].partition(b" ")[2])["complete"] is True
    except (ValueError, KeyError, TypeError):
        return False


def check_language(root: Path, language: str, journal: Journal, identity: Identity) -> None:
    """Raise `DataError` if the name, size or header of a shard is wrong. `verify` checks all bytes."""
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
                    f"The header of shard {shard.path} is not the one its journal describes: the file is corrupt or was "
                    f"swapped. Nothing was copied. {COPY_AGAIN}."
                )


def copy_language(source: Path, target: Path, journal: Journal) -> None:
    """Copy one language. Shards become hard links where possible; the journal is copied, because it may be written again."""
    if target.is_symlink():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for record in journal.shards:
        name = Path(record["file"]).name
        if not _is_linked(source / name, target / name):
            _copy(source / name, target / name)
    _copy(source / JOURNAL_NAME, target / JOURNAL_NAME)


def _check_regular_files(paths: list[Path]) -> None:
    for path in paths:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _not_copied(path, "is a link or not a regular file")


def _not_copied(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} {what}: merge copies regular files and follows no link. Nothing was copied. Put the "
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
