"""Packed files (.xz, .gz, .bz2, .zst): how they are recognised, and their content.

In: a raw file. Out: the bytes of its content; an error if any byte of the file was not used. A packed file may hold several
streams, as `cat a.xz b.xz` makes them. The libraries' own file objects stop without an error at some of what may follow the
first stream.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.names import quoted

PACKED_BYTES = 1 << 16  # read from the file at a time
UNPACKED_BYTES = 1 << 18  # most that is unpacked at a time
MAGIC = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh"}  # first bytes of a file
ZSTD_DICTIONARY_MESSAGE = "Dictionary mismatch"
ZSTD_WINDOW_MESSAGE = "too much memory"  # libzstd on a frame packed with --long above 27
PACKINGS = ("", ".xz", ".gz", ".zst", ".bz2")
UNPACK_COMMANDS = {".xz": "xz -dc", ".gz": "gzip -dc", ".zst": "zstd -dc --long=31", ".bz2": "bzip2 -dc"}
PACK_COMMANDS = {"": "", ".xz": " | xz -c", ".gz": " | gzip -c", ".zst": " | zstd -qc", ".bz2": " | bzip2 -c"}
UNPACKING_ERRORS = (EOFError, lzma.LZMAError, zlib.error)


def packing_of_name(name: str) -> str:
    """The packing that the end of a file's name states; "" for a plain file."""
    return next((packing for packing in PACKINGS[1:] if name.lower().endswith(packing)), "")


def packing_of_content(start: bytes) -> str:
    """The packing that the first bytes of a file show; "" for none."""
    return next((packing for packing, magic in MAGIC.items() if start.startswith(magic)), "")


def rewriting(path: Path, command: str, packing: str) -> str:
    """A shell command that replaces the content of the file `path`, packed by `packing`, by what `command` makes of it."""
    file, written = quoted(path), quoted(f"{path}.new")
    if not packing:
        return f"{command} < {file}{PACK_COMMANDS[packing]} > {written} && mv {written} {file}"
    send = f"{UNPACK_COMMANDS[packing]} < {file} | {command}{PACK_COMMANDS[packing]} > {written}"
    return f"(set -o pipefail; {send}) && mv {written} {file}"  # else a command that fails would replace the file


class PackedError(ValueError):
    """Bytes in a packed file that are no stream, where a stream was expected."""


class PackedWithDictionary(ValueError):
    """A zstd frame that needs a dictionary from another file."""


class WindowTooLarge(ValueError):
    """A zstd frame that only `zstd --long=31` unpacks."""


def unpacked(raw: io.RawIOBase, packing: str) -> Iterator[bytes]:
    """The content of `raw`, an open file at its start, in pieces that are never empty.

    Raises:
        UNPACKING_ERRORS, OSError or ValueError: the file is corrupt, incomplete, or needs options of zstd.
    """
    if packing == ".zst":
        return _zstd(raw)
    if packing == ".gz":
        return _streams(raw, _GzipMember, padding=1)
    if packing == ".xz":
        return _streams(raw, _XzStreams(), padding=4)
    if packing == ".bz2":
        return _streams(raw, bz2.BZ2Decompressor, padding=0)
    return iter(lambda: raw.read(UNPACKED_BYTES) or b"", b"")


def _streams(raw: io.RawIOBase, decoder_for: Callable[..., Any], padding: int) -> Iterator[bytes]:
    """The content of all streams of a file. A multiple of `padding` zero bytes may follow each stream (0: no zero bytes)."""
    data, number = raw.read(PACKED_BYTES) or b"", 1
    if not data:
        raise EOFError("the file is empty")
    while data:
        start = data
        try:
            decoder = decoder_for(data) if isinstance(decoder_for, _XzStreams) else decoder_for()
            while not decoder.eof:
                if decoder.needs_input and not data:
                    data = raw.read(PACKED_BYTES) or b""
                    if not data:
                        raise EOFError("the file ends inside a packed stream")
                piece = decoder.decompress(data, UNPACKED_BYTES)
                data = b""
                if piece:
                    yield piece
        except (lzma.LZMAError, zlib.error, OSError) as error:
            if number == 1 or getattr(error, "errno", None) is not None:
                raise
            raise PackedError(f"stream {number} of the file, {start[:4].hex(' ')} ..., is corrupt: {error}") from error
        data, number = _after_padding(raw, decoder.unused_data, padding), number + 1


def _after_padding(raw: io.RawIOBase, data: bytes, multiple: int) -> bytes:
    """The bytes that follow the zero bytes after a stream; empty at the end of the file."""
    num_zeros = 0
    while True:
        data = data or raw.read(PACKED_BYTES) or b""
        rest = data.lstrip(b"\0") if multiple else data
        num_zeros += len(data) - len(rest)
        if rest or not data:
            break
        data = b""
    if multiple and num_zeros % multiple:
        raise PackedError(f"{num_zeros} zero bytes follow a stream, which is not a multiple of {multiple}")
    return rest


class _XzStreams:
    """Makes the decoder for the next stream: .xz, or the older .lzma at the start of a file, which `xz -dc` unpacks too."""

    def __init__(self) -> None:
        self._format = lzma.FORMAT_AUTO

    def __call__(self, start: bytes) -> Any:
        if start.startswith(MAGIC[".xz"]):
            self._format = lzma.FORMAT_XZ
        return lzma.LZMADecompressor(self._format)


class _GzipMember:
    """`zlib` with the interface of the other two decompressors."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)  # 31: a gzip header and checksum around it
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        piece = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = not self._zlib.unconsumed_tail and len(piece) < max_length
        return piece


def _zstd(raw: io.RawIOBase) -> Iterator[bytes]:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    num_bytes = 0
    try:
        while piece := stream.read1(UNPACKED_BYTES):
            num_bytes += len(piece)
            yield piece
    except OSError as error:
        if ZSTD_WINDOW_MESSAGE in str(error):
            raise WindowTooLarge(str(error)) from error
        if ZSTD_DICTIONARY_MESSAGE in str(error):
            raise PackedWithDictionary(str(error)) from error
        raise
    if not num_bytes and not raw.tell():
        raise EOFError("the file is empty")
