"""Quality of the text of each language: broken lines, `<unk>`, tokens per byte, records without text, and unusual languages.

In: counts of a journal or a manifest. Out: figures and warnings. A language whose figures differ much from the others mostly
has text in another encoding or another language, or a script that the tokenizer does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.shards import ShardSet
from data_prep.where import MISMATCH, NOT_MET, NULL

ODD_BROKEN = 0.01  # share of lines
ODD_UNKNOWN, MUCH_UNKNOWN = 0.01, 0.1  # share of tokens: unusual if the others have far fewer, and always unusual
UNKNOWN_TIMES_OTHERS = 5.0
TOKENS_PER_BYTE_TIMES_OTHERS = 2.5  # XLM-R's vocabulary: 0.13 to 0.32 over CC-100's languages
ODD_SEPARATORS, ODD_TWICE = 0.05, 0.05  # per line
QUALITY_COLUMNS = "broken lines | <unk> | tokens per byte | odd"
_RECORD_KINDS = {
    "records_without_field": "without the field",
    "records_null": "null",
    "records_empty": "empty",
    "records_not_text": "not text",
}
_WHERE_KINDS = {NOT_MET: "do not meet it", NULL: "null or NaN", MISMATCH: "without a value to compare"}


@dataclass
class Quality:
    """Figures of one language. Shares are None if the shards were made before these were counted."""

    language: str
    broken_share: float
    unknown_share: float | None
    tokens_per_byte: float
    duplicate_share: float  # characters encoded twice, per line
    odd: str = ""


def qualities(shards: ShardSet) -> list[Quality]:
    """The figures of every language. `odd` names those that are unusual in comparison with the median of the others."""
    rows = [
        _quality(language, shards.manifest["languages"][language].get("counts", {}), shards.num_tokens(language),
                 shards.num_bytes(language))
        for language in shards.languages
    ]  # fmt: skip
    for row in rows:
        row.odd = "; ".join(_odd(row, [other for other in rows if other is not row]))
    return rows


def _quality(language: str, counts: Mapping[str, Any], tokens: int, text_bytes: int) -> Quality:
    lines = max(1, counts.get("lines_read", counts.get("lines", 0)), counts.get("lines_broken", 0))
    return Quality(
        language=language,
        broken_share=counts.get("lines_broken", 0) / lines,
        unknown_share=counts.get("unknown_tokens", 0) / max(1, tokens) if "lines_read" in counts else None,
        tokens_per_byte=tokens / max(1, text_bytes),
        duplicate_share=counts.get("double_encoded_characters", 0) / lines,
    )


def _odd(row: Quality, others: list[Quality]) -> list[str]:
    found = []
    if row.broken_share > ODD_BROKEN:
        found.append("broken lines")
    if row.unknown_share is not None and row.unknown_share > ODD_UNKNOWN:
        unknown = [other.unknown_share for other in others if other.unknown_share is not None]
        limit = min(MUCH_UNKNOWN, UNKNOWN_TIMES_OTHERS * float(np.median(unknown))) if unknown else ODD_UNKNOWN
        if row.unknown_share > limit:
            found.append("many <unk>")
    if len(others) > 1:  # with two languages, either could be the unusual one
        typical = float(np.median([other.tokens_per_byte for other in others]))
        if row.tokens_per_byte > TOKENS_PER_BYTE_TIMES_OTHERS * typical:
            found.append("many tokens per byte")
        if row.tokens_per_byte * TOKENS_PER_BYTE_TIMES_OTHERS < typical:
            found.append("few tokens per byte")
    if row.duplicate_share > ODD_TWICE:
        found.append("encoded twice")
    return found


def quality_cells(row: Quality) -> str:
    """Cells of a Markdown table for `QUALITY_COLUMNS`."""
    unknown = "" if row.unknown_share is None else f"{row.unknown_share:.2%}"
    return f"{row.broken_share:.2%} | {unknown} | {row.tokens_per_byte:.3f} | {row.odd}"


def quality_table(rows: list[Quality]) -> str:
    """A Markdown table with one row for each language."""
    lines = [f"| language | {QUALITY_COLUMNS} |", "|---|---:|---:|---:|---|"]
    lines += [f"| {row.language} | {quality_cells(row)} |" for row in rows]
    return "\n".join(lines)


def warnings_of(counts: Mapping[str, int]) -> list[str]:
    """Warnings about text of one language that was changed or left out, or that may have other line ends."""
    found = []
    if split := counts.get("documents_split"):
        found.append(f"{split} times a document was cut because it is over 2 MiB")
    if records := sum(counts.get(kind, 0) for kind in _RECORD_KINDS):
        kinds = ", ".join(f"{counts[kind]} {words}" for kind, words in _RECORD_KINDS.items() if counts.get(kind))
        found.append(f"{records} records have no text and were left out ({kinds})")
    if left_out := sum(counts.get(kind, 0) for kind in _WHERE_KINDS):
        kinds = ", ".join(f"{counts[kind]} {words}" for kind, words in _WHERE_KINDS.items() if counts.get(kind))
        found.append(f"{left_out} records were left out by --where ({kinds})")
    if files := counts.get("files_with_cr_line_ends"):
        found.append(f"{files} files have CR alone as line end; it was read as one")
    if files := counts.get("files_of_json"):
        found.append(
            f"{files} files named .txt hold JSON records, which were read as text; name them .jsonl if that is wrong"
        )
    if files := counts.get("files_empty"):
        found.append(f"{files} files are empty")
    for name, what in (
        ("carriage_returns_in_lines", "CR"),
        ("unicode_separators_in_lines", "U+2028, U+2029 or U+0085"),
    ):
        if counts.get(name, 0) > ODD_SEPARATORS * max(1, counts.get("lines_read", 0)):
            found.append(
                f"{counts[name]} times {what} is inside one of its {counts.get('lines_read', 0)} lines. If it is meant as "
                "line end, convert it to LF and prepare the language again"
            )
    if counts.get("double_encoded_characters", 0) > ODD_TWICE * max(1, counts.get("lines_read", 0)):
        found.append(
            f"{counts['double_encoded_characters']} characters look as if UTF-8 had been read in another encoding and encoded "
            "again (Ã¼ instead of ü)"
        )
    return found
