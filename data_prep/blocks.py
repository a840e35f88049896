"""A stream of text cut into blocks of complete documents, the unit of work of a tokenising process.

In: pieces of text. Out: `Block`s. The cuts depend on the bytes of the text only, not on the sizes of the pieces. So the shards
are the same for any number of workers and after any interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import xxhash

from data_prep.lines import BLANK_LINE

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 21  # one line of 2 MiB costs SentencePiece 50 MB of memory


@dataclass(frozen=True)
class Place:
    """Where a part of a source begins. A run that resumes reads from there and not from the start of the source."""

    part: int = 0
    text_start: int = 0  # bytes of the source's text before the part
    text_xxh3_128: str = ""  # digest of the last block before the part
    first_line: int = 0  # lines of the source's text before the part
    counts: Mapping[str, int] = field(default_factory=dict)  # of the source, before the part
    stamp: Mapping[str, int] = field(default_factory=dict)  # of the file


@dataclass
class Block:
    """Complete documents, with their position in the text stream of their source."""

    text: bytes
    end: int  # where the block ends, in bytes from the start of the stream
    # XXH3-128 of the stream up to `end`; in a part after the first, of the digest before the part and the part's text
    digest: str
    was_split: bool = False  # the block ends inside a document that is too long for one block
    first_line: int = 0  # number of the block's first line in the stream, from 0
    place: Place | None = None  # of the part that the block is of; None if the source must be read from its start
    continues: bool = False  # the block begins inside a document that is too long for one block


def cut_blocks(
    chunks: Iterator[bytes],
    block_bytes: int = BLOCK_BYTES,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    place: Place | None = None,
) -> Iterator[Block]:
    """Blocks of about `block_bytes`, cut at blank lines.

    A document over `max_document_bytes` is cut at the end of a line, a line over `max_document_bytes` at a space. `chunks` begin
    at `place` in the text of their source.
    """
    start = place or Place()
    buffer, hasher, end, line = (
        bytearray(),
        xxhash.xxh3_128(start.text_xxh3_128.encode()),
        start.text_start,
        start.first_line,
    )
    target, exhausted, continues = block_bytes, False, False
    while True:
        while len(buffer) <= target and not exhausted:
            chunk = next(chunks, b"")
            exhausted = not chunk
            buffer += chunk
        if not buffer:
            return
        was_split = False
        if len(buffer) <= target:
            cut = len(buffer)
        else:
            cut = _after_last_blank_line(buffer, target)
            if not cut and target < max_document_bytes:
                target = max_document_bytes
                continue
            if not cut:
                cut, was_split = _inside_document(buffer, target), True
        text = bytes(memoryview(buffer)[:cut])
        del buffer[:cut]
        hasher.update(text)
        end += cut
        yield Block(text, end, hasher.hexdigest(), was_split, line, place, continues)
        continues = was_split
        line += text.count(b"\n")
        target = block_bytes


def _after_last_blank_line(buffer: bytearray, limit: int) -> int:
    """The index after the last blank line before `limit`; 0 if there is none."""
    unix, windows = buffer.rfind(b"\n\n", 0, limit), buffer.rfind(b"\n\r\n", 0, limit)
    if unix < 0 and windows < 0:
        return max((match.end() for match in BLANK_LINE.finditer(bytes(memoryview(buffer)[:limit]))), default=0)
    return max(unix + 2 if unix >= 0 else 0, windows + 3 if windows >= 0 else 0)


def _inside_document(buffer: bytearray, limit: int) -> int:
    """The index after a line end or a space in the second half of `buffer[:limit]`; else one between two characters."""
    for separator in (b"\n", b" "):
        found = buffer.rfind(separator, limit // 2, limit)
        if found >= 0:
            return found + 1
    cut = limit
    while cut > limit - 4 and buffer[cut] & 0xC0 == 0x80:  # not inside a UTF-8 sequence
        cut -= 1
    return cut
