"""Replacing files atomically, and names that no other process uses.

In: a path and its new content. Out: a file with the old content or the new content, also after a kill or a power failure.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path


def unique_name(path: Path, suffix: str) -> Path:
    """A name in the directory of `path` that no other process uses: it holds host, process id and random digits."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}{suffix}")


def leftovers(path: Path, suffix: str) -> list[Path]:
    """Unique names that earlier owners of `path` left. Only the present owner may call this: the earlier ones are dead."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[A-Za-z0-9-]+-[0-9]+-[0-9a-f]{{8}}{re.escape(suffix)}")
    return [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` under a unique name, fsync, and rename to `path`. If several processes do so, the last one wins."""
    temporary = unique_name(path, ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
