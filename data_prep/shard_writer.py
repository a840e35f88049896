"""Writing one shard.

In: token ids of documents. Out: `NNNNN.tok`, fsynced and renamed, and its record for the manifest. Until `finish` the file has
the suffix `.tmp`, so a file without it is always complete.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.durable_files import sync
from data_prep.file_hashes import xxh3_128_of_file
from data_prep.shard_layout import (
    HEADER_BYTES,
    OFFSET_DTYPE,
    TOKEN_DTYPE,
    BlockHasher,
    Identity,
    header,
    sections,
)


class ShardWriter:
    """Appends blocks of complete documents to `directory/NNNNN.tok.tmp`."""

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
        """Append complete documents.

        Args:
            tokens: little-endian uint32 ids.
            document_lengths: number of tokens of each document.
        """
        self._write(tokens)
        self.num_tokens += len(tokens) // TOKEN_DTYPE.itemsize
        self._document_lengths.append(document_lengths)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        self._hasher.update(view)
        while len(view):
            view = view[self._file.write(view) :]

    def finish(self) -> dict[str, Any]:
        """Fsync and hash the shard and rename it to its final name. Returns its record for the manifest."""
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
        digest = xxh3_128_of_file(self.temporary)
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
        """Delete the unfinished shard."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)
