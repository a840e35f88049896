"""What a language's preparation has safely done: `LANG/journal.jsonl`, one fsynced line per finished shard.

A line stands for everything up to the end of its shard, so a run that was killed continues after the last whole line. The
manifest is made from these journals alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_prep.ownership import LOCK_NAME, Taken, own
from data_prep.shards import DataError, read_again

JOURNAL_NAME = "journal.jsonl"


@dataclass
class Entry:
    """State of a language after one shard. `shard` is None where a last line has only the end to report."""

    shard: dict[str, Any] | None
    source: int  # index of the source being read
    text_end: int  # how far its text has been read, in bytes of text
    text_xxh3_128: str  # of that text
    finished: list[dict[str, Any]]  # sources read to their end since the entry before: name, stamp, text bytes, hash
    counts: dict[str, int]
    complete: bool = False


@dataclass
class Journal:
    """The entries on disk, and appending to them."""

    directory: Path
    entries: list[Entry] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.directory / JOURNAL_NAME

    @property
    def last(self) -> Entry | None:
        return self.entries[-1] if self.entries else None

    @property
    def complete(self) -> bool:
        return self.last is not None and self.last.complete

    @property
    def shards(self) -> list[dict[str, Any]]:
        return [entry.shard for entry in self.entries if entry.shard is not None]

    @property
    def finished_sources(self) -> list[dict[str, Any]]:
        """Every source that has been read to its end, in order."""
        return [source for entry in self.entries for source in entry.finished]

    @classmethod
    def read(cls, directory: Path) -> Journal:
        """Entries that are whole and whose shard is there in full size; what comes after them is to be done again."""
        journal = cls(directory)
        try:
            content = read_again(journal.path, journal.path.read_bytes)
        except OSError:  # missing, or no file
            return journal
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # torn by a kill or a power cut while it was written
            digest, _, text = line.rstrip(b"\n").partition(b" ")
            if xxhash.xxh3_64_hexdigest(text).encode() != digest:
                raise DataError(
                    f"{journal.path} is damaged in line {number}. Make the language again: the same command with "
                    f"--redo {directory.name}"
                )
            if (entry := _entry_of(text)) is None:
                raise DataError(
                    f"{journal.path} was edited or made by another program: line {number} is no entry of a journal. Make "
                    f"the language again: the same command with --redo {directory.name}"
                )
            if entry.shard is not None and not _is_whole(directory, entry.shard):
                break
            journal.entries.append(entry)
        return journal

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the language against a second run; the lock dies with the process."""
        try:
            lock = own(self.directory / LOCK_NAME, str(self.directory))
        except Taken as error:
            raise Taken(f"Another run is preparing {self.directory} right now: {error}") from None
        with lock:
            self.path.touch()
            yield

    def rewind(self) -> None:
        """Drop from the disk whatever is not covered by `entries`: torn lines, shards in flight, their successors."""
        known = {Path(shard["file"]).name for shard in self.shards}
        for path in self.directory.iterdir():
            if path.name.endswith((".tok", ".tmp")) and path.name not in known:
                path.unlink()
        text = b"".join(_line(entry) for entry in self.entries)
        if self.path.read_bytes() != text:
            os.truncate(self.path, len(text))

    def append(self, entry: Entry) -> None:
        with open(self.path, "ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)


def _entry_of(text: bytes) -> Entry | None:
    """None where the hash fits and the content is still none of ours."""
    try:
        entry = Entry(**json.loads(text))
        _line(entry)  # half a character (\ud800) could not be written again
    except (ValueError, TypeError, RecursionError):
        return None
    numbers: list[Any] = [entry.source, entry.text_end]
    lists = isinstance(entry.finished, list) and all(isinstance(source, dict) for source in entry.finished)
    if not (lists and isinstance(entry.counts, dict) and type(entry.complete) is bool):
        return None
    numbers += entry.counts.values()
    if entry.shard is not None:
        if not isinstance(entry.shard, dict) or not _is_file_name(entry.shard.get("file")):
            return None
        numbers += [entry.shard.get(key) for key in ("tokens", "documents", "bytes")]
    return entry if all(type(number) is int and number >= 0 for number in numbers) else None


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name.encode("utf-8", "surrogatepass")) < 200 and name.isprintable()


def _line(entry: Entry) -> bytes:
    """Hash of the rest, a space, the entry as JSON."""
    text = json.dumps(asdict(entry), ensure_ascii=False).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _is_whole(directory: Path, shard: dict[str, Any]) -> bool:
    path = directory / Path(shard["file"]).name
    try:
        return read_again(path, path.stat).st_size == shard["bytes"]
    except OSError:
        return False
