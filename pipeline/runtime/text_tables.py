"""Tables of figures with aligned columns, for the console. In: header, rows and notes. Out: text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

MOST_COLUMNS = 10  # of figures in a table whose rows are models: about 100 characters


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
    return "\n".join([title, *(layout.format(*cells).rstrip() for cells in lines), *filter(None, notes)])


def figures_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[str], notes: Iterable[str]
) -> str:
    """A table of models and their figures, for example per language. Models become columns if the table is wide otherwise.

    Args:
        header: titles of the columns that name the model, for example "model" and "pooled from", then of the figures
        columns: format of every column after the first, as in `text_table`; the last one is that of every figure
    """
    num_figures = len(header) - len(columns)
    if num_figures <= max(MOST_COLUMNS, len(rows)):
        return text_table(title, header, rows, [*columns, *[columns[-1]] * (num_figures - 1)], notes)
    (names, *others), labels = zip(*rows, strict=True), header[1:]
    first_of_each = [names[0], *(name if name != before else "" for before, name in pairwise(names))]
    lines = [[label, *cells] for label, cells in zip(labels, others, strict=True)]
    widths = [max(map(len, column)) + 2 for column in zip(first_of_each, *others, strict=True)]
    return text_table(title, [header[0], *first_of_each], lines, [f">{width}" for width in widths], notes)
