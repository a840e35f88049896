"""Reading shards: `ShardSet` maps a finished output directory of `python -m data_prep prepare`.

In: a shard directory. Out: rows of token ids. Names, counts and sizes are checked when the directory is opened, a shard's
header when the shard is first read, and hashes by `python -m data_prep verify`. The shards of a language form one token
stream. Row r is `<s>`, the `seq_len - 2` stream tokens from r * (seq_len - 2) on, and `</s>`.
"""

from __future__ import annotations

import json
import mmap
import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.command_line import module_command
from data_prep.json_files import read_json_object
from data_prep.row_documents import RowDocuments
from data_prep.shard_layout import FORMAT_NAME, FORMAT_VERSION, HEADER_BYTES, TOKEN_DTYPE, Identity, header, sections
from data_prep.unfinished import why_no_manifest
from data_prep.unreadable import DataError as DataError
from data_prep.unreadable import Explained as Explained
from data_prep.unreadable import UnreadableError as UnreadableError
from data_prep.unreadable import read_again as read_again
from data_prep.unreadable import unreadable

BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
MANIFEST_NAME, RUN_NAME = "manifest.json", "prepare.json"
LANGUAGE_PATTERN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62}[A-Za-z0-9])?")
_SHARD_FILE = re.compile(r"(?P<language>[^/]+)/(?P<number>[0-9]{5})\.tok")
_RowTable = tuple[list[int], list[int], list[np.ndarray]]  # for each shard: first row, end row, rows as a 2-D view


class Shard:
    """One shard file as the manifest describes it. The file is memory-mapped when it is first read."""

    def __init__(self, root: Path, language: str, number: int, record: dict[str, Any], identity: Identity) -> None:
        self.path = root / record["file"]
        self.language, self.number, self.identity = language, number, identity
        self.num_tokens: int = record["tokens"]
        self.num_documents: int = record["documents"]
        self.num_bytes: int = record["bytes"]
        self.xxh3_128: str = record["xxh3_128"]

    def size_problem(self) -> str | None:
        """What is wrong with the size of the file; None if it is right."""
        try:
            found = read_again(self.path, self.path.stat).st_size
        except OSError as error:
            return f"Shard {self.path} cannot be read: {error.strerror}. {self._fix()}."
        if found != self.num_bytes:
            return (
                f"Shard {self.path} holds {found} bytes, its manifest says {self.num_bytes}: it was truncated or overwritten. "
                f"{self._fix()}."
            )
        return None

    def _fix(self) -> str:
        return f"Copy a valid file in its place, or prepare {self.language} again with --redo {self.language}"

    def expected_header(self) -> bytes:
        """The header that follows from the manifest: `HEADER_BYTES` bytes."""
        return header(self.identity, self.language, self.number, self.num_tokens, self.num_documents)

    @cached_property
    def _mapped(self) -> mmap.mmap:
        try:
            mapped = read_again(self.path, self._map)
        except UnreadableError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(
                f"Cannot map shard {self.path}: {error}. Many shards need `ulimit -n` above 1024."
            ) from error
        if mapped[:HEADER_BYTES] != self.expected_header():
            raise DataError(
                f"The header of shard {self.path} is not the one its manifest describes: the file is corrupt or was "
                f"swapped. To find the problem: `{module_command('data_prep', 'verify', self.path.parent.parent)}`"
            )
        return mapped

    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def check_not_truncated(self) -> None:
        """Raise if the file was truncated after it was mapped: reading beyond its end would kill the process (SIGBUS).

        Costs one fstat.
        """
        try:
            found = self._mapped.size()
        except OSError as error:
            raise UnreadableError(unreadable(self.path, error)) from error
        if found != self.num_bytes:
            raise DataError(
                f"Shard {self.path} has changed while it was read: {found} bytes now, {self.num_bytes} by its manifest. "
                f"{self._fix()}, while nothing reads it; then start the same command again."
            )

    @cached_property
    def tokens(self) -> np.ndarray:
        """The token ids: uint32 [num_tokens], read-only, backed by the file."""
        return np.frombuffer(self._mapped, TOKEN_DTYPE, self.num_tokens, HEADER_BYTES)

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """The index in `tokens` at which each document starts, and the end of the last: uint64 [num_documents + 1]."""
        where = sections(self.num_tokens, self.num_documents)
        return np.frombuffer(self._mapped, "<u8", self.num_documents + 1, where.documents)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an output directory, with format version, hash, names and counts checked.

    Raises:
        DataError: there is no manifest, or it is not valid.
        UnreadableError: it exists and cannot be read.
    """
    file = path / MANIFEST_NAME
    try:
        manifest = read_json_object(file)
        if manifest["format"] != FORMAT_NAME or manifest["version"] != FORMAT_VERSION:
            raise DataError(
                f"{file} is of format {str(manifest['format'])[:40]!r} version {str(manifest['version'])[:40]}; this program reads "
                f"{FORMAT_NAME!r} version {FORMAT_VERSION}. Prepare the shards again."
            )
        if manifest["manifest_xxh3_128"] != manifest_digest(manifest):
            raise DataError(
                f"{file} is corrupt or was edited: its hash does not match its content. To write it again from the journals: "
                f"`{module_command('data_prep', 'merge', path)}`"
            )
        identity_of(manifest)
        check_manifest(path, manifest)
    except OSError:  # no such file, or a directory in its place
        raise DataError(why_no_manifest(path, MANIFEST_NAME, RUN_NAME)) from None
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is corrupt ({type(error).__name__}: {error}). Prepare the shards again.") from error
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """XXH3-128 of the manifest without its `manifest_xxh3_128`, as JSON with sorted keys and no spaces."""
    content = {key: value for key, value in manifest.items() if key != "manifest_xxh3_128"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def identity_of(manifest: dict[str, Any]) -> Identity:
    """The tokenizer and options that every shard of a manifest must have been made with."""
    tokenizer, options = manifest["tokenizer"], manifest["options_xxh3_128"]
    if len(bytes.fromhex(tokenizer["sha256"])) != 32 or len(bytes.fromhex(options)) != 16:
        raise KeyError("hash of the wrong length")
    if not 0 < int(tokenizer["vocab_size"]) < 2**32:
        raise KeyError("impossible vocabulary")
    return Identity(tokenizer["sha256"], tokenizer["vocab_size"], options)


def row_ends(manifest: dict[str, Any]) -> tuple[int, int]:
    """Ids of the first and the last token of a row: XLM-R's unless the manifest names others."""
    tokenizer = manifest["tokenizer"]
    ends = tokenizer.get("bos", BOS_ID), tokenizer.get("eos", EOS_ID)
    if not all(type(number) is int and 0 <= number < tokenizer["vocab_size"] for number in ends):
        raise DataError(
            f"The manifest's row ends {str(ends)[:80]} are not ids of its vocabulary. Prepare the shards again."
        )
    return ends


def check_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Check that every shard is named `root/LANG/NNNNN.tok`, is inside `root`, and has counts that fit its size."""
    file = root / MANIFEST_NAME
    for language, entry in manifest["languages"].items():
        if type(entry["text_bytes"]) is not int:
            raise KeyError(f"text_bytes of {language}")
        if not LANGUAGE_PATTERN.fullmatch(language):
            raise DataError(f"{file} names a language {language[:80]!r}: not a plain name. Do not use this manifest.")
        for number, record in enumerate(entry["shards"]):
            name = record["file"]
            match = _SHARD_FILE.fullmatch(name)
            if match is None or match["language"] != language or int(match["number"]) != number:
                raise DataError(
                    f"{file} names a shard {name[:80]!r}; expected {language}/{number:05d}.tok. Do not use it."
                )
            if not (root / name).resolve().is_relative_to(root.resolve()):
                raise DataError(f"{root / name} leads out of {root} by a symbolic link. Copy the shard in.")
            if type(record["xxh3_128"]) is not str:
                raise KeyError(f"xxh3_128 of {name}")
            counts = (record["tokens"], record["documents"], record["bytes"])
            if not all(type(count) is int and count >= 0 for count in counts):
                raise DataError(
                    f"{file} is corrupt: impossible counts {str(counts)[:80]} for {name}. Prepare the shards again."
                )
            if sections(record["tokens"], record["documents"]).end != record["bytes"]:
                raise DataError(f"{file} is corrupt: the size of {name} does not follow from its counts.")


class ShardSet:
    """All languages of one output directory. Opening it reads the manifest and checks the size of every file.

    Args:
        path: the directory.
        check_sizes: whether to raise where the size of a shard file is wrong.
    """

    def __init__(self, path: str | Path, check_sizes: bool = True) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        identity = identity_of(self.manifest)
        self.vocab_size, self.tokenizer_sha256 = identity.vocab_size, identity.tokenizer_sha256
        self.bos_id, self.eos_id = row_ends(self.manifest)
        self.languages: list[str] = sorted(self.manifest["languages"])
        self._shards = {
            language: [
                Shard(self.path, language, number, record, identity)
                for number, record in enumerate(self.manifest["languages"][language]["shards"])
            ]
            for language in self.languages
        }
        if check_sizes:
            for shard in self.all_shards():
                if problem := shard.size_problem():
                    raise DataError(problem)
        self._row_tables: dict[tuple[tuple[str, ...], int], list[_RowTable]] = {}
        self._row_documents: dict[tuple[str, ...], RowDocuments] = {}

    def all_shards(self) -> list[Shard]:
        """The shards of all languages, in order of language and number."""
        return [shard for language in self.languages for shard in self._shards[language]]

    def shards(self, language: str) -> list[Shard]:
        """The shards of one language, in order."""
        if language not in self._shards:
            raise DataError(f"No language {language!r} in {self.path}; it holds: {', '.join(self.languages)}.")
        return self._shards[language]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content: tokenizer and every shard. Paths and dates are not part of it."""
        content = {
            "version": FORMAT_VERSION,
            "tokenizer": self.tokenizer_sha256,
            "vocab_size": self.vocab_size,
            "shards": {language: [shard.xxh3_128 for shard in self._shards[language]] for language in self.languages},
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    def compare_ids(self, tokenizer: Path) -> tuple[str, list[str]]:
        """Check that AutoTokenizer of the directory `tokenizer` gives the ids of these shards.

        Returns:
            A sentence about what was compared, and warnings.

        Raises:
            DataError: the ids differ.
        """
        from data_prep.id_check import check_again  # not at the top: reading shards opens no tokenizer

        return check_again(self.manifest, tokenizer)

    def num_tokens(self, language: str) -> int:
        """Number of tokens in the stream of one language."""
        return sum(shard.num_tokens for shard in self.shards(language))

    def num_documents(self, language: str) -> int:
        """Number of documents of one language."""
        return sum(shard.num_documents for shard in self.shards(language))

    def num_bytes(self, language: str) -> int:
        """Bytes of the UTF-8 text that the shards of one language were made from."""
        self.shards(language)
        return self.manifest["languages"][language]["text_bytes"]

    def num_rows(self, language: str, seq_len: int) -> int:
        """Number of rows of `seq_len` tokens in one language. Tokens that do not fill a last row are not used."""
        return self.num_tokens(language) // _stream_tokens(seq_len)

    def rows(self, language: str, row_numbers: Any, seq_len: int) -> np.ndarray:
        """Packed rows `<s> ... </s>` of one language.

        Args:
            language: a name of `languages`.
            row_numbers: n integers from 0 to `num_rows` - 1, in any order.
            seq_len: tokens in a row, `<s>` and `</s>` included.

        Returns:
            int64 [n, seq_len].
        """
        numbers = self._checked_rows(language, row_numbers, seq_len)
        return self.gather([language], np.zeros(len(numbers), np.int64), numbers, seq_len)

    def _checked_rows(self, language: str, row_numbers: Any, seq_len: int) -> np.ndarray:
        """The numbers as int64 [n]. Raises `DataError` if there is no such row."""
        numbers = np.asarray(row_numbers, dtype=np.int64).reshape(-1)
        num_rows = self.num_rows(language, seq_len)
        outside = numbers[(numbers < 0) | (numbers >= num_rows)]
        if len(outside):
            raise DataError(
                f"Row {outside[0]} of {language} does not exist; {self.path} has {num_rows} rows of it at sequence length "
                f"{seq_len}."
            )
        return numbers

    def gather(self, languages: list[str], language_index: np.ndarray, rows: np.ndarray, seq_len: int) -> np.ndarray:
        """Row rows[i] of languages[language_index[i]] for every i from 0 to n - 1, as int64 [n, seq_len]."""
        key = (tuple(languages), seq_len)
        if key not in self._row_tables:
            self._row_tables[key] = [self._row_table(language, seq_len) for language in languages]
        tables = self._row_tables[key]
        out = np.empty((len(rows), seq_len), dtype=np.int64)
        out[:, 0], out[:, -1] = self.bos_id, self.eos_id
        inner, width, checked = out[:, 1:-1], _stream_tokens(seq_len), set()
        for position, (index, row) in enumerate(zip(language_index.tolist(), rows.tolist(), strict=True)):
            first_rows, end_rows, views = tables[index]
            shard = bisect_right(first_rows, row) - 1
            if (index, shard) not in checked:
                checked.add((index, shard))
                self._shards[languages[index]][shard].check_not_truncated()
            if row < end_rows[shard]:
                inner[position] = views[shard][row - first_rows[shard]]
            else:
                inner[position] = self.stream(languages[index], row * width, (row + 1) * width)
        if len(rows) and int(out.max()) >= self.vocab_size:
            position = int(out.max(axis=1).argmax())
            raise DataError(
                f"Token id {int(out.max())} in row {rows[position]} of {languages[language_index[position]]} in "
                f"{self.path} is beyond the vocabulary of {self.vocab_size}: the shard is corrupt. "
                f"To find where: `{module_command('data_prep', 'verify', self.path)}`"
            )
        return out

    def _row_table(self, language: str, seq_len: int) -> _RowTable:
        """For each shard: its first complete row, the row after its last complete row, and these rows as a 2-D view."""
        width, start = _stream_tokens(seq_len), 0
        first_rows, end_rows, views = [], [], []
        for shard in self.shards(language):
            first = -(-start // width)
            end = max(first, (start + shard.num_tokens) // width)
            first_rows.append(first)
            end_rows.append(end)
            views.append(shard.tokens[first * width - start : end * width - start].reshape(-1, width))
            start += shard.num_tokens
        return first_rows, end_rows, views

    def segments(self, language: str, row_numbers: Any, seq_len: int) -> np.ndarray:
        """Lengths of the parts of documents in each row, for attention that must not cross documents.

        Returns:
            int64 [n, largest number of parts], padded with 0. Each row sums to `seq_len`: `<s>` belongs to the first part,
            `</s>` to the last.
        """
        numbers = self._checked_rows(language, row_numbers, seq_len)
        for shard in self.shards(language):
            shard.check_not_truncated()
        return self.gather_segments([language], np.zeros(len(numbers), np.int64), numbers, seq_len)

    def gather_segments(
        self, languages: list[str], language_index: np.ndarray, rows: np.ndarray, seq_len: int
    ) -> np.ndarray:
        """`segments` of the rows that `gather` has just returned for the same arguments, and whose shards it has checked."""
        key = tuple(languages)
        if key not in self._row_documents:
            self._row_documents[key] = RowDocuments([self.shards(language) for language in languages])
        return self._row_documents[key].lengths(language_index, rows, seq_len)

    def stream(self, language: str, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of a language's stream, across shards: uint32."""
        parts = self._shards_of_part(language, start, end)
        return np.concatenate(
            [np.empty(0, TOKEN_DTYPE), *(shard.tokens[max(0, start - at) : end - at] for shard, at in parts)]
        )

    def _shards_of_part(self, language: str, start: int, end: int) -> Iterator[tuple[Shard, int]]:
        """The shards with tokens of [start, end) of a language's stream, and the position of each one's first token."""
        position = 0
        for shard in self.shards(language):
            if position < end and position + shard.num_tokens > start:
                shard.check_not_truncated()
                yield shard, position
            position += shard.num_tokens


def _stream_tokens(seq_len: int) -> int:
    if seq_len < 3:
        raise DataError(f"A sequence length of {seq_len} holds no token between <s> and </s>; use at least 3.")
    return seq_len - 2
