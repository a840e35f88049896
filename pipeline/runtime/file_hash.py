"""Hashes of files. In: a path. Out: a hexadecimal digest of its content, which is read in blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import xxhash

BLOCK_BYTES = 4 << 20


def sha256_of(path: Path) -> str:
    """sha256, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xxh3_128_of(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """xxh3-128, as `xxhsum -H2` prints it. `progress` is called after each block."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            progress()
    return digest.hexdigest()
