"""The figures of one part: rows of named tables, each on disk as soon as it is measured.

In: rows. Out: a JSON Lines file, `{"table": ..., "row": {...}}` per line, which survives a crash of the part. A row that
could not be measured has a `note` with the reason; `failed` says that the reason is an error.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LONGEST_NOTE = 300  # characters of an error in the table; the log has all of it


class NotHere(Exception):
    """This machine, or this version of the pipeline, does not have what a figure needs. No failure."""


class Figures:
    """Appends rows to the file of one part."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, table: str, row: Row, failed: bool = False) -> None:
        line = {"table": table, "row": row, "failed": failed}
        with open(self._file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        print(f"{table}: {row}", flush=True)

    def attempt(self, table: str, name: Row, measure: Callable[[], Row]) -> Row | None:
        """Add the row `{**name, **measure()}` and return it. Where that raises, add the reason and return None."""
        try:
            row = {**name, **measure()}
        except Exception as error:
            note, failed = reason_of(error)
            if failed:
                traceback.print_exc()
            self.add(table, {**name, "note": note}, failed)
            return None
        self.add(table, row)
        return row


def reason_of(error: Exception) -> tuple[str, bool]:
    """Why a row is missing, in one line, and whether that is a failure."""
    text = " ".join(str(error).split())[:LONGEST_NOTE]
    if isinstance(error, NotHere) or type(error).__name__ == "NotUsableHereError":  # a backend's own word for it
        return text, False
    if isinstance(error, ImportError):
        return f"not measured: the package {error.name or text} is not installed", False
    if type(error).__name__ == "OutOfMemoryError":
        return "does not fit into this device's memory", False
    return f"{type(error).__name__}: {text}", True


def read_figures(file: Path) -> list[dict[str, Any]]:
    """The lines that a part has written; a line cut off by a kill is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
