"""Input files to one kind of byte stream: lines of UTF-8, a blank line between documents (CC-100's own format).

`discover` finds files and their languages, `Source.chunks` reads one of them, `cut_blocks` cuts the stream into blocks of
whole documents. Where the stream is cut depends on its bytes alone, never on how a reader happened to deliver them.
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

from data_prep.languages import language_of_name
from data_prep.layout import file_digest
from data_prep.shards import LANGUAGE_PATTERN, DataError

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 24
READ_BYTES = 1 << 18
SUFFIXES = (".txt", ".txt.xz", ".txt.gz", ".txt.zst")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DamagedSource(DataError):
    """An input file that cannot be read to its end. What was read before stands."""


@dataclass
class Source:
    """One input file of one language."""

    language: str
    path: Path
    position: int = field(default=0, compare=False)  # bytes read from the file itself, for progress and errors
    digest: str = field(default="", compare=False)  # xxh3-128 of the file, once it has been read to its end

    @property
    def name(self) -> str:
        return self.path.name

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
        """The text, in pieces of no particular size."""
        try:
            with open(self.path, "rb", buffering=0) as raw:
                counted = _Counted(raw, self)
                with _decompressed(counted, self.path) as stream:
                    first = True
                    while chunk := stream.read(READ_BYTES):
                        if first:
                            _refuse_binary(self.path, chunk)
                            chunk, first = chunk.removeprefix(_BYTE_ORDER_MARK), False
                        yield chunk
                self.digest = counted.hasher.hexdigest()
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno is not None:
                raise DataError(f"Cannot read {self.path}: {error.strerror}.") from error
            raise DamagedSource(
                f"{self.path} is damaged or cut short: reading stopped at byte {self.position} of "
                f"{self.path.stat().st_size} ({error}). Download it again and run the same command."
            ) from error


class _Counted(io.RawIOBase):
    """A raw file that tells its source how far it has been read."""

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


def _decompressed(raw: _Counted, path: Path) -> Any:
    buffered = io.BufferedReader(raw, 1 << 16)
    if path.suffix == ".xz":
        return lzma.LZMAFile(buffered)
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=buffered)
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(buffered, "r"), "zstd")
    return buffered


def _refuse_binary(path: Path, start: bytes) -> None:
    odd = sum(start.count(byte) for byte in (b"\0", b"\x01", b"\x02", b"\x03", b"\x04", b"\x05", b"\x06", b"\x08"))
    if odd > len(start) // 50:
        raise DamagedSource(f"{path} is not text in UTF-8 ({odd} control bytes in its first {len(start)}).")


def discover(inputs: list[Path], language: str | None) -> dict[str, list[Source]]:
    """Input files by language, in a fixed order."""
    found: dict[str, list[Source]] = {}
    for path in _files(inputs):
        name = language_of_name(path.name.split(".")[0])
        if name is None and language is not None:
            name = language
        if name is None:
            raise DataError(
                f"{path}: cannot tell its language from its name. Name it like CC-100 (en.txt.xz, zh-Hans.txt.xz) or "
                "give --language xx."
            )
        if language is None or name == language:
            found.setdefault(name, []).append(Source(name, path))
    if not found:
        wanted = f" of language {language}" if language else ""
        raise DataError(f"No text{wanted} in {', '.join(map(str, inputs))}; looked for *{', *'.join(SUFFIXES)}.")
    for name in found:
        if not LANGUAGE_PATTERN.fullmatch(name):
            raise DataError(f"{name!r} is no language name; use letters, digits, '-' and '_'.")
    return dict(sorted(found.items()))


def _files(inputs: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
        elif path.is_file():
            if not path.name.endswith(SUFFIXES):
                raise DataError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}.")
            files.append(path)
        else:
            raise DataError(f"Input {path} does not exist.")
    return files


@dataclass
class Block:
    """Whole documents, with their place in the text stream of their source."""

    text: bytes
    end: int
    digest: str  # xxh3-128 of the stream from its start to `end`
    was_split: bool


def cut_blocks(chunks: Iterator[bytes]) -> Iterator[Block]:
    """About 1 MiB each, cut at blank lines; a document over 16 MiB is cut at a line, a longer line at a space."""
    buffer, hasher, end = bytearray(), xxhash.xxh3_128(), 0
    wanted, exhausted = BLOCK_BYTES, False
    while True:
        while len(buffer) <= wanted and not exhausted:
            chunk = next(chunks, b"")
            exhausted = not chunk
            buffer += chunk
        if not buffer:
            return
        if exhausted and len(buffer) <= wanted:
            cut, was_split = len(buffer), False
        else:
            cut, was_split = _last_blank_line(buffer, wanted), False
            if not cut and wanted < MAX_DOCUMENT_BYTES:
                wanted *= 4
                continue
            if not cut:
                cut, was_split = _cut_inside_document(buffer, wanted), True
        text = bytes(memoryview(buffer)[:cut])
        del buffer[:cut]
        hasher.update(text)
        end += cut
        yield Block(text, end, hasher.hexdigest(), was_split)
        wanted = BLOCK_BYTES


def _last_blank_line(buffer: bytearray, limit: int) -> int:
    """Where the text after the last blank line before `limit` starts; 0 if there is none."""
    unix, windows = buffer.rfind(b"\n\n", 0, limit), buffer.rfind(b"\n\r\n", 0, limit)
    return max(unix + 2 if unix >= 0 else 0, windows + 3 if windows >= 0 else 0)


def _cut_inside_document(buffer: bytearray, limit: int) -> int:
    for separator in (b"\n", b" "):
        found = buffer.rfind(separator, limit // 2, limit)
        if found >= 0:
            return found + 1
    cut = limit
    while cut > limit - 4 and buffer[cut] & 0xC0 == 0x80:  # not inside a UTF-8 sequence
        cut -= 1
    return cut
