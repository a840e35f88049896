"""The bytes of one shard file, format version 1: header, token stream, document offsets, block hashes.

`write_header` and friends are pure functions of what the manifest says about a shard, so a header is checked by making
it again and comparing. `ShardWriter` (preparation) and `ShardSet` (training) both build on this file; the layout is
described for other languages in docs/shard_format.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

FORMAT_NAME = "minilmv2-shards"
FORMAT_VERSION = 1
MAGIC = b"MLV2TOK\n"
HEADER_BYTES = 4096
HASH_BLOCK_BYTES = 1 << 20
TOKEN_DTYPE = np.dtype("<u4")
OFFSET_DTYPE = np.dtype("<u8")

# magic, version, header bytes, tokens, documents, offset of: tokens, document offsets, block hashes; file bytes,
# vocabulary, shard number, sha256 of the tokenizer, xxh3-128 of the options, language
_HEADER = struct.Struct("<8sIIQQQQQQII32s16s64s")
_HEADER_HASH = struct.Struct("<Q")


@dataclass(frozen=True)
class Identity:
    """What every shard of one output directory must have been made with."""

    tokenizer_sha256: str
    vocab_size: int
    options_xxh3_128: str


@dataclass(frozen=True)
class Sections:
    """Where the parts of a shard file lie, in bytes from its start."""

    documents: int
    block_hashes: int
    end: int


def sections(num_tokens: int, num_documents: int) -> Sections:
    documents = HEADER_BYTES + -(-num_tokens * TOKEN_DTYPE.itemsize // 8) * 8
    block_hashes = documents + (num_documents + 1) * OFFSET_DTYPE.itemsize
    num_blocks = -(-(block_hashes - HEADER_BYTES) // HASH_BLOCK_BYTES)
    return Sections(documents, block_hashes, block_hashes + 8 * num_blocks)


def header(identity: Identity, language: str, number: int, num_tokens: int, num_documents: int) -> bytes:
    """The 4096 header bytes; the last eight are the xxh3-64 of all before."""
    where = sections(num_tokens, num_documents)
    fields = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        HEADER_BYTES,
        num_tokens,
        num_documents,
        HEADER_BYTES,
        where.documents,
        where.block_hashes,
        where.end,
        identity.vocab_size,
        number,
        bytes.fromhex(identity.tokenizer_sha256),
        bytes.fromhex(identity.options_xxh3_128),
        language.encode(),
    )
    body = fields.ljust(HEADER_BYTES - _HEADER_HASH.size, b"\0")
    return body + _HEADER_HASH.pack(xxhash.xxh3_64_intdigest(body))


def file_digest(path: Path) -> str:
    """xxh3-128 of a whole file, as `xxhsum -H2` prints it."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASH_BLOCK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class BlockHasher:
    """xxh3-64 of every 1 MiB of what is fed to it, however it is cut."""

    def __init__(self) -> None:
        self._full: list[int] = []
        self._current = xxhash.xxh3_64()
        self._filled = 0

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            taken = min(len(view), HASH_BLOCK_BYTES - self._filled)
            self._current.update(view[:taken])
            self._filled += taken
            view = view[taken:]
            if self._filled == HASH_BLOCK_BYTES:
                self._full.append(self._current.intdigest())
                self._current = xxhash.xxh3_64()
                self._filled = 0

    def digests(self) -> np.ndarray:
        last = [self._current.intdigest()] if self._filled else []
        return np.array(self._full + last, dtype=OFFSET_DTYPE)
