"""Input files as one kind of byte stream: lines of UTF-8, a blank line between documents (CC-100's own format).

Read are .txt, JSON lines (.jsonl, .ndjson, .json), each plain or .xz, .gz, .zst, .bz2, in upper or lower case, .parquet, and
`hf:NAME[:CONFIG[:SPLIT]]` for a dataset of the Hub or a local directory of one. A file is read to its last byte, or what is
wrong with it is said. `discovery.py` finds the files and their languages.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_prep.lines import BYTE_ORDER_MARK, ends_lines_with_cr, with_line_feeds
from data_prep.names import quoted, shown
from data_prep.other_encodings import SAMPLE_LINES, broken_lines, likely_encoding, wide_encoding
from data_prep.records import JSON_TO_LINES, BrokenRecord, Records, WrongField, from_hub, from_json_lines, from_parquet
from data_prep.shard_layout import file_digest
from data_prep.shards import DataError
from data_prep.unpack import (
    PACKINGS,
    UNPACKING_ERRORS,
    PackedError,
    PackedWithDictionary,
    WindowTooLarge,
    rewriting,
    unpacked,
)

START_BYTES = 1 << 18  # of the content of a file: what it is judged by before anything of it is used
TEXT_KINDS, JSON_KINDS = (".txt",), (".jsonl", ".ndjson")
KNOWN_KINDS = f"*.txt, *.jsonl, *.ndjson (each plain or {', '.join(PACKINGS[1:])}), *.json packed so, *.parquet"
_CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
_MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2"}
MAX_BROKEN_LINES = 0.05  # share of a file's lines that may be no UTF-8
MIN_BROKEN_AT_START = 10  # lines; with more than half of all lines broken the rest of the file need not be read


class CorruptSource(DataError):
    """An input that cannot be read to its end. What was read before stands."""


class WrongTextField(CorruptSource):
    """Records that have no text under the name that was given."""


def iconv(encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8"


def kind_of(name: str, by_name: bool = False) -> tuple[str, str] | None:
    """What a file's name says it is: (.txt, .jsonl or .parquet, packing); None for what is not read.

    `by_name`: it was named on the command line. A bare .json is read as JSON lines only then, as many directories hold
    one that is no text.
    """
    lower = name.lower()
    packing = next((packed for packed in PACKINGS[1:] if lower.endswith(packed)), "")
    if lower.endswith(".parquet"):
        return ".parquet", ""
    stem = lower.removesuffix(packing)
    if stem.endswith(".txt"):
        return ".txt", packing
    if stem.endswith(JSON_KINDS) or (stem.endswith(".json") and (packing or by_name)):
        return ".jsonl", packing
    return None


@dataclass
class Source:
    """One input file of one language."""

    language: str
    path: Path
    name: str  # of the file below the input directory: how journal and manifest know it
    text_field: str = "text"
    bad_records: str = "skip"  # or fail: records without text
    max_broken_lines: float = MAX_BROKEN_LINES
    position: int = field(default=0, compare=False)  # bytes read from the file itself, for progress and errors
    digest: str = field(default="", compare=False)  # xxh3-128 of the file, once it has been read to its end
    counts: Counter[str] = field(default_factory=Counter, compare=False)  # of what was left out while it was read

    @property
    def holds_records(self) -> bool:
        return (kind_of(self.path.name, by_name=True) or ("", ""))[0] != ".txt"

    def stamp(self) -> dict[str, int]:
        """What tells at once that a file is the one it was."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"Cannot read {shown(self.path)}: {error.strerror}.") from error
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def changed_since(self, record: dict[str, Any]) -> bool:
        """Whether the file differs from the one recorded; only another date makes it read the content."""
        stamp = self.stamp()
        if stamp["bytes"] != record["bytes"]:
            return True
        return stamp["mtime_ns"] != record["mtime_ns"] and file_digest(self.path) != record["xxh3_128"]

    def chunks(self) -> Iterator[bytes]:
        """The text, in pieces of no particular size; CorruptSource where the file cannot be read on."""
        self.counts.clear()
        try:
            before = self.stamp()
            kind, packing = kind_of(self.path.name, by_name=True) or (".txt", "")
            yield from self._parquet() if kind == ".parquet" else self._stream(kind, packing)
            if self.changed_since({**before, "xxh3_128": self.digest}):
                raise DataError(
                    f"{shown(self.path)} changed while it was read ({before['bytes']} bytes before, "
                    f"{self.stamp()['bytes']} bytes now). Wait until it is written, and run the same command again."
                )
        except WrongField as error:
            raise WrongTextField(f"{shown(self.path)}: {error}.") from error
        except BrokenRecord as error:
            raise CorruptSource(f"{shown(self.path)}: {error}. Then run the same command again.") from error
        except WindowTooLarge as error:
            raise CorruptSource(self._too_large_a_window()) from error
        except PackedWithDictionary as error:
            raise CorruptSource(
                f"{shown(self.path)} was packed with a zstd dictionary, which is not in it. Unpack it with that dictionary "
                "(zstd -d -D DICTIONARY) and move the packed file away. Then run the same command."
            ) from error
        except MemoryError as error:
            raise DataError(
                f"{shown(self.path)} needs more memory to unpack than there is (byte {self.position})."
            ) from error
        except (*UNPACKING_ERRORS, PackedError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"Cannot read {shown(self.path)}: {error.strerror}.") from error
            raise CorruptSource(
                f"{shown(self.path)} is damaged or cut short: reading stopped at byte {self.position} of "
                f"{self.stamp()['bytes']} ({error}). {self._what_it_starts_as()}Put a complete file in its place and run the same "
                "command."
            ) from error

    def _what_it_starts_as(self) -> str:
        """Where a packed file is none of its name's kind."""
        _, packing = kind_of(self.path.name, by_name=True) or ("", "")
        with open(self.path, "rb") as file:
            start = file.read(16)
        looks_like = next((packed for magic, packed in _MAGIC.items() if start.startswith(magic)), "")
        if not packing or looks_like == packing or any(magic.startswith(start) for magic in _MAGIC):
            return ""
        if looks_like:
            return f"It starts as a {looks_like} file does: name it so. "
        is_text = start.isascii() and not start.translate(None, bytes(range(32, 127)) + b"\t\n\r")
        return f"It starts as a text does that is not packed: name it so, without {packing}. " if is_text else ""

    def _too_large_a_window(self) -> str:
        packed, target = quoted(self.path), quoted(str(self.path)[: -len(".zst")])
        return (
            f"{shown(self.path)} was packed with a window of more than 128 MB, which is not read. Unpack it and move the "
            f"packed file away: zstd -d --long=31 {packed} -o {target} && mv {packed} {packed}.unpacked. Then run the same "
            "command."
        )

    def _stream(self, kind: str, packing: str) -> Iterator[bytes]:
        with open(self.path, "rb", buffering=0) as raw:
            counted = _Counted(raw, self)
            pieces = _long_start(unpacked(counted, packing), START_BYTES)
            start = next(pieces, b"")
            self._check_encoding(start, packing)
            if kind == ".jsonl":
                records = Records(self.text_field, self.bad_records, self.counts)
                yield from from_json_lines(_after(start, pieces), records, rewriting(self.path, JSON_TO_LINES, packing))
            else:
                yield from self._text(start, pieces)
            self.digest = counted.hasher.hexdigest()

    def _text(self, start: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
        if not start:
            self.counts["files_empty"] += 1
        if _is_json_line(start.split(b"\n", 1)[0]):
            self.counts["files_of_json"] += 1
        text = _after(start.removeprefix(BYTE_ORDER_MARK), pieces)
        if ends_lines_with_cr(start, is_all=len(start) < START_BYTES):
            self.counts["files_with_cr_line_ends"] += 1
            text = with_line_feeds(text)
        yield from text

    def _check_encoding(self, start: bytes, packing: str) -> None:
        """What the start of a file shows already: it is no text, or most of its lines are in another encoding."""
        if encoding := wide_encoding(start, self.language):
            raise CorruptSource(self._not_utf8("its start shows it", encoding, packing))
        control = len(start) - len(start.translate(None, _CONTROL_BYTES))
        if control > len(start) // 20:
            kind = next((packed for magic, packed in _MAGIC.items() if start.startswith(magic)), None)
            raise CorruptSource(
                f"{shown(self.path)} is not text in UTF-8: {control} of its first {len(start)} bytes are control characters. "
                + (f"It starts as a {kind} file does: name it so. " if kind else "")
                + "If it is text in another encoding, convert it (iconv -f ENCODING -t UTF-8); else leave it out of the input."
            )
        broken = list(broken_lines(start)) if self.max_broken_lines < 0.5 else []
        if len(broken) < MIN_BROKEN_AT_START:
            return
        num_lines = sum(map(bool, map(bytes.strip, start.split(b"\n"))))
        if 2 * len(broken) > num_lines:
            lines = [line for _, line in broken[:SAMPLE_LINES]]  # not the last one, which may be cut
            problem = f"{len(broken)} of its first {num_lines} lines are not, line {broken[0][0] + 1} the first"
            raise CorruptSource(self._not_utf8(problem, likely_encoding(lines, self.language), packing))

    def _not_utf8(self, problem: str, encoding: str, packing: str) -> str:
        return (
            f"{shown(self.path)} is not text in UTF-8: {problem}. It looks like {encoding}; convert it and run the same "
            f"command: {rewriting(self.path, iconv(encoding), packing)}"
        )

    def how_to_convert(self, lines: list[bytes]) -> str:
        """The likely encoding of some broken lines of this source, and what to do about it."""
        encoding = likely_encoding(lines, self.language)
        kind, packing = kind_of(self.path.name, by_name=True) or (".txt", "")
        if kind == ".parquet" or isinstance(self, HubSource):
            return f"They look like {encoding}: write the file again with its text in UTF-8"
        return f"They look like {encoding}; convert the file: {rewriting(self.path, iconv(encoding), packing)}"

    def _parquet(self) -> Iterator[bytes]:
        size = self.path.stat().st_size

        def on_progress(share: float) -> None:
            self.position = int(share * size)

        yield from from_parquet(self.path, Records(self.text_field, self.bad_records, self.counts), on_progress)
        self.digest = file_digest(self.path)


@dataclass
class HubSource(Source):
    """A dataset of the Hugging Face Hub or a directory of one; known by its name, as it has no size or date."""

    def stamp(self) -> dict[str, int]:
        return {"bytes": 0, "mtime_ns": 0}

    def changed_since(self, record: dict[str, Any]) -> bool:
        return False

    def chunks(self) -> Iterator[bytes]:
        self.counts.clear()
        try:
            yield from from_hub(self.name.removeprefix("hf:"), Records(self.text_field, self.bad_records, self.counts))
        except WrongField as error:
            raise WrongTextField(f"{shown(self.name)}: {error}.") from error
        except BrokenRecord as error:
            raise CorruptSource(f"{shown(self.name)}: {error}.") from error


class _Counted(io.RawIOBase):
    """A raw file that tells its source how far it has been read, and hashes what goes by."""

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


def _is_json_line(line: bytes) -> bool:
    """Whether a line of what should be text is a JSON record."""
    if not line.startswith(b"{") or not line.rstrip().endswith(b"}"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _long_start(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same pieces, the first of at least `size` bytes (or all there are); what came before damage is still delivered."""
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


def _after(start: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    if start:
        yield start
    yield from pieces
