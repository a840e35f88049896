"""Cleaning text before it is encoded. By default a line is not changed.

In: the bytes of a block. Out: lines, the document of each line, and counts of what was left out or changed, which the manifest
records. This runs in the worker processes. Dropping repetitions needs the text in order and runs before them (`dedup.py`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_prep.blocks import MAX_DOCUMENT_BYTES
from data_prep.lines import text_lines
from data_prep.scripts import shares_in_script
from data_prep.shards import DataError

_CONTROL = bytes(set(range(32)) - set(b"\t\n\r")) + b"\x7f"
LEAST_SCRIPT_SHARE = 0.5
LEAST_CHARS_OF_CUT = MAX_DOCUMENT_BYTES // 4  # in UTF-8 a character has at most four bytes


@dataclass(frozen=True)
class CleanOptions:
    """Options that determine the bytes of the shards: the manifest records them, and one output holds one set of them."""

    broken_text: str = "replace"  # invalid UTF-8: replace (by U+FFFD) | skip (the line) | fail
    control_characters: str = "keep"  # keep | remove
    script_check: bool = False  # leave out lines whose letters are mostly in another script than the language's
    min_document_chars: int = 0  # shorter documents are left out
    max_document_chars: int = 0  # longer documents are left out; 0: no limit
    dedup: str = "none"  # none | documents | lines: leave out exact repetitions within a language
    dedup_memory_mb: int = 256  # per language; more memory remembers further back


def split_documents(text: bytes) -> tuple[list[bytes], np.ndarray]:
    """The non-blank lines of a block without surrounding white space, and the document number of each: int64 [lines]."""
    lines = text_lines(text)
    is_text = np.fromiter(map(len, lines), np.int64, len(lines)) > 0
    document = np.cumsum(~is_text)
    return [line for line in lines if line], document[is_text]


def clean(
    lines: list[bytes], document: np.ndarray, language: str, options: CleanOptions, is_cut: bool = False
) -> tuple[list[bytes], np.ndarray, Counter[str]]:
    """The lines that are kept, their document numbers, and counts of what was left out or changed.

    `is_cut`: document 0 is a part of a document that is too long for one block.
    """
    counts: Counter[str] = Counter()
    lines, keep = _replace_broken(lines, options.broken_text, counts)
    if options.control_characters == "remove":
        cleaned = [line.translate(None, _CONTROL).strip() for line in lines]
        counts["lines_with_control_characters"] += sum(old != new for old, new in zip(lines, cleaned, strict=True))
        lines = cleaned
        keep &= np.fromiter(map(bool, lines), bool, len(lines))
    if options.script_check and lines:
        fitting = shares_in_script(lines, language) >= LEAST_SCRIPT_SHARE
        counts["lines_in_other_script"] += int((keep & ~fitting).sum())
        keep &= fitting
    if options.min_document_chars or options.max_document_chars:
        keep &= _fitting_documents(lines, document, keep, options, counts, is_cut)
    if not keep.all():
        lines = [line for line, kept in zip(lines, keep, strict=True) if kept]
        document = document[keep]
    return lines, document, counts


def _replace_broken(lines: list[bytes], policy: str, counts: Counter[str]) -> tuple[list[bytes], np.ndarray]:
    """The lines with U+FFFD for what is not UTF-8, and whether each line is kept: bool [lines]."""
    keep = np.ones(len(lines), bool)
    try:
        b"\n".join(lines).decode("utf-8")
        return lines, keep
    except UnicodeDecodeError:
        fixed = [line.decode("utf-8", "replace").encode() for line in lines]
    broken = [number for number, (old, new) in enumerate(zip(lines, fixed, strict=True)) if old != new]
    if policy == "fail":
        raise DataError(
            f"{len(broken)} lines of a block are not UTF-8, the first is {fixed[broken[0]].decode()[:80]!r}. "
            "Fix the file, or prepare with --broken-text replace or skip."
        )
    counts["lines_broken"] += len(broken)
    if policy == "skip":
        keep[broken] = False
    return fixed, keep


def _fitting_documents(
    lines: list[bytes],
    document: np.ndarray,
    keep: np.ndarray,
    options: CleanOptions,
    counts: Counter[str],
    is_cut: bool,
) -> np.ndarray:
    """Whether the document of each line is neither too short nor too long: bool [lines].

    All parts of a cut document are treated alike: it is longer than `MAX_DOCUMENT_BYTES`, however short its last part is.
    """
    chars = np.fromiter((len(line.decode("utf-8", "replace")) for line in lines), np.int64, len(lines))
    per_document = np.bincount(document, weights=chars * keep)
    if is_cut and len(per_document) and per_document[0]:
        per_document[0] = max(per_document[0], LEAST_CHARS_OF_CUT)
    short = per_document < options.min_document_chars
    long = per_document > (options.max_document_chars or np.inf)
    has_text = np.bincount(document, weights=keep) > 0
    counts["documents_too_short"] += int((short & has_text).sum())
    counts["documents_too_long"] += int((long & has_text).sum())
    return ~(short | long)[document]
