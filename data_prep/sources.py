"""Input files as one kind of byte stream: lines of UTF-8, a blank line between documents (CC-100's own format).

Read are .txt, .jsonl (each plain or .xz, .gz, .zst), .parquet, and `hf:NAME[:CONFIG[:SPLIT]]` for a dataset of the Hub or a
local directory of one. `discovery.py` finds the files and their languages.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_prep.layout import file_digest
from data_prep.records import BrokenRecord, from_hub, from_json_lines, from_parquet
from data_prep.shards import DataError

READ_BYTES = 1 << 18
_COMPRESSIONS = ("", ".xz", ".gz", ".zst")
SUFFIXES = (*(kind + packed for kind in (".txt", ".jsonl") for packed in _COMPRESSIONS), ".parquet")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))


class DamagedSource(DataError):
    """An input that cannot be read to its end. What was read before stands."""


@dataclass
class Source:
    """One input file of one language."""

    language: str
    path: Path
    name: str  # of the file below the input directory: how journal and manifest know it
    text_field: str = "text"
    position: int = field(default=0, compare=False)  # bytes read from the file itself, for progress and errors
    digest: str = field(default="", compare=False)  # xxh3-128 of the file, once it has been read to its end

    def stamp(self) -> dict[str, int]:
        """What tells at once that a file is the one it was."""
        status = self.path.stat()
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def changed_since(self, record: dict[str, Any]) -> bool:
        """Whether the file differs from the one recorded; only another date makes it read the content."""
        stamp = self.stamp()
        if stamp["bytes"] != record["bytes"]:
            return True
        return stamp["mtime_ns"] != record["mtime_ns"] and file_digest(self.path) != record["xxh3_128"]

    def chunks(self) -> Iterator[bytes]:
        """The text, in pieces of no particular size; DamagedSource where the file cannot be read on."""
        try:
            yield from self._parquet() if self.path.suffix == ".parquet" else self._stream()
        except (EOFError, lzma.LZMAError, zlib.error, BrokenRecord, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"Cannot read {self.path}: {error.strerror}.") from error
            raise DamagedSource(
                f"{self.path} is damaged or cut short: reading stopped at byte {self.position} of "
                f"{self.path.stat().st_size} ({error}). Put a whole file in its place and run the same command."
            ) from error

    def _stream(self) -> Iterator[bytes]:
        with open(self.path, "rb", buffering=0) as raw:
            counted = _Counted(raw, self)
            with _decompressed(io.BufferedReader(counted, 1 << 16), self.path.suffix) as stream:
                if ".jsonl" in self.path.suffixes:
                    yield from from_json_lines(io.BufferedReader(stream, READ_BYTES), self.text_field)
                else:
                    yield from self._text(stream)
            self.digest = counted.hasher.hexdigest()

    def _text(self, stream: Any) -> Iterator[bytes]:
        chunk = stream.read1(READ_BYTES)  # read1: what came before damage is still delivered
        if problem := _why_not_text(chunk):
            raise DamagedSource(
                f"{self.path} is not text in UTF-8: {problem}. Convert it (iconv -t UTF-8) or leave it out of the input."
            )
        chunk = chunk.removeprefix(_BYTE_ORDER_MARK)
        while chunk:
            yield chunk
            chunk = stream.read1(READ_BYTES)

    def _parquet(self) -> Iterator[bytes]:
        size = self.path.stat().st_size

        def on_progress(share: float) -> None:
            self.position = int(share * size)

        yield from from_parquet(self.path, self.text_field, on_progress)
        self.digest = file_digest(self.path)


@dataclass
class HubSource(Source):
    """A dataset of the Hugging Face Hub or a directory of one; known by its name, as it has no size or date."""

    def stamp(self) -> dict[str, int]:
        return {"bytes": 0, "mtime_ns": 0}

    def changed_since(self, record: dict[str, Any]) -> bool:
        return False

    def chunks(self) -> Iterator[bytes]:
        try:
            yield from from_hub(str(self.path).removeprefix("hf:"), self.text_field)
        except BrokenRecord as error:
            raise DamagedSource(f"{self.path}: {error}.") from error


class _Counted(io.RawIOBase):
    """A raw file that tells its source how far it has been read, and hashes what goes by."""

    def __init__(self, raw: Any, source: Source) -> None:
        self._raw, self._source = raw, source
        self.hasher = xxhash.xxh3_128()
        source.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        self._source.position += count
        self.hasher.update(memoryview(buffer)[:count])
        return count


def _why_not_text(start: bytes) -> str | None:
    """Whether the start of a file looks like something else than UTF-8. A few odd bytes are common in web text."""
    control = len(start) - len(start.translate(None, _CONTROL_BYTES))
    if control > len(start) // 20:
        return f"{control} of its first {len(start)} bytes are control characters"
    text = start.decode("utf-8", "replace")
    if text.count("\ufffd") > 1 + len(text) // 20:
        return f"{text.count(chr(0xFFFD))} places in its first {len(start)} bytes are not UTF-8"
    return None


def _decompressed(packed: io.BufferedReader, suffix: str) -> Any:
    if suffix == ".xz":
        return lzma.LZMAFile(packed)
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=packed)
    if suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")
    return packed
