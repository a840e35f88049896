"""One language from text to shards: read blocks, have them encoded, write them in order, journal every shard.

A lane keeps a window of blocks in flight, so that all workers have work while the results are written in the order of
the text. It continues after the journal's last entry, and notices when the text before that point is not what it was.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.encode import Encoded, WorkerPool
from data_prep.journal import Entry, Journal
from data_prep.layout import Identity, sync_directory
from data_prep.shards import DataError
from data_prep.sources import Block, Source, cut_blocks
from data_prep.writer import ShardWriter


class Stopped(Exception):
    """Another lane met an error that stops the whole run."""


@dataclass
class LaneSettings:
    """What all lanes of a run share."""

    output: Path
    identity: Identity
    shard_tokens: int
    window: int
    on_progress: Callable[[str, int, int], None]  # language, bytes of source read, tokens written
    stop: threading.Event


@dataclass
class _InFlight:
    block: Block
    source: int
    finished: dict[str, Any] | None  # the source's record when this is its last block
    encoded: Future[Encoded]
    position: int


@dataclass
class Lane:
    language: str
    sources: list[Source]
    pool: WorkerPool
    settings: LaneSettings
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory = self.settings.output / self.language
        self.directory.mkdir(exist_ok=True)
        self.journal = Journal.read(self.directory)
        self._writer: ShardWriter | None = None
        self._counts: Counter[str] = Counter(self.journal.last.counts if self.journal.last else {})
        self._finished = list(self.journal.last.finished) if self.journal.last else []

    def run(self) -> None:
        """Bring the language to its end, or raise with every finished shard kept."""
        self.check_sources()
        if self.journal.complete:
            return
        self.journal.rewind()
        sync_directory(self.settings.output)
        pending: deque[_InFlight] = deque()
        try:
            for item in self._blocks():
                pending.append(item)
                if len(pending) > self.settings.window:
                    self._write(pending.popleft())
            while pending:
                self._write(pending.popleft())
            self._end()
        finally:
            for item in pending:
                item.encoded.cancel()
            if self._writer is not None:
                self._writer.discard()

    def check_sources(self) -> None:
        """Sources that were read to their end must still be the files they were."""
        if self.journal.complete and len(self.sources) > len(self._finished):
            new = [source.name for source in self.sources[len(self._finished) :]]
            raise DataError(
                f"{self.language} was finished without {', '.join(new)}. To make it again from all its files: --redo "
                f"{self.language}."
            )
        for position, record in enumerate(self._finished):
            source = self.sources[position] if position < len(self.sources) else None
            if source is None or source.name != record["name"]:
                found = source.name if source else "nothing"
                raise DataError(
                    f"{self.language} was begun with {record['name']} as file {position + 1}; the input now has {found} "
                    f"there. Restore it, or make the language again: --redo {self.language}."
                )
            if source.changed_since(record):
                raise DataError(
                    f"{source.path} is not the file that {self.directory} was made from ({record['bytes']} bytes then, "
                    f"{source.stamp()['bytes']} now). Restore it, or make the language again: --redo {self.language}."
                )

    def _blocks(self) -> Iterator[_InFlight]:
        last = self.journal.last
        first_source = last.source if last else 0
        for index in range(first_source, len(self.sources)):
            source = self.sources[index]
            resume = last if last is not None and index == last.source else None
            if resume and len(self._finished) > index:
                continue
            stamp = source.stamp()
            held: Block | None = None
            end, digest = 0, ""
            for block in self._after(source, resume):
                if self.settings.stop.is_set():
                    raise Stopped
                end, digest = block.end, block.digest
                if block.was_split:
                    self._counts["documents_split"] += 1
                if not block.text:
                    continue
                if held is not None:
                    yield self._submit(held, index, None)
                held = block
            record = {
                "name": source.name,
                **stamp,
                "xxh3_128": source.digest,
                "text_bytes": end,
                "text_xxh3_128": digest,
            }
            yield self._submit(held or Block(b"", end, digest, False), index, record)

    def _after(self, source: Source, resume: Entry | None) -> Iterator[Block]:
        """Blocks behind the resume point; the text before it must hash to what it did."""
        skipping = resume is not None and resume.text_end > 0
        for block in cut_blocks(source.chunks()):
            if not skipping:
                yield block
                continue
            assert resume is not None
            if block.end == resume.text_end and block.digest == resume.text_xxh3_128:
                skipping = False
                yield Block(b"", block.end, block.digest, False)
            elif block.end >= resume.text_end:
                break
        if skipping:
            raise DataError(
                f"The text of {source.path} is not the one that {self.directory} was begun with (its first "
                f"{resume.text_end if resume else 0} bytes differ). Restore it, or make the language again: --redo {self.language}."
            )

    def _submit(self, block: Block, source: int, finished: dict[str, Any] | None) -> _InFlight:
        position = self.sources[source].position
        return _InFlight(block, source, finished, self.pool.submit(block.text), position)

    def _write(self, item: _InFlight) -> None:
        encoded = item.encoded.result()
        self._counts.update(encoded.counts)
        self._counts["text_bytes"] += len(item.block.text)
        if item.finished:
            self._finished.append(item.finished)
        self._position = item
        if encoded.tokens:
            if self._writer is None:
                number = len(self.journal.shards)
                self._writer = ShardWriter(self.directory, self.language, number, self.settings.identity)
            self._writer.append(encoded.tokens, encoded.document_lengths)
            if self._writer.num_tokens >= self.settings.shard_tokens:
                self._commit(item, complete=False)
        self.settings.on_progress(self.language, item.position, len(encoded.tokens) // 4)

    def _commit(self, item: _InFlight, complete: bool) -> None:
        shard = self._writer.seal() if self._writer else None
        self._writer = None
        block = item.block
        self.journal.append(
            Entry(shard, item.source, block.end, block.digest, list(self._finished), dict(self._counts), complete)
        )

    def _end(self) -> None:
        if self._writer is None and not self.journal.shards:
            names = ", ".join(str(source.path) for source in self.sources)
            raise DataError(f"{self.language}: no text in {names}. Remove it from the input or replace it.")
        self._commit(self._position, complete=True)
