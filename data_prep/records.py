"""Sources that hold records instead of lines (JSON lines, Parquet, Hugging Face datasets) as CC-100's kind of text.

One record is one document: its lines stay lines, blank lines inside it are left out, a blank line ends it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.shards import DataError

RECORDS_PER_CHUNK = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BrokenRecord(ValueError):
    """A record that cannot be read; the message says which and why."""


def document(text: Any, where: str) -> bytes:
    """One record's text as the lines of one document."""
    if not isinstance(text, str):
        raise BrokenRecord(f"{where} is no text but {type(text).__name__}")
    raw = text.encode("utf-8", "surrogatepass")
    lines = [line for line in raw.split(b"\n") if line.strip()]
    return b"\n".join(lines) + b"\n\n" if lines else b""


def _joined(documents: Iterable[bytes]) -> Iterator[bytes]:
    """A few hundred documents at a time; never an empty piece, which would mean the end."""
    held: list[bytes] = []
    for one in documents:
        held.append(one)
        if len(held) == RECORDS_PER_CHUNK:
            if chunk := b"".join(held):
                yield chunk
            held = []
    if chunk := b"".join(held):
        yield chunk


def from_json_lines(stream: io.BufferedIOBase, text_field: str) -> Iterator[bytes]:
    def documents() -> Iterator[bytes]:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                # bytes that are not UTF-8 go on as they are broken: what becomes of them is a cleaning option's to say
                record = json.loads(line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "surrogateescape"))
            except ValueError as error:
                raise BrokenRecord(f"line {number} is not JSON: {error}") from error
            if not isinstance(record, dict) or text_field not in record:
                raise BrokenRecord(f"line {number} has no field {text_field!r}")
            yield document(record[text_field], f"field {text_field!r} of line {number}")

    return _joined(documents())


def from_parquet(path: Path, text_field: str, on_progress: Any) -> Iterator[bytes]:
    """`on_progress(share)` is told how much of the file has been read."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise BrokenRecord(f"there is no column {text_field!r}; its columns are {names}")
        number = 0
        for batch in file.iter_batches(batch_size=RECORDS_PER_CHUNK, columns=[text_field]):
            texts = batch.column(0).to_pylist()
            number += len(texts)
            on_progress(number / max(1, file.metadata.num_rows))
            if chunk := b"".join(document(text, f"a value near row {number}") for text in texts):
                yield chunk
    except (pyarrow.ArrowException, OSError) as error:
        raise BrokenRecord(f"not a whole Parquet file: {error}") from error


def from_hub(specification: str, text_field: str) -> Iterator[bytes]:
    """`NAME_OR_DIRECTORY[:CONFIG[:SPLIT]]` through the `datasets` library, streaming."""
    import datasets

    name, config, split = [*specification.split(":"), "", ""][:3]
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            records = loaded[split or "train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            records = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"Dataset {specification!r} cannot be opened: {error}.") from error

    def documents() -> Iterator[bytes]:
        for number, record in enumerate(records, start=1):
            if text_field not in record:
                raise BrokenRecord(f"record {number} has no field {text_field!r}; it has {', '.join(record)}")
            yield document(record[text_field], f"field {text_field!r} of record {number}")

    return _joined(documents())
