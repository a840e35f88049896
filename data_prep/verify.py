"""`verify`: every byte of a shard directory against its manifest, naming file and offset of what is wrong.

Per shard: the header is made again and compared, all bytes are hashed, every token id must be in the vocabulary, document
offsets must rise from 0 to the number of tokens. The block hashes stored in the shard narrow damage down to 1 MiB.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from data_prep.layout import HASH_BLOCK_BYTES, HEADER_BYTES, OFFSET_DTYPE, TOKEN_DTYPE, file_digest, sections
from data_prep.shards import Shard, ShardSet


def verify(path: Path, on_shard: Callable[[int], None] = lambda size: None) -> list[str]:
    """What is wrong with the shards at `path`, one sentence each; opening them may raise DataError by itself."""
    shard_set = ShardSet(path)

    def check(shard: Shard) -> str | None:
        problem = check_shard(shard)
        on_shard(shard.num_bytes)
        return problem

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing releases the interpreter lock
        return [problem for problem in threads.map(check, shard_set.all_shards()) if problem]


def check_shard(shard: Shard) -> str | None:
    """The first thing wrong with one shard file."""
    with open(shard.path, "rb", buffering=0) as file:
        found = file.read(HEADER_BYTES)
        expected = shard.expected_header()
        if found != expected:
            offset = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
            return f"{shard.path}: byte {offset} of the header differs from what the manifest describes"
    if file_digest(shard.path) != shard.xxh3_128:
        return first_bad_block(shard)
    return check_content(shard)


def first_bad_block(shard: Shard) -> str:
    """Which 1 MiB block of a shard whose hash is wrong is the first that does not match its stored hash."""
    where = sections(shard.num_tokens, shard.num_documents)
    with open(shard.path, "rb", buffering=0) as file:
        file.seek(where.block_hashes)
        stored = np.frombuffer(file.read(where.end - where.block_hashes), OFFSET_DTYPE)
        file.seek(HEADER_BYTES)
        for number, expected in enumerate(stored):
            start = HEADER_BYTES + number * HASH_BLOCK_BYTES
            end = min(start + HASH_BLOCK_BYTES, where.block_hashes)
            if xxhash.xxh3_64_intdigest(file.read(end - start)) != int(expected):
                return f"{shard.path}: damaged in the block of bytes {start} to {end - 1}"
    return f"{shard.path}: its blocks are whole, but it is not the file that the manifest describes"


def check_content(shard: Shard) -> str | None:
    """Token ids and document offsets of a shard whose hashes are right (so: was it written right?)."""
    for start in range(0, shard.num_tokens, HASH_BLOCK_BYTES):
        block = shard.tokens[start : start + HASH_BLOCK_BYTES]
        beyond = np.flatnonzero(block >= shard.identity.vocab_size)
        if len(beyond):
            offset = HEADER_BYTES + (start + int(beyond[0])) * TOKEN_DTYPE.itemsize
            return f"{shard.path}: token id {block[beyond[0]]} at byte {offset} is beyond the vocabulary"
    offsets = shard.document_offsets
    if offsets[0] != 0 or offsets[-1] != shard.num_tokens or np.any(offsets[1:] <= offsets[:-1]):
        return f"{shard.path}: document offsets do not rise from 0 to the number of tokens"
    return None
