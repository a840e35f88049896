"""The bytes of one shard file, format version 1: header, token stream, document offsets, block hashes.

In: what the manifest says about a shard. Out: its header and the offsets of its sections. These are pure functions, so a header
is checked by computing it again. docs/shard_format.md specifies the format.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

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
    """The tokenizer and options that all shards of one output directory have in common."""

    tokenizer_sha256: str
    vocab_size: int
    options_xxh3_128: str


@dataclass(frozen=True)
class Sections:
    """Offsets of the sections of a shard file, in bytes from its start. The tokens start at `HEADER_BYTES`."""

    documents: int
    block_hashes: int
    end: int  # the size of the file


def sections(num_tokens: int, num_documents: int) -> Sections:
    """The offsets that follow from the numbers of tokens and documents."""
    documents = HEADER_BYTES + -(-num_tokens * TOKEN_DTYPE.itemsize // 8) * 8
    block_hashes = documents + (num_documents + 1) * OFFSET_DTYPE.itemsize
    num_blocks = -(-(block_hashes - HEADER_BYTES) // HASH_BLOCK_BYTES)
    return Sections(documents, block_hashes, block_hashes + 8 * num_blocks)


def header(identity: Identity, language: str, number: int, num_tokens: int, num_documents: int) -> bytes:
    """The 4096 bytes of the header. The last eight are the XXH3-64 of the bytes before them."""
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


class BlockHasher:
    """XXH3-64 of every 1 MiB of a stream, whatever the sizes of its pieces."""

    def __init__(self) -> None:
        self._full: list[int] = []
        self._current = xxhash.xxh3_64()
        self._filled = 0

    def update(self, data: bytes | memoryview) -> None:
        """Add the next piece of the stream."""
        view = memoryview(data)
        while len(view):
            size = min(len(view), HASH_BLOCK_BYTES - self._filled)
            self._current.update(view[:size])
            self._filled += size
            view = view[size:]
            if self._filled == HASH_BLOCK_BYTES:
                self._full.append(self._current.intdigest())
                self._current = xxhash.xxh3_64()
                self._filled = 0

    def digests(self) -> np.ndarray:
        """The hashes so far: uint64 [blocks]. The last block may be shorter."""
        last = [self._current.intdigest()] if self._filled else []
        return np.array(self._full + last, dtype=OFFSET_DTYPE)
