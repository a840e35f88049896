"""A file that cannot be read now is not a corrupt one: it is tried again, then the program stops and names it.

In: something that reads a file. Out: what it returns, or an `UnreadableError` with file and errno. Network file systems
answer EIO, ESTALE or EACCES for a moment, and EMFILE says nothing about the file at all: a reader that took these for damage
would fall back to older data and later delete the newest.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

PAUSES_S = (0.1, 0.4, 1.0)  # between four attempts
# Answers that are the truth about what is in the file's place; every other errno is about the moment or the access.
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
HINTS = {
    errno.EACCES: "let this user read it (chmod, chown, or a group that all of you share)",
    errno.EPERM: "let this user read it (chmod, chown, or a group that all of you share)",
    errno.EMFILE: "raise the limit of open files (`ulimit -n 65536`)",
    errno.ENFILE: "the whole machine has too many open files; close some programs",
    errno.ENOMEM: "free memory",
}
SHOWN_AT_EACH_END = 2000  # characters of an error message
Result = TypeVar("Result")


class Explained(ValueError):
    """What is wrong, where, and how to mend it, in one paragraph. It names values of files that anybody may have written, so
    one that is longer than a screen is cut in its middle: what is wrong stands first and what to do last."""

    def __str__(self) -> str:
        text = super().__str__()
        left_out = len(text) - 2 * SHOWN_AT_EACH_END
        if left_out <= 0:
            return text
        return f"{text[:SHOWN_AT_EACH_END]} [... {left_out} characters ...] {text[-SHOWN_AT_EACH_END:]}"


class DataError(Explained):
    """Something about text, tokenizer or shards that the user can mend: what is wrong, where, how to mend it."""


class UnreadableError(DataError):
    """A file that exists and could not be read, after several attempts: nobody knows whether it is corrupt."""


def read_again(path: Path, read: Callable[[], Result]) -> Result:
    """`read()`, tried again after short pauses while the system answers with an error that says nothing about the content.

    Raises:
        UnreadableError: the last attempt failed as well; names `path` and errno.
        OSError: missing, or a directory or link in the file's place.
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
    hint = HINTS.get(error.errno or 0, "check the disk or the network file system that it is on")
    return (
        f"{path} cannot be read now ({name}: {os.strerror(error.errno or 0)}; {len(PAUSES_S) + 1} attempts). That does not "
        f"make it corrupt: nothing was passed over and nothing deleted. To fix it, {hint}, then start the same command again"
    )
