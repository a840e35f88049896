"""One language from text to shards: read blocks, submit them to the workers, write the results in order, journal every shard.

In: the sources of a language. Out: its shards and its journal. A job keeps a window of blocks in flight, so that all workers
have work. It continues after the last entry of the journal, and raises if the text before that point has changed.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.blocks import Block, Place
from data_prep.broken import BrokenLines, OtherEncoding
from data_prep.clean import CleanOptions
from data_prep.dedup import Deduplicator
from data_prep.durable_files import sync
from data_prep.encode import Encoded
from data_prep.journal import Entry, Journal
from data_prep.manifest import read_run
from data_prep.names import how_to_redo
from data_prep.progress import say
from data_prep.quality import warnings_of
from data_prep.shard_layout import TOKEN_DTYPE, Identity
from data_prep.shard_writer import ShardWriter
from data_prep.shards import DataError
from data_prep.sources import CorruptSource, Source
from data_prep.workers import WorkerDied, WorkerPool


class Stopped(Exception):
    """Another job met an error that stops the complete run."""


@dataclass
class LanguageJobSettings:
    """Settings that all jobs of a run share."""

    output: Path
    identity: Identity
    clean: CleanOptions
    shard_tokens: int
    block_bytes: int
    window: int  # blocks in flight
    on_progress: Callable[[str, int, int], None]  # language, bytes of its sources read so far, new tokens
    compared: Mapping[str, Counter[str]]  # counts of the lines whose ids were compared, by language
    engine: str = ""  # what makes the ids, if it is not the library that the settings name
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass
class _InFlight:
    """A block that the workers are encoding, and the position of its source after it."""

    block: Block
    source: int
    finished: dict[str, Any] | None  # the record of the source, if this is its last block
    counts: Counter[str]
    encoded: Future[Encoded]
    position: int  # in the bytes of all sources, for progress


class LanguageJob:
    """The preparation of one language."""

    def __init__(self, language: str, sources: list[Source], pool: WorkerPool, settings: LanguageJobSettings) -> None:
        self.language, self.sources, self._pool, self.settings = language, sources, pool, settings
        self.directory = settings.output / language
        self._writer: ShardWriter | None = None

    def run(self) -> None:
        """Finish the language. If this raises, every finished shard is kept."""
        self.directory.mkdir(exist_ok=True)
        journal = Journal(self.directory)
        with journal.locked():
            self._journal = journal = Journal.read(self.directory)
            self._check_same_options()
            check_sources(self.language, self.sources, journal)
            if journal.complete:
                return
            journal.rewind()
            sync(self.settings.output)
            try:
                self._continue()
            except OtherEncoding as error:
                # The converted file is another text. Without shards of this one it needs no --redo.
                self._truncate_to_journal(error.source_index)
                raise

    def _check_same_options(self) -> None:
        """Raise if a run with other options has begun the output again before this run locked its first language."""
        if read_run(self.settings.output)["options_xxh3_128"] != self.settings.identity.options_xxh3_128:
            raise DataError(
                f"{self.settings.output} has meanwhile been begun again with other options. Nothing was written."
            )

    def _truncate_to_journal(self, source: int) -> None:
        """Remove every shard that holds text of the source with this index or of a later one."""
        self._journal.entries = [entry for entry in self._journal.entries if entry.source < source]
        self._journal.rewind()

    def _continue(self) -> None:
        last = self._journal.last
        self._counts: Counter[str] = Counter(last.counts if last else {})
        self._broken = BrokenLines(self.sources, self.settings.clean.broken_text)
        if last is not None and last.lines is not None:
            self._broken.resume(last.source, last.lines)
        self._counts |= self.settings.compared.get(self.language, Counter())
        self._num_finished = len(self._journal.finished_sources)
        self._newly_finished: list[dict[str, Any]] = []
        self._place = (last.source, last.text_end, last.text_xxh3_128) if last else (0, 0, "")
        self._part = last.place if last else None
        self._bytes_before = [0]
        for source in self.sources:
            self._bytes_before.append(self._bytes_before[-1] + source.stamp()["bytes"])
        pending: deque[_InFlight] = deque()
        try:
            self._fill(pending, last)
            self._end()
        finally:
            for item in pending:
                item.encoded.cancel()
            if self._writer is not None:
                self._writer.discard()

    def _fill(self, pending: deque[_InFlight], last: Entry | None) -> None:
        try:
            for item in self._submitted_blocks(last):
                pending.append(item)
                if len(pending) > self.settings.window:
                    self._write(pending.popleft())
        except CorruptSource:
            while pending:  # the shards that are kept must not depend on the speed of the workers
                self._write(pending.popleft())
            raise
        while pending:
            self._write(pending.popleft())

    def _submitted_blocks(self, last: Entry | None) -> Iterator[_InFlight]:
        """Submit every block that is still to be written. The last block of a source carries the record of the source."""
        deduplicator = Deduplicator(self.settings.clean)
        for index, source in enumerate(self.sources):
            stamp = source.stamp()
            done = index < self._num_finished
            if done and not deduplicator.is_active:
                continue
            resumed = last if last is not None and index == last.source and not done else None
            resume_at = resumed.text_end if resumed else 0
            known = resumed.place if resumed and not deduplicator.is_active else None
            place = Place(**known) if known else None
            held = Block(b"", 0, "")
            for block in source.blocks(self.settings.block_bytes, place):
                if self.settings.stop.is_set():
                    raise Stopped
                if done or block.end <= resume_at:
                    deduplicator.filter(block.text)
                    held = Block(b"", block.end, block.digest, place=block.place)
                    if last is not None and block.end == resume_at and block.digest != last.text_xxh3_128:
                        break
                    continue
                self._check_resumed(source, resume_at, held, last)
                if held.text:
                    yield self._submit(held, index, None, deduplicator)
                held = block
            if not done:
                self._check_resumed(source, resume_at, held, last)
                record = {"name": source.name, **stamp, "xxh3_128": source.digest}
                record |= {"text_bytes": held.end, "text_xxh3_128": held.digest}
                record |= {"counts": dict(source.counts)} if source.counts else {}
                yield self._submit(held, index, record, deduplicator)

    def _check_resumed(self, source: Source, resume_at: int, held: Block, last: Entry | None) -> None:
        """Raise if the text before the point of resumption has no block that ends there, or another hash."""
        if last is None or held.end > resume_at or not resume_at:
            return
        if (held.end, held.digest) != (resume_at, last.text_xxh3_128):
            raise DataError(
                f"The first {resume_at} bytes of text of {source.title} are not those that {self.directory} was begun with. "
                f"Restore the file, or {how_to_redo(self.language)}"
            )

    def _submit(self, block: Block, source: int, finished: Any, deduplicator: Deduplicator) -> _InFlight:
        text, counts, has_first = deduplicator.filter(block.text)
        counts["documents_split"] += block.was_split
        position = self._bytes_before[source] + self.sources[source].position
        is_cut = (block.was_split or block.continues) and has_first
        encoded = self._pool.submit(text, self.language, is_cut)
        return _InFlight(block, source, finished, counts, encoded, position)

    def _write(self, item: _InFlight) -> None:
        try:
            encoded = item.encoded.result()
        except WorkerDied:
            raise
        except DataError as error:
            path = self.sources[item.source].title
            raise DataError(f"{path}, in the text after line {item.block.first_line}: {error}") from error
        is_end = item.finished is not None
        self._broken.add(item.source, item.block.text, item.block.first_line, encoded.counts, is_end)
        self._counts.update(item.counts)
        self._counts.update(encoded.counts)
        self._counts["text_bytes"] += len(item.block.text)
        if item.finished:
            self._newly_finished.append(item.finished)
            self._counts.update(item.finished.get("counts", {}))
        self._place = (item.source, item.block.end, item.block.digest)
        self._part = asdict(item.block.place) if item.block.place else None
        if encoded.tokens:
            if self._writer is None:
                number = len(self._journal.shards)
                self._writer = ShardWriter(self.directory, self.language, number, self.settings.identity)
            self._writer.append(encoded.tokens, encoded.document_lengths)
            if self._writer.num_tokens >= self.settings.shard_tokens:
                self._commit(complete=False)
        self.settings.on_progress(self.language, item.position, len(encoded.tokens) // TOKEN_DTYPE.itemsize)

    def _commit(self, complete: bool) -> None:
        shard = self._writer.finish() if self._writer else None
        self._writer = None
        if shard and self.settings.engine:
            shard["engine"] = self.settings.engine
        counts = {name: count for name, count in sorted(self._counts.items()) if count}
        part, lines = (None, None) if complete else (self._part, self._broken.lines)
        self._journal.append(Entry(shard, *self._place, self._newly_finished, counts, complete, part, lines))
        self._newly_finished = []

    def _end(self) -> None:
        if self._writer is None and not self._journal.shards:
            names = ", ".join(source.title for source in self.sources)
            left_out = "; ".join(warnings_of(self._counts))
            raise DataError(
                f"there is no text in {names}. Remove it from the input or replace it."
                + (f" ({left_out})" if left_out else "")
            )
        broken = self._broken.warning(self._counts)
        self._commit(complete=True)
        for warning in [*([broken] if broken else []), *warnings_of(self._counts)]:
            say(f"warning: {self.language}: {warning}", sys.stderr)


def check_sources(language: str, sources: list[Source], journal: Journal) -> None:
    """Raise `DataError` if a source that was read to its end has changed or one that was begun is gone, or if a finished
    language has new files.
    """
    finished = journal.finished_sources
    fix = f"Restore it, or {how_to_redo(language)}"
    if journal.complete and len(sources) > len(finished):
        new = ", ".join(sorted({source.name for source in sources} - {record["name"] for record in finished}))
        raise DataError(f"it was finished without {new}. To include all files, {how_to_redo(language)}")
    begun = journal.last.source if journal.last is not None else -1
    if begun >= max(len(finished), len(sources)):
        raise DataError(
            f"{journal.directory} holds a part of file {begun + 1} of {language}; the input now has only {len(sources)}. {fix}"
        )
    for number, record in enumerate(finished):
        source = sources[number] if number < len(sources) else None
        if source is None or source.name != record["name"]:
            found = source.name if source else "no file"
            raise DataError(f"file {number + 1} was {record['name']}; the input now has {found} there. {fix}")
        if source.changed_since(record):
            raise DataError(
                f"{source.title} is not the file that {journal.directory} was made from ({record['bytes']} bytes with "
                f"hash {record['xxh3_128'][:8]} then, {source.stamp()['bytes']} bytes now). {fix}"
            )
