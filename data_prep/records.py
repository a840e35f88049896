"""Records (JSON lines, Parquet, Hugging Face datasets) as CC-100's kind of text.

In: records. Out: one document per record: its lines without the blank ones, then a blank line. A record without usable text is
counted and left out (`--bad-records skip`), or is an error. If most records have none, `--text-field` is wrong, which is an
error too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.lines import BYTE_ORDER_MARK, ends_lines_with_cr, text_lines
from data_prep.names import one_line
from data_prep.shards import DataError

RECORDS_PER_CHUNK = 256
RECORDS_PROBED = 200  # fewer than a chunk: a wrong field is rejected before any text is passed on
MAX_FIELDS_NAMED = 12
LIBRARY_READERS = ("arrow", "csv", "json", "parquet", "text")  # of `datasets`: these run no script and unpickle nothing
MISSING, NOT_TEXT = "records_without_field", "records_not_text"
JSON_TO_LINES = "python -c 'import json, sys; [print(json.dumps(one)) for one in json.load(sys.stdin)]'"


class BrokenRecord(ValueError):
    """A record that cannot be read. The message names it and the reason."""


class WrongField(ValueError):
    """Most records have no text in the given field. The message names their fields."""


class Records:
    """Reads the text of the records of one source. `counts` gets the number of records without text, by kind."""

    def __init__(self, text_field: str, policy: str, counts: Counter[str]) -> None:
        self.text_field, self.counts, self._policy = text_field, counts, policy
        self._fields: Counter[str] = Counter()
        self._num_records = 0
        self._types: Counter[str] = Counter()

    def document(self, record: Any, where: str) -> bytes:
        """The document of one record; empty if the record has no text and is left out. `where` names it in messages."""
        self._num_records += 1
        lines, problem = b"", self._problem(record)
        if problem is None:
            lines = _lines_of(record[self.text_field])
            problem = None if lines else ("records_empty", "is empty")
        if problem is not None:
            self.counts[problem[0]] += 1
        if self._num_records == RECORDS_PROBED:
            self.check_field()
        if problem is not None and self._policy == "fail":
            raise BrokenRecord(
                f"field {self.text_field!r} of {where} {problem[1]}. Fix that record, or leave such records out with "
                "--bad-records skip"
            )
        return lines

    def _problem(self, record: Any) -> tuple[str, str] | None:
        """The kind of a record without usable text and words for it; None if the record has text."""
        if not isinstance(record, dict) or self.text_field not in record:
            if isinstance(record, dict) and len(self._fields) < 1000:
                self._fields.update(record.keys())
            return MISSING, "is missing"
        value = record[self.text_field]
        if value is None:
            return "records_null", "is null"
        if not isinstance(value, str | bytes):
            self._types[type(value).__name__] += 1
            return NOT_TEXT, f"is {type(value).__name__}, not text"
        return None

    def check_field(self) -> None:
        """Raise `WrongField` if most of the records so far have no such field, or no text in it."""
        if 2 * self.counts[MISSING] > self._num_records:
            fields = [name for name, _ in self._fields.most_common(MAX_FIELDS_NAMED)]
            has = f"they have {', '.join(fields)}" if fields else "they are not objects with fields"
            raise WrongField(
                f"{self.counts[MISSING]} of its first {self._num_records} records have no field {self.text_field!r}; {has}. "
                "Name the field that holds the text with --text-field"
            )
        if 2 * self.counts[NOT_TEXT] > self._num_records:
            raise WrongField(
                f"field {self.text_field!r} is {self._types.most_common(1)[0][0]} in {self.counts[NOT_TEXT]} of its first "
                f"{self._num_records} records, not text. Name the field that holds the text with --text-field"
            )


def _lines_of(text: str | bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if ends_lines_with_cr(raw, is_all=True):
        raw = raw.replace(b"\r", b"\n")
    lines = raw.split(b"\n")
    kept = [line for line, stripped in zip(lines, text_lines(raw), strict=True) if stripped]
    return b"\n".join(kept) + b"\n\n" if kept else b""


def _joined(documents: Iterable[bytes], records: Records) -> Iterator[bytes]:
    """The documents in pieces of some hundred, never empty: an empty piece would mean the end of the text.

    The field is checked before the last piece.
    """
    held: list[bytes] = []
    for one in documents:
        held.append(one)
        if len(held) == RECORDS_PER_CHUNK:
            if chunk := b"".join(held):
                yield chunk
            held = []
    records.check_field()
    if chunk := b"".join(held):
        yield chunk


def from_json_lines(chunks: Iterator[bytes], records: Records, to_lines: str) -> Iterator[bytes]:
    """The documents of a file of JSON lines, given in pieces. `to_lines` is the command that converts a JSON array."""

    def documents() -> Iterator[bytes]:
        for number, line in enumerate(_lines(chunks), start=1):
            stripped = line.removeprefix(BYTE_ORDER_MARK).strip()
            if stripped:
                yield records.document(_json_record(stripped, number, to_lines), f"line {number}")

    return _joined(documents(), records)


def _json_record(line: bytes, number: int, to_lines: str) -> Any:
    try:
        # bytes that are not UTF-8 are kept here: a cleaning option decides about them later
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except RecursionError as error:
        raise BrokenRecord(f"line {number} nests its values too deeply. Remove that line") from error
    except ValueError as error:
        if line in (b"{", b"[") or (number == 1 and line.startswith(b"[")):
            raise BrokenRecord(
                f"line {number} begins a JSON text of several lines; each line must hold one record. Convert it: {to_lines}"
            ) from error
        raise BrokenRecord(f"line {number} is not JSON: {error}. Correct or remove that line") from error
    if isinstance(record, list):
        raise BrokenRecord(f"line {number} is a JSON array; each line must hold one record. Convert it: {to_lines}")
    return record


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a file of JSON lines. A raw CR in it can only be a line end, as JSON escapes it in texts."""
    held: list[bytes] = []
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        held.append(head)
        for line in rest:
            yield from _at_carriage_returns(b"".join(held))
            held = [line]
    if last := b"".join(held):
        yield from _at_carriage_returns(last)


def _at_carriage_returns(line: bytes) -> list[bytes]:
    return line.removesuffix(b"\r").split(b"\r") if b"\r" in line else [line]


def from_parquet(path: Path, records: Records, on_progress: Any) -> Iterator[bytes]:
    """The documents of a Parquet file. `on_progress` is called with the share of the rows that have been read.

    Raises:
        WrongField: there is no such column of text.
        EOFError: the file is not a complete Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    text_field = records.text_field

    def documents() -> Iterator[bytes]:
        number = 0
        for batch in file.iter_batches(batch_size=RECORDS_PER_CHUNK, columns=[text_field]):
            for text in _parquet_texts(batch.column(0)):
                number += 1
                yield records.document({text_field: text}, f"row {number}")
            on_progress(number / max(1, file.metadata.num_rows))

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise WrongField(
                f"there is no column {text_field!r}; its columns are {names}. Name the column that holds the text with "
                "--text-field"
            )
        kind = file.schema_arrow.field(text_field).type
        if not _holds_text(kind):
            columns = ", ".join(f"{column.name} ({column.type})" for column in file.schema_arrow)
            raise WrongField(
                f"column {text_field!r} is of type {kind}, not text; its columns are {columns}. Name the "
                "column that holds the text with --text-field"
            )
        yield from _joined(documents(), records)
    except (pyarrow.ArrowException, OSError) as error:
        raise EOFError(f"not a complete Parquet file: {error}") from error


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in (*is_text, types.is_binary_view, types.is_null))


def _parquet_texts(column: Any) -> list[bytes | None]:
    """The column as bytes. A string column may hold bytes that are not UTF-8; they are handled like those of a text file."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_null(column.type):
        return [None] * len(column)
    return column.cast(pyarrow.large_binary()).to_pylist()


def check_safe_reader(specification: str, builder: Any) -> None:
    """Reject a script of the dataset itself, and readers of the library that unpickle (tar archives with tensors)."""
    *above, reader = type(builder).__module__.split(".")
    if above[:2] != ["datasets", "packaged_modules"] or reader not in LIBRARY_READERS:
        raise DataError(
            f"Dataset {specification!r} is read by {reader!r} of the datasets library; only {', '.join(LIBRARY_READERS)} are accepted, "
            "because they run no code and unpickle nothing. Save it as one of these."
        )


def from_hub(specification: str, records: Records) -> Iterator[bytes]:
    """The documents of `NAME_OR_DIRECTORY[:CONFIG[:SPLIT]]`, streamed by the `datasets` library."""
    import datasets

    name, config, split = [*specification.split(":"), "", ""][:3]
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            found = loaded[split or "train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            builder = datasets.load_dataset_builder(name, config or None)
            check_safe_reader(specification, builder)
            found = builder.as_streaming_dataset(split=split or "train")
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # RuntimeError: the dataset is a script
        if isinstance(error, DataError):
            raise
        raise DataError(f"Dataset {specification!r} cannot be opened: {error}.") from error

    def documents() -> Iterator[bytes]:
        number, rows = 0, iter(found)
        while True:
            try:
                record = next(rows, None)
            except Exception as error:  # whatever the readers of the library raise
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise BrokenRecord(f"record {number + 1} cannot be read ({reason})") from error
            if record is None:
                return
            number += 1
            yield records.document(record, f"record {number}")

    return _joined(documents(), records)
