"""The text column of a Parquet file, and parts of the file that can be read without what is before them.

In: a path or an open file. Out: the documents in pieces. A part is a run of row groups with at least `PART_BYTES` of text. Where
parts begin follows from the file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.records import RECORDS_PER_CHUNK, Records, WrongField, joined
from data_prep.where import Condition

PART_BYTES = 1 << 25  # of the text column, uncompressed: read again by a run that resumes
FIX = "Name the column that holds the text with --text-field"


@dataclass(frozen=True)
class Part:
    """Row groups `first_group` to `end_group` - 1, which begin with row `first_row`."""

    first_group: int
    end_group: int
    first_row: int


class ParquetText:
    """The documents of one Parquet file.

    Raises:
        WrongField: there is no such column of text, or a column of `--where` is missing or of another type.
        EOFError: the file is not a complete Parquet file.
    """

    def __init__(self, file: Any, records: Records) -> None:
        import pyarrow
        import pyarrow.parquet

        self._unreadable = (pyarrow.ArrowException, OSError)
        self._records = records
        try:
            self._file = pyarrow.parquet.ParquetFile(file)
        except self._unreadable as error:
            raise _incomplete(error) from error
        _check_columns(self._file.schema_arrow, records)

    def parts(self) -> list[Part]:
        """All row groups in parts of at least `PART_BYTES` of text, the last of any size."""
        metadata = self._file.metadata
        parts, first_group, first_row, num_rows, size = [], 0, 0, 0, 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = (group.column(index) for index in range(group.num_columns))
            size += sum(
                one.total_uncompressed_size for one in columns if one.path_in_schema == self._records.text_field
            )
            num_rows += group.num_rows
            if size >= PART_BYTES or number == metadata.num_row_groups - 1:
                parts.append(Part(first_group, number + 1, first_row))
                first_group, first_row, size = number + 1, num_rows, 0
        return parts

    def chunks(self, part: Part | None, on_progress: Callable[[float], None]) -> Iterator[bytes]:
        """The documents of one part, or of the file. `on_progress` is called with the share of the file's rows read so far."""
        part = part or Part(0, self._file.metadata.num_row_groups, 0)
        self._records.num_records = part.first_row
        try:
            yield from joined(self._documents(part, on_progress), self._records)
        except self._unreadable as error:
            raise _incomplete(error) from error

    def _documents(self, part: Part, on_progress: Callable[[float], None]) -> Iterator[bytes]:
        records, number = self._records, part.first_row
        columns = list(dict.fromkeys([records.text_field, *(one.column for one in records.where.conditions)]))
        for group in range(part.first_group, part.end_group):  # one at a time: only what is read is fetched
            for batch in self._file.iter_batches(RECORDS_PER_CHUNK, row_groups=[group], columns=columns):
                on_progress((number + len(batch)) / self._file.metadata.num_rows)  # before text is passed on
                for values in zip(*(_values(batch.column(name)) for name in columns), strict=True):
                    number += 1
                    yield records.document(dict(zip(columns, values, strict=True)), f"row {number}")


def _incomplete(error: BaseException) -> EOFError:
    return EOFError(f"not a complete Parquet file: {error}")


def _check_columns(schema: Any, records: Records) -> None:
    columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
    if records.text_field not in schema.names:
        raise WrongField(f"there is no column {records.text_field!r}; its columns are {', '.join(schema.names)}. {FIX}")
    for name in (records.text_field, *(condition.column for condition in records.where.conditions)):
        if schema.names.count(name) > 1:
            raise WrongField(
                f"there are {schema.names.count(name)} columns {name!r}; its columns are {columns}. Rename them"
            )
    kind = schema.field(records.text_field).type
    if not _holds_text(kind):
        raise WrongField(f"column {records.text_field!r} is of type {kind}, not text; its columns are {columns}. {FIX}")
    for condition in records.where.conditions:
        if condition.column not in schema.names:
            raise WrongField(
                f"--where '{condition}': there is no column {condition.column!r}; its columns are {columns}"
            )
        kind = schema.field(condition.column).type
        if not _compares(condition, kind):
            raise WrongField(
                f"--where '{condition}': column {condition.column!r} is of type {kind}, not {condition.kind}; its columns are "
                f"{columns}"
            )


def _compares(condition: Condition, kind: Any) -> bool:
    from pyarrow import types

    if types.is_null(kind):
        return True
    if condition.kind == "text":
        return _holds_text(kind)
    if condition.kind == "true/false":
        return types.is_boolean(kind)
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in (*is_text, types.is_binary_view, types.is_null))


def _values(column: Any) -> list[Any]:
    """The column as numbers or bytes. A string column may hold bytes that are not UTF-8; they are handled like those of a file.

    A number of less than 64 bits is its shortest decimal, as JSON writes it: 0.8 and not 0.800000011920929.
    """
    import pyarrow

    narrow = {pyarrow.float16(): np.float16, pyarrow.float32(): np.float32}.get(column.type)
    if narrow is not None:
        return [None if one is None else float(str(narrow(one))) for one in column.to_pylist()]
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _holds_text(column.type) and not pyarrow.types.is_null(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()
