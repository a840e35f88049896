"""The progress of one language on disk: `LANG/journal.jsonl`, one fsynced line for each finished shard.

In: entries. Out: the same entries after a restart. An entry covers all text up to the end of its shard, so a run that was
killed continues after the last valid entry. The manifest is made from the journals only.
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

from data_prep.blocks import Place
from data_prep.names import how_to_redo
from data_prep.ownership import LOCK_NAME, InUseError, own
from data_prep.shards import DataError, read_again

JOURNAL_NAME = "journal.jsonl"


@dataclass
class Entry:
    """The state of a language after one shard. `shard` is None in a last entry that only records the end."""

    shard: dict[str, Any] | None
    source: int  # index of the source being read
    text_end: int  # bytes of its text up to the end of the shard
    text_xxh3_128: str  # XXH3-128 of that text
    # sources read to their end since the previous entry: name, stamp, text bytes, hashes
    finished: list[dict[str, Any]]
    counts: dict[str, int]
    complete: bool = False
    place: dict[str, Any] | None = None  # `Place` of the part of the source being read; None if there are no parts
    # `read` and `broken`: lines of the source up to the end of the shard; None at the end, and in entries of earlier versions
    lines: dict[str, int] | None = None


@dataclass
class Journal:
    """The valid entries of a language, in order."""

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
        """Records of the sources that have been read to their end, in order."""
        return [source for entry in self.entries for source in entry.finished]

    @classmethod
    def read(cls, directory: Path) -> Journal:
        """The entries up to the first that is incomplete or whose shard does not have its full size.

        Raises:
            DataError: an entry is corrupt or was edited.
        """
        journal = cls(directory)
        try:
            content = read_again(journal.path, journal.path.read_bytes)
        except OSError:  # no such file, or a directory in its place
            return journal
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # incomplete: the run was killed while it wrote the line
            digest, _, text = line.rstrip(b"\n").partition(b" ")
            if xxhash.xxh3_64_hexdigest(text).encode() != digest:
                raise DataError(f"{journal.path} is corrupt in line {number}. To {how_to_redo(directory.name)}")
            if (entry := _entry_of(text)) is None:
                raise DataError(
                    f"{journal.path} was edited or made by another program: line {number} is not an entry of a journal. "
                    f"To {how_to_redo(directory.name)}"
                )
            if entry.shard is not None and not _has_full_size(directory, entry.shard):
                break
            journal.entries.append(entry)
        return journal

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Own the language while it is written. The lock ends with the process."""
        try:
            lock = own(self.directory / LOCK_NAME, str(self.directory))
        except InUseError as error:
            raise InUseError(f"Another run is preparing {self.directory} right now: {error}") from None
        with lock:
            self.path.touch()
            yield

    def rewind(self) -> None:
        """Remove from the disk what `entries` do not cover: incomplete lines, unfinished shards, and later shards."""
        known = {Path(shard["file"]).name for shard in self.shards}
        for path in self.directory.iterdir():
            if path.name.endswith((".tok", ".tmp")) and path.name not in known:
                path.unlink()
        text = b"".join(_line(entry) for entry in self.entries)
        if self.path.read_bytes() != text:
            os.truncate(self.path, len(text))

    def append(self, entry: Entry) -> None:
        """Add an entry, on disk before this returns."""
        with open(self.path, "ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)


def _entry_of(text: bytes) -> Entry | None:
    """The entry in a line whose hash is right; None if its content is not an entry."""
    try:
        entry = Entry(**json.loads(text))
        if entry.place is not None:
            Place(**entry.place)
        _line(entry)  # a lone surrogate (\ud800) cannot be written
    except (ValueError, TypeError, RecursionError):
        return None
    numbers: list[Any] = [entry.source, entry.text_end]
    lists = isinstance(entry.finished, list) and all(isinstance(source, dict) for source in entry.finished)
    if not (lists and isinstance(entry.counts, dict) and type(entry.complete) is bool):
        return None
    numbers += entry.counts.values()
    if entry.lines is not None:
        if not isinstance(entry.lines, dict):
            return None
        numbers += [entry.lines.get("read"), entry.lines.get("broken")]
    if entry.place is not None:
        counts, stamp = entry.place.get("counts"), entry.place.get("stamp")
        if not isinstance(counts, dict) or not isinstance(stamp, dict):
            return None
        numbers += [entry.place.get(key) for key in ("part", "text_start", "first_line")]
        numbers += [*counts.values(), *stamp.values()]
    if entry.shard is not None:
        if not isinstance(entry.shard, dict) or not _is_file_name(entry.shard.get("file")):
            return None
        numbers += [entry.shard.get(key) for key in ("tokens", "documents", "bytes")]
    return entry if all(type(number) is int and number >= 0 for number in numbers) else None


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name.encode("utf-8", "surrogatepass")) < 200 and name.isprintable()


def _line(entry: Entry) -> bytes:
    """One line: the XXH3-64 of the JSON text, a space, the JSON text."""
    record = asdict(entry)
    for key in ("place", "lines"):
        if record[key] is None:
            del record[key]
    text = json.dumps(record, ensure_ascii=False).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _has_full_size(directory: Path, shard: dict[str, Any]) -> bool:
    path = directory / Path(shard["file"]).name
    try:
        return read_again(path, path.stat).st_size == shard["bytes"]
    except OSError:
        return False
