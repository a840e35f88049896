"""Errors that a user can fix, and reading files that may be unreadable for a moment.

In: a function that reads a file. Out: its result, or an `UnreadableError` with file and errno. A file that cannot be read now
is not a corrupt file: network file systems answer EIO, ESTALE or EACCES for a moment, and EMFILE says nothing about the file.
A reader that mistook these for corruption would fall back to older data and later delete the newest.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

PAUSES_S = (0.1, 0.4, 1.0)  # between four attempts
# These say what is at the path. Every other errno is about this moment or about access.
ABOUT_THE_PATH = frozenset(
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.ENODEV,
        errno.ENXIO,
        None,
    )
)
ADVICE = {
    errno.EACCES: "change its permissions (chmod, chown, or a group that all of you share), or name another",
    errno.EPERM: "change its permissions (chmod, chown, or a group that all of you share), or name another",
    errno.EMFILE: "raise the limit of open files (`ulimit -n 65536`)",
    errno.ENFILE: "close some programs; the machine has too many open files",
    errno.ENOMEM: "free memory",
    errno.ENOSPC: "free space there, or name a directory on another disk",
    errno.EDQUOT: "free space within your quota, or name a directory on another disk",
    errno.EROFS: "name a writable directory",
    errno.ENOENT: "check the name",
    errno.EIO: "read the log of the system (the disk or the network file system may be failing)",
    errno.ESTALE: "wait until the file system is back",
}
SHOWN_AT_EACH_END = 2000  # characters of an error message
Result = TypeVar("Result")


class Explained(ValueError):
    """One paragraph that says what is wrong, where, and how to fix it.

    The paragraph names values of files that anybody may have written. If it is longer than a screen, its middle is cut: it
    starts with what is wrong and ends with what to do.
    """

    def __str__(self) -> str:
        text = super().__str__()
        left_out = len(text) - 2 * SHOWN_AT_EACH_END
        if left_out <= 0:
            return text
        return f"{text[:SHOWN_AT_EACH_END]} [... {left_out} characters ...] {text[-SHOWN_AT_EACH_END:]}"


class DataError(Explained):
    """A problem of text, tokenizer or shards that the user can fix."""


class UnreadableError(DataError):
    """A file that exists and could not be read in several attempts. It may or may not be corrupt."""


def read_again(path: Path, read: Callable[[], Result]) -> Result:
    """Call `read()`, and again after short pauses while the error says nothing about the content of `path`.

    Raises:
        UnreadableError: the last attempt failed too; names `path` and errno.
        OSError: nothing is at `path`, or a directory or a link in a circle.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return read()
        except OSError as error:
            if error.errno in ABOUT_THE_PATH:
                raise
            if pause_s is None:
                raise UnreadableError(unreadable(path, error)) from error
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def unreadable(path: Path, error: OSError) -> str:
    """One paragraph about a file that could not be read."""
    name = errno.errorcode.get(error.errno or 0, "no errno")
    hint = ADVICE.get(error.errno or 0, "check the disk or the network file system that it is on")
    return (
        f"{path} cannot be read now ({name}: {os.strerror(error.errno or 0)}; {len(PAUSES_S) + 1} attempts). That does not "
        f"make it corrupt: nothing was skipped and nothing was deleted. To fix it, {hint}, then start the same command again"
    )
