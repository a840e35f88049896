"""The report of a check: Markdown with one section per part, and JSON with the same figures.

In: what is known about the machine, and the results of the parts. Out: two files, each replaced as one, and the text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.figures import Row
from benchmarks.gpu_check.runner import PartResult
from benchmarks.measure import markdown_table
from data_prep.durable_files import replace_file

TINY_NOTE = "tiny, CPU: no figure"


@dataclass(frozen=True)
class Report:
    """Where the report goes, and its first lines."""

    markdown: Path
    json: Path
    about: dict[str, str]
    is_tiny: bool

    def write(self, results: Sequence[PartResult]) -> None:
        """Replace both files."""
        replace_file(self.markdown, self.text(results))
        parts = {
            result.part.name: {
                "title": result.part.title,
                "state": result.state,
                "reason": result.reason,
                "seconds": round(result.seconds, 1),
                "rows": result.figures,
            }
            for result in results
        }
        note = {"note": TINY_NOTE} if self.is_tiny else {}
        replace_file(self.json, json.dumps({**note, **self.about, "parts": parts}, indent=1) + "\n")

    def text(self, results: Sequence[PartResult]) -> str:
        """The Markdown."""
        lines = [f"# What one GPU measured: {self.about['device']}", ""]
        if self.is_tiny:
            lines += [f"**{TINY_NOTE}.** The check ran on small shapes to show that it runs.", ""]
        lines += [*(f"- {key}: {value}" for key, value in self.about.items()), ""]
        lines += [
            "Times are medians of one session. Compare ratios; `null` in the JSON is a figure that a CPU does not have.",
            "",
        ]
        states = [[r.part.name, r.state, f"{r.seconds:.0f}", r.reason or ""] for r in results]
        lines += [markdown_table(["part", "state", "seconds", "reason"], states), ""]
        for result in results:
            lines += [f"## {result.part.title}", ""]
            if not result.is_good:
                lines += [f"**{result.state}**: {result.reason}", ""]
            for table, rows in _tables(result).items():
                lines += [f"{table}:", "", _table(rows), ""]
        return "\n".join(lines)


def _tables(result: PartResult) -> dict[str, list[Row]]:
    tables: dict[str, list[Row]] = {}
    for line in result.figures:
        tables.setdefault(line["table"], []).append(line["row"])
    return tables


def _table(rows: list[Row]) -> str:
    """Columns in the order in which they first appear; those without any value are left out."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if any(row.get(column) is not None for row in rows)]
    return markdown_table(columns, [[_cell(row.get(column)) for column in columns] for row in rows])


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and abs(value) >= 1000:
        return round(value)
    return value if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
