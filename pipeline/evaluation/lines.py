"""The lines of a text file, or an error that names the line.

In: a path. Out: the number and the text of every line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError


def text_lines(path: Path, hint: str = "") -> Iterator[tuple[int, str]]:
    """Yield (number, text) of every line, without line end and byte order mark.

    `hint`: how to convert a file that is not UTF-8

    Raises:
        UserError: a line is not UTF-8, or has a carriage return within it
    """
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 (byte {error.start} of the line). Convert the file first{hint}."
                ) from None
            if "\r" in line:
                raise UserError(
                    f"{where}: a carriage return within the line. If lines end in one (old Macintosh files), convert the file: "
                    f"tr '\\r' '\\n' < {path.name}"
                )
            yield number, line
