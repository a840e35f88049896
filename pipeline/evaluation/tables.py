"""The rows of tables of figures, and tables as Markdown for the model card. For the console: runtime/text_tables.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column is aligned left, all others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def pooling_rows(results: Mapping[str, Any], per: str, figure: Callable[[Any], float] = float) -> list[list[str]]:
    """Rows of model, pooling, one figure for each entry of `result[per]`, and the mean.

    `figure`: what is shown of one pooling's value in one entry.
    """
    return [
        [name, pooling, *(f"{figure(entry[pooling]):.3f}" for entry in result[per].values()), f"{mean:.3f}"]
        for name, result in results.items()
        for pooling, mean in result["mean"].items()
    ]


def heldout_rows(points: Iterable[Mapping[str, Any]], digits: int) -> list[list[str]]:
    """Header and rows of the first and the last held-out loss of every language in the points of a run; empty without any."""
    evaluations = [point for point in points if "heldout/mean" in point]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    tags = [tag for tag in last if tag.startswith("heldout/") and tag in first]
    rows = [[tag.removeprefix("heldout/"), *(f"{point[tag]:.{digits}f}" for point in (first, last))] for tag in tags]
    return [["language", f"step {first['step']}", f"step {last['step']}"], *rows]


def sentence(text: str) -> str:
    """The text with a capital first letter and a full stop; empty text stays empty."""
    return f"{text[0].upper()}{text[1:]}." if text else ""
