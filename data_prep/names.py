"""Texts from outside for messages: file names on one line, in UTF-8 or quoted for a shell, and errors on one line."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def kept_name(name: str) -> str:
    """`name` with bytes that are not UTF-8 written as \\xNN, as journal and manifest store it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def shown(path: Path | str) -> str:
    """A path for a message. Control characters, such as a line end in a file name, are escaped too."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in kept_name(str(path))
    )


def quoted(path: Path | str) -> str:
    """A path for a shell command that the user pastes."""
    if shown(path) == str(path):
        return shlex.quote(str(path))
    escaped = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(path))
    return "$'" + "".join(escaped) + "'"


def one_line(error: BaseException) -> str:
    """The text of an exception of a library, without line ends."""
    return " ".join(str(error).split())


def how_to_redo(language: str) -> str:
    """How to prepare one language again, for the end of a message."""
    return f"prepare the language again: the same command with --redo {language}"


def map_pattern(name: str) -> str:
    """A pattern for a language map that matches `name`: without spaces and characters that mean something in a pattern."""
    return "".join(char if char.isprintable() and char not in " #[]*" else "?" for char in name)
