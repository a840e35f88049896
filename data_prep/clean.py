"""What may be done to text before it is encoded. By default nothing: a line stays the line it was.

`split_documents` finds lines and documents of a block, `clean_lines` applies the options; everything left out is counted
under a name that ends up in the manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class CleanOptions:
    """Part of what makes the bytes of the shards; recorded in the manifest and never mixed."""

    broken_text: str = "replace"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def split_documents(text: bytes, options: CleanOptions) -> tuple[list[bytes], np.ndarray]:
    """The non-blank lines of a block, and for each the number of its document."""
    lines = [line.strip() for line in text.split(b"\n")]
    is_text = np.fromiter(map(len, lines), np.int64, len(lines)) > 0
    document = np.cumsum(~is_text)
    return [line for line in lines if line], document[is_text]


def clean_lines(
    lines: list[bytes], document: np.ndarray, options: CleanOptions
) -> tuple[list[bytes], np.ndarray, dict[str, int]]:
    return lines, document, {}
