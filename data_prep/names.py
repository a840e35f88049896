"""File names as they may be printed and stored: on one line, and in UTF-8 whatever bytes the file system holds."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def kept_name(name: str) -> str:
    """`name` with bytes that are not UTF-8 written as \\xNN: what journal and manifest hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def shown(path: Path | str) -> str:
    """A path for a message: control characters (a line end in a file name) written out as well."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in kept_name(str(path))
    )


def quoted(path: Path | str) -> str:
    """A path for a shell command that is printed to be pasted."""
    if shown(path) == str(path):
        return shlex.quote(str(path))
    escaped = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(path))
    return "$'" + "".join(escaped) + "'"
