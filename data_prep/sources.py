"""Input files of every kind as CC-100's format: lines of UTF-8 text with a blank line after each document.

In: one file, found by `discovery.py`: .txt or JSON lines (.jsonl, .ndjson, .json), each plain or packed (.xz, .gz, .zst, .bz2),
or .parquet. Out: the text in pieces, up to the last byte of the file, or an error that names the file and its problem. Files of
the hub are in `hub_files.py`.
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from data_prep.blocks import Block, Place, cut_blocks
from data_prep.file_hashes import xxh3_128_of_file
from data_prep.lines import BYTE_ORDER_MARK, ends_lines_with_cr, with_line_feeds
from data_prep.names import quoted, shown
from data_prep.other_encodings import SAMPLE_LINES, broken_lines, likely_encoding, wide_encoding
from data_prep.parquet import ParquetText
from data_prep.records import JSON_TO_LINES, BrokenRecord, Records, WrongField, from_json_lines
from data_prep.shards import DataError
from data_prep.unpack import (
    MAGIC,
    PACKINGS,
    UNPACKING_ERRORS,
    PackedError,
    PackedWithDictionary,
    WindowTooLarge,
    packing_of_content,
    packing_of_name,
    rewriting,
    unpacked,
)
from data_prep.where import NO_CONDITION, Where

START_BYTES = 1 << 18  # of the content of a file: its encoding is checked on them before any text is used
JSON_KINDS = (".jsonl", ".ndjson")
KNOWN_KINDS = f"*.txt, *.jsonl, *.ndjson (each plain or {', '.join(PACKINGS[1:])}), *.json packed so, *.parquet"
_CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
MIN_BROKEN_AT_START = 10  # broken lines at the start: if they are more than half of its lines, the file is rejected


class CorruptSource(DataError):
    """An input that cannot be read to its end. Shards of the text before that point are kept."""


class WrongTextField(CorruptSource):
    """Records without the field that --text-field names."""


def iconv(encoding: str) -> str:
    """The shell command that converts text from `encoding` to UTF-8."""
    return f"iconv -f {encoding} -t UTF-8"


def kind_of(name: str, by_name: bool = False) -> tuple[str, str] | None:
    """The kind (.txt, .jsonl or .parquet) and the packing that a file's name states; None for a file that is not read.

    Args:
        name: the name of the file.
        by_name: whether the user named this file itself. Only then a plain .json is read, as JSON lines: many directories hold
            a .json that is not text.
    """
    lower, packing = name.lower(), packing_of_name(name)
    if lower.endswith(".parquet"):
        return ".parquet", ""
    stem = lower.removesuffix(packing)
    if stem.endswith(".txt"):
        return ".txt", packing
    if stem.endswith(JSON_KINDS) or (stem.endswith(".json") and (packing or by_name)):
        return ".jsonl", packing
    return None


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read."""

    text_field: str = "text"
    bad_records: str = "skip"  # records without text: skip | fail
    max_broken_lines: float = 0.05  # share of a file's lines that may be invalid UTF-8
    where: Where = NO_CONDITION  # that records must meet


@dataclass
class Source:
    """One input file of one language."""

    language: str
    path: Path
    name: str  # path below the input directory, as journal and manifest record it
    options: ReadOptions = ReadOptions()
    position: int = field(default=0, compare=False)  # bytes read of the (packed) file, for progress and errors
    digest: str = field(default="", compare=False)  # XXH3-128 of the file, after it was read to its end
    counts: Counter[str] = field(default_factory=Counter, compare=False)  # records left out and unusual files, by kind

    in_parts: bool = field(default=False, compare=False)  # whether a Parquet file is cut into blocks part by part

    @property
    def title(self) -> str:
        """The file, for messages."""
        return shown(self.path)

    @property
    def holds_records(self) -> bool:
        """Whether the file holds records (JSON lines, Parquet) and not lines of text."""
        return self._kind()[0] != ".txt"

    @property
    def how_to_continue(self) -> str:
        """What to do after the file was corrected, for messages."""
        return "run the same command again"

    @property
    def can_be_read_again(self) -> bool:
        """False for a pipe."""
        return self.path.is_file()

    def _kind(self) -> tuple[str, str]:
        return kind_of(self.path.name, by_name=True) or (".txt", "")

    def stamp(self) -> dict[str, int]:
        """Size and date of modification, by which a file that has not changed is recognised without reading it."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"Cannot read {self.title}: {error.strerror}.") from error
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def changed_since(self, record: dict[str, Any]) -> bool:
        """Whether the file differs from the one that the journal records. The content is hashed only if the date differs."""
        stamp = self.stamp()
        if stamp["bytes"] != record["bytes"]:
            return True
        return stamp["mtime_ns"] != record["mtime_ns"] and self._hash() != record["xxh3_128"]

    def chunks(self) -> Iterator[bytes]:
        """The text in pieces of any size.

        Raises:
            CorruptSource: the file is corrupt, in another encoding, or has no such text field.
            DataError: the file cannot be opened, changed meanwhile, or needs too much memory.
        """
        kind, packing = self._kind()
        self.counts.clear()
        with self._read_to_end():
            if kind == ".parquet":
                yield from ParquetText(self._parquet_file(), self._records()).chunks(None, self._on_progress)
            else:
                yield from self._stream(kind, packing)

    def blocks(self, block_bytes: int, place: Place | None = None) -> Iterator[Block]:
        """The text in blocks. If they have a `Place`, a later call may start there; an earlier part is not read then.

        A place of a file that has changed since, and any place of a file without parts, means the start of the file.
        """
        if not self.in_parts or self._kind()[0] != ".parquet":
            yield from cut_blocks(self.chunks(), block_bytes)
            return
        stamp = self.stamp()
        here = place if place is not None and place.stamp == stamp else Place(stamp=stamp)
        self.counts.clear()
        self.counts.update(here.counts)
        with self._read_to_end():
            text = ParquetText(self._parquet_file(), self._records())
            for number, part in enumerate(text.parts()[here.part :], start=here.part):
                here = replace(here, part=number, counts=dict(sorted(self.counts.items())))
                end, digest, line = here.text_start, here.text_xxh3_128, here.first_line
                for block in cut_blocks(text.chunks(part, self._on_progress), block_bytes, place=here):
                    yield block
                    end, digest, line = block.end, block.digest, block.first_line + block.text.count(b"\n")
                here = replace(here, text_start=end, text_xxh3_128=digest, first_line=line)

    @contextmanager
    def _read_to_end(self) -> Iterator[None]:
        """Hash the file after it was read, and turn errors of libraries into `DataError`s that name it."""
        try:
            before = self.stamp()
            self.digest = ""
            yield
            self.digest = self.digest or self._hash()
            if self.changed_since({**before, "xxh3_128": self.digest}):
                raise DataError(
                    f"{self.title} changed while it was read ({before['bytes']} bytes before, "
                    f"{self.stamp()['bytes']} bytes now). Wait until it is written, and run the same command again."
                )
        except WrongField as error:
            raise WrongTextField(f"{self.title}: {error}.") from error
        except BrokenRecord as error:
            raise CorruptSource(f"{self.title}: {error}. Then {self.how_to_continue}.") from error
        except WindowTooLarge as error:
            raise CorruptSource(self._too_large_a_window()) from error
        except PackedWithDictionary as error:
            raise CorruptSource(
                f"{self.title} was packed with a zstd dictionary, which it does not contain. Unpack it with that dictionary "
                "(zstd -d -D DICTIONARY) and move the packed file away. Then run the same command."
            ) from error
        except MemoryError as error:
            raise DataError(
                f"{self.title} needs more memory to unpack than this machine has (byte {self.position})."
            ) from error
        except (*UNPACKING_ERRORS, PackedError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"Cannot read {self.title}: {error.strerror}.") from error
            raise CorruptSource(
                f"{self.title} is corrupt or truncated: reading stopped at byte {self.position} of "
                f"{self.stamp()['bytes']} ({error}). {self._other_packing()}Put a complete file in its place and run the same "
                "command."
            ) from error

    def _open(self) -> Any:
        """The file, open for reading bytes without a buffer."""
        return open(self.path, "rb", buffering=0)

    def _parquet_file(self) -> Any:
        return self.path

    def _hash(self) -> str:
        return xxh3_128_of_file(self.path)

    def _rewriting(self, command: str) -> str:
        """A shell command that replaces the content of the file by what `command` makes of it."""
        return rewriting(self.path, command, self._kind()[1])

    def _other_packing(self) -> str:
        """How to name the file correctly, if its first bytes show another packing than its name; else ""."""
        _, packing = self._kind()
        with self._open() as file:
            start = file.read(16)
        found = packing_of_content(start)
        if not packing or found == packing or any(magic.startswith(start) for magic in MAGIC.values()):
            return ""
        if found:
            return _looks_packed(found)
        is_text = start.isascii() and not start.translate(None, bytes(range(32, 127)) + b"\t\n\r")
        return f"It looks like plain text: rename it without {packing}. " if is_text else ""

    def _too_large_a_window(self) -> str:
        packed, target = quoted(self.path), quoted(str(self.path)[: -len(".zst")])
        return (
            f"{self.title} was packed with a window of more than 128 MB, which prepare does not read. Unpack it and move the "
            f"packed file away: zstd -d --long=31 {packed} -o {target} && mv {packed} {packed}.unpacked. Then run the same "
            "command."
        )

    def _stream(self, kind: str, packing: str) -> Iterator[bytes]:
        with self._open() as raw:
            counted = _Counted(raw, self)
            pieces = long_start(unpacked(counted, packing), START_BYTES)
            start = next(pieces, b"")
            self._check_encoding(start)
            if kind == ".jsonl":
                records = itertools.chain([start], pieces)
                yield from from_json_lines(records, self._records(), self._rewriting(JSON_TO_LINES))
            else:
                yield from self._text(start, pieces)
            self.digest = counted.hasher.hexdigest()

    def _text(self, start: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
        if not start:
            self.counts["files_empty"] += 1
        if _is_json_line(start.split(b"\n", 1)[0]):
            self.counts["files_of_json"] += 1
        text: Iterator[bytes] = itertools.chain([start.removeprefix(BYTE_ORDER_MARK)], pieces)
        if ends_lines_with_cr(start, is_all=len(start) < START_BYTES):
            self.counts["files_with_cr_line_ends"] += 1
            text = with_line_feeds(text)
        yield from text

    def _check_encoding(self, start: bytes) -> None:
        """Raise `CorruptSource` if the start of the file is not text, or if most of its lines are in another encoding."""
        if encoding := wide_encoding(start, self.language):
            raise CorruptSource(self._not_utf8("its first bytes are not", encoding))
        control = len(start) - len(start.translate(None, _CONTROL_BYTES))
        if control > len(start) // 20:
            found = packing_of_content(start)
            raise CorruptSource(
                f"{self.title} is not text in UTF-8: {control} of its first {len(start)} bytes are control characters. "
                + (_looks_packed(found) if found else "")
                + "If it is text in another encoding, convert it (iconv -f ENCODING -t UTF-8); else leave it out of the input."
            )
        broken = list(broken_lines(start)) if self.options.max_broken_lines < 0.5 else []
        if len(broken) < MIN_BROKEN_AT_START:
            return
        num_lines = sum(map(bool, map(bytes.strip, start.split(b"\n"))))
        if 2 * len(broken) > num_lines:
            lines = [line for _, line in broken[:SAMPLE_LINES]]  # without the last one, which may be truncated
            problem = f"{len(broken)} of its first {num_lines} lines are not, line {broken[0][0] + 1} is the first"
            raise CorruptSource(self._not_utf8(problem, likely_encoding(lines, self.language)))

    def _not_utf8(self, problem: str, encoding: str) -> str:
        return (
            f"{self.title} is not text in UTF-8: {problem}. It looks like {encoding}; convert it and "
            f"{self.how_to_continue}: {self._rewriting(iconv(encoding))}"
        )

    def how_to_convert(self, lines: list[bytes]) -> str:
        """The likely encoding of some broken lines of this source, and the command that converts the file."""
        encoding = likely_encoding(lines, self.language)
        if self._kind()[0] == ".parquet":
            return f"They look like {encoding}: write the file again with its text in UTF-8"
        return f"They look like {encoding}; convert the file: {self._rewriting(iconv(encoding))}"

    def _on_progress(self, share: float) -> None:
        self.position = int(share * self.stamp()["bytes"])

    def _records(self) -> Records:
        return Records(self.options.text_field, self.options.bad_records, self.counts, self.options.where)


class _Counted(io.RawIOBase):
    """A raw file that hashes the bytes that are read and tells its source how many they are."""

    def __init__(self, raw: Any, source: Source) -> None:
        self._raw, self._source = raw, source
        self.hasher = xxhash.xxh3_128()
        source.position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._source.position

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        self._source.position += count
        self.hasher.update(memoryview(buffer)[:count])
        return count


def _looks_packed(packing: str) -> str:
    return f"It starts like a {packing} file: rename it with that ending. "


def _is_json_line(line: bytes) -> bool:
    """Whether a line of a text file is a JSON record."""
    if not line.startswith(b"{") or not line.rstrip().endswith(b"}"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def long_start(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same pieces, the first of at least `size` bytes or of all bytes. Bytes before an error are delivered first."""
    held = bytearray()
    try:
        for piece in pieces:
            held += piece
            if len(held) >= size:
                break
    except Exception:
        if held:
            yield bytes(held)
        raise
    if held:
        yield bytes(held)
    yield from pieces
