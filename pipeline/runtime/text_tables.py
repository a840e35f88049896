"""Tables of figures with aligned columns, for the console. In: header, rows and notes. Out: text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], columns: Sequence[str], notes: Iterable[str] = ()
) -> str:
    """A title, a table and notes below it.

    Args:
        header: titles of the columns; the first column has the names of the models and is as wide as the longest
        columns: format of every column after the first: `>9` right-aligned, `<12` left-aligned after two spaces
        notes: lines below the table; empty ones are left out
    """
    lines = [header, *rows]
    width = max(len(cells[0]) for cells in lines)
    formats = [f"  {{:{column}}}" if column.startswith("<") else f"{{:{column}}}" for column in columns]
    layout = "".join([f"{{:<{width}}}", *formats])
    return "\n".join([title, *(layout.format(*cells) for cells in lines), *filter(None, notes)])
