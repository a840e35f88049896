"""`verify`: checking every byte of a shard directory against its manifest.

In: a directory. Out: problems, each with file and offset. For each shard the header is computed again and compared, all bytes are
hashed, every token id must be in the vocabulary, and document offsets must rise from 0 to the number of tokens. The block hashes
in the shard locate corruption to 1 MiB.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from data_prep.file_hashes import xxh3_128_of_file
from data_prep.journal import JOURNAL_NAME
from data_prep.manifest import RUN_NAME, make_manifest, read_run
from data_prep.progress import BYTES, Progress
from data_prep.shard_layout import HASH_BLOCK_BYTES, HEADER_BYTES, OFFSET_DTYPE, TOKEN_DTYPE, sections
from data_prep.shards import DataError, Shard, ShardSet, UnreadableError, read_again

TOKENS_PER_CHECK = 1 << 20


class Findings(list[str]):
    """One sentence for each corrupt file. `unreadable` holds one for each file that could not be read."""

    def __init__(self) -> None:
        super().__init__()
        self.unreadable: list[str] = []


def verify(path: Path, show_progress: bool = False) -> Findings:
    """Check all shards at `path`, also after a file that is corrupt or cannot be read.

    Raises:
        DataError: the manifest is missing or not valid.
    """
    shard_set = ShardSet(path, check_sizes=False)
    shards = shard_set.all_shards()
    total = sum(shard.num_bytes for shard in shards)
    with (
        Progress("verify", total, BYTES, is_shown=show_progress) as shown,
        ThreadPoolExecutor(os.cpu_count()) as threads,  # hashing releases the interpreter lock
    ):
        findings = Findings()
        for shard, (problem, was_read) in zip(shards, threads.map(_problem_of, shards), strict=True):
            shown.update(shard.num_bytes)
            if problem:
                (findings if was_read else findings.unreadable).append(problem)
    if not findings and not findings.unreadable:
        try:
            findings.extend(check_records(path, shard_set))
        except UnreadableError as error:
            findings.unreadable.append(str(error))
    return findings


def _problem_of(shard: Shard) -> tuple[str | None, bool]:
    """The first problem of a shard, and whether the shard could be read."""
    try:
        return read_again(shard.path, lambda: check_shard(shard)), True
    except UnreadableError as error:
        return str(error), False
    except OSError as error:
        return f"{shard.path}: {error.strerror or error}", True


def check_records(path: Path, shard_set: ShardSet) -> list[str]:
    """Problems of `prepare.json` and the journals, if they are there: they must give this manifest."""
    if not (path / RUN_NAME).is_file():
        return []  # the shards were copied without them, which is enough for training
    try:
        from_journals = make_manifest(path, {**read_run(path), "languages": list(shard_set.manifest["languages"])})
    except UnreadableError:
        raise
    except DataError as error:
        return [str(error)]
    if from_journals != shard_set.manifest:
        different = [
            name for name, entry in from_journals["languages"].items() if entry != shard_set.manifest["languages"][name]
        ]
        where = ", ".join(f"{path / name / JOURNAL_NAME}" for name in different) or f"{path / RUN_NAME}"
        return [f"{where}: does not describe the shards that the manifest describes"]
    return []


def check_shard(shard: Shard) -> str | None:
    """The first problem of one shard file; None if it is valid."""
    if problem := shard.size_problem():
        return problem
    with open(shard.path, "rb", buffering=0) as file:
        found, expected = file.read(HEADER_BYTES), shard.expected_header()
    if found != expected:
        offset = next(i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
        return f"{shard.path}: byte {offset} of the header is not what the manifest describes (corrupt or swapped)"
    if xxh3_128_of_file(shard.path) != shard.xxh3_128:
        return first_bad_block(shard)
    return check_content(shard)


def first_bad_block(shard: Shard) -> str:
    """The first 1 MiB block that does not match its stored hash, in a shard whose hash is wrong."""
    where = sections(shard.num_tokens, shard.num_documents)
    with open(shard.path, "rb", buffering=0) as file:
        file.seek(where.block_hashes)
        stored = np.frombuffer(file.read(where.end - where.block_hashes), OFFSET_DTYPE)
        file.seek(HEADER_BYTES)
        for number, expected in enumerate(stored):
            start = HEADER_BYTES + number * HASH_BLOCK_BYTES
            end = min(start + HASH_BLOCK_BYTES, where.block_hashes)
            if xxhash.xxh3_64_intdigest(file.read(end - start)) != int(expected):
                return f"{shard.path}: corrupt in the block of bytes {start} to {end - 1} (or in its hash)"
    return f"{shard.path}: valid in itself, but not the file that the manifest describes (swapped?)"


def check_content(shard: Shard) -> str | None:
    """The first problem of token ids and document offsets in a shard whose hashes are right: it was written wrong."""
    tokens = np.memmap(shard.path, TOKEN_DTYPE, "r", HEADER_BYTES, (shard.num_tokens,))
    for start in range(0, shard.num_tokens, TOKENS_PER_CHECK):
        block = tokens[start : start + TOKENS_PER_CHECK]
        beyond = np.flatnonzero(block >= shard.identity.vocab_size)
        if len(beyond):
            offset = HEADER_BYTES + (start + int(beyond[0])) * TOKEN_DTYPE.itemsize
            return f"{shard.path}: token id {block[beyond[0]]} at byte {offset} is beyond the vocabulary"
    where = sections(shard.num_tokens, shard.num_documents)
    offsets = np.memmap(shard.path, OFFSET_DTYPE, "r", where.documents, (shard.num_documents + 1,))
    if offsets[0] != 0 or offsets[-1] != shard.num_tokens or np.any(offsets[1:] <= offsets[:-1]):
        return f"{shard.path}: document offsets do not rise from 0 to the number of tokens"
    return None
