"""Records (JSON lines, Parquet, data sets) as CC-100's kind of text.

In: records. Out: one document per record: its lines without the blank ones, then a blank line. A record without usable text is
counted and left out (`--bad-records skip`), or is an error. If most records have none, `--text-field` is wrong, which is an
error too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from data_prep.lines import BYTE_ORDER_MARK, ends_lines_with_cr, text_lines
from data_prep.shards import DataError
from data_prep.where import MISMATCH, NO_CONDITION, NOT_MET, NULL, Where

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

    def __init__(self, text_field: str, policy: str, counts: Counter[str], where: Where = NO_CONDITION) -> None:
        self.text_field, self.counts, self._policy, self.where = text_field, counts, policy, where
        self._fields: Counter[str] = Counter()
        self.num_records = 0
        self._types: Counter[str] = Counter()

    def document(self, record: Any, where: str) -> bytes:
        """The document of one record; empty if the record has no text and is left out. `where` names it in messages."""
        self.num_records += 1
        lines, problem = b"", self._problem(record)
        if problem is None:
            lines = _lines_of(record[self.text_field])
            problem = None if lines else ("records_empty", "is empty")
        if problem is not None:
            self.counts[problem[0]] += 1
        if self.num_records == RECORDS_PROBED:
            self.check_field()
        # a record that --where leaves out need not have text
        if problem is not None and self._policy == "fail" and self.where.problem(record) not in (NOT_MET, NULL):
            raise BrokenRecord(
                f"field {self.text_field!r} of {where} {problem[1]}. Fix that record, or leave such records out with "
                "--bad-records skip"
            )
        return lines

    def _problem(self, record: Any) -> tuple[str, str] | None:
        """The kind of a record that is left out and words for it; None if the record has text and meets `--where`."""
        if not isinstance(record, dict) or self.text_field not in record:
            self._remember_fields(record)
            return MISSING, "is missing"
        value = record[self.text_field]
        if value is None:
            return "records_null", "is null"
        if not isinstance(value, str | bytes):
            self._types[type(value).__name__] += 1
            return NOT_TEXT, f"is {type(value).__name__}, not text"
        if (kind := self.where.problem(record)) is None:
            return None
        if kind == MISMATCH:
            self._remember_fields(record)
        return kind, f"is text, but the record has no value that --where '{self.where}' can compare"

    def check_field(self) -> None:
        """Raise `WrongField` if most of the records so far have no such field, no text in it, or nothing to compare."""
        if 2 * self.counts[MISMATCH] > self.num_records:
            raise WrongField(
                f"{self.counts[MISMATCH]} of its first {self.num_records} records have no value that --where '{self.where}' can "
                f"compare: the field is missing or of another type; {self._has_fields()}"
            )
        if 2 * self.counts[MISSING] > self.num_records:
            raise WrongField(
                f"{self.counts[MISSING]} of its first {self.num_records} records have no field {self.text_field!r}; "
                f"{self._has_fields()}. Name the field that holds the text with --text-field"
            )
        if 2 * self.counts[NOT_TEXT] > self.num_records:
            raise WrongField(
                f"field {self.text_field!r} is {self._types.most_common(1)[0][0]} in {self.counts[NOT_TEXT]} of its first "
                f"{self.num_records} records, not text. Name the field that holds the text with --text-field"
            )

    def _remember_fields(self, record: Any) -> None:
        if isinstance(record, dict) and len(self._fields) < 1000:
            self._fields.update(record.keys())

    def _has_fields(self) -> str:
        fields = [name for name, _ in self._fields.most_common(MAX_FIELDS_NAMED)]
        return f"they have {', '.join(fields)}" if fields else "they are not objects with fields"


def _bytes_of(text: str) -> bytes:
    """The text in UTF-8. Bytes of a file that are not UTF-8 (half of a surrogate pair each, in `text`) are as in the file."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # another half of a pair, by an escape such as \ud83d
        return text.encode("utf-8", "surrogatepass")


def _lines_of(text: str | bytes) -> bytes:
    raw = _bytes_of(text) if isinstance(text, str) else text
    if ends_lines_with_cr(raw, is_all=True):
        raw = raw.replace(b"\r", b"\n")
    lines = raw.split(b"\n")
    kept = [line for line, stripped in zip(lines, text_lines(raw), strict=True) if stripped]
    return b"\n".join(kept) + b"\n\n" if kept else b""


def joined(documents: Iterable[bytes], records: Records) -> Iterator[bytes]:
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

    return joined(documents(), records)


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


def check_safe_reader(specification: str, builder: Any) -> None:
    """Reject a script of the dataset itself, and readers of the library that unpickle (tar archives with tensors)."""
    *above, reader = type(builder).__module__.split(".")
    check_reader(
        specification, reader if above[:2] == ["datasets", "packaged_modules"] else f"{'.'.join(above)}.{reader}"
    )


def check_reader(specification: str, reader: str) -> None:
    """Raise `DataError` if a reader of the library may run code or unpickle."""
    if reader not in LIBRARY_READERS:
        raise DataError(
            f"Dataset {specification!r} is read by {reader!r} of the datasets library; only {', '.join(LIBRARY_READERS)} are accepted, "
            "because they run no code and unpickle nothing. Save it as one of these."
        )
