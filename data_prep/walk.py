"""The files below an input: every file to be read once, and the reason for every file that is left out.

In: a file or a directory. Out: a `Walk`. Directories are read once. A link to a directory is followed once, after all
directories that are reached without a link.
"""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.names import kept_name, shown
from data_prep.shards import RUN_NAME, DataError
from data_prep.sources import KNOWN_KINDS, kind_of

UNKNOWN_KIND = "of a kind that is not read"
NO_TEXT = "no text of a language (README, LICENSE, checksums)"
HIDDEN = "hidden (the name starts with a dot)"
DANGLING = "a link that leads nowhere"
UNREADABLE = "cannot be read"
NOT_REGULAR = "not a regular file (FIFO, socket or device)"
READ_ALREADY = "a link to a directory that is read already"
OUTPUT = "an output of prepare"
LEFT_OUT = "left out by the language map"
EMPTY = "empty (0 bytes)"
KNOWN_REASONS = (OUTPUT, READ_ALREADY, LEFT_OUT)  # reasons that --strict-input accepts
_ABOUT_TEXT = re.compile(
    r"(?:readme|licen[cs]e)(?:[._-].*)?|(?:copying|notice)(?:\.\w+)?|.*\.(?:sha(?:1|224|256|384|512)|md5)(?:sums?)?|"
    r"(?:sha(?:1|224|256|384|512)|md5)sums?(?:[._].*)?|checksums?(?:[._].*)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class NotTaken:
    path: str
    reason: str


@dataclass(frozen=True)
class Found:
    """One file to be read."""

    path: Path
    name: str  # path below the input directory
    identity: tuple[int, int]  # device and inode
    by_name: bool  # whether the command line names the file itself


@dataclass
class Walk:
    found: list[Found] = field(default_factory=list)
    not_taken: list[NotTaken] = field(default_factory=list)

    def leave(self, path: str | Path, reason: str) -> None:
        self.not_taken.append(NotTaken(str(path), reason))


def is_about_text(name: str) -> bool:
    """Whether the name of a file is one of those that accompany texts, such as README or LICENSE."""
    return _ABOUT_TEXT.fullmatch(name) is not None


def walk(given: str, is_mapped: Callable[[Path], bool], language: str | None = None) -> Walk:
    """The files of one input.

    Args:
        given: a file or a directory.
        is_mapped: whether the language map has a pattern for a file. Such a file is text, whatever its name.
        language: the value of `--language`. A file such as README is text if it is named on the command line and this names it.

    Raises:
        DataError: the input does not exist or cannot be read, or the file is of an unknown kind.
    """
    path, result = Path(given), Walk()
    try:
        status = path.stat()
    except OSError as error:
        what = "does not exist" if not path.is_symlink() else "is a link that leads nowhere"
        reason = what if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise DataError(f"Input {shown(path)} {reason}.") from error
    if stat.S_ISDIR(status.st_mode):
        _walk_directories(given, is_mapped, result)
        result.found.sort(key=lambda file: file.name)
        return result
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"Input {shown(path)} is {NOT_REGULAR}. Give a file that can be read twice, or a directory.")
    is_asked_for = path.name.split(".")[0] == language
    if is_about_text(path.name) and not is_mapped(path) and not is_asked_for:
        result.leave(path, NO_TEXT)
    elif not (is_about_text(path.name) and is_asked_for) and kind_of(path.name, by_name=True) is None:
        raise DataError(f"{shown(path)}: unknown kind of file; known are {KNOWN_KINDS}.")
    else:
        result.found.append(Found(path, kept_name(path.name), (status.st_dev, status.st_ino), by_name=True))
    return result


def _walk_directories(given: str, is_mapped: Callable[[Path], bool], result: Walk) -> None:
    seen: dict[tuple[int, int], str] = {}  # directories by device and inode
    waiting: deque[tuple[str, str]] = deque([(given, "")])  # path, name below the input
    linked: list[tuple[str, str]] = []
    while waiting or linked:
        if not waiting:  # links come last, so that a directory reached without a link keeps its own name
            waiting.append(linked.pop())
        path, prefix = waiting.popleft()
        try:
            status = Path(path).stat()
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                result.leave(path, f"{READ_ALREADY}, {shown(seen[identity])}")
                continue
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            result.leave(path, f"{UNREADABLE}: {error.strerror}")
            continue
        seen[identity] = path
        if any(entry.name == RUN_NAME for entry in entries):
            result.leave(
                path, OUTPUT
            )  # shards may be below the texts they were made from, and their journals are .jsonl
            continue
        links: list[tuple[str, str]] = []
        for entry in entries:
            if not _is_directory(entry):
                _classify(entry, prefix, is_mapped, result)
            elif entry.name.startswith("."):
                result.leave(entry.path, HIDDEN)
            else:
                (links if entry.is_symlink() else waiting).append((entry.path, f"{prefix}{entry.name}/"))
        linked.extend(reversed(links))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link
        return False


def _classify(entry: os.DirEntry[str], prefix: str, is_mapped: Callable[[Path], bool], result: Walk) -> None:
    """Add a file to `result.found`, or to `result.not_taken` with the reason."""
    try:
        status = entry.stat()
    except OSError as error:
        nowhere = isinstance(error, FileNotFoundError) or entry.is_symlink()
        result.leave(entry.path, DANGLING if nowhere else f"{UNREADABLE}: {error.strerror}")
        return
    if entry.name.startswith("."):
        result.leave(entry.path, HIDDEN)
    elif not stat.S_ISREG(status.st_mode):
        result.leave(entry.path, NOT_REGULAR)
    elif is_about_text(entry.name) and not is_mapped(Path(entry.path)):
        result.leave(entry.path, NO_TEXT)
    elif kind_of(entry.name) is None:
        result.leave(entry.path, UNKNOWN_KIND)
    else:
        if not status.st_size:
            result.leave(entry.path, EMPTY)  # it stays among the sources, which the journal identifies by their order
        identity = (status.st_dev, status.st_ino)
        result.found.append(Found(Path(entry.path), kept_name(prefix + entry.name), identity, by_name=False))
