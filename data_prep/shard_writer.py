"""Writes one shard: token blocks in, a fsynced and renamed `NNNNN.tok` and its manifest record out.

Until `seal` the file carries the suffix `.tmp`, so a shard under its own name is always whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.durable_files import sync
from data_prep.shard_layout import (
    HEADER_BYTES,
    OFFSET_DTYPE,
    TOKEN_DTYPE,
    BlockHasher,
    Identity,
    file_digest,
    header,
    sections,
)


class ShardWriter:
    """Appends blocks of whole documents to `directory/NNNNN.tok.tmp`."""

    def __init__(self, directory: Path, language: str, number: int, identity: Identity) -> None:
        self.language, self.number, self.identity = language, number, identity
        self.path = directory / f"{number:05d}.tok"
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self.num_tokens = 0
        self._document_lengths: list[np.ndarray] = []
        self._hasher = BlockHasher()
        self._file = open(self.temporary, "wb", buffering=0)
        self._file.write(bytes(HEADER_BYTES))

    def append(self, tokens: bytes, document_lengths: np.ndarray) -> None:
        """`tokens`: little-endian uint32 of whole documents; `document_lengths`: tokens of each."""
        self._write(tokens)
        self.num_tokens += len(tokens) // TOKEN_DTYPE.itemsize
        self._document_lengths.append(document_lengths)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        self._hasher.update(view)
        while len(view):
            view = view[self._file.write(view) :]

    def finish(self) -> dict[str, Any]:
        """Close the shard under its own name; what the manifest has to say about it."""
        lengths = np.concatenate([np.zeros(1, OFFSET_DTYPE), *self._document_lengths]).astype(OFFSET_DTYPE)
        num_documents = len(lengths) - 1
        where = sections(self.num_tokens, num_documents)
        padding = where.documents - HEADER_BYTES - self.num_tokens * TOKEN_DTYPE.itemsize
        self._write(bytes(padding))
        self._write(np.cumsum(lengths, dtype=OFFSET_DTYPE).tobytes())
        self._file.write(self._hasher.digests().tobytes())
        self._file.seek(0)
        self._file.write(header(self.identity, self.language, self.number, self.num_tokens, num_documents))
        os.fsync(self._file.fileno())
        self._file.close()
        digest = file_digest(self.temporary)
        self.temporary.replace(self.path)
        sync(self.path.parent)
        return {
            "file": f"{self.language}/{self.path.name}",
            "bytes": where.end,
            "tokens": self.num_tokens,
            "documents": num_documents,
            "xxh3_128": digest,
        }

    def discard(self) -> None:
        """Throw the shard in flight away."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)
