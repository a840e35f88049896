"""Hashes of the content of files.

In: the path of a file. Out: hexadecimal digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import xxhash

READ_BYTES = 1 << 20


def xxh3_128_of_file(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """XXH3-128 of a file, as `xxhsum -H2` prints it. `progress` is called after each block."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            progress()
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
